"""Floor 1: bytes and names of weight files."""
