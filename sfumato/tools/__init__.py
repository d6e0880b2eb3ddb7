"""Floor 4: what is done to weight files outside training."""
