"""Text outputs are stored without padding and come back as they were: several fields, each with its own padding, some empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from folders import dataset, folder, plan, subset
from torch import Tensor

from sfumato.data.cache import CachedText, cache_texts
from sfumato.data.store import FileIndex, TensorStore
from sfumato.data.strategies import TextEncoderOutputsCachingStrategy

STRATEGY = TextEncoderOutputsCachingStrategy(
    fields=("text", "text_mask", "glyphs", "glyphs_mask", "ids", "ids_mask", "pooled"),
    ragged={"text": "text_mask", "glyphs": "glyphs_mask", "ids": "ids_mask"},
    lengths={"ids": 8},
    dtype=torch.bfloat16,
)
ROWS = {"a cat": (3, 0, 2), 'a sign "open"': (5, 4, 8), "a": (1, 0, 9), "": (1, 0, 1)}
"""Caption -> used rows of text, glyphs and ids."""


def encode(captions: Sequence[str]) -> dict[str, Tensor]:
    """Stands in for the text encoders: states that are zero, and false in the mask, where the caption has ended."""
    cond: dict[str, Tensor] = {"pooled": torch.tensor([[len(c), 1.0] for c in captions])}
    for place, (name, shape) in enumerate({"text": (4,), "glyphs": (2,), "ids": ()}.items()):
        used = torch.tensor([ROWS[c][place] for c in captions])
        mask = torch.arange(9) < used[:, None]
        values = torch.arange(1, 10).reshape(9, *[1] * len(shape)).expand(len(captions), 9, *shape)
        values = values * mask.reshape(*mask.shape, *[1] * len(shape))
        cond |= {name: values if name == "ids" else values.float(), f"{name}_mask": mask}
    return cond


@pytest.fixture
def kept(tmp_path: Path) -> CachedText:
    """The captions of a folder in a cache on the disk."""
    images = folder(tmp_path / "images", [(64, 64)] * len(ROWS))
    for i, caption in enumerate(ROWS):
        (images / f"{i}.txt").write_text(caption)
    of = plan(dataset(subset(images)))

    def start() -> CachedText:
        store, index = TensorStore(tmp_path / "cache"), FileIndex(tmp_path / "cache")
        return cache_texts(of, store, index, lambda batches: map(encode, batches), "encoder", STRATEGY, settings={})

    assert start().encoded == len(ROWS)
    again = start()
    assert again.found == len(ROWS)
    return again


def test_padding_is_not_stored_and_16_bits_are(kept: CachedText) -> None:
    for caption, rows in ROWS.items():
        entry = kept.read(caption, caption)
        assert [len(entry[name]) for name in ("text", "glyphs", "ids")] == list(rows)
        assert entry["text"].dtype == torch.bfloat16 and entry["ids"].dtype == torch.int64
        assert entry.keys() == {"text", "glyphs", "ids", "pooled"}


def seen(cond: Mapping[str, Tensor], name: str) -> list[list[object]]:
    """The rows of a field that its mask shows, by caption."""
    mask = cond.get(f"{name}_mask", torch.ones(cond[name].shape[:2], dtype=torch.bool))
    assert not cond[name][~mask].any()
    return [rows[used].tolist() for rows, used in zip(cond[name], mask, strict=True)]


@pytest.mark.parametrize("captions", [list(ROWS), list(ROWS)[:1], list(ROWS)[2:]], ids=["all", "one", "no glyphs"])
def test_what_is_read_is_what_was_encoded(kept: CachedText, captions: list[str]) -> None:
    cond, fresh = kept.cond(captions), encode(captions)
    for name in ("text", "glyphs", "ids"):
        assert seen(cond, name) == seen(fresh, name)
    assert torch.equal(cond["pooled"].float(), fresh["pooled"])
    longest = [max(ROWS[c][place] for c in captions) for place in range(3)]
    assert [cond[name].shape[1] for name in ("text", "glyphs", "ids")] == [*longest[:2], max(8, longest[2])]
    assert ("glyphs_mask" in cond) == (longest[1] > 0), "no mask where all rows are used, or there are none"
    assert "ids_mask" in cond
