"""Text encoders that are never in memory whole: blocks are read from the files one after another, and all captions that
fit pass a block while it is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sfumato.data.batch import Cond
from sfumato.data.store import Progress
from sfumato.models.base import Models
from sfumato.models.components import ComponentWeights
from sfumato.models.meta_init import drop
from sfumato.models.relay import relay, wait_for

LARGE = 4 << 30
"""Bytes from which on a frozen text encoder is streamed, if nothing else is asked for. Smaller ones fit wherever a
denoiser does."""
HELD = 2 << 30
"""Bytes that the batches of one pass over the files keep between two blocks. T5-XXL takes some 1,000 captions of 100
tokens with that, or 160 of 512."""
SIDE_BY_SIDE, ON_CPU = 128, 8
"""Batches that pass a block together. Each is a thread, for which the CPU's kernels hold threads of their own; there a
block's computation takes longer than reading it, so few are enough."""


def sizes(models: Models, dtypes: Mapping[str, torch.dtype]) -> dict[str, int]:
    """Bytes of the text encoders in these number formats, by name."""
    shapes = {name: models.source.components[name].shapes() for name in models.encoders}
    return {name: sum(map(math.prod, found.values())) * dtypes[name].itemsize for name, found in shapes.items()}


def encode_each(
    models: Models,
    batches: Sequence[Sequence[str]],
    device: torch.device,
    progress: Progress | None = None,
    *,
    negative: Sequence[bool] | None = None,
) -> Iterator[Cond]:
    """The outputs of the text encoders for batches of captions, one after another, under the autocast of the caller.

    Encoders in `models.streamed` are read meanwhile, from the first block to the last that is used, once for all
    batches that keep `HELD` bytes together; on `device` are never more than one block, what is outside of blocks, and
    these. The others must have their values. The numbers are those of `models.encode`, bit for bit. `progress`: (done,
    all) captions, or blocks times batches where something is streamed. `negative`: which batches are negative prompts;
    None: none of them. Errors: `UserError` for files that changed.
    """
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def encode(captions: Sequence[str], negative: bool) -> Cond:
        with torch.no_grad(), torch.autocast(kind, dtype, enabled=enabled):  # both are a thread's own
            return models.encode(models.tokenize(captions, negative=negative))

    which = negative or [False] * len(batches)
    calls = [partial(encode, captions, other) for captions, other in zip(batches, which, strict=True)]
    if models.streamed:
        return _streamed(models, calls, device, progress)
    return _plain(calls, [len(captions) for captions in batches], progress)


def _plain(calls: Sequence[Callable[[], Cond]], sizes: Sequence[int], progress: Progress | None) -> Iterator[Cond]:
    done = 0
    for call, size in zip(calls, sizes, strict=True):
        yield call()
        done += size
        if progress:
            progress(done, sum(sizes))


def _streamed(
    models: Models, calls: Sequence[Callable[[], Cond]], device: torch.device, progress: Progress | None
) -> Iterator[Cond]:
    if not calls:
        return
    with _hooked(models, device) as blocks:
        at, total = [0] * len(calls), len(calls) * len(blocks.blocks)

        def passed(batch: int, stage: int) -> None:
            at[batch] = stage
            if progress:
                progress(sum(at), total)

        for i, cond in enumerate(relay(
            calls, blocks.enter, most=ON_CPU if device.type == "cpu" else SIDE_BY_SIDE, memory=HELD, passed=passed,
        )):  # fmt: skip
            passed(i, len(blocks.blocks))
            yield cond


@dataclass(frozen=True, slots=True)
class _Block:
    """A block of a net, and where its values are."""

    module: nn.Module
    path: str
    weights: ComponentWeights
    dtype: torch.dtype | None

    def read(self) -> dict[str, Tensor]:
        """Its tensors, in memory of their own: pages of a mapped file would stay when the block has gone."""
        return {name.removeprefix(self.path): t for name, t in self.weights.natives(self.dtype, map=False)}


