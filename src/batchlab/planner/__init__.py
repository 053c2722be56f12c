"""Choices made from facts and rules: which batch, on how many devices, evaluated and saved how often."""
