"""Batches of hard neighbours for contrastive training."""
