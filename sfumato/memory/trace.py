"""What a training step needs of a device's memory, from shapes alone: blocks are traced once for each kind.

A net is run without values (FakeTensorMode). Blocks that are alike, and there are up to seventy of them, would take
minutes; so one of each kind is run by itself, forward and backward, and in the net a stand-in takes the place of every
one of them, which makes tensors of the same sizes and tells the tracker what the block would have held. What
checkpointing and its like change is then arithmetic on the record of one trace (`Trace.peaks`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from sfumato.memory.quantise import Stored
from sfumato.memory.tracker import Tracker, Watch


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """What a block does to memory; all in bytes, above what was alive when it began."""

    forward: int
    """The most of its forward pass, where it remembers what its backward pass needs."""
    forward_only: int
    """The same where nothing is remembered."""
    saved: int
    """What it remembers, besides its inputs and outputs."""
    backward: int
    """The most of its backward pass, above what was alive then, `saved` and the gradients of its outputs included."""
    gradients: int
    """Of its weights."""
    flops: tuple[int, int]
    """Of its forward and of its backward pass; no bytes."""
    casts: int
    """Of weights in the format of autocast, which keeps them until the end of the forward pass."""
    kept: tuple[bool, ...]
    """Which of its input tensors it remembers."""
    outputs: tuple[tuple[torch.Size, torch.dtype, bool] | None, ...]
    """Shape, format and whether it has a gradient, of each output tensor."""
    others: tuple[Any, ...]
    """Of each output what is no tensor."""
    tree: Any


@dataclass(frozen=True, slots=True)
class Event:
    """A moment of the trace."""

    kind: str
    """"forward" and "backward" of a block; "gap": what lies between, and before and after them."""
    level: int
    """Bytes alive at its begin; of a gap the most."""
    gradients: int
    """How much of that are gradients."""
    block: int = -1


@dataclass(frozen=True, slots=True)
class Peak:
    """The most bytes of a phase, and what they are."""

    activations: int = 0
    gradients: int = 0
    temporary: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.gradients + self.temporary


@dataclass(slots=True)
class Trace:
    """One step, of which a block's part can be had in other ways."""

    events: list[Event] = field(default_factory=list)
    records: list[BlockRecord] = field(default_factory=list)
    """One for each call of a block, in order."""
    flops: int = 0
    inputs: list[int] = field(default_factory=list)
    """Bytes of the inputs that are this call's alone: what a checkpoint of it keeps."""

    def peaks(
        self, checkpointed: Collection[int] = (), *, offloaded: bool = False, fused: bool = False
    ) -> dict[str, Peak]:
        """{"forward", "backward"} -> the peak. `checkpointed`: calls of blocks that remember their inputs alone;
        `offloaded`: and those on the host; `fused`: gradients are used up as they come."""
        found, checkpointed = {"forward": Peak(), "backward": Peak()}, frozenset(checkpointed)
        phase, less, aside, casts = "forward", 0, 0, 0

        def seen(level: int, gradients: int, more: int) -> None:
            kept = 0 if fused else gradients
            peak = Peak(max(level - gradients - less - aside + casts, 0), kept, more)
            found[phase] = max(found[phase], peak, key=lambda p: p.total)

        for event in self.events:
            if event.kind == "gap":
                seen(event.level, event.gradients, 0)
                continue
            record, again = self.records[event.block], event.block in checkpointed
            put_aside = self.inputs[event.block] if again and offloaded else 0
            if event.kind == "forward":
                seen(event.level, event.gradients, record.forward_only if again else record.forward)
                if again:
                    less, aside, casts = less + record.saved, aside + put_aside, casts + record.casts
                continue
            phase, aside, casts = "backward", aside - put_aside, 0
            if again:
                seen(event.level, event.gradients, record.forward)
                less -= record.saved
            seen(event.level, event.gradients, record.backward)
        return found

    def kept_inputs(self, checkpointed: Iterable[int]) -> int:
        """Bytes that checkpoints of these calls keep."""
        return sum(self.inputs[i] for i in checkpointed)


