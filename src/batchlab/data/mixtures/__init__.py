"""Batches from several sources or tasks."""
