"""Floor 2: pictures to batches; knows no family."""
