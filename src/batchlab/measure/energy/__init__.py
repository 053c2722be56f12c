"""Joules and emissions of a run, and how to compare two settings by them."""
