"""Eigenvalues of the loss's Hessian, and the learning rates that they allow."""
