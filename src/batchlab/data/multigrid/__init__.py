"""Batches whose shape goes by a multigrid schedule."""
