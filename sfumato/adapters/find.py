"""Kinds of adapters, one file each, found by its last line `ADAPTER = ...`; a new kind adds no line here. Imports no
torch until a kind is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sfumato.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.adapters.base import Adapter, LayerOptions

LYCORIS = "lycoris.kohya"
"""The module of LyCORIS, which names a kind by its `algo` in network_args."""


@cache
def kinds() -> tuple[str, ...]:
    """All kinds' names."""
    files = Path(__file__).parent.glob("*.py")
    return tuple(sorted(p.stem for p in files if "\nADAPTER = " in p.read_text(encoding="utf-8")))


@cache
def _aliases() -> Mapping[str, str]:
    """Other programs' name of a kind -> ours."""
    return {alias: name for name in kinds() for alias in vars(_load(name)).get("aliases", ())}


def _load(name: str) -> type[Adapter]:
    return cast("type[Adapter]", import_module(f"sfumato.adapters.{name}").ADAPTER)


def kind(name: str, algo: str = "lora") -> type[Adapter]:
    """A kind by its name or an alias of it, by kohya's (`networks.lora`, `networks.lora_flux`: what follows a kind's
    name says for which models it was written), or by LyCORIS' (`lycoris.kohya`, and its `algo`). Errors: `UserError`
    for an unknown one."""
    flag = f"network_module {name!r}" if name != LYCORIS else f"network_args algo={algo}"
    own = name.removeprefix("networks.") if name != LYCORIS else algo.lower()
    if own in kinds():
        return _load(own)
    known = {**_aliases(), **{each: each for each in kinds()}}
    begins = [each for each in known if own == each or own.startswith(f"{each}_")]
    if begins:
        return _load(known[max(begins, key=len)])
    raise UserError(f"{flag} is not known; known: {', '.join(sorted(known))}{nearest(own, known)}")


def from_tensors(
    tensors: Mapping[str, Tensor], prefer: type[Adapter] | None = None
) -> tuple[type[Adapter], LayerOptions]:
    """The kind that a layer's tensors are of, with its options. `prefer`: taken if they may be its own, as several
    kinds have files that look alike. Errors: `UserError` if none has such tensors."""
    others = (k for name in kinds() if "read" in vars(k := _load(name)))
    for each in (prefer, *others) if prefer else others:
        if options := each.read(tensors):
            return each, options
    raise UserError(
        f"no kind of adapter has the tensors {', '.join(sorted(tensors))}; known kinds: {', '.join(kinds())}"
    )
