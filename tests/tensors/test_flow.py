"""Rectified flow against diffusers' scheduler, densities and weights, and against formulas of the distributions."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from hypothesis import example, given, settings
from hypothesis import strategies as st
from noising import noised

from sfumato.cli import options
from sfumato.config import LossConfig, NoiseConfig
from sfumato.models.flow_options import REFUSED, FlowOptions, NextditSampling
from sfumato.tensors import losses
from sfumato.tensors.flow import LARGEST, SMALLEST, Flow, flux_mu, schedule
from sfumato.tensors.noise import DDPM, NoisySample
from sfumato.tensors.random import SampleRandom, generator

LATENTS = torch.randn(64, 4, 6, 8, generator=torch.Generator().manual_seed(1))
RANDOM = SampleRandom(range(64))
MANY = SampleRandom(range(4000))
CLOSE = {"atol": 1e-6, "rtol": 1e-6}
KINDS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift", "nextdit_shift")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(FlowOptions):
    """As a family extends them."""

    guidance_scale: float = 3.5
    """Something that is the family's own."""


def of(noise: NoiseConfig | None = None, shift: float = 1.0, **chosen: Any) -> Flow:
    return Flow.of(Options(**chosen), noise or NoiseConfig(), shift=shift)


@pytest.mark.parametrize(
    "process",
    [
        *(Flow(timestep_sampling=kind, discrete_flow_shift=2.5, sigmoid_scale=1.4) for kind in KINDS),
        *(Flow(weighting_scheme=scheme, logit_mean=0.3) for scheme in ("logit_normal", "mode", "sigma_sqrt")),
        Flow(min_timestep=200, max_timestep=600),
        DDPM(min_timestep=100, max_timestep=900),
        DDPM(),
    ],
    ids=str,
)
def test_a_level_is_the_share_of_chance_below_it(process: Flow | DDPM) -> None:
    """Its noise is of the sample, its weight of the timestep, as where chance chooses it."""
    by_chance = process.draw((4, 6, 8), MANY)["t"].float()
    levels = (0.0625, 0.4375, 0.5, 0.9375)
    found = [process.draw((4, 6, 8), RANDOM, level) for level in levels]
    for level, drawn in zip(levels, found, strict=True):
        assert drawn["t"].unique().numel() == 1 and drawn["t"].shape == (64,)
        assert (by_chance < drawn["t"][0]).float().mean().item() == pytest.approx(level, abs=0.025)
        assert torch.equal(drawn["noise"], RANDOM.normal("noise", (4, 6, 8)))
    chance = process.draw((4, 6, 8), RANDOM)
    assert all(each.keys() == chance.keys() for each in found)


# --- what the net sees and should say ---


@pytest.mark.parametrize("kind", KINDS)
def test_input_and_timestep_equal_diffusers(kind: Any) -> None:
    found = noised(Flow(timestep_sampling=kind), LATENTS, RANDOM)
    order = found.t.argsort(descending=True)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=(found.t[order] / 1000).tolist())
    theirs = scheduler.scale_noise(
        LATENTS[order], scheduler.timesteps, RANDOM.normal("noise", LATENTS.shape[1:])[order]
    )
    torch.testing.assert_close(found.x[order], theirs, **CLOSE)
    torch.testing.assert_close(found.t[order], scheduler.timesteps, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.noise_to_signal, (found.t / 1000) / (1 - found.t / 1000), rtol=1e-3, atol=0)


def test_one_step_of_diffusers_sampler_along_the_target_is_the_data() -> None:
    found = noised(Flow(), LATENTS, RANDOM)
    for i in range(8):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[found.t[i].item() / 1000])
        x0 = scheduler.step(found.target[i : i + 1], scheduler.timesteps[0], found.x[i : i + 1]).prev_sample
        torch.testing.assert_close(x0, LATENTS[i : i + 1], atol=1e-5, rtol=0)


def test_everything_is_fp32_whatever_the_latents_and_the_autocast() -> None:
    half = LATENTS.bfloat16()
    wanted = noised(Flow(), half.float(), RANDOM)
    with torch.autocast("cpu", torch.bfloat16):
        found = noised(Flow(), half, RANDOM)
    for field in fields(NoisySample):
        assert getattr(found, field.name).dtype == torch.float32, field.name
        assert torch.equal(getattr(found, field.name), getattr(wanted, field.name)), field.name
    assert len(found.t.bfloat16().unique()) < len(found.t.unique()) == 64


