"""A moving average of trained weights, to save and to sample with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.optim.host import Shelf


class EMA:
    """`average = decay * average + (1 - decay) * weight` after every step, in fp32.

    The decay warms up, min(decay, (n + 1) / (n + 10)) at update n, so that the start values are soon forgotten;
    the first update takes the weights as they are. Same as diffusers' `EMAModel`.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float, shelf: Shelf | None = None) -> None:
        """`weights`: by names that stay the same from run to run. `shelf`: where averages wait on the host."""
        if not 0 <= decay < 1:
            raise UserError(f"ema_decay {decay}: expected 0 up to but not 1, such as 0.999")
        self.decay, self.updates = decay, 0
        self._share, self._left = 0.0, set[str]()
        self.shelf = shelf
        if shelf is None:
            self.average = {name: w.detach().float().clone() for name, w in weights.items()}
        else:
            for name, w in weights.items():
                shelf.put(name, [w.detach().float()])
            self.average = {name: shelf.homes(name)[0] for name in weights}
            shelf.settle()

    def anew(self, weights: Mapping[str, Tensor]) -> EMA:
        """One that starts from these weights."""
        return EMA(weights, self.decay, self.shelf)

    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the weights of a step. What is no longer trained keeps its average."""
        self.begin()
        self.finish(weights)

    def begin(self) -> None:
        """A step begins, anew if it was not finished. Its weights come with `take`, in any number of parts."""
        self._share = 1 - min(self.decay, (self.updates + 1) / (self.updates + 10)) if self.updates else 1.0
        self._left = set(self.average)
        if self.shelf:
            self.shelf.begin()

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Take in weights of the step, those that have not been yet."""
        now = {name: w.detach().float() for name, w in weights.items() if name in self._left}
        self._left -= now.keys()
        if self.shelf:
            for name, w in now.items():
                (average,) = self.shelf.take(name)
                self.shelf.put(name, [average.lerp_(w.to(average.device), self._share)])
        elif now:
            torch._foreach_lerp_([self.average[name] for name in now], list(now.values()), self._share)

    def finish(self, weights: Mapping[str, Tensor]) -> None:
        """The step is done; `weights`: all, of which those are taken in that have not been."""
        self.take(weights)
        self.updates += 1

    @contextmanager
    def applied(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Within, the weights hold their average; afterwards their own values, bit for bit."""
        self._settle()
        with torch.no_grad():
            own = {name: self._copy(w) for name, w in weights.items()}
            for name, w in weights.items():
                w.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, w in weights.items():
                    w.copy_(own[name])

    def state(self) -> dict[str, Tensor]:
        """Averages by name, and the number of updates."""
        self._settle()
        return {**self.average, "updates": torch.tensor(self.updates)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The reverse of `state`. Errors: `ValueError` for other names or shapes."""
        if odd := sorted(state.keys() ^ {*self.average, "updates"}):
            raise ValueError(f"{len(odd)} averages are in one of them only, such as {odd[0]}")
        self._settle()
        self.updates = int(state["updates"])
        for name, own in self.average.items():
            if own.shape != state[name].shape:
                raise ValueError(
                    f"the average of {name} has shape {tuple(state[name].shape)} there and {tuple(own.shape)} here"
                )
            own.copy_(state[name])

    def _copy(self, weight: Tensor) -> Tensor:
        """Where the averages are, as the device may have no room for it."""
        return weight.detach().to("cpu" if self.shelf else weight.device, copy=True)

    def _settle(self) -> None:
        """Averages can be read and written."""
        if self.shelf:
            self.shelf.settle()
