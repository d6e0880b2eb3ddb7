"""Options of the families that are trained by rectified flow, and the settings that mean nothing to them; imports no
torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sfumato.models.facts import Idle

Scheme = Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowOptions:
    """What a run can be told about timesteps and loss of a rectified flow; a family's `Options` extend it."""

    timestep_sampling: Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift"] = "sigma"
    """How noise levels are drawn. sigma: by weighting_scheme, then shifted; uniform: evenly; sigmoid: the sigmoid of a
    normal number; shift: the same, then shifted; flux_shift: the same, shifted the more the larger the image is."""
    sigmoid_scale: float | None = None
    """Spread of timestep_sampling sigmoid, shift and flux_shift; default 1. Below 1: more of the middle."""
    discrete_flow_shift: float | None = None
    """Shift of timestep_sampling sigma and shift, above 1 towards more noise; default: the model's own."""
    weighting_scheme: Scheme = "uniform"
    """logit_normal and mode: the density of timestep_sampling sigma. sigma_sqrt and cosmap: weights of the loss. none,
    uniform: neither."""
    logit_mean: float | None = None
    """Mean of weighting_scheme logit_normal, above 0 towards more noise; default 0."""
    logit_std: float | None = None
    """Spread of weighting_scheme logit_normal; default 1."""
    mode_scale: float | None = None
    """Strength of weighting_scheme mode, -1 to 1.75: above 0 more of the middle; default 1.29."""
    model_prediction_type: Literal["raw", "additive", "sigma_scaled"] = "raw"
    """raw: the model says the velocity, which is what the loss compares. sigma_scaled: the loss compares the image that
    follows from it. additive: the model learns to say the velocity less its input, which no sampler expects."""


_PLAIN = "a flow is sampled from plain noise, so it is trained on that"
_WEIGHTS = "it weighs the timesteps of older models; for a flow see weighting_scheme"

REFUSED: Mapping[str, str] = {
    "noise_offset": _PLAIN,
    "noise_offset_random_strength": _PLAIN,
    "adaptive_noise_scale": _PLAIN,
    "multires_noise_iterations": _PLAIN,
    "multires_noise_discount": _PLAIN,
    "zero_terminal_snr": "a flow always ends in pure noise",
    "min_snr_gamma": _WEIGHTS,
    "scale_v_pred_loss_like_noise_pred": _WEIGHTS,
    "v_pred_like_loss": _WEIGHTS,
    "debiased_estimation_loss": _WEIGHTS,
}
"""Settings of noise and loss that a flow has no use for, and why."""

IDLE = (
    Idle(
        ("sigmoid_scale",),
        lambda o: o.timestep_sampling in ("sigma", "uniform"),
        "timestep_sampling sigma and uniform have no spread",
    ),
    Idle(
        ("discrete_flow_shift",),
        lambda o: o.timestep_sampling not in ("sigma", "shift"),
        "only timestep_sampling sigma and shift are shifted by it",
    ),
    Idle(
        ("weighting_scheme",),
        lambda o: o.weighting_scheme in ("logit_normal", "mode") and o.timestep_sampling != "sigma",
        "as a density it acts with timestep_sampling sigma alone",
    ),
    Idle(
        ("logit_mean", "logit_std"),
        lambda o: o.weighting_scheme != "logit_normal",
        "only weighting_scheme logit_normal has it",
    ),
    Idle(("sample_sampler",), lambda v: v.sample_sampler != "euler", "this model is drawn with euler"),
    Idle(("mode_scale",), lambda o: o.weighting_scheme != "mode", "only weighting_scheme mode has it"),
)
"""For `Facts.idle`: options that do nothing beside others."""

METADATA = (
    *("timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "weighting_scheme"),
    *("logit_mean", "logit_std", "mode_scale", "model_prediction_type"),
)
"""For `Facts.metadata`."""


def check(options: FlowOptions) -> list[str]:
    """For `Facts.check`: values out of range."""
    positive = [
        name
        for name in ("sigmoid_scale", "discrete_flow_shift", "logit_std")
        if (value := getattr(options, name)) is not None and value <= 0
    ]
    wrong = [f"{name}: expected above 0, found {getattr(options, name):g}" for name in positive]
    if options.mode_scale is not None and not -1 <= options.mode_scale <= 1.75:
        wrong.append(f"mode_scale: expected -1 to 1.75, found {options.mode_scale:g}")
    return wrong
