"""Weights in fewer bits, against the packages whose formats they are."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional as bitsandbytes
from comfy_kitchen.backends.eager import quantization as comfy

from sfumato.tensors.stored import FP8, NF4, Format, Int8

BF16 = torch.bfloat16


def weight(*shape: int) -> torch.Tensor:
    """Random, with columns of outliers, as trained weights have them."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    made[:, ::97] *= 8
    return made


def lost(format: Format, exact: torch.Tensor, dtype: torch.dtype = torch.float32) -> float:
    found = format.dequantise(format.quantise(exact), exact.shape, dtype)
    return float((found.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("format", "bits", "most"),
    [(FP8(), 8.5, 0.022), (FP8(0), 8.1, 0.027), (Int8(256), 8.1, 0.009), (Int8(), 8.1, 0.036), (NF4(), 4.26, 0.14)],
)
def test_error_and_size(format: Format, bits: float, most: float) -> None:
    exact = weight(512, 1024)
    assert most / 1.3 < lost(format, exact) < most
    assert lost(format, exact, BF16) < most * 1.05
    assert format.nbytes(exact.shape) == pytest.approx(exact.numel() * bits / 8, rel=0.01)
    stored = format.quantise(exact)
    empty = format.outline(exact.shape)
    assert {n: (t.shape, t.dtype) for n, t in empty.items()} == {n: (t.shape, t.dtype) for n, t in stored.items()}
    halves = [format.quantise(half) for half in exact.split(256)]
    assert all(torch.equal(t, stored[name]) for name, t in format.join(halves).items())
    assert not format.dequantise(format.quantise(exact * 0), exact.shape, BF16).any()


def test_int8_is_comfy_kitchens() -> None:
    exact = weight(64, 512)
    codes, scale = comfy.quantize_int8_convrot_weight(exact, 256)
    found = Int8.of(exact.shape).quantise(exact)
    assert (codes - found["codes"]).abs().max() <= 1 and (codes != found["codes"]).float().mean() < 1e-3
    torch.testing.assert_close(found["scale"], scale)
    back = Int8(256).dequantise({"codes": codes, "scale": scale}, exact.shape, torch.float32)
    torch.testing.assert_close(back, comfy.dequantize_int8_convrot_weight(codes, scale, 256))
    groups = {(8, 512): 256, (8, 320): 64, (8, 48): 16, (8, 40): 0, (8, 20, 4, 4): 64}
    assert {shape: Int8.of(shape).turn for shape in groups} == groups


def test_nf4_is_bitsandbytes() -> None:
    # Largest numbers that bf16 holds: bitsandbytes keeps them in fp32.
    exact = weight(64, 256).unflatten(1, (-1, 64))
    exact = (exact / exact.abs().amax(-1, keepdim=True) * 0.25).flatten(1)
    codes, state = bitsandbytes.quantize_4bit(exact, blocksize=64, quant_type="nf4")
    found = NF4().quantise(exact)
    assert torch.equal(found["codes"].flatten(), codes.flatten())
    torch.testing.assert_close(
        NF4().dequantise(found, exact.shape, torch.float32), bitsandbytes.dequantize_4bit(codes, state)
    )
