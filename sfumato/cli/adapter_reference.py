"""Prints docs/adapters.md, the page of all kinds of adapters, their options, and what gets them: `python -m
sfumato.cli.adapter_reference`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from inspect import getdoc

import torch
from torch import nn

from sfumato import families
from sfumato.adapters import files, kind, kinds, values
from sfumato.adapters.arguments import CommonArgs
from sfumato.adapters.base import Adapter
from sfumato.adapters.plan import ALL, CONVOLUTIONS, DEFAULT, DROPOUTS, NONE
from sfumato.adapters.presets import PRESETS
from sfumato.cli import options
from sfumato.cli.reference import expected_of
from sfumato.errors import UserError
from sfumato.formats.clients import CLIENTS, Names, loads_in
from sfumato.formats.dialect import usual

HEAD = f"""# Adapters

Made by `python -m sfumato.cli.adapter_reference > docs/adapters.md` from `sfumato/adapters/` and the families; do not
edit.

`network_module` names the kind; without it a run that starts from `network_weights` takes the file's, and any other
`lora`. kohya's names are read as they are written there: `networks.KIND`, whatever follows KIND (`networks.lora_flux`),
and `lycoris.kohya` with `algo=KIND`. Everything below is an argument in `network_args`, as `name=value`.

`target` names sets of layers, separated by commas, and then nothing else gets adapters: a set of any component
(`target=attention,mlp`), a component, which means its default layers (`target=denoiser`, `target=text_encoders`), or a
set of one (`target=clip_l.attention`). `{ALL}` is every linear layer and convolution, `{NONE}` no layer, for
include_patterns to add some. Without target, `{DEFAULT}` gets adapters, and with conv_dim `{CONVOLUTIONS}` as well.

Patterns are regular expressions. A module path is the one of the original checkpoint
(`double_blocks.0.img_attn.qkv`), the one that sd-scripts has where it differs, or either with the component before it
(`clip_l.text_model.encoder.layers.0.mlp.fc1`); kohya's name is that of the file (`lora_unet_double_blocks_0_...`).
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD, *_kinds()]
    for name in kinds():
        parts += _kind(name)
    parts += ["## Arguments of all kinds\n", *_options(CommonArgs)]
    parts += _presets()
    for name in families.names():
        parts += _family(name)
    return "\n".join(parts)


# --- kinds ---


def _kinds() -> Iterator[str]:
    yield "## Kinds\n"
    head = ("kind", "also called", "tensors of a layer", "has", "read in kohya's names by", "in PEFT's by")
    yield from _table(head, map(_row, kinds()))


def _row(name: str) -> tuple[str, ...]:
    own = kind(name)
    also = vars(own).get("aliases", ())
    return f"`{name}`", _listed(also), _listed(sorted(_adapter(own).tensors())), _features(own), *_dialects(own)


def _adapter(own: type[Adapter]) -> Adapter:
    """That of a layer with the kind's default options."""
    return own(nn.Linear(16, 16), own.Options(), torch.Generator().manual_seed(0))


def _features(own: type[Adapter]) -> str:
    found = [name for name in DROPOUTS if name in own.supports]
    found += ["loraplus_lr_ratio"] if own.loraplus_parameters is not Adapter.loraplus_parameters else []
    with suppress(UserError):
        _adapter(own).scale_norm(1.0)
        found.append("scale_weight_norms")
    return _listed(found)


def _dialects(own: type[Adapter]) -> tuple[str, str]:
    """The programs that read the kind's tensors in kohya's names and in PEFT's, where they know the layer's name."""
    dialects = usual({"denoiser": "lora_unet_"}, {"denoiser": ""}, {"denoiser": ""}, {})
    clients = tuple(client.name for client in CLIENTS)
    known = (Names(dialect="kohya", component="denoiser", names=".*", known_to=clients),)
    cells = []
    for name in ("kohya", "peft"):
        try:
            written = files.write(dialects[name], {("denoiser", "layer"): _adapter(own).tensors()})
            found = loads_in({key: tuple(t.shape) for key, t in written.items()}, known)
            cells.append(", ".join(each.client for each in found if each.loaded) or "none")
        except UserError:
            cells.append("cannot be written")
    return cells[0], cells[1]


def _kind(name: str) -> Iterator[str]:
    own = kind(name)
    yield f"### {name}\n"
    yield " ".join((getdoc(own) or "").split("\n\n")[0].split()) + "\n"
    yield from _options(own.Options)


# --- arguments ---


def _options(record: type) -> Iterator[str]:
    names = [name for name in values.types(record) if name not in DROPOUTS]
    found = options.of(record, "")
    rows = [
        (f"`{o.name}`", expected_of(o), "" if o.default is None else f"`{o.default}`", o.help)
        for o in map(found.__getitem__, names)
    ]
    if rows:
        yield from _table(("argument", "value", "default", "meaning"), rows)


def _presets() -> Iterator[str]:
    yield "## Presets of lycoris.kohya\n"
    yield (
        "As sets of this page; those that a family does not have are passed over. A preset file names sets in place of "
        "classes, and paths or patterns of them as LyCORIS does.\n"
    )
    rows = (
        (f"`{name}`", _listed(sets), "" if large else "not larger than 1x1") for name, (sets, large) in PRESETS.items()
    )
    yield from _table(("preset", "target", "convolutions"), rows)


def _family(name: str) -> Iterator[str]:
    yield f"## {families.family(name).title}\n"
    targets = families.family(name).targets
    alike = {id(sets): [c for c, others in targets.items() if others is sets] for sets in targets.values()}
    rows = [
        (", ".join(alike[id(sets)]), f"`{each}`", _listed(patterns))
        for component, sets in targets.items()
        if alike[id(sets)][0] == component
        for each, patterns in sets.items()
    ]
    yield from _table(("component", "set", "module paths"), rows)
    if record := families.facts(name).network_args:
        yield from _options(record)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""


if __name__ == "__main__":
    print(page(), end="")
