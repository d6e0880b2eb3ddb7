"""The smaller LoRAs that a DyLoRA file holds: its first ranks, however many."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.formats.adapter_check import check_adapter
from sfumato.formats.dialect import ALPHA, DOWN, UP
from sfumato.formats.metadata import hashes
from sfumato.tools.resize import lora_layers
from sfumato.tools.written import check_output_file


def first_ranks(source: Path, out: Path, unit: int) -> list[Path]:
    """Write `OUT-0004`, `OUT-0008` ... of the first `unit` ranks, the first 2 `unit` and so on, all of them the last.

    Each acts as it did in training, where so many ranks out of all are scaled by sqrt(all / so many) besides
    (arXiv:2210.07558, as sd-scripts has it). Errors: `UserError` for what is not a LoRA, or `unit` does not divide.
    """
    tensors = files.load(source)
    check_adapter(tensors, str(source))
    layers = lora_layers(source, tensors)
    ranks = {len(tensors[keys[DOWN]]) for keys in layers.values()}
    if len(ranks) > 1 or unit < 1 or min(ranks) % unit:
        raise UserError(f"{source}: unit {unit} must divide the rank of every layer, here {sorted(ranks)}")
    (rank,) = ranks
    metadata = files.read_header(source).metadata
    written = []
    for count in range(unit, rank + 1, unit):
        path = out.with_name(f"{out.stem}-{count:04d}{out.suffix}")
        check_output_file(path, source)
        made: dict[str, Tensor] = dict(tensors)
        for keys in layers.values():
            made[keys[DOWN]] = tensors[keys[DOWN]][:count].contiguous()
            made[keys[UP]] = tensors[keys[UP]][:, :count].contiguous()
            # alpha / count is to be alpha / rank times sqrt(rank / count).
            if ALPHA in keys:
                made[keys[ALPHA]] = tensors[keys[ALPHA]] * (count / rank) ** 0.5
            else:
                made[keys[UP]] = made[keys[UP]] * (rank / count) ** 0.5
        own = {k: v for k, v in metadata.items() if not k.startswith("sshs_")} | {"ss_network_dim": str(count)}
        files.save(path, made, {**own, **hashes(made, own)})
        written.append(path)
    return written
