"""What FLUX.1 is told of captions, live and as it is kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tinies import encoders, flux

from sfumato.families.flux.facts import Options
from sfumato.families.flux.family import FAMILY
from sfumato.models.base import Models, SampleInfo
from sfumato.models.loading import load
from sfumato.tensors.flow import flux_mu, schedule

CAPTIONS = ["a cat", "", "red " * 30]


def opened(folder: Path, guidance: bool = True, **options: Any) -> Models:
    files = flux.write(guidance, folder)
    return load(FAMILY, str(files.model), Options(**{**files.options, **options}), vae=files.vae)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return opened(tmp_path_factory.mktemp("dev"))


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return opened(tmp_path_factory.mktemp("masked"), apply_t5_attn_mask=True)


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return opened(tmp_path_factory.mktemp("schnell"), guidance=False)


@torch.no_grad()
def said(models: Models) -> dict[str, torch.Tensor]:
    return dict(models.encode(models.tokenize(CAPTIONS)))


def test_t5_has_as_many_rows_as_the_version_was_trained_with(dev: Models, schnell: Models, tmp_path: Path) -> None:
    assert [said(models)["t5"].shape[1] for models in (dev, schnell, opened(tmp_path, t5xxl_max_token_length=40))] == [
        512,
        256,
        40,
    ]


def test_the_pooled_state_is_not_projected(dev: Models) -> None:
    """Some files of CLIP-L hold a projection, which this model was not made with."""
    ids = dev.tokenize(CAPTIONS)["clip_l"]
    assert ids.shape == (3, 77)
    with torch.no_grad():
        torch.testing.assert_close(said(dev)["pooled"], encoders.clip_l()(ids).pooler_output, atol=1e-6, rtol=1e-6)


def test_without_a_mask_padding_is_content_and_all_rows_are_kept(dev: Models) -> None:
    cond, strategy = said(dev), dev.outputs
    assert set(cond) == {"pooled", "t5"}
    kept = strategy.entry(cond, 1)
    assert set(kept) == {"pooled", "t5"} and len(kept["t5"]) == 512
    assert kept["t5"][100:].abs().max() > 0.1
    back = strategy.join([strategy.entry(cond, i) for i in range(3)])
    assert all(torch.equal(back[name], cond[name]) for name in cond)


def test_with_a_mask_only_the_captions_own_rows_are_kept(masked: Models) -> None:
    cond, strategy = said(masked), masked.outputs
    used = cond["t5_mask"].sum(1).tolist()
    assert used[1] == 1 and used[0] < used[2]  # an empty caption has its end mark
    assert not cond["t5"][~cond["t5_mask"]].any()
    kept = [strategy.entry(cond, i) for i in range(3)]
    assert [len(entry["t5"]) for entry in kept] == used
    back = strategy.join(kept)
    assert back["t5"].shape[1] == max(used)
    assert torch.equal(back["t5_mask"], cond["t5_mask"])
    assert torch.equal(back["t5"], cond["t5"])


def test_a_mask_that_hides_nothing_is_left_out(masked: Models) -> None:
    """Live and as it is kept: attention is faster without, and the step need not ask the device."""
    tokens = masked.tokenize(CAPTIONS[:1])
    assert set(tokens) == {"clip_l", "t5", "t5_mask"}
    with torch.no_grad():
        cond = masked.encode(tokens)
    assert set(cond) == {"pooled", "t5"}
    strategy = masked.outputs
    assert set(strategy.join([strategy.entry(cond, 0)] * 2)) == {"pooled", "t5"}


def test_t5_sees_no_padding_under_a_mask(masked: Models, dev: Models) -> None:
    """The states of a caption are those of T5 at the caption's own length, which they are not without a mask."""
    ids, n = masked.tokenize(CAPTIONS)["t5"], int(said(masked)["t5_mask"][0].sum())
    with torch.no_grad():
        alone = encoders.t5()(ids[:1, :n]).last_hidden_state
    torch.testing.assert_close(said(masked)["t5"][:1, :n], alone, atol=1e-5, rtol=1e-5)
    assert (said(dev)["t5"][:1, :n] - alone).abs().max() > 1e-3


def test_what_is_kept_depends_on_what_made_it(dev: Models, masked: Models, schnell: Models) -> None:
    settings = [
        {**models.tokenize_strategy.settings, **models.encode_strategy.settings} for models in (dev, masked, schnell)
    ]
    assert len({str(each) for each in settings}) == 3
    assert settings[0]["t5xxl_max_token_length"] == 512 and settings[1]["apply_t5_attn_mask"] is True


def test_text_is_kept_in_bf16_and_latents_raw_in_fp16(dev: Models) -> None:
    assert dev.outputs.dtype == torch.bfloat16
    latents = FAMILY.latents
    assert (latents.dtype, latents.channels, latents.patch, latents.multiple) == (torch.float16, 16, 2, 16)


def test_guidance(dev: Models, tmp_path: Path) -> None:
    """A prompt's own; while training that of the options, which is 1."""
    cond, sizes = said(dev), torch.tensor([[64, 64, 0, 0, 64, 64]] * 3)
    assert dev.condition(cond, SampleInfo(sizes=sizes))["guidance"].tolist() == [1.0] * 3
    told = torch.tensor([1.0, 3.5, 4.3])
    assert torch.equal(dev.condition(cond, SampleInfo(sizes=sizes, guidance=told))["guidance"], told)
    other = opened(tmp_path, guidance_scale=2.3)
    in_16_bits = {name: t.bfloat16() for name, t in cond.items()}
    assert other.condition(in_16_bits, SampleInfo(sizes=sizes))["guidance"].tolist() == pytest.approx([2.3] * 3)


def test_schnell_is_told_none_and_says_so_when_a_prompt_asks(schnell: Models, caplog: pytest.LogCaptureFixture) -> None:
    cond, sizes = said(schnell), torch.tensor([[64, 64, 0, 0, 64, 64]] * 3)
    assert set(schnell.condition(cond, SampleInfo(sizes=sizes, guidance=torch.full((3,), 3.5)))) == {
        "pooled",
        "t5",
    }
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert set(schnell.condition(cond, SampleInfo(sizes=sizes, guidance=torch.full((3,), 5.0)))) == {
            "pooled",
            "t5",
        }
    assert "FLUX.1 schnell takes no guidance" in caplog.text


def test_sigmas_go_by_the_version_and_by_the_size(dev: Models, schnell: Models) -> None:
    assert FAMILY.sigmas is not None
    assert torch.equal(FAMILY.sigmas(dev, 20, 128 * 128, None), schedule(20, mu=flux_mu(64 * 64)))
    assert torch.equal(FAMILY.sigmas(dev, 20, 64 * 64, None), schedule(20, mu=flux_mu(32 * 32)))
    torch.testing.assert_close(FAMILY.sigmas(schnell, 4, 128 * 128, None), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


def test_the_net_hears_timesteps_in_fp32(dev: Models) -> None:
    """sd-scripts hands them over in bf16, in which 1000 of them are 250."""
    cond = dev.condition({name: t[:1] for name, t in said(dev).items()}, SampleInfo(sizes=torch.zeros(1, 6)))
    heard = []
    hook = dev.denoiser.get_submodule("time_in").register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    with torch.no_grad():
        for t in (700.0, 700.7):
            dev.predict(torch.randn(1, 16, 4, 4), torch.tensor([t]), cond)
    hook.remove()
    assert heard[0].dtype == torch.float32 and not torch.equal(*heard)