class BlockTracer:
    """Puts stand-ins in the place of blocks, and writes down what happens."""

    def __init__(self, tracker: Tracker, signature: Callable[[nn.Module], Hashable]) -> None:
        """`signature`: equal for blocks that are alike."""
        self.tracker, self.signature, self.trace = tracker, signature, Trace()
        self.gradients = 0
        self.casts = 0
        self._records: dict[Hashable, BlockRecord] = {}
        self._users: dict[int, int] = {}
        self._storages: list[dict[int, int]] = []
        self._gap: Watch | None = None

    @contextmanager
    def on(self, blocks: Sequence[nn.Module], inner: Iterable[nn.Module] = ()) -> Iterator[Trace]:
        """Trace what is run within. `blocks`: whose calls are told apart; `inner`: parts that are alike."""
        listed = {id(b) for b in blocks}
        units = list({id(m): m for m in (*blocks, *inner)}.values())
        for unit in units:
            unit.forward = self._stand_in(unit, unit.forward, top=id(unit) in listed)
        try:
            with self.tracker.watch() as self._gap, _Unsaid():  # type: ignore[no-untyped-call]
                yield self.trace
                self._end_gap()
                self.trace.flops = self.tracker.flops
        finally:
            for unit in units:
                del unit.forward
        seen = Counter(key for found in self._storages for key in found)
        self.trace.inputs = [sum(n for key, n in f.items() if seen[key] == 1) for f in self._storages]

    def _stand_in(self, unit: nn.Module, forward: Callable[..., Any], *, top: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            flat, _ = tree_flatten((args, kwargs))
            tensors = [t for t in flat if isinstance(t, Tensor)]
            record = self._record(unit, forward, args, kwargs)
            number = -1
            if top and self._gap is not None:
                number = len(self.trace.records)
                self.trace.records.append(record)
                self._storages.append({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors})
                self._happens("forward", number)
            trains = any(out and out[2] for out in record.outputs)
            mark = torch.empty((), requires_grad=trains)
            with torch.set_grad_enabled(trains):
                outs = _StandIn.apply(self, record, number, mark, *tensors)  # type: ignore[no-untyped-call]
            if number >= 0:
                self._begin_gap()
            made = iter(outs)
            leaves = [next(made) if spec else other for spec, other in zip(record.outputs, record.others, strict=True)]
            return tree_unflatten(leaves, record.tree)

        return call

    def _record(
        self, unit: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> BlockRecord:
        flat, _ = tree_flatten((args, kwargs))
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        key = (self.signature(unit), torch.is_grad_enabled(), autocast, *map(_described, flat))
        if key not in self._records:
            self._records[key] = self._measured(unit, forward, args, kwargs)
        return self._records[key]

    def _measured(
        self, unit: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> BlockRecord:
        """Run a block by itself."""
        flat, tree = tree_flatten((args, kwargs))
        gap, self._gap = self._gap, None
        before, flops = self.gradients, self.tracker.flops
        try:
            with self.tracker.apart():
                found = self._runs(forward, flat, tree)
                self.tracker.hold(before - self.gradients)
        finally:
            self._gap, self.gradients, self.tracker.flops = gap, before, flops
        return found

    def _runs(self, forward: Callable[..., Any], flat: list[Any], tree: Any) -> BlockRecord:
        tracker, saved_keys = self.tracker, set[int]()
        start = tracker.live

        def go() -> tuple[list[Any], Any]:
            args, kwargs = tree_unflatten(flat_now, tree)
            return tree_flatten(forward(*args, **kwargs))

        def note(t: Tensor) -> Tensor:
            saved_keys.add(t.untyped_storage()._cdata)
            return t

        flat_now = [t.detach() if isinstance(t, Tensor) else t for t in flat]
        casts, self.casts = self.casts, 0
        torch.clear_autocast_cache()
        with torch.no_grad(), tracker.watch() as only:
            go()
        only_casts = tracker.live - start + self.casts
        torch.clear_autocast_cache()  # what is cast without gradients must not be used with them
        self.casts = casts
        flat_now = [t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in flat]
        given = {t.untyped_storage()._cdata for t in flat if isinstance(t, Tensor)}
        counted = tracker.flops
        with tracker.watch() as watch, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            leaves, out_tree = go()
        flops = tracker.flops - counted
        torch.clear_autocast_cache()
        outs = [t for t in leaves if isinstance(t, Tensor)]
        new = {k: s.nbytes() for s in (t.untyped_storage() for t in outs) if (k := s._cdata) not in given}
        saved = tracker.live - start - sum(new.values())
        described = tuple((t.shape, t.dtype, t.requires_grad) if isinstance(t, Tensor) else None for t in leaves)
        others = tuple(None if isinstance(t, Tensor) else t for t in leaves)
        kept = tuple(t.untyped_storage()._cdata in saved_keys for t in flat if isinstance(t, Tensor))
        ends = [t for t in outs if t.requires_grad]
        backward = gradients = 0
        if ends:
            end = _End.apply(self, *ends)  # type: ignore[no-untyped-call]
            del outs, ends, leaves
            before = self.gradients
            with tracker.watch() as self._backward, torch.autocast("cpu", enabled=False):
                end.backward()
                backward = self._backward.peak - self._level
            gradients = self.gradients - before
        return BlockRecord(
            forward=watch.peak - start, forward_only=only.peak - start, saved=saved, backward=backward,
            gradients=gradients, flops=(flops, tracker.flops - counted - flops), casts=only_casts, kept=kept,
            outputs=described, others=others, tree=out_tree,
        )  # fmt: skip

    def on_gradient(self, weight: Tensor) -> None:
        """To be called when a weight's gradient is there, which is then given up: it is counted as held."""
        assert weight.grad is not None
        nbytes = weight.grad.untyped_storage().nbytes()
        weight.grad = None
        self.gradients += nbytes
        self.tracker.hold(nbytes)

    # --- what the stand-ins say ---

    def _happens(self, kind: str, number: int) -> None:
        self._end_gap()
        self.trace.events.append(Event(kind, self.tracker.live, self.gradients, number))

    def _end_gap(self) -> None:
        if self._gap is not None:
            self.trace.events.append(Event("gap", self._gap.peak, self.gradients))

    def _begin_gap(self) -> None:
        if self._gap is not None:
            self._gap.peak = self.tracker.live

    def begin_backward(self) -> None:
        """The gradients of a block that is run by itself are there."""
        self._level = self._backward.peak = self.tracker.live


class _Unsaid(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A question that only values could answer ("is all of the mask true?") is answered with no."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return False
        return func(*args, **(kwargs or {}))


class _StandIn(torch.autograd.Function):
    """In the place of a block: outputs without values, and what it would do to memory."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, tracer: BlockTracer, record: BlockRecord, number: int, mark: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        tracker = tracer.tracker
        ctx.tracer, ctx.record, ctx.number = tracer, record, number
        ctx.shapes = [(t.shape, t.dtype) for t in tensors]
        ctx.save_for_backward(*(t for t, kept in zip(tensors, record.kept, strict=True) if kept))
        trains = mark.requires_grad
        tracker.pulse(record.forward if trains else record.forward_only)
        outs = [torch.empty(shape, dtype=dtype) for shape, dtype, _ in filter(None, record.outputs)]
        tracker.hold(record.saved)
        tracer.casts += record.casts
        tracker.flops += record.flops[0]
        ctx.mark_non_differentiable(
            *(t for t, (_, _, differs) in zip(outs, filter(None, record.outputs), strict=True) if not differs)
        )
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        tracer, record, tracker = ctx.tracer, ctx.record, ctx.tracer.tracker
        if ctx.number >= 0:
            tracer._happens("backward", ctx.number)
        tracker.pulse(record.backward)
        made = [
            torch.empty(shape, dtype=dtype) if needed else None
            for (shape, dtype), needed in zip(ctx.shapes, ctx.needs_input_grad[4:], strict=True)
        ]
        tracker.hold(record.gradients - record.saved)
        tracker.flops += record.flops[1]
        tracer.gradients += record.gradients
        if ctx.number >= 0:
            tracer._begin_gap()
        return (None, None, None, None, *made)


class _End(torch.autograd.Function):
    """What comes after a block that is run by itself: its backward pass makes the gradients of the block's outputs."""

    @staticmethod
    def forward(ctx: Any, tracer: BlockTracer, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        ctx.tracer, ctx.shapes = tracer, [(t.shape, t.dtype) for t in tensors]
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        made = [torch.empty(shape, dtype=dtype) for shape, dtype in ctx.shapes]
        ctx.tracer.begin_backward()
        return (None, *made)


def _described(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.requires_grad
    return repr(value)


def signature(module: nn.Module, hooked: Mapping[nn.Module, Hashable]) -> Hashable:
    """What makes blocks alike: classes and shapes of all that is in them. `hooked`: what is hooked to layers."""
    return tuple(
        (
            name,
            type(part),
            hooked.get(part),
            tuple(
                (n, tuple(t.shape), t.dtype, t.requires_grad)
                for n, t in (*part._parameters.items(), *part._buffers.items())
                if t is not None
            ),
        )
        for name, part in module.named_modules()
    )


def alike(net: nn.Module, signatures: Callable[[nn.Module], Hashable]) -> list[nn.Module]:
    """Parts of a net that occur more than once, and are more than a layer."""
    parts = [part for part in net.modules() if len(list(part.children())) > 1 and not isinstance(part, nn.ModuleList)]
    keys = {id(part): hash(signatures(part)) for part in parts}
    counts = Counter(keys.values())
    return [part for part in parts if counts[keys[id(part)]] > 1]


def without_values(net: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Give a net on the meta device weights in `dtype` (None: as they are) without values, in the FakeTensorMode of the
    caller; codes of quantised layers stay in their own formats."""
    for part in net.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(
                    torch.empty(p.shape, dtype=dtype or p.dtype, device="cpu"), p.requires_grad
                )
        for name, b in part._buffers.items():
            if b is not None and b.is_meta:
                kept = dtype is None or isinstance(part, Stored) or not b.is_floating_point()
                part._buffers[name] = torch.empty(b.shape, dtype=b.dtype if kept else dtype, device="cpu")
