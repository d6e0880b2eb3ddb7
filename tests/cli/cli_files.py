"""Weight files that are a header and zeros, made without torch; the flags of kohya's scripts."""

from __future__ import annotations

import json
import struct
from functools import cache
from pathlib import Path

from sfumato.cli import toml

SHAPES = {
    "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.proj_in.weight": (8, 8, 1, 1),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 16),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (10, 16),
    "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3),
}


def safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A file of fp16 zeros with these names and shapes, byte by byte as the format says."""
    header, at = {}, 0
    for name, shape in shapes.items():
        count = 2
        for side in shape:
            count *= side
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + count]}
        at += count
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    return path


COMMON = "logging models optimizer training dataset losses deepspeed"


@cache
def pairs() -> dict[str, list[str]]:
    """Script -> its flags."""
    table = toml.read(Path(__file__).with_name("kohya_flags.toml"))[0]
    found = {}
    for script, (groups, own) in table["scripts"].items():
        names = [name for group in f"{COMMON} {groups}".split() for name in table["groups"][group].split()]
        found[script] = list(dict.fromkeys([*names, *own.split()]))
    return found
