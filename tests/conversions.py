"""Adapters of every kind in the names of programs, on tiny models, and the page of what converting them finds.

`python tests/conversions.py` writes `docs/conversions.md` anew.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tinies import flux, sdxl
from torch import Tensor

from sfumato import adapters
from sfumato.adapters import files as adapter_files
from sfumato.adapters.base import Adapter
from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.formats.dialect import ALPHA, AdapterTensors, ModulePath
from sfumato.tools import adapter_file
from sfumato.tools.convert_adapter import convert
from sfumato.tools.verify import verify

PAGE = Path(__file__).parents[1] / "docs" / "conversions.md"
LAYERS: Mapping[str, tuple[ModulePath, ...]] = {
    "flux": tuple(
        ("denoiser", path)
        for path in (
            "double_blocks.0.img_attn.qkv",  # q, k and v of equal rows
            "double_blocks.0.img_mlp.0",
            "single_blocks.0.linear1",  # q, k, v and the two-layer net, of other rows
            "final_layer.adaLN_modulation.1",  # rows change places
        )
    ),
    "sdxl": (
        ("denoiser", "input_blocks.4.1.transformer_blocks.0.attn1.to_q"),
        ("denoiser", "input_blocks.4.0.in_layers.2"),  # a 3x3 convolution
        ("clip_l", "text_model.encoder.layers.0.self_attn.q_proj"),
    ),
}
WAYS = (
    ("sdxl", "kohya", "comfy"),
    ("sdxl", "kohya", "diffusers"),
    ("sdxl", "diffusers", "lycoris"),
    ("flux", "comfy", "kohya"),
    ("flux", "kohya", "diffusers"),
    ("flux", "diffusers", "comfy"),
)
"""Family, from, to."""


class Form(NamedTuple):
    """A form that files of a kind have."""

    title: str
    kind: type[Adapter]
    options: Mapping[str, Any]
    ranks: tuple[int, ...] = (2,)
    """Of one layer, or piece of a layer, after the other, again and again."""
    alpha: bool = True


@cache
def model(family: str) -> Path:
    """A tiny model's denoiser and, of SDXL, all the rest."""
    folder = Path(tempfile.mkdtemp(prefix="sfumato-"))
    return {"flux": lambda: flux.write(True, folder), "sdxl": lambda: sdxl.write(folder)}[family]().model


@cache
def outline(family: str) -> adapter_file.Outline:
    (found,) = adapter_file._outlines(Path(), {}, {}, None, str(model(family)))
    return found


def opened_once(patch: pytest.MonkeyPatch) -> None:
    """A tiny model's header need not be read for each file."""
    slow = adapter_file._outlines
    known = cache(lambda model: slow(Path(), {}, {}, None, model))
    patch.setattr(adapter_file, "_outlines", lambda file, tensors, metadata, family, model: known(model))
    patch.setattr(adapter_file, "open_checkpoint", cache(adapter_file.open_checkpoint))


def forms() -> Iterator[Form]:
    """Every kind with files of its own, in every form that one of its switches gives to them."""
    seen = set()
    for name in sorted(adapters.kinds(), key=lambda name: name != "lora"):
        kind = adapters.kind(name)
        if "read" not in vars(kind):
            continue  # its files are its parent's
        switches: list[dict[str, Any]] = [{}]
        for field in fields(kind.Options):
            if field.type == "bool":
                switches.append({field.name: not field.default})
                if field.name == "dora_wd":
                    switches.append({"dora_wd": True, "wd_on_out": False})
        for options in switches:
            form = Form(", ".join([name, *(f"{k}={v}" for k, v in options.items())]), kind, options)
            try:
                made = [(path[1], tensors_of(form, "sdxl", path)) for path in LAYERS["sdxl"]]
            except UserError:
                continue  # the kind does not have this setting
            shapes = {(path, leaf): tuple(t.shape) for path, tensors in made for leaf, t in tensors.items()}
            if (look := tuple(sorted(shapes.items()))) not in seen:
                seen.add(look)
                yield form
        if name == "lora":
            yield Form("lora, mixed ranks", kind, {}, ranks=(2, 3, 1))
            yield Form("lora, no alpha", kind, {}, alpha=False)


