"""An optimizer's step in parts: the weights of a part step as soon as their gradients are there, and these are freed at
once, so that the gradients of all weights are never on the device together.

Any optimizer that treats a weight by itself can do so: it is shown a part of its weights alone. Those that search one
rate for all weights get all gradients at once, from the host's memory, where each went as it came.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from sfumato.optim.host import Copies, HostGradients, HostState, nbytes

Part = Sequence[nn.Parameter]
Clipping = Literal["host", "two_passes", "delayed"]
_PART = 16 * 2**20
"""Bytes of weights that step together by default: an optimizer's call for a few numbers takes as long as for these."""
_NORM = "last_grad_norm"
"""Kept in the first parameter group, so that it is saved and resumed with the optimizer's own state."""


def parts(weights: Sequence[nn.Parameter], blocks: Sequence[nn.Module] = (), size: int = _PART) -> list[Part]:
    """Weights cut into parts of about `size` bytes, none with weights of two blocks."""
    block_of = {p: i for i, block in enumerate(blocks) for p in block.parameters()}
    out: list[list[nn.Parameter]] = []
    for p in sorted(weights, key=lambda p: block_of.get(p, -1)):
        fits = out and block_of.get(out[-1][0]) == block_of.get(p) and nbytes(out[-1]) < size
        if fits:
            out[-1].append(p)
        else:
            out.append([p])
    return list(out)


