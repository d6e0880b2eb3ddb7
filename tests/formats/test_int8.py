"""Weights in int8 as comfy-kitchen makes them and ComfyUI marks them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_kitchen.tensor import TensorWiseINT8Layout
from torch import Tensor

from sfumato.formats.coded import METADATA
from sfumato.formats.files import save
from sfumato.formats.lazy import Lazy
from sfumato.formats.planned import PlannedTensor
from sfumato.formats.scaled_fp8 import recoded

FORMS: dict[str, dict[str, Any]] = {
    "tensor": {},
    "row": {"per_channel": True},
    "rotated": {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
    "rotated by 256": {"per_channel": True, "convrot": True},
}


def quantised(weight: Tensor, path: str, form: str, *, inside: bool = False) -> tuple[dict[str, Tensor], Tensor, Any]:
    """The tensors of a layer in int8, its weight as comfy-kitchen reads it, and what is said of it."""
    codes, params = TensorWiseINT8Layout.quantize(weight, **FORMS[form])
    said = {"format": "int8_tensorwise"}
    rotation = {k: getattr(params, k) for k in ("convrot", "convrot_groupsize")} if params.convrot else {}
    said |= {"params": rotation} if inside else rotation
    tensors = {f"{path}.weight{k}": t for k, t in TensorWiseINT8Layout.state_dict_tensors(codes, params).items()}
    return tensors, TensorWiseINT8Layout.dequantize(codes, params), said


def marked(said: Any) -> Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["tensor", "metadata", "params"])
def test_what_is_read_is_what_comfy_kitchen_reads(tmp_path: Path, form: str, where: str) -> None:
    weight = torch.randn(300, 512, generator=torch.Generator().manual_seed(0))
    tensors, wanted, said = quantised(weight, "net.a", form, inside=where == "params")
    metadata = {METADATA: json.dumps({"layers": {"net.a": said}})} if where == "metadata" else {}
    beside = {} if metadata else {"net.a.comfy_quant": marked(said)}
    save(tmp_path / "a.safetensors", {**tensors, **beside, "net.a.bias": torch.ones(300)}, metadata)
    lazy = Lazy.of([tmp_path / "a.safetensors"])
    assert set(lazy) == {"net.a.weight", "net.a.bias"}
    torch.testing.assert_close(lazy.cast(torch.float32)["net.a.weight"], wanted, rtol=1e-5, atol=1e-5)
    assert lazy["net.a.weight"].dtype == torch.bfloat16
    assert (lazy.cast(torch.float32)["net.a.weight"] - weight).norm() < 0.02 * weight.norm()
    # What is written again is the same, where nothing is changed; what is larger gets another scale.
    codes, _, scale = lazy.scales()["net.a.weight"]
    of, exact = lazy.coded["net.a.weight"], lazy.exact()["net.a.weight"]
    again, same = recoded(exact, of, torch.int8, scale)
    assert torch.equal(again.make(), codes.make()) and torch.equal(same.make(), scale.make())
    larger = PlannedTensor(torch.float32, exact.shape, lambda: 2 * exact.make())
    again, twice = recoded(larger, of, torch.int8, scale)
    assert torch.equal(again.make(), codes.make())
    torch.testing.assert_close(twice.make(), 2 * scale.make())


@pytest.mark.parametrize(
    "said", [None, {"format": "convrot_w4a4"}, {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 7}]
)
def test_other_meanings_of_int8_are_left_to_be_refused(tmp_path: Path, said: Any) -> None:
    tensors = {"a.weight": torch.zeros(4, 64, dtype=torch.int8), "a.weight_scale": torch.ones(4, 1)}
    save(tmp_path / "a.safetensors", tensors | ({"a.comfy_quant": marked(said)} if said else {}))
    lazy = Lazy.of([tmp_path / "a.safetensors"])
    assert not lazy.coded and "a.weight_scale" in lazy
