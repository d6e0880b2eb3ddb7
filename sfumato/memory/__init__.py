"""Floor 2: what keeps a model within memory, applied to it from outside."""
