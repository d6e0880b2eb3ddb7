"""Adapter key names as other programs spell them: written and read by one record.

A `Dialect` builds the name of every layer of a net and looks names up; a name whose dots became `_` is never split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sfumato.errors import UserError, nearest
from sfumato.formats.names import Change, KeyMap, Rule

ModulePath = tuple[str, str]
"""(component, native path of the layer): ("denoiser", "input_blocks.1.1.transformer_blocks.0.attn1.to_q")."""
AdapterTensors = dict[str, Tensor]
"""What an adapter keeps for a layer, in kohya's and LyCORIS' names: "lora_down.weight", "alpha", "hada_w1_a" ..."""

DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"
PEFT_NAMES = {DOWN: "lora_A.weight", UP: "lora_B.weight"}
"""For `Dialect.tensor_names`: what PEFT, and with it diffusers and ComfyUI, calls the two factors of a LoRA."""
_READ_AS = {
    "lora_A.weight": DOWN,
    "lora_B.weight": UP,
    "lora_A.default.weight": DOWN,
    "lora_B.default.weight": UP,
    "lora.down.weight": DOWN,
    "lora.up.weight": UP,
}
"""Leaf spellings of PEFT and of old diffusers; files mix them with any dialect's paths, so all are read in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one program names the tensors of an adapter."""

    name: str
    prefix: Mapping[str, str]
    """component -> what stands before the path, separator included; a component that is not here cannot be named."""
    keys: Mapping[str, KeyMap] = field(default_factory=dict)
    """component -> table native -> foreign; a component that is not here keeps its native names."""
    separator: Literal[".", "_"] = "."
    """What joins the parts of the path."""
    tensor_names: Mapping[str, str] = field(default_factory=dict)
    """native leaf -> foreign leaf; a leaf that is not here keeps its name."""
    fold_alpha: bool = False
    """No alpha is written; alpha / rank is multiplied into lora_up (PEFT). Such a dialect holds LoRA alone."""

    def names(self, path: ModulePath) -> tuple[tuple[str, ...], Rule | None]:
        """Foreign names of a layer, without leaf: one, or one per piece of a fused layer; and the rule that cuts it."""
        component, module = path
        if component not in self.prefix:
            raise UserError(
                f"the {self.name} names have no place for {component!r}; they hold {', '.join(self.prefix)}"
            )
        match = self.keys[component].match(module, native=True) if component in self.keys else None
        paths = match.foreign() if match else (module,)
        return tuple(
            self.prefix[component] + p.replace(".", self.separator) for p in paths
        ), match.rule if match else None


def usual(
    kohya: Mapping[str, str], comfy: Mapping[str, str], peft: Mapping[str, str], keys: Mapping[str, KeyMap]
) -> dict[str, Dialect]:
    """The dialects of a family, by name: the prefixes of each, and the tables to diffusers' names, on which PEFT's are
    built.

    kohya's and ComfyUI's are built on native names.
    """
    return {
        "kohya": Dialect(name="kohya", prefix=kohya, separator="_"),
        "comfy": Dialect(name="comfy", prefix=comfy, tensor_names=PEFT_NAMES),
        "peft": Dialect(name="peft", prefix=peft, keys=keys, tensor_names=PEFT_NAMES, fold_alpha=True),
    }


def write(dialect: Dialect, adapters: Mapping[ModulePath, AdapterTensors]) -> dict[str, Tensor]:
    """Adapters in a dialect's names. Errors: `UserError` for what the dialect cannot hold; two layers of one name."""
    out: dict[str, Tensor] = {}
    for path, tensors in adapters.items():
        names, rule = dialect.names(path)
        if dialect.fold_alpha:
            tensors = _folded(dialect, names[0], tensors)
        for name, piece in zip(names, _cut(names, rule, tensors), strict=True):
            keys = {f"{name}.{dialect.tensor_names.get(leaf, leaf)}": t for leaf, t in piece.items()}
            if twice := out.keys() & keys.keys():
                raise UserError(f"two layers share the {dialect.name} name {min(twice)!r}")
            out |= keys
    return out


