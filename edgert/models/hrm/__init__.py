"""HRM: two stacks at two speeds that refine a grid, in the original and the bidirectional form."""
