"""Chroma's transformer against diffusers', through the name table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ChromaPipeline
from flux_checks import within
from tinies import chroma
from tinies.encoders import T5_WIDTH
from torch import Tensor

from sfumato.errors import UserError
from sfumato.families.chroma.names import chroma_keys
from sfumato.families.chroma.net import Chroma
from sfumato.models.meta_init import fill, shapes

TOKENS = 9
"""Of the text."""
LENGTHS = (4, 7)
"""Tokens of two prompts that are seen."""
MASK = torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]


def tensors() -> dict[str, Tensor]:
    foreign = chroma.transformer().state_dict()
    return {name: t.clone() for name, t in chroma_keys(shapes(foreign)).to_native(foreign).items()}


def native() -> Chroma:
    held = tensors()
    return fill(Chroma.of(shapes(held)), held, "transformer").requires_grad_(True)


def inputs(h: int = 8, w: int = 12) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(2, 16, h, w, generator=g).requires_grad_(),
        "t": torch.tensor([0.0031, 0.977]),
        "context": torch.randn(2, TOKENS, T5_WIDTH, generator=g).requires_grad_(),
    }


def diffusers(model: Any, told: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
    """What diffusers' pipeline makes of latents before and after its model. Its own mask is one of numbers, which hides nothing."""
    b, c, h, w = told["x"].shape
    packed = ChromaPipeline._pack_latents(told["x"], b, c, h, w)
    said = model(
        hidden_states=packed,
        encoder_hidden_states=told["context"],
        timestep=told["t"],
        img_ids=ChromaPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32),
        txt_ids=torch.zeros(told["context"].shape[1], 3),
        attention_mask=None if mask is None else torch.cat([mask, torch.ones(b, packed.shape[1], dtype=torch.bool)], 1),
    ).sample
    return ChromaPipeline._unpack_latents(said, h * 8, w * 8, 8)


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_forward_and_gradient_equal_diffusers(mask: Tensor | None) -> None:
    ours, theirs, told = native(), chroma.transformer(), inputs()
    a, b = ours(**told, mask=mask), diffusers(theirs, told, mask)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    given = {name: told[name] for name in ("x", "context")}
    mine, own = given | dict(ours.named_parameters()), given | dict(theirs.named_parameters())
    got = dict(zip(mine, torch.autograd.grad(a.square().sum(), [*mine.values()]), strict=True))
    want = dict(zip(own, torch.autograd.grad(b.square().sum(), [*own.values()]), strict=True))
    within({name: got.pop(name) for name in given}, {name: want.pop(name) for name in given})
    within(chroma_keys(shapes(tensors())).to_foreign(got), want)


@pytest.mark.parametrize("size", [(2, 2), (14, 6), (4, 20)])
def test_any_even_size_of_latents(size: tuple[int, int]) -> None:
    with torch.no_grad():
        told = inputs(*size)
        torch.testing.assert_close(
            native()(**told, mask=MASK), diffusers(chroma.transformer(), told, MASK), atol=1e-5, rtol=1e-5
        )


def test_odd_sizes_are_refused() -> None:
    with pytest.raises(UserError, match=r"7 x 12 .*must be even"):
        native()(**inputs(7, 12))


@torch.no_grad()
def test_a_batch_of_prompts_under_a_mask_equals_each_at_its_own_length() -> None:
    told = inputs()
    together = native()(**told, mask=MASK)
    for i, length in enumerate(LENGTHS):
        one = {name: value[i : i + 1] for name, value in told.items()}
        one["context"] = one["context"][:, :length]
        torch.testing.assert_close(together[i : i + 1], diffusers(chroma.transformer(), one), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_a_mask_hides_changes_nothing() -> None:
    net, told = native(), inputs()
    before = net(**told, mask=MASK)
    other = told | {"context": torch.where(MASK[..., None], told["context"], 100 * torch.ones(()))}
    assert torch.equal(net(**other, mask=MASK), before)
    assert not torch.allclose(net(**other), net(**told), atol=1e-3)


@torch.no_grad()
def test_the_net_runs_in_16_bits() -> None:
    told, net = inputs(), native()
    near = native().bfloat16()(**{name: value if name == "t" else value.bfloat16() for name, value in told.items()})
    assert near.dtype == torch.bfloat16
    torch.testing.assert_close(near.float(), net(**told), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "name", ["distilled_guidance_layer.norms.1.scale", "distilled_guidance_layer.in_proj.weight", "img_in.weight"]
)
def test_a_missing_tensor_is_named(name: str) -> None:
    sizes = shapes(tensors())
    del sizes[name]
    with pytest.raises(UserError, match=f"lacks the tensor .*{name}"):
        fill(Chroma.of(sizes), {n: t for n, t in tensors().items() if n != name}, "transformer")
