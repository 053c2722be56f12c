"""The noise scale inside other people's loops: Hugging Face Trainer, Lightning, Accelerate."""
