"""Curves that several rooms fit to points, each with the interval of what it says. They know no noun of training."""
