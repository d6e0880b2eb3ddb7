"""What a weight file or model folder is, from headers alone; imports no torch, unless the file is a pickle."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sfumato import families
from sfumato.errors import UserError
from sfumato.families import detect
from sfumato.formats import files
from sfumato.formats.clients import loads_in
from sfumato.formats.header import Header
from sfumato.models import locate
from sfumato.models.detection import Detected, Shapes

_DOWN = (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight")
"""Ends of the tensors whose rows are the rank of a LoRA."""


def describe(path: str | Path) -> dict[str, Any]:
    """JSON-able facts of a file, a diffusers folder, or a folder of one component's weights.

    `kind`: checkpoint, adapter, vae, text_encoder, embedding, controlnet or unknown (then `seems` says more);
    `family`, `variant`, `dialect`, `prediction`: None where the file does not show it; `parts` of a checkpoint;
    `tensors`, `parameters`, `bytes`: counts; `dtypes`: tensors of each; `ranks`: LoRA layers of each rank;
    `loads_in`: of an adapter, what other programs load of it; `metadata`: as in the file.

    Errors: `UserError` for what is missing, truncated or not a weight file.
    """
    path = Path(path).expanduser()
    headers = _headers(path)
    tensors = {name: info for header in headers.values() for name, info in header.tensors.items()}
    shapes = {name: info.shape for name, info in tensors.items()}
    metadata = {key: value for header in headers.values() for key, value in header.metadata.items()}
    found, seems = _identify(path, shapes, metadata)
    facts: dict[str, Any] = {
        "path": str(path),
        "kind": found.kind if found else "unknown",
        "family": found.family if found else None,
        "variant": found.variant or None if found else None,
        "dialect": found.dialect or None if found else None,
        "prediction": found.prediction if found else None,
        "parts": list(found.parts) if found else [],
        "tensors": sum(len(header.tensors) for header in headers.values()),
        "parameters": sum(math.prod(i.shape) for header in headers.values() for i in header.tensors.values()),
        "bytes": sum(file.stat().st_size for file in headers),
        "dtypes": dict(Counter(i.dtype for header in headers.values() for i in header.tensors.values()).most_common()),
        "ranks": dict(
            sorted(Counter(i.shape[0] for name, i in tensors.items() if name.endswith(_DOWN) and i.shape).items())
        ),
        "loads_in": _loads_in(found, shapes),
        "metadata": metadata,
    }
    return facts if found else facts | {"seems": seems}


def text(facts: dict[str, Any]) -> str:
    """The facts for a reader: one per line, long metadata cut."""
    of = " ".join(str(facts[key]) for key in ("family", "variant") if facts[key])
    lines = [f"{facts['path']}: {facts['kind'].replace('_', ' ')}{f' of {of}' if of else ''}"]
    if "seems" in facts:
        lines.append(f"  {facts['seems']}")
    labelled = {
        "names": facts["dialect"],
        "prediction": facts["prediction"],
        "parts": ", ".join(facts["parts"]),
        "tensors": f"{facts['tensors']:,} ({', '.join(f'{n:,} {dtype}' for dtype, n in facts['dtypes'].items())})",
        "parameters": f"{facts['parameters']:,}",
        "size": f"{facts['bytes'] / 2**20:,.1f} MiB",
        "LoRA": ", ".join(f"{n:,} layers of rank {rank}" for rank, n in facts["ranks"].items()),
    }
    lines += [f"  {name:<12}{value}" for name, value in labelled.items() if value]
    lines += [f"  loads in {each['text']}" for each in facts["loads_in"]]
    if facts["metadata"]:
        lines.append("  metadata")
    for key, value in sorted(facts["metadata"].items()):
        lines.append(
            f"    {key} = "
            f"{value if len(value) <= 200 else f'{value[:200]} ... ({len(value):,} characters; whole with --json)'}"
        )
    return "\n".join(lines)


def _identify(path: Path, shapes: Shapes, metadata: Mapping[str, str]) -> tuple[Detected | None, str]:
    """What a file or folder is; or None and what it seems to be."""
    if (path / "model_index.json").is_file():
        try:
            return detect.detect_file(path, "FILE"), ""
        except UserError as error:
            return None, str(error)
    found = detect.identify(shapes, metadata)
    return found, "" if found else detect.unknown(shapes)


def _loads_in(found: Detected | None, shapes: Shapes) -> list[dict[str, Any]]:
    if found is None or found.kind != "adapter":
        return []
    each = loads_in(shapes, families.facts(found.family).loads_in)
    return [{**asdict(of), "text": of.text("convert it with --to {}")} for of in each]


def _headers(path: Path) -> dict[Path, Header]:
    """file -> its header, for all weight files of what `path` names."""
    if not path.is_dir():
        return {path: files.read_header(path)}
    if (path / "model_index.json").is_file():
        index = locate.read_json(path / "model_index.json")
        parts = [path / name for name in index if (path / name).is_dir() and _has_weights(path / name)]
    else:
        parts = [path]
    return {file: files.read_header(file) for part in parts for file in locate.weight_files(part)}


def _has_weights(folder: Path) -> bool:
    """Tokenizers and schedulers have none."""
    try:
        return bool(locate.weight_files(folder))
    except UserError:
        return False
