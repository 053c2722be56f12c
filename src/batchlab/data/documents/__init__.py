"""Batches of documents for language models, without padding."""
