"""The largest micro-batch that fits, found by running it."""
