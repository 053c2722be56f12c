"""What a set of runs says of batch size: steps to a target, and the laws fitted to them."""