TOLD = st.fixed_dictionaries(
    {
        "timestep_sampling": st.sampled_from(KINDS),
        "model_prediction_type": st.sampled_from(("raw", "additive", "sigma_scaled")),
    },
    optional={
        "ip_noise_gamma": st.just(0.1),
        "min_timestep": st.integers(0, 500),
        "max_timestep": st.integers(500, 1000),
        "weighting_scheme": st.sampled_from(("sigma_sqrt", "cosmap", "none", "uniform")),
        "shift": st.floats(0.1, 10),
    },
)


@given(TOLD, st.permutations(range(5)))
@settings(max_examples=40, deadline=None)
def test_a_sample_does_not_depend_on_its_batch(chosen: dict[str, Any], order: list[int]) -> None:
    process = Flow(**chosen)
    whole = noised(process, LATENTS[:5], SampleRandom(range(5)))
    parts = [noised(process, LATENTS[order[a:b]], SampleRandom(order[a:b])) for a, b in ((0, 2), (2, 5))]
    for field in fields(whole):
        joined = torch.cat([getattr(part, field.name) for part in parts])
        assert torch.equal(joined, getattr(whole, field.name)[list(order)]), field.name


def test_latents_of_five_dimensions_are_noised_alike() -> None:
    flat, deep = (noised(Flow(), x, RANDOM) for x in (LATENTS, LATENTS[:, :, None]))
    assert torch.equal(deep.x[:, :, 0], flat.x) and torch.equal(deep.target[:, :, 0], flat.target)


def test_input_perturbation_changes_the_input_alone() -> None:
    zeros = torch.zeros_like(LATENTS)
    plain, more = (noised(Flow(ip_noise_gamma=g), zeros, RANDOM) for g in (None, 0.5))
    assert torch.equal(plain.target, more.target) and torch.equal(plain.t, more.t)
    extra = (more.x - plain.x) / (plain.t / 1000).view(-1, 1, 1, 1)
    assert extra.std() == pytest.approx(0.5, rel=0.05)
    weaker = noised(Flow(ip_noise_gamma=0.5, ip_noise_gamma_random_strength=True), zeros, RANDOM)
    ratio = ((weaker.x - plain.x) / (more.x - plain.x)).flatten(1).median(1).values
    assert ratio.min() >= 0 and ratio.max() <= 1.001 and ratio.std() > 0.2


# --- where on the line ---


@pytest.mark.parametrize(
    "chosen",
    [
        {"weighting_scheme": "logit_normal", "logit_mean": 0.7, "logit_std": 1.3},
        {"weighting_scheme": "logit_normal"},
        {"weighting_scheme": "mode", "mode_scale": -0.5},
        {"weighting_scheme": "mode"},
        {"weighting_scheme": "none"},
        {"weighting_scheme": "cosmap"},
    ],
)
def test_densities_equal_diffusers_on_the_same_random_numbers(chosen: dict[str, Any]) -> None:
    theirs = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, **chosen}
    wanted = torch.cat(
        [
            compute_density_for_timestep_sampling(batch_size=1, generator=generator(k, "timestep"), **theirs)
            for k in range(64)
        ]
    )
    torch.testing.assert_close(Flow(**chosen).sigmas(RANDOM, 8, 8), wanted.clamp(SMALLEST, LARGEST), **CLOSE)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    shifted = torch.tensor([scheduler.shift * u / (1 + (scheduler.shift - 1) * u) for u in wanted.tolist()])
    torch.testing.assert_close(
        Flow(**chosen, shift=3.0).sigmas(RANDOM, 8, 8), shifted.clamp(SMALLEST, LARGEST), **CLOSE
    )


