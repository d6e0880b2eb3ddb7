"""Options of the families that are trained by rectified flow, and the settings that mean nothing to them; imports no
torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from sfumato.config import FamilyOptions, Settings, rules
from sfumato.config.rules import Excludes, Idle, Needs, Only, Positive

Sampling = Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift"]
NextditSampling = Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift", "nextdit_shift"]
"""For families whose models were trained with nextdit_shift: even, then shifted as flux_shift. Early versions of
sd-scripts moved it the other way, towards the image."""
Scheme = Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"]

_SPREAD = Needs(
    "timestep_sampling",
    among=("sigmoid", "shift", "flux_shift"),
    why="timestep_sampling sigma and uniform have no spread",
)
Shift = Annotated[
    Positive | None,
    Needs(
        "timestep_sampling", among=("sigma", "shift"), why="only timestep_sampling sigma and shift are shifted by it"
    ),
]
_NORMAL = Needs("weighting_scheme", among=("logit_normal",), why="only weighting_scheme logit_normal has it")
_MODE = Needs("weighting_scheme", among=("mode",), why="only weighting_scheme mode has it")

OF_CONTROLNET = Only("controlnet", why="only `train controlnet` trains a ControlNet")
OF_NEW = Excludes("controlnet_model_name_or_path", why="that ControlNet is as it is")
"""For settings of what a new ControlNet is made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowOptions(FamilyOptions):
    """The settings of timesteps and loss of a rectified flow; a family's `Options` extend it."""

    timestep_sampling: Sampling = "sigma"
    """How noise levels are chosen. sigma: by weighting_scheme, then shifted; uniform: evenly; sigmoid: the sigmoid of a
    normal number; shift: the same, then shifted; flux_shift: the same, shifted the more the larger the image is."""
    sigmoid_scale: Annotated[Positive | None, _SPREAD] = None
    """Spread of timestep_sampling sigmoid, shift and flux_shift; default 1. Below 1: more of the middle."""
    discrete_flow_shift: Shift = None
    """Shift of timestep_sampling sigma and shift, above 1 towards more noise; default: the model's own."""
    weighting_scheme: Scheme = "uniform"
    """logit_normal and mode: the density of timestep_sampling sigma. sigma_sqrt and cosmap: weights of the loss. none,
    uniform: neither."""
    logit_mean: Annotated[float | None, _NORMAL] = None
    """Mean of weighting_scheme logit_normal, above 0 towards more noise; default 0."""
    logit_std: Annotated[Positive | None, _NORMAL] = None
    """Spread of weighting_scheme logit_normal; default 1."""
    # Beyond this range the density folds back on itself (arXiv:2403.03206, 3.1).
    mode_scale: Annotated[Annotated[float, Interval(ge=-1, le=1.75)] | None, _MODE] = None
    """Strength of weighting_scheme mode: above 0 more of the middle; default 1.29."""
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


def _flow(settings: Settings) -> FlowOptions:
    return FlowOptions.of(settings.family)


IDLE = (
    Idle(
        ("weighting_scheme",),
        lambda s: _flow(s).weighting_scheme in ("logit_normal", "mode") and _flow(s).timestep_sampling != "sigma",
        "as a density it acts with timestep_sampling sigma alone",
    ),
    Idle(("sample_sampler",), lambda s: s.sample_sampler != "euler", "this model is sampled with euler"),
)
"""For `Facts.idle`: settings that do nothing beside others."""

METADATA = tuple(rules.hints(FlowOptions))
"""For `Facts.metadata`."""
