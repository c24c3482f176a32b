"""Training: a recipe -> a run folder with checkpoints, metrics, a plot and held-out figures."""
