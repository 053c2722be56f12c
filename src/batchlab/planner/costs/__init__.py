"""What a training run takes: seconds, dollars, joules, bytes, and loss for the money."""
