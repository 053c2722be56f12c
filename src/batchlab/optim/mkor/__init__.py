"""MKOR: Kronecker factors inverted by rank-1 updates."""
