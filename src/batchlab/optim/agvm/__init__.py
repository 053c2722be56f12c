"""AGVM: rates of modules set by the variance of their gradients."""
