"""Batch, frames and size moved together."""
