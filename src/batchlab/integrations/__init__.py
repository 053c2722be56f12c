"""The noise scale, and a batch that moves, in other people's loops: Hugging Face Trainer, Lightning, Accelerate."""
