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
from sfumato.formats import adapter_metadata, adapter_summary, coded, files
from sfumato.formats.clients import loads_in
from sfumato.formats.header import Header
from sfumato.models import locate
from sfumato.models.detection import ADAPTER_TENSOR, Detected, Shapes, has


def describe(path: str | Path) -> dict[str, Any]:
    """JSON-able facts of a file, a diffusers folder, or a folder of one component's weights.

    `kind`: checkpoint, adapter, vae, text_encoder, embedding, controlnet, one of `detect.OTHERS` or unknown (then
    `seems` says more); `family`, `variant`, `dialect`, `prediction`: None where the file does not show it; `quantised`:
    in which form, if it is; `parts` of a checkpoint; `tensors`, `parameters`, `bytes`: counts; `dtypes`: tensors of
    each; `kinds`, `ranks`, `alphas`: layers of an adapter of each; `made_by`: the program that wrote it; `loads_in`:
    what other programs load of it; `metadata`: as in the file.

    Errors: `UserError` for what is missing, truncated or not a weight file.
    """
    path = Path(path).expanduser()
    headers = _headers(path)
    tensors = {name: info for header in headers.values() for name, info in header.tensors.items()}
    metadata = {key: value for header in headers.values() for key, value in header.metadata.items()}
    quantised, plain = _quantised(headers)
    shapes = {name: tensors[name].shape for name in plain}
    found, seems = _identify(path, shapes, metadata)
    seems = f"its weights are quantised ({quantised}); {seems}" if quantised else seems
    adapter = (found is not None and found.kind == "adapter") or has(shapes, ADAPTER_TENSOR)
    facts: dict[str, Any] = {
        "path": str(path),
        "kind": found.kind if found else detect.other_kind(shapes) or "unknown",
        "family": found.family if found else None,
        "variant": found.variant or None if found else None,
        "dialect": found.dialect or None if found else None,
        "prediction": found.prediction if found else None,
        "quantised": quantised or None,
        "parts": list(found.parts) if found else [],
        "tensors": sum(len(header.tensors) for header in headers.values()),
        "parameters": sum(math.prod(i.shape) for header in headers.values() for i in header.tensors.values()),
        "bytes": sum(file.stat().st_size for file in headers),
        "dtypes": dict(Counter(i.dtype for header in headers.values() for i in header.tensors.values()).most_common()),
        **_adapter(headers if adapter else {}),
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
    if facts["kinds"]:
        lines.append(f"  {', '.join(facts['kinds'])}{f' made by {by}' if (by := facts['made_by']) else ''}")
    labelled = {
        "names": facts["dialect"],
        "prediction": facts["prediction"],
        "parts": ", ".join(facts["parts"]),
        "tensors": f"{facts['tensors']:,} ({', '.join(f'{n:,} {dtype}' for dtype, n in facts['dtypes'].items())})",
        "parameters": f"{facts['parameters']:,}",
        "size": f"{facts['bytes'] / 2**20:,.1f} MiB",
        "quantised": facts["quantised"],
        "kinds": ", ".join(f"{n:,} layers of {kind}" for kind, n in facts["kinds"].items()),
        "ranks": ", ".join(f"{n:,} layers of rank {rank}" for rank, n in facts["ranks"].items()),
        "alphas": ", ".join(f"{n:,} layers of alpha {alpha:g}" for alpha, n in facts["alphas"].items()),
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
    if locate.index_of(path):
        try:
            return detect.detect_file(path, "FILE"), ""
        except UserError as error:
            return None, str(error)
    found = detect.identify(shapes, metadata)
    return found, "" if found else detect.unknown(shapes)


def _quantised(headers: Mapping[Path, Header]) -> tuple[str, list[str]]:
    """How weights are quantised ("" if they are not), and the names of the weights alone."""
    kinds, left = Counter[str](), list[str]()
    for path, header in headers.items():
        found = coded.find(path, header)
        kinds.update(of.form for of in found.values())
        left += header.tensors.keys() - coded.companions(header.tensors, found)
    form, _ = locate.quantised(left)
    names = [n for n in left if not form or not locate.quantised([n])[0]]
    return form or ", ".join(kind for kind, _ in kinds.most_common(3)), names


def _adapter(headers: Mapping[Path, Header]) -> dict[str, Any]:
    """Facts of an adapter; empty ones of anything else."""
    made = {"kinds": {}, "ranks": {}, "alphas": {}, "made_by": ""}
    for path, header in headers.items():
        made |= adapter_summary.summary(header, None if path.suffix in files.PICKLES else path)
        made["made_by"] = adapter_metadata.made_by(header.metadata, header.tensors)
    return made


def _loads_in(found: Detected | None, shapes: Shapes) -> list[dict[str, Any]]:
    if found is None or found.kind != "adapter":
        return []
    each = loads_in(shapes, families.facts(found.family).loads_in)
    return [{**asdict(of), "text": of.text("convert it with --to {}")} for of in each]


def _headers(path: Path) -> dict[Path, Header]:
    """file -> its header, for all weight files of what `path` names."""
    if not path.is_dir():
        return {path: files.read_header(path)}
    if listed := locate.index_of(path):
        index = locate.read_json(listed)
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
