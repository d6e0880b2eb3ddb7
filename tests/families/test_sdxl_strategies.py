"""Captions to tokens to states, and what the U-Net is told of sizes, against diffusers and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tinies import encoders, sdxl
from torch import Tensor, nn

from sfumato.families.sdxl.facts import Options
from sfumato.families.sdxl.family import FAMILY
from sfumato.models import loading
from sfumato.models.base import Models, SampleInfo

CAPTIONS = ["a cat on a mat", "", "red " * 80 + "end", "one, two! " * 60]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl.write(tmp_path_factory.mktemp("model")).model


def said(models: Models, captions: list[str]) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(models.encode(models.tokenize(captions)))


def theirs(net: nn.Module, tokenizer: Any, caption: str, length: int) -> tuple[Tensor, Tensor]:
    """(length + 2, d) states of a caption, each run of 75 tokens encoded by itself, and what the net says of the first run as a whole."""
    ids = tokenizer(caption, add_special_tokens=False, truncation=True, max_length=length).input_ids
    runs = [ids[start : start + 75] for start in range(0, length, 75)]
    rows = [
        [tokenizer.bos_token_id, *run, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * (75 - len(run))]
        for run in runs
    ]
    with torch.no_grad():
        found = [net(torch.tensor([row]), output_hidden_states=True) for row in rows]
    parts = [each.hidden_states[-2][0] for each in found]
    return torch.cat([parts[0][:1], *(part[1:76] for part in parts), parts[-1][76:]]), found[0][0][0]


@pytest.mark.parametrize("length", [75, 150, 225])
def test_states_of_chunks_are_those_of_each_chunk(path: Path, length: Any) -> None:
    models = loading.load(FAMILY, str(path), Options(max_token_length=length))
    got = said(models, CAPTIONS)
    assert got["hidden"].shape == (len(CAPTIONS), length + 2, sdxl.CONTEXT)
    for i, caption in enumerate(CAPTIONS):
        first, _ = theirs(sdxl.clip_l(), encoders.clip_tokenizer(), caption, length)
        second, pooled = theirs(encoders.clip_g(), encoders.clip_tokenizer(g=True), caption, length)
        torch.testing.assert_close(got["hidden"][i], torch.cat([first, second], 1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got["pooled"][i], pooled, atol=1e-5, rtol=1e-5)


def test_weights_multiply_the_states_of_their_tokens_in_both_encoders(path: Path) -> None:
    plain = loading.load(FAMILY, str(path), Options(max_token_length=150))
    weighted = loading.load(FAMILY, str(path), Options(max_token_length=150, weighted_captions=True))
    caption = "a (cat:1.5) on [a] mat"
    tokens, expected, found = (
        weighted.tokenize([caption]),
        said(plain, ["a cat on a mat"]),
        said(weighted, [caption]),
    )
    assert torch.equal(tokens["clip_l_weights"], tokens["clip_g_weights"])
    factor = tokens["clip_l_weights"][:, :, 1:-1].flatten(1)[..., None]
    assert sorted(set(factor.flatten().tolist())) == pytest.approx([1 / 1.1, 1.0, 1.5])
    expected["hidden"][:, 1:-1] *= factor
    torch.testing.assert_close(found["hidden"], expected["hidden"])
    assert torch.equal(found["pooled"], expected["pooled"])


def test_the_first_end_mark_speaks_for_the_caption(path: Path) -> None:
    """What is written after it is padding to bigG, whose attention looks back only."""
    models = loading.load(FAMILY, str(path), Options())
    tokens = dict(models.tokenize(["a cat"]))
    before = models.encode(tokens)["pooled"]
    ids = tokens["clip_g_ids"].clone()
    ids[..., -3:] = torch.tensor([5, models.tokenizers["clip_g"].eos_token_id, 7])
    assert torch.equal(models.encode({**tokens, "clip_g_ids": ids})["pooled"], before)


def test_settings_say_what_the_result_depends_on(path: Path) -> None:
    a, b, c = (
        loading.load(FAMILY, str(path), Options(**told)).tokenize_strategy.settings  # type: ignore[arg-type]
        for told in ({}, {"max_token_length": 150}, {"weighted_captions": True})
    )
    assert a != b != c != a
    assert a["clip_l pad"] != a["clip_g pad"]


def test_text_encoders_in_different_formats(path: Path) -> None:
    """One is trained in fp32, the other frozen in bf16."""
    models = loading.load(FAMILY, str(path), Options(), dtype={"clip_l": torch.float32, "clip_g": torch.bfloat16})
    found, exact = said(models, CAPTIONS), said(loading.load(FAMILY, str(path), Options()), CAPTIONS)
    assert found["hidden"].dtype == torch.float32
    torch.testing.assert_close(found["hidden"][..., : sdxl.L_WIDTH], exact["hidden"][..., : sdxl.L_WIDTH])


@pytest.mark.parametrize("cropped", [(0, 0), (16, 24)])
def test_sizes_are_told_as_by_the_pipeline(path: Path, cropped: tuple[int, int]) -> None:
    """Original height and width, the crop's top and left, target height and width: the pipeline's own label and what it draws by it."""
    models, pipe = loading.load(FAMILY, str(path), Options()), sdxl.pipeline()
    pipe.set_progress_bar_config(disable=True)
    labels: list[Tensor] = []
    handle = pipe.unet.add_embedding.register_forward_pre_hook(lambda _, args: labels.append(args[0]))
    noise = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    told = {"original_size": (70, 90), "crops_coords_top_left": cropped, "target_size": (32, 48)}
    pipe(
        "a cat",
        height=32,
        width=48,
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=noise,
        output_type="latent",
        **told,
    )
    handle.remove()
    sizes = torch.tensor([[70, 90, *cropped, 32, 48]])
    cond = models.condition(said(models, ["a cat"]), SampleInfo(sizes=sizes))
    torch.testing.assert_close(cond["y"], labels[0], atol=1e-5, rtol=1e-5)
    assert cond["y"].dtype == torch.float32 and cond["y"].shape == (1, sdxl.G_WIDTH + 6 * 256)


def test_sizes_are_exact_whatever_the_format_of_the_text(path: Path) -> None:
    """bf16 would hold 1023 as 1024."""
    models = loading.load(FAMILY, str(path), Options())
    cond = {name: t.bfloat16() for name, t in said(models, ["a cat"]).items()}
    with torch.autocast("cpu", torch.bfloat16):
        a, b = (
            models.condition(cond, SampleInfo(sizes=torch.tensor([[side, side, 0, 0, side, side]])))["y"]
            for side in (1023, 1024)
        )
    assert a.dtype == torch.float32
    assert (a - b).abs().max() > 0.5
