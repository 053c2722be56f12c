"""A learned optimizer: a small network that writes the update."""
