"""Floor 2: optimizers, parameter groups, schedules, averages."""
