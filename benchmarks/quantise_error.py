"""What weights lose in each format: relative error of the weight and of a layer's output, bits a number, and the
processor's time, on layers of full size.

Weights are normal numbers, in which one column in a hundred is eight times larger, as columns of trained transformers
are; inputs are normal, one channel in fifty six times larger. Beside our formats: a plain cast to fp8 (what sd-scripts'
--fp8_base does), and bitsandbytes and comfy-kitchen where they are installed. On one core about two minutes.

    PYTHONPATH=. python benchmarks/quantise_error.py
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from load_memory import machine
from torch import Tensor

from sfumato.tensors.stored import FP8, NF4, Format, Int8

RESULTS = Path(__file__).with_name("results") / "quantise_error.json"
LAYERS = {
    "SDXL ff.net.0.proj": (10240, 1280),
    "SD3.5 large mlp.fc2": (2432, 9728),
    "FLUX img_attn.qkv": (9216, 3072),
    "FLUX single linear2": (3072, 15360),
    "T5-XXL wo": (4096, 10240),
    "SD 1.5 conv 1280 -> 640": (640, 1280, 3, 3),
}
ROWS = 256
"""Tokens of an input."""
Made = tuple[Callable[[Tensor], Any], Callable[[Any, torch.Size], Tensor], Callable[[Any], int]]


def ours(format: Format) -> Made:
    return (
        format.quantise,
        lambda parts, shape: format.dequantise(parts, shape, torch.float32),
        lambda parts: sum(t.nbytes for t in parts.values()),
    )


def whole(weight: Tensor) -> dict[str, Tensor]:
    """fp8 with one scale, as in ComfyUI's files."""
    scale = weight.abs().amax() / 448
    return {"codes": (weight / scale).to(torch.float8_e4m3fn), "scale": scale}


def cast() -> Made:
    return (
        lambda w: w.to(torch.float8_e4m3fn),
        lambda codes, shape: codes.float(),
        lambda codes: codes.nbytes,
    )


def formats(shape: tuple[int, ...]) -> dict[str, Made]:
    """Name -> how it is quantised, had back and counted."""
    one = ours(FP8(0))
    found = {
        "fp8, plain cast": cast(),
        "fp8, a scale for all": (whole, one[1], one[2]),
        "fp8, a scale for a row": one,
        "fp8 (64 inputs)": ours(FP8()),
        "int8, not turned": ours(Int8()),
        "int8": ours(Int8.of(shape)),
        "nf4": ours(NF4()),
    }
    return found | (others(shape) if len(shape) == 2 else {})


def others(shape: tuple[int, ...]) -> dict[str, Made]:
    """Other packages' formats."""
    found: dict[str, Made] = {}
    try:
        from bitsandbytes import functional as bnb

        found["bitsandbytes nf4"] = (
            lambda w: bnb.quantize_4bit(w, blocksize=64, quant_type="nf4"),
            lambda made, size: bnb.dequantize_4bit(*made),
            lambda made: made[0].nbytes + made[1].absmax.nbytes,
        )
    except ImportError:
        pass
    try:
        from comfy_kitchen.backends.eager import quantization as comfy

        if shape[1] % 256 == 0:
            found["comfy-kitchen int8 (convrot)"] = (
                lambda w: comfy.quantize_int8_convrot_weight(w, 256),
                lambda made, size: comfy.dequantize_int8_convrot_weight(*made, 256),
                lambda made: made[0].nbytes + made[1].nbytes,
            )
    except ImportError:
        pass
    return found


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def measured(shape: tuple[int, ...], made: Made, generator: torch.Generator) -> dict[str, float]:
    """One format on one layer."""
    quantise, dequantise, nbytes = made
    weight = torch.randn(shape, generator=generator) * 0.02
    weight[:, ::100] *= 8
    x = torch.randn(ROWS, shape[1], generator=generator)
    x[:, ::50] *= 6
    start = time.process_time()
    parts = quantise(weight)
    between = time.process_time()
    back = dequantise(parts, weight.shape)
    end = time.process_time()
    flat, other = (w.flatten(2).sum(-1) if w.ndim == 4 else w for w in (weight, back))
    return {
        "weight_error": error(back, weight),
        "output_error": error(x @ other.t(), x @ flat.t()),
        "bits": nbytes(parts) * 8 / weight.numel(),
        "quantise_ns": (between - start) / weight.numel() * 1e9,
        "dequantise_ns": (end - between) / weight.numel() * 1e9,
    }


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of the results (default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for layer, shape in LAYERS.items():
        for name, made in formats(shape).items():
            found = measured(shape, made, torch.Generator().manual_seed(0))
            rows.append(
                {"layer": layer, "shape": list(shape), "format": name, **{k: round(v, 5) for k, v in found.items()}}
            )
            print(f"{layer:26}{name:30}" + "".join(f"{v:12.4f}" for v in found.values()), flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