def tensors_of(form: Form, family: str, path: ModulePath, rows: int | None = None, at: int = 0) -> AdapterTensors:
    """An adapter of a layer, or of a piece of so many rows, away from its start."""
    shape = outline(family).layers[path]
    g = torch.Generator().manual_seed(at)
    weight = 0.1 * torch.randn(rows or shape[0], *shape[1:], generator=g)
    options = form.kind.Options(rank=form.ranks[at % len(form.ranks)], alpha=1.0, **form.options)
    adapter = form.kind(adapter_file._layer(weight), options, g)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    tensors = adapter.tensors()
    return tensors if form.alpha else {leaf: t for leaf, t in tensors.items() if leaf != ALPHA}


def written(form: Form, family: str, dialect_name: str) -> dict[str, Tensor]:
    """A file as a program with these names trains it: of a layer that it has in pieces, an adapter each. Errors:
    `UserError` if the names cannot hold the kind."""
    dialect = outline(family).dialects[dialect_name]
    out: dict[str, Tensor] = {}
    for at, path in enumerate(LAYERS[family]):
        names, rule = dialect.names(path)
        if len(names) == 1:
            out |= adapter_files.write(dialect, {path: tensors_of(form, family, path, at=at)})
            continue
        shape = outline(family).layers[path]
        assert rule is not None
        rows = rule.rows or (shape[0] // len(names),) * len(names)
        for i, (name, n) in enumerate(zip(names, rows, strict=True)):
            tensors = form.kind.fold_alpha(tensors_of(form, family, path, n, at + i))
            out |= {f"{name}.{dialect.tensor_names.get(leaf, leaf)}": t for leaf, t in tensors.items()}
    return out


def cell(form: Form, way: tuple[str, str, str], folder: Path) -> str:
    """ "exact", or why not. What is written has the same effect, which `verify` finds."""
    family, source, to = way
    one, other = folder / "one.safetensors", folder / "other.safetensors"
    try:
        files.save(one, written(form, family, source), {})
    except UserError as error:
        return reason(error)
    try:
        convert(one, other, to, model=str(model(family)))
    except UserError as error:
        assert not other.exists()
        return reason(error)
    found = verify(one, other, model=str(model(family)))
    other.unlink()
    assert found.same, found.differences
    return found.verdict


def reason(error: UserError) -> str:
    """Without the layer's name, which comes first in a message."""
    text = error.messages[0].removeprefix(f"{error.messages[0].split('.safetensors: ')[0]}.safetensors: ")
    return text.rpartition(": ")[2] if ": " in text else text


FORMS = tuple(forms())


def cells(folder: Path) -> dict[tuple[str, tuple[str, str, str]], str]:
    with pytest.MonkeyPatch.context() as patch:
        opened_once(patch)
        return {(form.title, way): cell(form, way, folder) for form in FORMS for way in WAYS}


def page(table: Mapping[tuple[str, tuple[str, str, str]], str]) -> str:
    """The page of the docs."""
    reasons: dict[str, int] = {}

    def said(text: str) -> str:
        return text if text == "exact" else f"refused [{reasons.setdefault(text, len(reasons) + 1)}]"

    heads = [f"{source} to {to} ({family})" for family, source, to in WAYS]
    lines = [f"| {' | '.join(['kind', *heads])} |", "|---" * (len(heads) + 1) + "|"]
    lines += [f"| {' | '.join([form.title, *(said(table[form.title, way]) for way in WAYS)])} |" for form in FORMS]
    return "\n".join(
        [
            "# Conversions of adapters",
            "",
            "What `sfumato convert IN OUT --to kohya|comfy|diffusers|lycoris` does with each kind of adapter. Made and",
            "kept by `tests/tools/test_convert_adapter.py`: each cell was converted and verified on tiny models.",
            "",
            "`lycoris` is kohya's names, which A1111, ComfyUI and `lycoris.kohya` read. SDXL stands for models whose layers",
            "are the same in diffusers, FLUX.1 for those whose q, k and v are one layer in kohya's and ComfyUI's names and",
            "several in diffusers'. `exact`: the same change of every weight, within 2e-6 of its norm. What is refused may",
            "be had as a LoRA that is near to it: `--rank N`, with the error stated. Which programs load the result says",
            "[loads-in.md](loads-in.md): diffusers' pipelines take LoRA and DoRA alone.",
            "",
            *lines,
            "",
            *(f"{n}. {text}" for text, n in reasons.items()),
            "",
        ]
    )


def a_file(path: Path, kind: str = "lora", family: str = "flux", dialect: str = "kohya", **metadata: str) -> Path:
    """An adapter of a kind for the tiny model of a family."""
    form = Form(kind, adapters.kind(kind), {})
    files.save(path, written(form, family, dialect), metadata)
    return path


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as where:
        PAGE.write_text(page(cells(Path(where))), encoding="utf-8")
