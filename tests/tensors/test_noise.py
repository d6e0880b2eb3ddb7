"""Noise, targets and weights, against diffusers' DDPMScheduler and formulas computed elsewhere."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st
from noising import noised

from sfumato.config import LossConfig, NoiseConfig
from sfumato.errors import UserError
from sfumato.tensors.noise import DDPM
from sfumato.tensors.random import SampleRandom

LATENTS = torch.randn(64, 4, 6, 8, generator=torch.Generator().manual_seed(1))
RANDOM = SampleRandom(range(64))
CLOSE = {"atol": 1e-6, "rtol": 1e-6}
EVERY = torch.arange(1000)
CASES: list[tuple[Literal["eps", "v"], bool]] = [("eps", False), ("v", False), ("v", True)]


def theirs(ours: DDPM) -> DDPMScheduler:
    config = ours.scheduler_config()
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=config["prediction_type"],
        rescale_betas_zero_snr=ours.zero_terminal_snr,
    )


@pytest.mark.parametrize(("prediction", "zero"), CASES)
def test_input_and_target_equal_diffusers(prediction: Literal["eps", "v"], zero: bool) -> None:
    ours = DDPM(prediction=prediction, zero_terminal_snr=zero)
    scheduler = theirs(ours)
    torch.testing.assert_close(ours.alphas_cumprod, scheduler.alphas_cumprod, **CLOSE)
    found = noised(ours, LATENTS, RANDOM)
    noise = RANDOM.normal("noise", LATENTS.shape[1:])
    torch.testing.assert_close(found.x, scheduler.add_noise(LATENTS, noise, found.t), **CLOSE)
    target = noise if prediction == "eps" else scheduler.get_velocity(LATENTS, noise, found.t)
    torch.testing.assert_close(found.target, target, **CLOSE)
    assert found.weight.tolist() == [1.0] * 64


def test_the_last_step_of_the_rescaled_schedule_is_pure_noise() -> None:
    ours = DDPM(prediction="v", zero_terminal_snr=True, min_timestep=999)
    found = noised(ours, LATENTS, RANDOM)
    assert torch.equal(found.x, RANDOM.normal("noise", LATENTS.shape[1:]))
    assert torch.equal(found.target, -LATENTS)
    assert found.noise_to_signal.isinf().all()


@pytest.mark.parametrize(("prediction", "zero"), CASES)
def test_min_snr_weights_follow_the_paper(prediction: Literal["eps", "v"], zero: bool) -> None:
    ours = DDPM(prediction=prediction, zero_terminal_snr=zero, min_snr_gamma=5.0)
    snr = compute_snr(theirs(ours), EVERY)
    wanted = snr.clamp(max=5) / (snr if prediction == "eps" else snr + 1)
    torch.testing.assert_close(ours.weight(EVERY), wanted, **CLOSE)


def test_the_other_weights() -> None:
    """Formulas of sd-scripts, with the limit of 1000 that it puts on the ratio."""
    snr = compute_snr(theirs(DDPM()), EVERY).clamp(max=1000)
    assert snr.max() == 1000
    torch.testing.assert_close(DDPM(debiased_estimation_loss=True).weight(EVERY), 1 / snr.sqrt(), **CLOSE)
    torch.testing.assert_close(
        DDPM(prediction="v", debiased_estimation_loss=True).weight(EVERY), 1 / (snr + 1), **CLOSE
    )
    torch.testing.assert_close(
        DDPM(prediction="v", scale_v_pred_loss_like_noise_pred=True).weight(EVERY), snr / (snr + 1), **CLOSE
    )
    torch.testing.assert_close(DDPM(v_pred_like_loss=0.5).weight(EVERY), 1 + 0.5 / (snr / (snr + 1)), **CLOSE)


def test_weights_multiply() -> None:
    both = DDPM(min_snr_gamma=5.0, debiased_estimation_loss=True).weight(EVERY)
    torch.testing.assert_close(
        both, DDPM(min_snr_gamma=5.0).weight(EVERY) * DDPM(debiased_estimation_loss=True).weight(EVERY)
    )


@pytest.mark.parametrize(
    "chosen", [{"min_snr_gamma": 5.0}, {"debiased_estimation_loss": True}, {"scale_v_pred_loss_like_noise_pred": True}]
)
def test_weights_use_the_rescaled_schedule_and_are_finite(chosen: dict[str, Any]) -> None:
    rescaled = DDPM(prediction="v", zero_terminal_snr=True, **chosen).weight(EVERY)
    assert rescaled.isfinite().all()
    assert not torch.allclose(rescaled, DDPM(prediction="v", **chosen).weight(EVERY), atol=1e-4)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "noise_offset": st.just(0.1),
            "multires_noise_iterations": st.integers(1, 8),
            "ip_noise_gamma": st.just(0.1),
            "min_timestep": st.integers(0, 500),
            "max_timestep": st.integers(500, 1000),
        },
    ),
    st.permutations(range(5)),
)
@settings(max_examples=25, deadline=None)
def test_a_sample_does_not_depend_on_its_batch(chosen: dict[str, Any], order: list[int]) -> None:
    process = DDPM(**chosen)
    whole = noised(process, LATENTS[:5], SampleRandom(range(5)))
    parts = [noised(process, LATENTS[order[a:b]], SampleRandom(order[a:b])) for a, b in ((0, 2), (2, 5))]
    for field in fields(whole):
        joined = torch.cat([getattr(part, field.name) for part in parts])
        assert torch.equal(joined, getattr(whole, field.name)[list(order)]), field.name


def test_timesteps_fill_their_range() -> None:
    many = SampleRandom(range(4000))
    t = noised(DDPM(min_timestep=200, max_timestep=210), torch.zeros(4000, 1, 1, 1), many).t
    assert set(t.tolist()) == set(range(200, 210))
    assert torch.bincount(t)[200:].min() > 300
    assert set(noised(DDPM(min_timestep=7, max_timestep=7), LATENTS, RANDOM).t.tolist()) == {7}


def noise_of(process: DDPM, latents: torch.Tensor = LATENTS) -> torch.Tensor:
    return noised(process, latents, RANDOM).target


def test_noise_offset_moves_whole_channels() -> None:
    plain, shifted = noise_of(DDPM()), noise_of(DDPM(noise_offset=0.3))
    shift = shifted - plain
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift))
    assert shift[..., 0, 0].std() == pytest.approx(0.3, rel=0.15)


def test_noise_offset_of_random_strength_is_random_for_each_sample() -> None:
    full, part = (
        noise_of(DDPM(noise_offset=0.3, noise_offset_random_strength=r)) - noise_of(DDPM()) for r in (False, True)
    )
    ratio = (part / full)[:, :, 0, 0]
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), atol=1e-3, rtol=1e-3)
    assert ratio.min() >= 0 and ratio.max() <= 1 and ratio[:, 0].std() > 0.2


def test_adaptive_noise_offset_follows_the_latents_mean() -> None:
    latents = torch.ones(64, 4, 6, 8) * torch.tensor([0.0, 1.0, -2.0, 4.0]).view(4, 1, 1)
    unit = (noise_of(DDPM(noise_offset=1.0), latents) - noise_of(DDPM(), latents))[..., 0, 0]
    adaptive = (noise_of(DDPM(noise_offset=0.1, adaptive_noise_scale=-0.05), latents) - noise_of(DDPM(), latents))[
        ..., 0, 0
    ]
    torch.testing.assert_close(adaptive, unit * torch.tensor([0.1, 0.05, 0.0, 0.0]), atol=1e-5, rtol=1e-4)


def test_multires_noise_is_smoother_and_of_unit_deviation_in_each_sample() -> None:
    plain, smooth = noise_of(DDPM()), noise_of(DDPM(multires_noise_iterations=6, multires_noise_discount=0.8))
    torch.testing.assert_close(smooth.flatten(1).std(1), torch.ones(64))
    neighbours = [(n[..., 1:] * n[..., :-1]).mean() for n in (plain, smooth)]
    assert abs(neighbours[0]) < 0.05 and neighbours[1] > 0.2


def test_input_perturbation_changes_the_input_alone() -> None:
    plain, more = (noised(DDPM(ip_noise_gamma=g), torch.zeros_like(LATENTS), RANDOM) for g in (None, 0.5))
    assert torch.equal(plain.target, more.target) and torch.equal(plain.t, more.t)
    extra = (more.x - plain.x) / (1 - DDPM().alphas_cumprod[plain.t]).sqrt().view(-1, 1, 1, 1)
    assert extra.std() == pytest.approx(0.5, rel=0.05)
    weaker = noised(DDPM(ip_noise_gamma=0.5, ip_noise_gamma_random_strength=True), torch.zeros_like(LATENTS), RANDOM)
    ratio = ((weaker.x - plain.x) / (more.x - plain.x)).flatten(1).median(1).values
    assert ratio.min() >= 0 and ratio.max() <= 1 and ratio.std() > 0.2


def test_16_bit_latents_are_noised_in_fp32() -> None:
    half = LATENTS.half()
    found = noised(DDPM(prediction="v"), half, RANDOM)
    assert torch.equal(found.x, noised(DDPM(prediction="v"), half.float(), RANDOM).x)
    assert {found.x.dtype, found.target.dtype, found.weight.dtype} == {torch.float32}


def test_fields_are_taken_from_configs_by_name_and_none_is_lost() -> None:
    process = DDPM.of("v", NoiseConfig(noise_offset=0.1, zero_terminal_snr=True), LossConfig(min_snr_gamma=3.0))
    assert process == DDPM(prediction="v", noise_offset=0.1, zero_terminal_snr=True, min_snr_gamma=3.0)
    assert {f.name for f in fields(NoiseConfig)} <= {f.name for f in fields(DDPM)}


@pytest.mark.parametrize(
    "chosen",
    [
        {"zero_terminal_snr": True},
        {"scale_v_pred_loss_like_noise_pred": True},
        {"prediction": "v", "v_pred_like_loss": 1.0},
    ],
)
def test_what_is_for_the_other_prediction_is_refused_by_name(chosen: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=list(chosen)[-1]):
        DDPM(**chosen)


def test_schedulers_walk_the_same_schedule() -> None:
    for prediction, zero in CASES:
        ours = DDPM(prediction=prediction, zero_terminal_snr=zero)
        config = {k: v for k, v in ours.scheduler_config().items() if k != "skip_prk_steps"}
        torch.testing.assert_close(DDIMScheduler(**config).alphas_cumprod, ours.alphas_cumprod, **CLOSE)
