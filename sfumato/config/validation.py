"""When the images that are held out of training (`validation_split`) are measured, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.config.rules import Count, CountOrOff, Record


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Record):
    """The loss on images that are held out of training by validation_split, on the same noise each time."""

    validate_every_n_steps: CountOrOff = None
    """Measure the loss on held-out images every n optimizer steps, in place of each epoch; before the first and after
    the last step always."""
    validate_every_n_epochs: CountOrOff = None
    """Measure the loss on held-out images every n epochs; default: 1, unless validate_every_n_steps is set."""
    max_validation_steps: Count | None = None
    """Measure at most this many batches of held-out images, and as many trained ones; default: all."""
    save_best: bool = False
    """Keep the result of the lowest loss on held-out images, as `NAME-best`."""
