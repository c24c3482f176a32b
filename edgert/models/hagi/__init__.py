"""HAGI: dense, looped and Clifford-grade decoders (Models A, B, C, D)."""