def read(
    dialects: Iterable[Dialect], tensors: Mapping[str, Tensor], paths: Iterable[ModulePath]
) -> dict[ModulePath, AdapterTensors]:
    """Tensors of an adapter file -> native tensors, in the order of `paths` (all layers of the nets, not only adapted
    ones).

    Keys of several dialects may stand in one file. A LoRA without alpha gets its rank as alpha. Errors:
    `UserError` listing the keys that name no layer, with the nearest names.
    """
    layers, order = _named_layers(tuple(dialects), paths)
    found: dict[ModulePath, tuple[Rule | None, dict[int, AdapterTensors]]] = {}
    strange = []
    for key, tensor in tensors.items():
        name, leaf = _split(key, layers)
        if not name:
            strange.append(key)
            continue
        layer = layers[name]
        rule, pieces = found.setdefault(layer.path, (layer.rule, {}))
        piece = pieces.setdefault(layer.piece, {})
        native = layer.tensor_names.get(leaf, _READ_AS.get(leaf, leaf))
        if native in piece or rule != layer.rule:
            raise UserError(f"two tensors for one place of {layer.path[1]}, the second of them {key!r}")
        if (native in (DOWN, UP) and (tensor.ndim < 2 or not tensor.numel())) or (
            native == ALPHA and tensor.numel() != 1
        ):
            expected = "one number" if native == ALPHA else "rows and columns"
            raise UserError(f"{key!r} of the adapter has the shape {list(tensor.shape)}, expected {expected}")
        piece[native] = tensor
    if strange:
        raise UserError(_unclaimed(strange, layers, len(tensors)))
    return {path: _joined(path, *found[path]) for path in order if path in found}


# --- names ---


@dataclass(frozen=True, slots=True)
class _NamedLayer:
    """What a foreign name stands for."""

    path: ModulePath
    piece: int
    rule: Rule | None
    tensor_names: Mapping[str, str]
    """foreign leaf -> native leaf"""


def _named_layers(
    dialects: tuple[Dialect, ...], paths: Iterable[ModulePath]
) -> tuple[dict[str, _NamedLayer], list[ModulePath]]:
    """What every layer's names in every dialect stand for, and the layers in order."""
    layers: dict[str, _NamedLayer] = {}
    order = list(paths)
    for dialect in dialects:
        native = {foreign: leaf for leaf, foreign in dialect.tensor_names.items()}
        for path in order:
            if path[0] not in dialect.prefix:
                continue
            names, rule = dialect.names(path)
            for piece, name in enumerate(names):
                known = layers.setdefault(name, _NamedLayer(path, piece, rule, native))
                if known.path != path:
                    raise ValueError(f"{name!r} names both {known.path} and {path}")
    return layers, order


def _split(key: str, layers: Mapping[str, _NamedLayer]) -> tuple[str, str]:
    """(name, leaf) of a key, the name being the longest known one; ("", "") when no layer has that name."""
    name = key
    while name := name.rpartition(".")[0]:
        leaf = key[len(name) + 1 :]
        if name in layers and leaf not in ("weight", "bias"):  # those are a checkpoint's, not an adapter's
            return name, leaf
    return "", ""


def _unclaimed(strange: list[str], layers: Mapping[str, _NamedLayer], total: int) -> str:
    """The message for keys that name no layer: a key of each of the first five unknown names, and the nearest known
    ones."""
    first: dict[str, str] = {}
    for key in strange:
        first.setdefault(key.split(".lora_")[0] if ".lora_" in key else key.rpartition(".")[0], key)
    shown = [f"  {key}{nearest(head, layers)}" for head, key in list(first.items())[:5]]
    more = [f"  and those of {len(first) - 5} more names"] if len(first) > 5 else []
    return "\n".join([f"{len(strange)} of {total} keys of the adapter name no layer of this model:", *shown, *more])


# --- values ---


