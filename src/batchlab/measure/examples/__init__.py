"""The squared gradient norm of each example from one backward pass, with no example's gradient held."""
