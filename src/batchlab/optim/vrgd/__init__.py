"""Variance-reduced gradients from the groups of a batch (VRGD)."""
