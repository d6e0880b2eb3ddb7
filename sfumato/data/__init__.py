"""Floor 2: images to batches; knows no family."""