class FusedStep:
    """One step of an optimizer, with the passes that give its gradients.

    Norm clipping needs all gradients before the first step: `clipping` says what is done. "host": gradients wait in
    the host's memory. "two_passes": forward and backward are done twice, first for the norm alone. "delayed": the norm
    is that of the last step (of the first step: two passes).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        cut: Sequence[Part],
        *,
        device: torch.device,
        copies: Copies | None = None,
        max_norm: float = 0.0,
        clipping: Clipping = "host",
        in_backward: bool = True,
        together: bool = False,
        state_on_host: bool = False,
        kept: Collection[nn.Parameter] = (),
    ) -> None:
        """`cut`: all weights in parts. `copies`: to the host, without which nothing waits there. `in_backward`:
        gradients are taken as they come, else they stay where they are until all are there. `together`: the optimizer
        needs all gradients at once. `kept`: weights whose gradients stay until they are cleared."""
        self.optimizer, self.max_norm, self.clipping, self.together = optimizer, max_norm, clipping, together
        self.in_backward, self.kept = in_backward, frozenset(kept)
        self.last = True
        """Whether the gradients that come now are the last ones that are added up for the step."""
        self.before: list[Callable[[Part], None]] = []
        """Called before the step of weights, which must be on the device after it."""
        self.after: list[Callable[[Part], None]] = []
        """Called after it: the weights have changed."""
        self.device, self._sums = device, HostGradients(copies) if copies else None
        if state_on_host and copies is None:
            raise TypeError("state_on_host needs copies")
        self.state = HostState(optimizer, copies) if state_on_host and copies else None
        self._parts = [_Part(weights) for weights in cut]
        self._part_of = {p: part for part in self._parts for p in part.weights}
        groups = optimizer.param_groups
        self._place = {p: (g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"])}
        self._norms: dict[nn.Parameter, Tensor] = {}
        self._groups: dict[int, dict[str, Any]] = {}
        self._factor: Tensor | None = None
        self._changes: Callable[[], None] = lambda: None
        self._take: Callable[[nn.Parameter], None] = self._count
        if in_backward:
            for p in self._place:
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(_weakly(self._arrived))

    def twice(self, *, scaled: bool) -> bool:
        """Whether the next step needs its gradients twice. `scaled`: they may overflow (fp16), and the step is left
        out then."""
        return self._waits(scaled) == "again"

    def step(
        self, backward: Callable[[], Tensor], scaler: torch.amp.GradScaler, changes: Callable[[], None]
    ) -> tuple[Tensor, Tensor]:
        """Do a step. `backward`: makes the gradients, and returns the loss; called twice if `twice`. `changes`: called
        before the first weight does. Returns the loss and the norm of the gradients, 0-d, on the device. After an error
        before `changes` the step may be done again, once the gradients are cleared."""
        self._begin()
        waits = self._waits(scaler.is_enabled())
        self._changes = changes
        if waits == "no":
            self._factor = self._delayed()
            loss = self._gradients(backward, self._step_now)
            norm = self._norm()
            self._finish()
        else:
            take = {"again": self._drop, "host": self._hold, "device": self._count}[waits]
            loss = self._gradients(backward, take)
            gate = _Gate(self._norm(), scaler)
            norm, self._factor = gate.norm, gate.factor(self.max_norm)

            def act() -> None:
                if waits == "again":
                    self._gradients(backward, self._step_now)
                    self._finish()
                else:
                    self._step_those(list(self._norms))

            gate.open(act)
        scaler.update()
        if self.clipping == "delayed":
            self.optimizer.param_groups[0][_NORM] = norm
        return loss, norm

    def flush(self, weights: Iterable[nn.Parameter]) -> None:
        """Let step what waits of the parts of these weights: they are about to leave the device."""
        for part in dict.fromkeys(self._part_of[p] for p in weights if p in self._part_of):
            self._step_part(part)

    def settle(self) -> None:
        """Return when all that is on its way to the host is there, so that the optimizer's state can be read."""
        if self.state:
            self.state.shelf.settle()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Within, the optimizer's `load_state_dict` may be called."""
        if self.state is None:
            yield
            return
        with self.state.loading():
            yield

    def each(self, act: Callable[[], None]) -> None:
        """Call `act` on the optimizer with one part of its weights after another, as they would step; it may change
        them."""
        for part in self._parts:
            with self._alone(part.weights):
                act()
            self._call(self.after, part.weights)
        self._keep_groups()

    # --- what is done with a gradient ---

    def _waits(self, scaled: bool) -> Literal["no", "again", "host", "device"]:
        """Where gradients wait for what must be known of all of them."""
        if not self.in_backward:
            return "device"
        if self.together:
            return "host"
        if scaled or (self.max_norm and self.clipping != "delayed"):
            return "again" if self.clipping == "two_passes" else "host"
        return "no" if not self.max_norm or _NORM in self.optimizer.param_groups[0] else "again"

    def _gradients(self, backward: Callable[[], Tensor], take: Callable[[nn.Parameter], None]) -> Tensor:
        """The passes, with each gradient given to `take` when it is whole."""
        self._take = take
        self._norms.clear()
        loss = backward()
        with torch.no_grad():
            # Those that only earlier ones of the added batches had a gradient for; all, if none was taken as it came.
            for p in self._place:
                if p not in self._norms:
                    self._give(p)
                    if p.grad is not None:
                        self._whole(p)
        return loss

    @torch.no_grad()
    def _arrived(self, p: nn.Parameter) -> None:
        if self.last:
            self._give(p)
            self._whole(p)
        else:
            self._hold(p)

    def _whole(self, p: nn.Parameter) -> None:
        assert p.grad is not None
        self._norms[p] = torch.linalg.vector_norm(p.grad, dtype=torch.float32)
        self._take(p)

    def _count(self, p: nn.Parameter) -> None:
        """Nothing: it waits where it is."""

    def _hold(self, p: nn.Parameter) -> None:
        """It goes to the host."""
        assert self._sums is not None
        self._sums.add(p)

    def _give(self, p: nn.Parameter) -> None:
        """What waits of it on the host comes back, to where the weight must be for it."""
        if self._sums and p in self._sums.shelf:
            self._call(self.before, [p])
            self._sums.give(p)

    def _begin(self) -> None:
        """Nothing is left of a step before, done or not."""
        for part in self._parts:
            part.begin()
        self._groups.clear()
        if self._sums:
            self._sums.shelf.clear()
            self._sums.shelf.begin()
        if self.state:
            self.state.shelf.begin()

    def _drop(self, p: nn.Parameter) -> None:
        p.grad = None

    # --- steps ---

    def _step_now(self, p: nn.Parameter) -> None:
        assert p.grad is not None
        if self._factor is not None:
            p.grad.mul_(self._factor)
        part = self._part_of[p]
        part.ready.append(p)
        part.come += 1
        if part.come >= part.expected:
            self._step_part(part)

    def _step_those(self, weights: Sequence[nn.Parameter]) -> None:
        """The step of weights whose gradients have waited, in the order in which they came."""
        if self._sums:
            self._sums.shelf.begin()
        with torch.no_grad():
            for p in weights:
                self._give(p)
                if not self.together:
                    self._step_now(p)
                elif self._factor is not None and p.grad is not None:
                    p.grad.mul_(self._factor)
        if self.together:
            self._call(self.before, weights)
            self._changes()
            self.optimizer.step()
            self._done(weights)
        else:
            self._finish()

    def _step_part(self, part: _Part) -> None:
        if not (ready := list(part.ready)):
            return
        part.ready.clear()
        self._changes()
        with self._alone(ready):
            self.optimizer.step()
        self._done(ready)

    def _done(self, weights: Part) -> None:
        for p in weights:
            if p not in self.kept:
                p.grad = None
        self._call(self.after, weights)

    def _call(self, hooks: Iterable[Callable[[Part], None]], weights: Part) -> None:
        for hook in hooks:
            hook(weights)

    @contextmanager
    def _alone(self, weights: Part) -> Iterator[None]:
        """Within, the optimizer has no other weights, and these are on the device with their state. What it changes in
        its groups, a step's counter say, comes to the groups when all parts are done (`_keep_groups`): each part
        begins from the same."""
        self._call(self.before, weights)
        if self.state:
            self.state.bring(weights)
        whole = self.optimizer.param_groups
        members: dict[int, list[nn.Parameter]] = {}
        for p in sorted(weights, key=self._place.__getitem__):
            members.setdefault(self._place[p][0], []).append(p)
        shown = {g: {**whole[g], "params": own} for g, own in members.items()}
        self.optimizer.param_groups = list(shown.values())
        try:
            yield
        finally:
            self.optimizer.param_groups = whole
        self._groups |= shown
        if self.state:
            self.state.send(weights)

    def _finish(self) -> None:
        """What is incomplete steps; so do groups without gradients, whose counters go on."""
        for part in self._parts:
            self._step_part(part)
        whole = self.optimizer.param_groups
        left = {g: {**group, "params": group["params"][:1]} for g, group in enumerate(whole) if g not in self._groups}
        if left:
            self._changes()
            self.optimizer.param_groups = list(left.values())
            try:
                self.optimizer.step()
            finally:
                self.optimizer.param_groups = whole
            self._groups |= left
        self._keep_groups()

    def _keep_groups(self) -> None:
        for g, shown in self._groups.items():
            own = self.optimizer.param_groups[g]
            own.update({name: value for name, value in shown.items() if name != "params"})
        self._groups.clear()

    # --- norms ---

    def _norm(self) -> Tensor:
        """Of all gradients together, as torch's `clip_grad_norm_` adds them up."""
        norms = [self._norms[p] for p in sorted(self._norms, key=self._place.__getitem__)]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=self.device)

    def _delayed(self) -> Tensor | None:
        """The factor by the norm of the last step."""
        norm = self.optimizer.param_groups[0].get(_NORM)
        return _clip(norm, self.max_norm) if self.max_norm and norm is not None else None


