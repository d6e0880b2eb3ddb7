"""Block streaming from outside: only some blocks of a net are on the device; the others wait on the host and come when
they are needed, forward and backward.

What is frozen is only ever copied to the device: a block leaves it by a pointer. Nothing here knows a net or a number
format.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from sfumato.memory.backends import Backend, Source
from sfumato.memory.swap_plan import Choice, tensors_of
from sfumato.tensors.packed import Layout


class Swap:
    """The streamed blocks of one net.

    A block's tensors lie in one run of bytes on the host, its home, and in one of a few slots on the device while it is
    needed; `tensor.data` points to where they are. So whoever reads a parameter between two steps reads its value.
    A touch of a block that is not there meets two devices, and fails.
    """

    def __init__(
        self, net: nn.Module, blocks: Sequence[nn.Module], choice: Choice, backend: Backend, *, packed: bool = True
    ) -> None:
        """`net` is on the host; all that is not streamed goes to the device.

        `blocks`: all that are repeated, in forward order, compiled and checkpointed already. `packed`: whether frozen
        tensors are copied into memory that the backend gives; if not, they stay where they are (pages of a file, say).
        """
        self._net, self._blocks, self._backend, self._places = net, list(blocks), backend, list(choice.places)
        shared = _shared(self._blocks)
        self._bring_rest(shared)
        tensors = [tensors_of(self._blocks[place], shared) for place in self._places]
        layouts = [Layout.of(each) for each in tensors]
        sizes = [max(layout.nbytes for layout in layouts[i :: choice.slots]) for i in range(choice.slots)]
        self._slots = [_Slot(backend.slot(size)) for size in sizes]
        self._streamed = [
            _Streamed.of(each, layout, self._slots[i % choice.slots], backend, packed)
            for i, (each, layout) in enumerate(zip(tensors, layouts, strict=True))
        ]
        self._rank = {place: i for i, place in enumerate(self._places)}
        self._there = set[int]()
        """Ranks of the blocks whose tensors point to the device."""
        self._storing = False
        """Whether values are on their way home."""
        self._rank_of = {id(t): rank for rank, each in enumerate(self._streamed) for t in each.tensors}
        self.leaving: list[Callable[[Sequence[nn.Parameter]], None]] = []
        """Called with the trained weights of a block that is about to leave the device."""
        net._apply = self._stay  # type: ignore[method-assign, assignment]
        self._plain = [vars(block).get("forward") for block in self._blocks]
        for place, block in enumerate(self._blocks):
            block.forward = self._wrapped(place, block.forward)

    def remove(self) -> None:
        """The blocks are again as they were, those that were streamed on the host."""
        self._park_all()
        self._backend.finish()  # no copy may come into memory that is given up
        for block, forward in zip(self._blocks, self._plain, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
        del self._net._apply
        self._blocks, self._streamed, self._slots = [], [], []

    def settle(self) -> None:
        """All tensors are at home with their values, and the first blocks on their way for the next step. It waits for
        copies only if something was trained."""
        self._park_all()
        for rank in range(len(self._slots)):
            self._load(rank)

    def _park_all(self) -> None:
        for rank in sorted(self._there):
            self._park(rank)
        if self._storing:
            self._backend.finish()
            self._storing = False

    def bring(self, weights: Iterable[Tensor]) -> None:
        """Have weights of one block on the device: they are about to step."""
        for rank in {self._rank_of[id(p)] for p in weights if id(p) in self._rank_of} - self._there:
            self._enter(self._places[rank], -1)

    def changed(self, weights: Iterable[Tensor]) -> None:
        """Weights have stepped on the device: they are written home, even if torch has not seen it."""
        for rank in {self._rank_of[id(p)] for p in weights if id(p) in self._rank_of}:
            self._streamed[rank].stamp = -1

    def _bring_rest(self, shared: frozenset[int]) -> None:
        streamed = {id(t) for place in self._places for t in tensors_of(self._blocks[place], shared).values()}
        for tensor in (*self._net.parameters(), *self._net.buffers()):
            if id(tensor) not in streamed:
                tensor.data = tensor.data.to(self._backend.device)

    def _stay(self, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """In place of the net's own: `to(device)` leaves each part where it is used."""
        tried = torch.empty(0, device=self._backend.device)
        if change(tried).dtype != tried.dtype:
            raise RuntimeError("the number format of a net whose blocks are streamed cannot change")
        return self._net

    # --- who comes when ---

    def _enter(self, place: int, step: int, again: bool = False) -> None:
        """The block at this place is about to run, forward (`step` 1) or backward (-1): all others are done.

        `again`: the next pass is forward, too.
        """
        rank = self._rank.get(place)
        for other in self._there - {rank}:
            self._park(other)
        taken = set()
        if rank is not None:
            taken.add(id(self._load(rank)))
        for following in self._following(place, rank, step, again):
            if (slot := id(self._streamed[following].slot)) not in taken:
                taken.add(slot)
                self._load(following)
        if rank is not None:
            self._bind(rank)

    def _following(self, place: int, rank: int | None, step: int, again: bool) -> list[int]:
        """The ranks that there is a slot for besides that of this block, in the order in which they are needed."""
        count, free = len(self._places), len(self._slots) - (rank is not None)
        if step < 0:
            last = bisect_left(self._places, place) - 1
            return list(range(last, max(-1, last - free), -1))
        first = bisect_right(self._places, place)
        return [i % count for i in range(first, first + free) if again or i < count]

    def _load(self, rank: int) -> _Slot:
        """Have a block on its way to its slot, if it is not there yet."""
        each = self._streamed[rank]
        slot = each.slot
        if slot.holds != rank or (rank not in self._there and each.changed()):
            if slot.holds in self._there:
                self._park(slot.holds)
            slot.holds = -1  # until the copy has begun
            slot.copy = self._backend.load(each.source, slot.flat[: each.layout.nbytes])
            slot.holds, each.stamp = rank, each.version()
        return slot

    def _arrived(self, rank: int) -> _Slot:
        """The same, and wait for it."""
        slot = self._load(rank)
        if slot.copy is not None:
            try:
                self._backend.wait(slot.copy)
            except BaseException:
                for each in self._slots:
                    if each.copy is not None:  # may have failed as well
                        each.holds, each.copy = -1, None
                raise
            slot.copy = None
        return slot

    def _bind(self, rank: int) -> None:
        self._arrived(rank)
        if rank not in self._there:
            self._streamed[rank].point(device=True)
            self._there.add(rank)

    def _park(self, rank: int) -> None:
        """Point home. The slot keeps the values until another block comes; what was changed there is written back."""
        each = self._streamed[rank]
        if each.trained:
            for tell in self.leaving:
                tell(each.trained)
            torch.clear_autocast_cache()  # it would keep what they were cast to until the pass ends
        self._there.discard(rank)
        if each.changed():
            each.stamp, self._storing = each.version(), True
            self._backend.store(each.slot.flat[: each.layout.nbytes], each.own_home())
        each.point(device=False)

    # --- around a block ---

    def _wrapped(self, place: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        rank = self._rank.get(place)

        @wraps(forward)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._enter(place, 1, again=not torch.is_grad_enabled())
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            if rank is None:
                out = forward(*args, **kwargs)
            else:
                with saved_tensors_hooks(partial(self._pack, rank), self._unpack):
                    out = forward(*args, **kwargs)
            given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.requires_grad and id(leaf) not in given:
                    leaf.register_hook(partial(self._backward, place))  # type: ignore[no-untyped-call]
            return out

        return wrapper

    def _backward(self, place: int, gradient: Tensor) -> None:
        """The gradient of a block's output is whole. Autograd runs what was recorded last first, so all blocks after
        this one are done."""
        self._enter(place, -1)

    def _pack(self, rank: int, saved: Tensor) -> Tensor | _Saved:
        """What autograd keeps of a block's forward: of views of the slot only where they lie in it."""
        flat = self._streamed[rank].slot.flat
        # A compiler tries what it compiles with tensors of its own.
        plain = type(saved) in (Tensor, nn.Parameter) and saved.layout == torch.strided and saved.device == flat.device
        if not plain or saved.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
            return saved
        return _Saved(rank, saved.dtype, saved.size(), saved.stride(), int(saved.storage_offset()))

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        slot = self._arrived(saved.rank)
        bare = torch.empty(0, dtype=saved.dtype, device=slot.flat.device)
        return bare.set_(slot.flat.untyped_storage(), saved.offset, saved.size, saved.stride)


class _Saved(NamedTuple):
    """A view of a block's slot."""

    rank: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(slots=True)
class _Slot:
    """A place on the device."""

    flat: Tensor
    holds: int = -1
    """Rank of the block whose values are there, or on their way."""
    copy: Any = None
    """The copy that nobody waited for yet."""


@dataclass(slots=True)
class _Streamed:
    """A block that comes and goes."""

    tensors: list[Tensor]
    layout: Layout
    slot: _Slot
    source: Source
    home: list[Tensor]
    device: list[Tensor]
    stamp: int = -1
    """Versions of the tensors whose values the slot holds."""
    flat: Tensor | None = None

    @property
    def trained(self) -> list[nn.Parameter]:
        return [t for t in self.tensors if isinstance(t, nn.Parameter) and t.requires_grad]

    @classmethod
    def of(cls, tensors: dict[str, Tensor], layout: Layout, slot: _Slot, backend: Backend, packed: bool) -> _Streamed:
        """With its tensors at home."""
        device = list(layout.views(slot.flat[: layout.nbytes]).values())
        if not packed and not any(t.requires_grad for t in tensors.values()):
            at_home = {name: t.data for name, t in tensors.items()}
            return cls(list(tensors.values()), layout, slot, partial(layout.pack, at_home), [*at_home.values()], device)
        flat = backend.host(layout.nbytes)
        layout.pack({name: t.detach() for name, t in tensors.items()}, flat)
        made = cls(list(tensors.values()), layout, slot, flat, [*layout.views(flat).values()], device, flat=flat)
        made.point(device=False)
        return made

    def point(self, *, device: bool) -> None:
        for tensor, view in zip(self.tensors, self.device if device else self.home, strict=True):
            tensor.data = view

    def version(self) -> int:
        return sum(t._version for t in self.tensors)

    def changed(self) -> bool:
        """Whether values were written since the slot and the home were equal."""
        return self.version() != self.stamp

    def own_home(self) -> Tensor:
        if self.flat is None:
            raise RuntimeError("a frozen block that stays in its file was changed on the device")
        return self.flat


def _shared(blocks: Sequence[nn.Module]) -> frozenset[int]:
    """Ids of tensors that several blocks have."""
    seen, shared = set[int](), set[int]()
    for block in blocks:
        own = {id(t) for t in tensors_of(block).values()}
        shared |= seen & own
        seen |= own
    return frozenset(shared)
