"""The tensors of a file that something is merged into, made one after another."""

from __future__ import annotations

import torch

from sfumato.formats import scaled_fp8
from sfumato.formats.planned import Writable, as_planned, renamed
from sfumato.models.components import ComponentWeights


def merged(weights: ComponentWeights, dtype: torch.dtype | None = None) -> dict[str, Writable]:
    """Those tensors under the file's names (prefix off); in `dtype`, or each in its own number format.

    Weights in 8 bits with scales keep their format, and their scales where the numbers fit; in another `dtype` all of
    them are given. GGUF's blocks become bf16.
    """
    key_format, coded, scales = weights.key_format, weights.tensors.coded, weights.tensors.scales()
    sources = dict.fromkeys(source for name in weights.changes for source in key_format.sources(name))
    tensors: dict[str, Writable] = {**weights.tensors.as_stored(), **weights.tensors.exact()}
    natives = renamed(key_format.read, {n: tensors[n] for n in (sources | dict.fromkeys(coded) if dtype else sources)})
    out = key_format.write({name: weights.with_change(name, t, dtype or t.dtype) for name, t in natives.items()})
    for name, of in coded.items() if dtype is None else ():
        if name in out and of.scale:
            stored, beside, scale = scales[name]
            out[name], out[beside] = scaled_fp8.recoded(as_planned(out[name]), of, stored.dtype, scale)
        elif name in out:
            out[name] = out[name].to(torch.bfloat16)
    return out
