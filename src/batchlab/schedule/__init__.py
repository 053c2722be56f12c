"""What the learning rate and the batch are along a run, counted in examples."""
