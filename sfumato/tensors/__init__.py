"""Floor 0: functions on tensors; imports torch alone."""
