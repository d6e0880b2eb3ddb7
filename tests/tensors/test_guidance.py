"""Guidance, against diffusers' pipeline of Lumina 2 and its guider of HunyuanImage 2.1."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import diffusers
import pytest
import torch
from diffusers.guiders import AdaptiveProjectedMixGuidance
from torch import Tensor, nn

from sfumato.tensors.guidance import ProjectedMix, Truncated

SCALE = torch.tensor([3.5, 3.5]).view(-1, 1, 1, 1)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
STEPS = 8


class Stub(nn.Module):
    """A denoiser of Lumina 2 that says something of its latents and its text, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(1)), 0
        self.config = SimpleNamespace(in_channels=4, sample_size=4)
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **rest: object) -> tuple[Tensor]:
        self.calls += 1
        return (velocity(hidden_states, encoder_hidden_states.mean((1, 2))),)


def velocity(x: Tensor, text: Tensor) -> Tensor:
    """A prediction (b, c, h, w) that depends on the latents and on a number of the text (b,)."""
    ramp = torch.linspace(-1, 2, x[0].numel()).view(x.shape[1:])
    return 0.3 * x + text.view(-1, 1, 1, 1) * ramp.sin() + 0.1 * ramp


def test_truncated_guidance_is_that_of_lumina_2_pipeline() -> None:
    pipeline: Any = diffusers.Lumina2Pipeline
    for ratio, renorm, calls in ((0.25, 1.0, 10), (0.6, 1.0, 12), (1.0, 1.0, 16), (0.25, 0.0, 10)):
        stub = Stub()
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
        pipe = pipeline(transformer=stub, scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None)
        pipe.set_progress_bar_config(disable=True)
        start = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(1))
        positive, negative = (torch.full((2, 3, 5), value) for value in (0.9, -0.4))
        mask = torch.ones(2, 3)
        wanted = pipe(
            prompt_embeds=positive, prompt_attention_mask=mask, negative_prompt_embeds=negative,
            negative_prompt_attention_mask=mask, latents=start, height=32, width=48, num_inference_steps=STEPS,
            guidance_scale=3.5, cfg_trunc_ratio=ratio, cfg_normalization=bool(renorm), output_type="latent",
            return_dict=False,
        )[0]  # fmt: skip
        assert stub.calls == calls
        rule, x, sigmas = Truncated(SCALE, STEPS, ratio, renorm), start, cast(Any, scheduler).sigmas
        for step in range(STEPS):
            prediction = velocity(x, positive.mean((1, 2)))
            if rule.uses_negative(step):
                prediction = rule.combine(prediction, velocity(x, negative.mean((1, 2))), step)
            x = x - (sigmas[step + 1] - sigmas[step]) * prediction  # the pipeline's model says the negative velocity
        torch.testing.assert_close(x, wanted, **CLOSE)


def test_renorm_is_a_factor_of_the_positive_norm() -> None:
    positive, negative = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    guided = Truncated(SCALE[:1], 1, renorm_cfg=0.5).combine(positive, negative, 0)
    torch.testing.assert_close(guided.norm(dim=-1), positive.norm(dim=-1) * 0.5, **CLOSE)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("size", [0.1, 3.0])
def test_projected_guidance_is_diffusers_mix_guider(rescale: float, size: float) -> None:
    """`size`: differences within the largest norm, and beyond it. Two samples with starts of their own are guided as
    they are alone."""
    starts = torch.tensor([2, 5]).view(-1, 1, 1, 1)
    rule = ProjectedMix(SCALE, starts, guidance_rescale=rescale, guidance_rescale_apg=rescale)
    guiders: list[Any] = [
        AdaptiveProjectedMixGuidance(
            guidance_scale=3.5, adaptive_projected_guidance_start_step=start, guidance_rescale=rescale
        )
        for start in (2, 5)
    ]
    generator = torch.Generator().manual_seed(4)
    for step in range(STEPS):
        positive = torch.randn(2, 4, 6, 6, generator=generator)
        negative = positive + size * torch.randn(2, 4, 6, 6, generator=generator)
        ours = rule.combine(positive, negative, step)
        assert rule.uses_negative(step)
        for i, guider in enumerate(guiders):
            guider.set_state(step=step, num_inference_steps=STEPS, timestep=torch.tensor(step))
            guider.prepare_inputs({"x": (positive[[i]], negative[[i]])})
            theirs = guider.forward(positive[[i]], negative[[i]])
            torch.testing.assert_close(ours[[i]], theirs.pred, **CLOSE)
