"""Architectures in torch: configuration, modules, and what of them becomes a graph."""