def test_flux_shift_equals_diffusers_time_shift_at_every_size() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    u = Flow(timestep_sampling="sigmoid", sigmoid_scale=1.7).sigmas(RANDOM, 8, 8)
    for height, width in ((32, 32), (64, 96), (128, 128), (256, 200)):
        mu = calculate_shift((height // 2) * (width // 2))
        ours = Flow(timestep_sampling="flux_shift", sigmoid_scale=1.7).sigmas(RANDOM, height, width)
        torch.testing.assert_close(ours, scheduler.time_shift(mu, 1.0, u), **CLOSE)
        even = Flow(timestep_sampling="uniform").sigmas(RANDOM, 8, 8)
        ours = Flow(timestep_sampling="nextdit_shift").sigmas(RANDOM, height, width)
        torch.testing.assert_close(ours, scheduler.time_shift(mu, 1.0, even), **CLOSE)


def unshift(s: torch.Tensor, shift: float) -> torch.Tensor:
    return s / (shift - (shift - 1) * s)


def normal(s: torch.Tensor, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return torch.special.ndtr((torch.logit(s) - mean) / std)


E_MU = math.exp(0.5)
"""FLUX's shift for 16 x 16 tokens."""


@pytest.mark.parametrize(
    ("chosen", "below"),
    [
        ({"timestep_sampling": "uniform"}, lambda s: s),
        ({"timestep_sampling": "sigma"}, lambda s: s),
        ({"timestep_sampling": "sigma", "discrete_flow_shift": 3.0}, lambda s: unshift(s, 3.0)),
        ({"weighting_scheme": "logit_normal", "logit_mean": 1.0, "logit_std": 0.5}, lambda s: normal(s, 1.0, 0.5)),
        ({"weighting_scheme": "logit_normal", "shift": 3.0}, lambda s: normal(unshift(s, 3.0))),
        ({"timestep_sampling": "sigmoid", "sigmoid_scale": 2.0}, lambda s: normal(s, 0.0, 2.0)),
        ({"timestep_sampling": "shift", "discrete_flow_shift": 3.1582}, lambda s: normal(s, math.log(3.1582))),
        ({"timestep_sampling": "shift", "shift": 6.0, "sigmoid_scale": 0.5}, lambda s: normal(s, math.log(6.0), 0.5)),
        ({"timestep_sampling": "flux_shift"}, lambda s: normal(unshift(s, E_MU))),
        ({"timestep_sampling": "nextdit_shift"}, lambda s: unshift(s, E_MU)),
        ({"timestep_sampling": "uniform", "min_timestep": 200, "max_timestep": 700}, lambda s: (s - 0.2) / 0.5),
        ({"timestep_sampling": "sigmoid", "min_timestep": 200, "max_timestep": 700}, lambda s: normal((s - 0.2) / 0.5)),
        ({"timestep_sampling": "shift", "shift": 3.0, "max_timestep": 500}, lambda s: normal(unshift(s / 0.5, 3.0))),
    ],
)
def test_sigmas_are_distributed_by_their_formula(
    chosen: dict[str, Any], below: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Kolmogorov-Smirnov: the share of 4000 numbers below each is what the distribution function says; 0.0258 is its 1 % limit."""
    s = Flow(**chosen).sigmas(MANY, 32, 32).double().sort().values
    share = torch.arange(1, 4001, dtype=torch.float64) / 4000
    distance = torch.maximum((share - below(s)).abs(), (share - 1 / 4000 - below(s)).abs()).max()
    assert distance < 1.63 / math.sqrt(4000)


def test_mode_has_the_papers_density() -> None:
    """Its quantiles, the map itself at u = 0.9, 0.75, 0.5 ..., written with the double angle."""
    s = Flow(weighting_scheme="mode", mode_scale=1.29).sigmas(MANY, 8, 8)
    share = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    u = 1 - share
    quantiles = share - 1.29 * (0.5 * torch.cos(torch.pi * u) - 0.5 + u)
    torch.testing.assert_close(s.quantile(share), quantiles, atol=0.012, rtol=0)


@given(TOLD, st.floats(0, 1, exclude_max=True), st.floats(-12, 12))
@example({"timestep_sampling": "sigmoid"}, 0.0, 40.0)
@example({"timestep_sampling": "sigmoid"}, 0.0, -200.0)
@example({"weighting_scheme": "mode"}, 0.0, 0.0)
@settings(max_examples=60, deadline=None)
def test_all_numbers_are_finite_and_timesteps_are_in_their_range(chosen: dict[str, Any], u: float, n: float) -> None:
    """Also where the random numbers are extreme."""

    class Extreme(SampleRandom):
        def uniform(self, purpose: str, shape: Any = ()) -> torch.Tensor:
            return torch.full((2, *shape), u)

        def normal(self, purpose: str, shape: Any) -> torch.Tensor:
            return torch.full((2, *shape), n)

    process = Flow(**chosen)
    found = noised(process, LATENTS[:2], Extreme([0, 1]))
    assert all(getattr(found, field.name).isfinite().all() for field in fields(NoisySample))
    assert (found.t >= max(chosen.get("min_timestep", 0), 1) - 1e-4).all() and (found.t < process.steps).all()
    assert (found.t <= chosen.get("max_timestep", 1000) + 1e-4).all()
    assert (found.weight > 0).all()
    for kind in ("constant", "exponential", "snr"):
        threshold = losses.huber_threshold(kind, 0.1, 1.0, found.t, found.noise_to_signal, process.steps)
        assert threshold.isfinite().all() and (threshold > 0).all()


def test_a_range_of_one_point_is_that_point() -> None:
    assert noised(Flow(min_timestep=400, max_timestep=400), LATENTS, RANDOM).t.tolist() == pytest.approx([400.0] * 64)


# --- what an error weighs ---

EVERY = torch.linspace(SMALLEST, LARGEST, 1000)


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "none", "uniform", "logit_normal", "mode"])
def test_weights_equal_diffusers(scheme: Any) -> None:
    theirs = compute_loss_weighting_for_sd3(scheme, EVERY)
    torch.testing.assert_close(Flow(weighting_scheme=scheme).weight(EVERY), theirs, **CLOSE)
    scaled = Flow(weighting_scheme=scheme, model_prediction_type="sigma_scaled").weight(EVERY)
    torch.testing.assert_close(scaled, theirs * EVERY**2, **CLOSE)


def gradient(prediction: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(cost.sum(), prediction)
    return found


def ours(found: NoisySample, prediction: torch.Tensor) -> torch.Tensor:
    error = losses.loss("l2", prediction, found.target)
    return losses.sample_losses(error, None, found.weight, torch.ones(len(prediction)))


def test_sigma_scaled_has_value_and_gradient_of_a_loss_on_the_data() -> None:
    found = noised(Flow(model_prediction_type="sigma_scaled", weighting_scheme="cosmap"), LATENTS, RANDOM)
    prediction = torch.randn(LATENTS.shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    s = (found.t / 1000).view(-1, 1, 1, 1)
    exact = (found.x - s * prediction - LATENTS).square() * compute_loss_weighting_for_sd3("cosmap", s)
    wanted = exact.flatten(1).mean(1)
    torch.testing.assert_close(ours(found, prediction), wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        gradient(prediction, ours(found, prediction)), gradient(prediction, wanted), atol=1e-7, rtol=1e-4
    )


def test_sigma_sqrt_on_the_data_is_the_plain_loss_on_the_velocity() -> None:
    plain = noised(Flow(), LATENTS, RANDOM)
    both = noised(Flow(model_prediction_type="sigma_scaled", weighting_scheme="sigma_sqrt"), LATENTS, RANDOM)
    assert torch.equal(plain.target, both.target)
    torch.testing.assert_close(both.weight, plain.weight, **CLOSE)


def test_additive_compares_what_is_predicted_and_the_input_with_the_velocity() -> None:
    plain, additive = (
        noised(Flow(model_prediction_type=k, ip_noise_gamma=0.1), LATENTS, RANDOM) for k in ("raw", "additive")
    )
    prediction = torch.randn(LATENTS.shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    wanted = (prediction + additive.x - plain.target).square().flatten(1).mean(1)
    torch.testing.assert_close(ours(additive, prediction), wanted)
    torch.testing.assert_close(gradient(prediction, ours(additive, prediction)), gradient(prediction, wanted))


# --- options ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_familys_own_shift_and_the_defaults_stand_with_every_sampling(kind: Any) -> None:
    for scheme in ("sigma_sqrt", "cosmap", "none", "uniform"):
        of(timestep_sampling=kind, weighting_scheme=scheme, shift=3.0)
    own, other = (
        of(timestep_sampling=kind, shift=3.0).sigmas(RANDOM, 8, 8),
        of(timestep_sampling=kind).sigmas(RANDOM, 8, 8),
    )
    assert (own > other).all() if kind in ("sigma", "shift") else torch.equal(own, other)


def test_the_users_shift_goes_before_the_familys_in_training_alone() -> None:
    flow = of(discrete_flow_shift=2.0, shift=3.0)
    assert torch.equal(flow.sigmas(RANDOM, 8, 8), Flow(shift=2.0).sigmas(RANDOM, 8, 8))
    config = flow.scheduler_config()
    assert config.pop("prediction_type") == "flow"
    assert FlowMatchEulerDiscreteScheduler(**config).shift == 3.0


def test_fields_are_taken_from_configs_by_name_and_none_is_lost() -> None:
    chosen = {
        "timestep_sampling": "shift",
        "sigmoid_scale": 2.0,
        "discrete_flow_shift": 4.0,
        "model_prediction_type": "sigma_scaled",
    }
    noise = {"min_timestep": 10, "max_timestep": 900, "ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True}
    assert of(NoiseConfig(**noise), **chosen) == Flow(**chosen, **noise)
    own = {f.name for f in fields(Flow)}
    assert {f.name for f in fields(FlowOptions)} <= own
    assert {f.name for f in fields(NoiseConfig)} <= own | set(REFUSED)
    ddpms = {f.name for f in fields(LossConfig)} & {f.name for f in fields(DDPM)}
    assert ddpms <= set(REFUSED) and not own & set(REFUSED)


def test_options_have_the_types_and_defaults_of_the_process_and_a_text_each() -> None:
    hints, theirs = get_type_hints(FlowOptions), get_type_hints(Flow)
    assert get_args(NextditSampling) == (*get_args(hints["timestep_sampling"]), "nextdit_shift")
    hints["timestep_sampling"] = NextditSampling  # the process has what families may add
    defaults = {f.name: f.default for f in fields(Flow)}
    found = options.of(Options, "any")
    for field in fields(FlowOptions):
        assert (hints[field.name], field.default) == (theirs[field.name], defaults[field.name]), field.name
        assert found[field.name].help
    assert found["guidance_scale"].help


def test_options_need_no_torch() -> None:
    code = "import sys, sfumato.models.flow_options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the way back ---


def even(steps: int) -> list[float]:
    """What the pipelines of FLUX, Chroma and Lumina hand to their scheduler."""
    return [1 - i / steps for i in range(steps)]


STEPS = (1, 2, 4, 20, 28, 50)


@pytest.mark.parametrize("steps", STEPS)
def test_schedules_equal_diffusers(steps: int) -> None:
    plain = FlowMatchEulerDiscreteScheduler()
    plain.set_timesteps(sigmas=even(steps))
    torch.testing.assert_close(schedule(steps), plain.sigmas, **CLOSE)
    for tokens in (256, 1024, 4096, 6000):
        mu = calculate_shift(tokens)
        assert flux_mu(tokens) == pytest.approx(mu, abs=1e-12)
        dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        dynamic.set_timesteps(sigmas=even(steps), mu=mu)
        torch.testing.assert_close(schedule(steps, mu=flux_mu(tokens)), dynamic.sigmas, **CLOSE)
    sd3 = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sd3.set_timesteps(steps)
    torch.testing.assert_close(schedule(steps, shift=3.0), sd3.sigmas, **CLOSE)
    lumina = FlowMatchEulerDiscreteScheduler(shift=6.0)
    lumina.set_timesteps(sigmas=even(steps))
    torch.testing.assert_close(schedule(steps, mu=math.log(6.0)), lumina.sigmas, **CLOSE)


@given(st.integers(1, 60), st.floats(0.1, 20), st.sampled_from(("shift", "mu", "neither")))
def test_a_schedule_falls_from_1_to_0(steps: int, shift: float, how: str) -> None:
    given = {"shift": {"shift": shift}, "mu": {"mu": math.log(shift)}, "neither": {}}[how]
    sigmas = schedule(steps, **given)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (steps + 1,)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_a_schedule_has_one_shift() -> None:
    with pytest.raises(ValueError, match="exclude"):
        schedule(4, shift=3.0, mu=1.0)
