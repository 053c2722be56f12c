"""What fine-tuning takes, from a few measured batches: the largest batch, its speed, and dollars."""
