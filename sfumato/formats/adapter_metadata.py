"""What a file of an adapter says of itself beside its tensors: who made it, and PEFT's config with the alphas that PEFT
keeps there."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import UserError
from sfumato.formats import files

if TYPE_CHECKING:
    from torch import Tensor

DIFFUSERS_CONFIG = "lora_adapter_metadata"
"""In a file's metadata: the configs of its parts as diffusers saves them, "transformer.lora_alpha" and so on."""
PEFT_CONFIG = "adapter_config.json"
"""Beside `adapter_model.safetensors`, as PEFT saves an adapter."""
_RANKS = {"lora_A.weight": 0, "lora_down.weight": 0, "hada_w1_b": 0, "lokr_w1_b": 0, "lokr_w2_b": 0}
"""Leaf -> its dimension that is the rank."""


def made_by(metadata: Mapping[str, str], names: Collection[str] = ()) -> str:
    """The program that wrote an adapter, as far as it left a mark; "" if it left none. `names`: of the tensors."""
    text = " ".join(metadata.get(key, "") for key in ("software", "modelspec.implementation", "ss_training_comment"))
    for mark, program in (
        ("sfumato", "sfumato"),
        ("ai-toolkit", "ai-toolkit"),
        ("musubi", "musubi-tuner"),
        ("OneTrainer", "OneTrainer"),
        ("SimpleTuner", "SimpleTuner"),
    ):
        if mark.lower() in text.lower():
            return program
    for start, program in (("ss_sfumato_", "sfumato"), ("ot_", "OneTrainer")):
        if any(key.startswith(start) for key in metadata):
            return program
    module = metadata.get("ss_network_module", "")
    if module.startswith("lycoris"):
        return "LyCORIS in kohya's scripts"
    if module:
        return "kohya's scripts"
    if any(name.startswith(("lora_transformer_", "bundle_emb")) for name in names):
        return "OneTrainer"
    if any(name.startswith("lycoris_") for name in names):
        return "LyCORIS (SimpleTuner, for example)"
    if any(".processor." in name and "_lora" in name for name in names):
        return "diffusers or XLabs"
    if any(name.startswith("base_model.model.") for name in names):
        return "PEFT"
    return "diffusers" if DIFFUSERS_CONFIG in metadata else ""


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of an adapter file, with the alphas that stand in PEFT's config. Errors: as `files.load`
    and `peft_config`."""
    metadata = dict(files.read_header(path).metadata)
    return with_alphas(files.load(path), peft_config(metadata, path)), metadata


def peft_config(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """PEFT's config of an adapter, from its metadata or from the file beside it; empty where there is none.

    Fields of diffusers' begin with the part that they are for ("transformer.r"). Errors: `UserError` if it cannot be
    read.
    """
    beside, where = path.parent / PEFT_CONFIG, f"{path} ({DIFFUSERS_CONFIG})"
    text = metadata.get(DIFFUSERS_CONFIG, "")
    if not text and path.stem == "adapter_model" and beside.is_file():
        text, where = beside.read_text(encoding="utf-8"), str(beside)
    try:
        config = json.loads(text) if text else {}
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); the scale of the adapter stands there") from None
    return config if isinstance(config, dict) else {}


def with_alphas(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a file, with an alpha for every layer whose alpha stands in PEFT's config instead.

    PEFT scales by alpha / r, or by alpha / sqrt(r) if `use_rslora`; LoKr of two whole factors too, where LyCORIS does
    not: there it goes into a factor. Source: `peft.utils.get_pattern_key`, `LoraLayer.update_layer`.
    """
    import torch

    out = dict(tensors)
    if not config:
        return out
    done = {key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")}
    for key, tensor in tensors.items():
        name, rank = _layer(key, tensor)
        if not name or name in done or (not rank and f"{name}.lokr_w1" not in tensors):
            continue
        done.add(name)
        alpha = _alpha(config, name, rank)
        if alpha is not None and rank:
            out[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        elif alpha is not None:
            out[key] = tensor * alpha
    return out


def _layer(key: str, tensor: Tensor) -> tuple[str, int]:
    """(name of the layer, rank) if a tensor shows it; rank 0: of LoKr's whole factor, which has none."""
    key = re.sub(r"\.lora_(A|B)\.(?!weight)[^.]+\.weight$", r".lora_\1.weight", key)
    for leaf, dimension in _RANKS.items():
        if key.endswith(f".{leaf}"):
            return key[: -len(leaf) - 1], tensor.shape[dimension]
    whole = ".lokr_w2"
    return (key.removesuffix(whole), 0) if key.endswith(whole) else ("", 0)


def _alpha(config: Mapping[str, Any], name: str, rank: int) -> float | None:
    """The alpha of a layer of that rank; of a layer without rank its scale; None: the config does not say."""
    prefix, path = _part(config, name)
    alpha = _matched(config.get(f"{prefix}alpha_pattern"), path)
    if alpha is None:
        alpha = config.get(f"{prefix}lora_alpha", config.get(f"{prefix}alpha"))
    if alpha is None:
        return None
    if config.get(f"{prefix}use_rslora"):
        return float(alpha) * math.sqrt(rank)
    if rank:
        return float(alpha)
    r = _matched(config.get(f"{prefix}rank_pattern"), path) or config.get(f"{prefix}r")
    return float(alpha) / float(r) if r else None


def _part(config: Mapping[str, Any], name: str) -> tuple[str, str]:
    """("transformer.", path) if the config's fields stand by part, else ("", path)."""
    path = name.removeprefix("base_model.model.")
    part, _, rest = path.partition(".")
    return (f"{part}.", rest) if f"{part}.r" in config else ("", path)


def _matched(patterns: object, path: str) -> float | None:
    """The value of the first pattern that the end of a path matches."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return float(value)
    return None
