"""Texts that are there more than once."""
