"""Words that are learnt, as diffusers reads them, beside an adapter, for each block of the U-Net, and from captions as kohya makes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from runs.test_families import prepared, trained
from tinies.cases import Case, cases

from sfumato.formats.files import load

CASES = {case.name: case for case in cases()}
WORD: dict[str, Any] = {"token_string": "hoge", "num_vectors_per_token": 2}


@pytest.fixture
def images(images: Path) -> Path:
    for caption in images.glob("*.txt"):
        caption.write_text(f"a red hoge, {caption.stem}")
    return images


@pytest.mark.parametrize("case", [CASES["sd-1"], CASES["sdxl-base"]], ids=lambda case: case.name)
def test_diffusers_loads_what_was_saved(case: Case, images: Path, tmp_path: Path) -> None:
    files = case.write(tmp_path / "model")
    a_run = prepared(case, files, images, tmp_path / "out", "embedding", learning_rate=0.1, **WORD)
    models = trained(a_run)
    result = tmp_path / "hoge.safetensors"
    a_run.save_result(result, a_run.step, 0)
    pipe, vectors = copy.deepcopy(case.pipeline()), load(result)
    parts = {"clip_l": ("text_encoder", "tokenizer"), "clip_g": ("text_encoder_2", "tokenizer_2")}
    if "emb_params" in vectors:
        pipe.load_textual_inversion(str(result), token="hoge")
    else:
        for name, tensor in vectors.items():
            encoder, tokenizer = (getattr(pipe, part) for part in parts[name])
            pipe.load_textual_inversion({"hoge": tensor}, text_encoder=encoder, tokenizer=tokenizer)
    captions = ["a hoge in the rain", "rain"]
    with torch.no_grad():
        wanted = case.encoded(pipe, captions)
        found = models.encode(models.tokenize(captions))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)
    a_run.trainable.remove()
    with torch.no_grad():
        assert (models.encode(models.tokenize(captions))["hidden"] - found["hidden"]).abs().max() > 1e-2
