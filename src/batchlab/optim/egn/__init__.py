"""Exact Gauss-Newton through the kernel of the batch."""