def _folded(dialect: Dialect, name: str, tensors: AdapterTensors) -> AdapterTensors:
    """The tensors with alpha / rank multiplied into `lora_up`."""
    if strange := tensors.keys() - {DOWN, UP, ALPHA}:
        raise UserError(
            f"the {dialect.name} names hold LoRA alone, not {min(strange)!r} of {name}; save with --dialect kohya"
        )
    up = tensors[UP]
    scale = float(tensors[ALPHA]) / tensors[DOWN].shape[0] if ALPHA in tensors else 1.0
    return {DOWN: tensors[DOWN], UP: (up.float() * scale).to(up.dtype)}


def _cut(names: tuple[str, ...], rule: Rule | None, tensors: AdapterTensors) -> list[AdapterTensors]:
    """The tensors of each piece of a fused layer: `lora_down` is shared, `lora_up` is cut along its rows."""
    if rule and rule.change:
        tensors = _moved(names[0], rule.change, rule.change.back, tensors)
    if len(names) == 1:
        return [tensors]
    if strange := tensors.keys() - {DOWN, UP, ALPHA}:
        raise UserError(
            f"{names[0]}: {min(strange)!r} of a fused layer cannot be cut into {len(names)}; save with native names "
            "(comfy)"
        )
    up = tensors[UP]
    rows = list(rule.rows) if rule and rule.rows else [up.shape[0] // len(names)] * len(names)
    return [{leaf: part if leaf == UP else t for leaf, t in tensors.items()} for part in torch.split(up, rows)]


def _moved(name: str, change: Change, move: Callable[[Tensor], Tensor], tensors: AdapterTensors) -> AdapterTensors:
    """The tensors of a layer whose weight goes through `move`: exact for LoRA if that is a matter of rows, those of
    `lora_up`."""
    if not change.moves_rows:
        raise UserError(f"{name}: the layer's values differ between the two sides; its adapter has no exact form there")
    if strange := tensors.keys() - {DOWN, UP, ALPHA}:
        raise UserError(
            f"{name}: the layer's rows stand in another order there, in which {min(strange)!r} has no exact form; only "
            "LoRA has"
        )
    return {leaf: move(t) if leaf == UP else t for leaf, t in tensors.items()}


def _joined(path: ModulePath, rule: Rule | None, pieces: dict[int, AdapterTensors]) -> AdapterTensors:
    """The native tensors of a layer from those of its pieces, exactly; a piece that is not there changes nothing."""
    for tensors in pieces.values():
        if DOWN in tensors and ALPHA not in tensors:  # scale 1
            tensors[ALPHA] = torch.tensor(float(tensors[DOWN].shape[0]), dtype=tensors[DOWN].dtype)
    whole = pieces[0] if rule is None or len(rule.foreign) == 1 else _fused(path, rule, pieces)
    return _moved(path[1], rule.change, rule.change.into, whole) if rule and rule.change else whole


def _fused(path: ModulePath, rule: Rule, pieces: dict[int, AdapterTensors]) -> AdapterTensors:
    """The tensors of a fused layer: at the same rank when all pieces share one `lora_down`, else at the sum of their
    ranks."""
    if any(tensors.keys() != {DOWN, UP, ALPHA} for tensors in pieces.values()):
        raise UserError(
            f"{path[1]}: only LoRA, with lora_down and lora_up in every piece, can be joined to a fused layer"
        )
    parts = [pieces[i] for i in sorted(pieces)]
    downs, ups = [p[DOWN] for p in parts], [p[UP] for p in parts]
    if len(parts) == len(rule.foreign) and all(
        torch.equal(p[DOWN], downs[0]) and p[ALPHA] == parts[0][ALPHA] for p in parts
    ):
        return {DOWN: downs[0], UP: torch.cat(ups), ALPHA: parts[0][ALPHA]}
    rows = rule.rows or (ups[0].shape[0],) * len(rule.foreign)
    rank = sum(d.shape[0] for d in downs)
    up = ups[0].new_zeros((sum(rows), rank, *ups[0].shape[2:]))
    at = 0
    for i, part in sorted(pieces.items()):
        r = part[DOWN].shape[0]
        up[sum(rows[:i]) : sum(rows[: i + 1]), at : at + r] = part[UP] * (part[ALPHA] / r)
        at += r
    return {DOWN: torch.cat(downs), UP: up, ALPHA: torch.tensor(float(rank), dtype=up.dtype)}
