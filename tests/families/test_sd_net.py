"""The U-Net against diffusers', through the name table."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.families.sd.family import blocks
from sfumato.families.sd.names import unet_keys
from sfumato.families.sd.net import UNet
from sfumato.models.meta_init import fill, shapes


def native(v2: bool) -> UNet:
    tensors = tiny.parts(v2=v2).unet.state_dict()
    tensors = {name: t.clone() for name, t in unet_keys(tensors).to_native(tensors).items()}
    return fill(UNet.of(shapes(tensors)), tensors, "unet").requires_grad_(True)


def inputs(h: int = 16, w: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, h, w, generator=g), torch.randn(2, 9, tiny.WIDTH, generator=g)
    return x.requires_grad_(), torch.tensor([3, 977]), context.requires_grad_()


@pytest.mark.parametrize("v2", [False, True])
def test_forward_and_gradient_equal_diffusers(v2: bool) -> None:
    ours, theirs = native(v2), tiny.parts(v2=v2).unet
    x, t, context = inputs()
    a, b = ours(x, t, context), theirs(x, t, context).sample
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    names, parameters = zip(*ours.named_parameters(), strict=True)
    grad_x, grad_context, *grads = torch.autograd.grad(a.square().sum(), (x, context, *parameters))
    keys = unet_keys(names)
    expected = dict(theirs.named_parameters())
    want_x, want_context, *wants = torch.autograd.grad(b.square().sum(), (x, context, *expected.values()))
    torch.testing.assert_close(grad_x, want_x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad_context, want_context, atol=1e-5, rtol=1e-5)
    got = keys.to_foreign(dict(zip(names, grads, strict=True)))
    torch.testing.assert_close(got, dict(zip(expected, wants, strict=True)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(9, 13), (10, 12), (8, 7)])
def test_any_size_of_latents(size: tuple[int, int]) -> None:
    x, t, context = inputs(*size)
    with torch.no_grad():
        torch.testing.assert_close(
            native(False)(x, t, context), tiny.parts(v2=False).unet(x, t, context).sample, atol=1e-5, rtol=1e-5
        )


def test_blocks_are_all_that_stands_between_the_ends() -> None:
    net = native(False)
    held = {id(p) for block in blocks(net) for p in block.parameters()}
    rest = {name for name, p in net.named_parameters() if id(p) not in held}
    assert {name.rpartition(".")[0] for name in rest} == {
        "time_embed.0",
        "time_embed.2",
        "input_blocks.0.0",
        "out.0",
        "out.2",
    }


def test_heads_that_do_not_fit_are_refused() -> None:
    tensors = tiny.parts(v2=True).unet.state_dict()
    sizes = shapes(unet_keys(tensors).to_native(tensors))
    with pytest.raises(UserError, match="heads of 64"):
        UNet.of({name: tuple(32 if n == 64 else n for n in shape) for name, shape in sizes.items()})