def _weakly(method: Callable[[nn.Parameter], None]) -> Callable[[nn.Parameter], None]:
    """The same as long as its object lives: Python's collector does not see what torch's hooks hold, and would keep a
    whole training in memory."""
    held = WeakMethod(method)

    def hook(p: nn.Parameter) -> None:
        if alive := held():
            alive(p)

    return hook


class _Part:
    """Weights that step together."""

    def __init__(self, weights: Part) -> None:
        self.weights, self.ready = list(weights), list[nn.Parameter]()
        self.come, self.expected = 0, len(self.weights)
        """Gradients of this step, and how many there were in the one before: frozen weights get none."""

    def begin(self) -> None:
        """The next step begins."""
        self.expected = self.come or self.expected
        self.come = 0
        self.ready.clear()


class _Gate:
    """The step of fp16, which is left out where gradients are not finite: their norm stands for all of them."""

    def __init__(self, norm: Tensor, scaler: torch.amp.GradScaler) -> None:
        """`norm`: of the gradients with their scale; `self.norm` is that without it."""
        self.scaler, self.norm, self.shrink = scaler, norm, None
        if scaler.is_enabled():
            # The scaler knows optimizers alone.
            self.stand_in = _StandIn([nn.Parameter(torch.ones_like(norm)) for _ in range(2)], {})
            measured, one = self.stand_in.param_groups[0]["params"]
            measured.grad, one.grad = norm.clone(), torch.ones_like(norm)
            scaler.unscale_(self.stand_in)
            self.norm, self.shrink = measured.grad, one.grad

    def factor(self, max_norm: float) -> Tensor | None:
        """What each gradient is to be multiplied with, for its scale and for clipping."""
        if not max_norm:
            return self.shrink
        clip = _clip(self.norm, max_norm)
        return clip if self.shrink is None else clip * self.shrink

    def open(self, act: Callable[[], None]) -> None:
        """Do `act`, unless the norm is not finite with a scale."""
        if self.scaler.is_enabled():
            self.stand_in.act = act
            self.scaler.step(self.stand_in)
        else:
            act()


class _StandIn(torch.optim.Optimizer):
    """An optimizer whose step is `act`."""

    act: Callable[[], None]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.act()


def _clip(norm: Tensor, limit: float) -> Tensor:
    """As torch's `clip_grad_norm_`."""
    return (limit / (norm + 1e-6)).clamp(max=1.0)
