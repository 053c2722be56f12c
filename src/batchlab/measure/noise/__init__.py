"""What gradients say of batch size: the noise scale, live in any loop, and its relatives."""
