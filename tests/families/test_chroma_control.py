"""ControlNets of Chroma, against diffusers' ChromaTransformer2DModel: it has no class for them, but takes what they give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ChromaPipeline
from tinies import chroma
from tinies.encoders import T5_WIDTH
from torch import Tensor
from training import config

from sfumato.errors import UserError
from sfumato.families.chroma.control import arguments
from sfumato.models.base import Models
from sfumato.models.controlled import Controlled, new_net, read_net, save_net
from sfumato.train.trainables.controlnet import ControlNet

H, W, TOKENS, STRENGTH = 8, 12, 9, 0.7


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    (case,) = chroma.CASES
    return case.models(case.write(tmp_path_factory.mktemp("model")))


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, t, states of the text, and images to follow."""
    g = torch.Generator().manual_seed(1)
    x, images = torch.randn(2, 16, H, W, generator=g), torch.rand(2, 3, 8 * H, 8 * W, generator=g)
    return x, torch.tensor([3.1, 977.0]), torch.randn(2, TOKENS, T5_WIDTH, generator=g), images


def said(models: Models, x: Tensor, t: Tensor, t5: Tensor) -> Tensor:
    with torch.no_grad():
        return models.predict(x, t, {"t5": t5})


def residuals(models: Models, net: Any) -> list[Tensor]:
    x, t, t5, images = inputs()
    with torch.no_grad():
        return net(*arguments(models.denoiser, (x, t / 1000, t5)), hint=images)


def they_say(x: Tensor, t: Tensor, t5: Tensor, added: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    """What diffusers' model says, and its states after each block."""
    states: list[Tensor] = []
    theirs = chroma.transformer()
    hooks = [b.register_forward_hook(lambda *args: states.append(args[2][1])) for b in theirs.transformer_blocks]
    with torch.no_grad():
        answer = theirs(
            hidden_states=ChromaPipeline._pack_latents(x, *x.shape),
            encoder_hidden_states=t5,
            timestep=t / 1000,
            img_ids=ChromaPipeline._prepare_latent_image_ids(2, H // 2, W // 2, "cpu", torch.float32),
            txt_ids=torch.zeros(TOKENS, 3),
            controlnet_block_samples=added,
            controlnet_blocks_repeat=True,
        ).sample
    for hook in hooks:
        hook.remove()
    return ChromaPipeline._unpack_latents(answer, 8 * H, 8 * W, 8), states


def test_a_new_net_is_the_first_blocks(models: Models) -> None:
    """Through doors that let all pass, its states are those of diffusers' model."""
    net: Any = new_net(models, torch.Generator().manual_seed(1))
    for door in net.controlnet_blocks:
        door.weight.data = torch.eye(len(door.weight))
    torch.testing.assert_close(residuals(models, net), they_say(*inputs()[:3], None)[1], atol=1e-5, rtol=1e-5)


def test_the_model_takes_what_it_gives_as_diffusers_does(models: Models, tmp_path: Path) -> None:
    net = new_net(models, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(3)
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    save_net(models, net.state_dict(), tmp_path / "ours.safetensors", {})
    x, t, t5, images = inputs()
    follower = Controlled(models, read_net(models, str(tmp_path / "ours.safetensors")), STRENGTH)
    follower.follow(images)
    ours = said(models, x, t, t5)
    follower.remove()
    assert (ours - said(models, x, t, t5)).abs().max() > 1e-2
    wanted, _ = they_say(x, t, t5, [STRENGTH * each for each in residuals(models, net)])
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    # Before the training, not after it.
    with pytest.raises(UserError, match="save_model_as: diffusers has no ControlNet of Chroma"):
        ControlNet(models, config(save_model_as="diffusers"))
