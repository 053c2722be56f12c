"""The loss around and between solutions, along chosen directions."""
