"""The time of a training step against its micro-batch, and where it goes."""
