"""Batch sizes along a run: settled beforehand, or by what was measured."""