def _reads_ahead(device: torch.device) -> bool:
    """Whether the next block is read while one is used; on the CPU its memory is worth more."""
    return device.type != "cpu"


class _Blocks:
    """The blocks of all streamed nets, of which one has its values."""

    def __init__(self, blocks: Sequence[_Block], device: torch.device, pool: ThreadPoolExecutor) -> None:
        self.blocks, self._device, self._pool = blocks, device, pool
        self._now = -1
        self._coming: dict[int, Future[dict[str, Tensor]]] = {}
        self._used = set[int]()
        """Those that a pass came to: what comes after them in their net no later pass reads ahead."""

    def enter(self, place: int) -> None:
        """Have this block's values in place of those of the one before."""
        if place == self._now:
            return
        if self._now >= 0:
            drop(self.blocks[self._now].module)
        coming = self._coming.pop(place, None)
        self._coming.clear()
        tensors = coming.result() if coming else self.blocks[place].read()
        self.blocks[place].module.load_state_dict({n: t.to(self._device) for n, t in tensors.items()}, assign=True)
        first, self._now = place not in self._used, place
        self._used.add(place)
        if _reads_ahead(self._device) and place + 1 < len(self.blocks) and (first or place + 1 in self._used):
            self._coming[place + 1] = self._pool.submit(self.blocks[place + 1].read)


@contextmanager
def _hooked(models: Models, device: torch.device) -> Iterator[_Blocks]:
    """Within, the streamed encoders can be called in a `relay`; afterwards they are without values again."""
    handles: list[RemovableHandle] = []
    blocks: list[_Block] = []
    try:
        for name in (name for name in models.encoders if name in models.streamed):
            net, weights, dtype = models.encoders[name], models.source.components[name], models.dtypes.get(name)
            modules = models.family.encoder_blocks(net)
            paths = {module: f"{path}." for path, module in net.named_modules()}
            inner = {module: [paths[module] + n for n in module.state_dict()] for module in modules}
            outer = net.state_dict().keys() - {n for names in inner.values() for n in names}
            handles += _fill_outer(net, weights, outer, dtype, device)
            for module in modules:
                handles.append(module.register_forward_pre_hook(partial(_arrive, len(blocks)), with_kwargs=True))
                blocks.append(_Block(module, paths[module], weights.part(inner[module]), dtype))
        with ThreadPoolExecutor(1) as pool:
            yield _Blocks(blocks, device, pool)
    finally:
        for handle in handles:
            handle.remove()
        for name in models.streamed:
            drop(models.encoders[name])


def _arrive(place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Wait for the block's values."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    wait_for(place, sum(storages.values()))


def _fill_outer(
    net: nn.Module, weights: ComponentWeights, names: set[str], dtype: torch.dtype | None, device: torch.device
) -> list[RemovableHandle]:
    """Give a net the tensors outside of its blocks. The tables of embeddings are the largest of all, and few of their
    rows are used: on the CPU only these come into memory."""
    lookups = [(f"{path}.weight", m) for path, m in net.named_modules() if type(m) is nn.Embedding]
    tables = {name: m for name, m in lookups if name in names and name not in weights.changes}
    values = {name: t.to(device) for name, t in weights.part(names - tables.keys()).natives(dtype)}
    handles = []
    for name, stored in weights.part(tables).natives():
        if device.type != "cpu" or dtype in (None, stored.dtype):
            values[name] = stored.to(device).to(dtype or stored.dtype)
            continue
        # What is never written takes no memory.
        values[name] = torch.empty(stored.shape, dtype=dtype)
        handles.append(tables[name].register_forward_pre_hook(partial(_cast_rows, stored, values[name])))
    net.load_state_dict({**net.state_dict(), **values}, assign=True)
    return handles


def _cast_rows(stored: Tensor, table: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Fill the rows of a table that are about to be looked up."""
    ids = args[0]
    table[ids] = stored[ids].to(table.dtype)
