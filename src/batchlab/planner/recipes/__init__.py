"""A training recipe, and what it becomes at another batch size."""
