"""fp8 weights with scales: read as the product in fp32, written so that the whole range of e4m3 is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfumato.formats.coded import companions, find
from sfumato.formats.files import load, read_header, save
from sfumato.formats.lazy import Lazy
from sfumato.formats.planned import made
from sfumato.formats.scaled_fp8 import quantised

FP8 = torch.float8_e4m3fn


def weights() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "net.a.weight": 0.01 * torch.randn(6, 4, generator=g),
        "net.b.weight": 3000 * torch.randn(5, 4, generator=g),
        "net.a.bias": torch.randn(6, generator=g).bfloat16(),
    }


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("rows", [False, True])
def test_what_is_read_is_weight_times_scale(tmp_path: Path, scale: str, rows: bool) -> None:
    stored, wanted = {"net.scaled_fp8": torch.zeros(2, dtype=FP8)}, {}
    for name, t in weights().items():
        if t.ndim == 1:
            stored[name] = wanted[name] = t
            continue
        factor = t.abs().amax(1, keepdim=True) / 448 if rows else t.abs().amax() / 448
        stored |= {name: (t / factor).to(FP8), f"{name.removesuffix('weight')}{scale}": factor}
        wanted[name] = (stored[name].float() * factor).bfloat16()
    save(tmp_path / "a.safetensors", stored | {"net.a.scale_input": torch.ones(())})
    lazy = Lazy.of([tmp_path / "a.safetensors"])
    assert set(lazy) == set(wanted)
    assert {n: of.form for n, of in lazy.coded.items()} == dict.fromkeys(("net.a.weight", "net.b.weight"), "fp8 scaled")
    for read in (lazy, lazy.cast(None, map=False), {name: made(t) for name, t in lazy.as_stored().items()}):
        assert all(torch.equal(read[name], t) and read[name].dtype == t.dtype for name, t in wanted.items())
    assert torch.equal(lazy.below("net.").cast(torch.float32)["a.weight"].bfloat16(), wanted["net.a.weight"])


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_written_is_near_and_uses_the_range(tmp_path: Path, stream: bool) -> None:
    path, matrices = tmp_path / "a.safetensors", ["net.a.weight", "net.b.weight"]
    save(tmp_path / "plain.safetensors", weights())
    tensors = Lazy.of([tmp_path / "plain.safetensors"]).as_stored() if stream else weights()
    save(path, quantised(tensors, matrices, ["net.scaled_fp8"]))
    stored = load(path)
    assert stored["net.scaled_fp8"].dtype == FP8 and stored["net.scaled_fp8"].numel() == 2
    for name in matrices:
        assert stored[name].dtype == FP8 and stored[name].float().abs().max() == 448
        assert stored[f"{name.removesuffix('weight')}scale_weight"].shape == ()
    again = Lazy.of([path])
    for name, t in weights().items():
        torch.testing.assert_close(again[name].float(), t.float(), atol=0.002 * float(t.abs().max()), rtol=0.07)


def test_scales_of_other_formats_are_left_to_be_refused(tmp_path: Path) -> None:
    save(
        tmp_path / "a.safetensors",
        {"a.weight": torch.zeros(4, 4).half(), "a.weight_scale": torch.ones(()), "scaled_fp8": torch.ones(2)},
    )
    save(tmp_path / "b.safetensors", {"a.weight": torch.zeros(4, 4).to(FP8), "a.weight_scale": torch.ones(4, 2)})
    for name in ("a", "b"):
        header = read_header(path := tmp_path / f"{name}.safetensors")
        assert not find(path, header) and not companions(header.tensors, {})
