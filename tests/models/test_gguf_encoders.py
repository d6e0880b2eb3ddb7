"""Text encoders in GGUF files, under the names that the package `gguf` gives transformers' tensors."""

from __future__ import annotations

from pathlib import Path

import gguf
import nets
import pytest
import torch
from formats import gguf_files
from tinies import encoders, llms
from torch import Tensor

from sfumato.models.components import Component, open_component
from sfumato.models.encoders.llm import gemma2_component, qwen3_component, qwen25vl_component

ENCODERS: dict[str, tuple[Component, str]] = {
    "t5": (nets.T5, "T5ENCODER"),
    "gemma2": (gemma2_component((), "text_encoder"), "GEMMA2"),
    "qwen3": (qwen3_component((), "text_encoder"), "QWEN3"),
    "qwen25vl": (qwen25vl_component((), "text_encoder"), "QWEN2VL"),
}


def tensors(name: str) -> dict[str, Tensor]:
    """Of the model of language, as transformers names them."""
    made = (encoders.t5 if name == "t5" else getattr(llms, name))().state_dict()
    start = "model.language_model." if name == "qwen25vl" else ""
    found = {
        key.removeprefix(start): t for key, t in made.items() if key.startswith(start) and "embed_tokens" not in key
    }
    table = "shared.weight" if name == "t5" else "embed_tokens.weight"
    return found | {table: made[start + table]}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_read_as_its_blocks_say(name: str, tmp_path: Path) -> None:
    part, arch = ENCODERS[name]
    plain, before = tensors(name), "" if name == "t5" else "model."
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], 8)
    names = {key: table.get_name(before + key, try_suffixes=(".weight", ".bias")) for key in plain}
    assert None not in names.values() and len(set(names.values())) == len(names)
    # llama.cpp's converter adds 1 to the norms of Gemma.
    added = {key: float(name == "gemma2" and key.endswith("norm.weight")) for key in plain}
    held = {names[key]: t + added[key] for key, t in plain.items()} | {"output.weight": torch.zeros(3, 3)}
    wanted = gguf_files.write(tmp_path / "a.gguf", held, arch=arch.lower())
    weights = open_component(part, str(tmp_path / "a.gguf"))
    assert weights.key_format.name == "llama.cpp" and set(weights.unused or ()) == {"output.weight"}
    net = nets.built(part, {key: wanted[names[key]] - added[key] for key in plain}).state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        found = weights.build(dtype).state_dict()
        assert all(torch.equal(found[key], t.to(dtype)) for key, t in net.items())
    again = weights.key_format.write(dict(weights.natives(torch.float32)))
    torch.testing.assert_close(again, {key: wanted[key] for key in again}, rtol=0, atol=1e-7)
