"""Floor 5: from prompts to images, the same while training and for `sfumato sample`."""
