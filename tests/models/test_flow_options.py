"""Which settings a flow takes, and beside which others: the rules of `FlowOptions`, for a config made in Python."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

import pytest

from sfumato.config import Config, LossConfig, NoiseConfig, Settings
from sfumato.errors import UserError
from sfumato.models import flow_options
from sfumato.models.detection import Signature
from sfumato.models.facts import Facts
from sfumato.models.flow_options import REFUSED, FlowOptions

KINDS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
NOISE = {f.name for f in fields(NoiseConfig)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(FlowOptions):
    """As a family extends them."""


FACTS = Facts(
    options=Options,
    signature=Signature(family="flow", claims={}, denoiser=lambda shapes: None, adapters={}),
    architecture=lambda options: "",
    base_model_version=lambda options: "",
    pipelines=(),
    refused=REFUSED,
    idle=flow_options.IDLE,
)


def check(noise: NoiseConfig | None = None, loss: LossConfig | None = None, **own: Any) -> None:
    config = Config(noise=noise or NoiseConfig(), loss=loss or LossConfig(), family=Options(**own))
    FACTS.check(Settings.of(config, "network"))


@pytest.mark.parametrize(
    "told",
    [
        *({"timestep_sampling": k, "sigmoid_scale": 1.0} for k in ("sigma", "uniform")),
        *({"timestep_sampling": k, "discrete_flow_shift": 1.0} for k in ("uniform", "sigmoid", "flux_shift")),
        *({"timestep_sampling": k, "weighting_scheme": w} for k in KINDS[1:] for w in ("logit_normal", "mode")),
        *({"weighting_scheme": w, n: 0.5} for w in ("uniform", "mode") for n in ("logit_mean", "logit_std")),
        *({"weighting_scheme": w, "mode_scale": 1.0} for w in ("none", "logit_normal")),
        {"ip_noise_gamma_random_strength": True},
        {"timestep_sampling": "sigmoid", "sigmoid_scale": 0.0},
        {"discrete_flow_shift": -1.0},
        {"weighting_scheme": "logit_normal", "logit_std": 0.0},
        {"weighting_scheme": "mode", "mode_scale": 1.8},
        {"weighting_scheme": "mode", "mode_scale": -1.1},
        {"min_timestep": 1000},
        {"min_timestep": -1},
        {"max_timestep": 1001},
        {"max_timestep": 0},
        {"min_timestep": 500, "max_timestep": 400},
    ],
)
def test_what_would_do_nothing_or_harm_is_refused_by_name(told: dict[str, Any]) -> None:
    with pytest.raises(UserError) as refused:
        check(
            NoiseConfig(**{name: value for name, value in told.items() if name in NOISE}),
            **{name: value for name, value in told.items() if name not in NOISE},
        )
    (message,) = refused.value.messages
    assert message.startswith(list(told)[-1])


def test_settings_of_ddpm_are_refused_all_at_once() -> None:
    noise = NoiseConfig(
        noise_offset=0.1,
        noise_offset_random_strength=True,
        adaptive_noise_scale=0.1,
        multires_noise_iterations=6,
        multires_noise_discount=0.8,
        zero_terminal_snr=True,
        ip_noise_gamma_random_strength=True,
    )
    loss = LossConfig(
        min_snr_gamma=5.0, scale_v_pred_loss_like_noise_pred=True, v_pred_like_loss=1.0, debiased_estimation_loss=True
    )
    with pytest.raises(UserError) as refused:
        check(noise, loss, sigmoid_scale=2.0)
    named = [message.split(":")[0] for message in refused.value.messages]
    assert sorted(named) == sorted([*REFUSED, "sigmoid_scale", "ip_noise_gamma_random_strength"])


@pytest.mark.parametrize("name", list(REFUSED))
def test_each_of_them_is_refused_alone_but_not_when_switched_off(name: str) -> None:
    record = NoiseConfig if name in NOISE else LossConfig
    on = True if get_type_hints(record)[name] is bool else 0.7
    off = {bool: False, float: 0.0}.get(get_type_hints(record)[name])
    with pytest.raises(UserError, match=f"^{name}: {REFUSED[name]}; leave it out$"):
        check(**{"noise" if name in NOISE else "loss": record(**{name: on})})
    check(**{"noise" if name in NOISE else "loss": record(**{name: off})})


def test_a_prompt_of_another_sampler_is_no_matter_of_training() -> None:
    config = Config(family=Options())
    for sampler, words in (("ddim", "sampled with euler"), ("euler", "")):
        found = FACTS.without_effect(
            Settings.of(replace(config, sample=replace(config.sample, sample_sampler=sampler)), "network"),
            trains=False,
        )
        assert words in found.get("sample_sampler", "")
