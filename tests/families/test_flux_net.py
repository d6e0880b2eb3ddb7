"""FLUX.1's transformer against diffusers', through the name table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from flux_checks import within
from tinies import flux
from tinies.encoders import L_WIDTH, T5_WIDTH
from torch import Tensor

from sfumato.errors import UserError
from sfumato.families.flux.names import flux_keys
from sfumato.families.flux.net import Flux, axes, blocks
from sfumato.models.meta_init import fill, shapes

TOKENS = 9
"""Of the text."""


def tensors(guidance: bool = True) -> dict[str, Tensor]:
    foreign = flux.transformer(guidance=guidance).state_dict()
    return {name: t.clone() for name, t in flux_keys(shapes(foreign)).to_native(foreign).items()}


def native(guidance: bool = True) -> Flux:
    held = tensors(guidance)
    return fill(Flux.of(shapes(held)), held, "transformer").requires_grad_(True)


def inputs(h: int = 8, w: int = 12, guidance: bool = True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    told = {
        "x": torch.randn(2, 16, h, w, generator=g).requires_grad_(),
        "t": torch.tensor([0.0031, 0.977]),
        "context": torch.randn(2, TOKENS, T5_WIDTH, generator=g).requires_grad_(),
        "y": torch.randn(2, L_WIDTH, generator=g).requires_grad_(),
    }
    return told | ({"guidance": torch.tensor([1.0, 3.5])} if guidance else {})


def diffusers(model: Any, told: dict[str, Tensor]) -> Tensor:
    """What diffusers' pipeline makes of latents before and after its model."""
    b, c, h, w = told["x"].shape
    packed = FluxPipeline._pack_latents(told["x"], b, c, h, w)
    ids = FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32)
    said = model(
        hidden_states=packed,
        encoder_hidden_states=told["context"],
        pooled_projections=told["y"],
        timestep=told["t"],
        img_ids=ids,
        txt_ids=torch.zeros(told["context"].shape[1], 3),
        guidance=told.get("guidance"),
    ).sample
    return FluxPipeline._unpack_latents(said, h * 8, w * 8, 8)


@pytest.mark.parametrize("guidance", [True, False])
def test_forward_and_gradient_equal_diffusers(guidance: bool) -> None:
    ours, theirs, told = native(guidance), flux.transformer(guidance=guidance), inputs(guidance=guidance)
    a, b = ours(**told), diffusers(theirs, told)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    given = {name: told[name] for name in ("x", "context", "y")}
    mine, own = given | dict(ours.named_parameters()), given | dict(theirs.named_parameters())
    got = dict(zip(mine, torch.autograd.grad(a.square().sum(), [*mine.values()]), strict=True))
    want = dict(zip(own, torch.autograd.grad(b.square().sum(), [*own.values()]), strict=True))
    within({name: got.pop(name) for name in given}, {name: want.pop(name) for name in given})
    within(flux_keys(shapes(tensors(guidance))).to_foreign(got), want)


@pytest.mark.parametrize("size", [(2, 2), (14, 6), (4, 20)])
def test_any_even_size_of_latents(size: tuple[int, int]) -> None:
    with torch.no_grad():
        told = inputs(*size)
        torch.testing.assert_close(native()(**told), diffusers(flux.transformer(), told), atol=1e-5, rtol=1e-5)


def test_odd_sizes_are_refused() -> None:
    with pytest.raises(UserError, match=r"8 x 13 .*must be even"):
        native()(**inputs(8, 13))


@torch.no_grad()
def test_a_batch_of_prompts_under_a_mask_equals_each_at_its_own_length() -> None:
    net, told, lengths = native(), inputs(), (4, TOKENS)
    mask = torch.arange(TOKENS) < torch.tensor(lengths)[:, None]
    together = net(**told, mask=mask)
    for i, length in enumerate(lengths):
        one = {name: value[i : i + 1] for name, value in told.items()}
        one["context"] = one["context"][:, :length]
        torch.testing.assert_close(together[i : i + 1], diffusers(flux.transformer(), one), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_a_mask_hides_changes_nothing() -> None:
    net, told = native(), inputs()
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    torch.testing.assert_close(net(**told, mask=mask), net(**told), atol=1e-5, rtol=1e-5)
    mask[:, 2] = mask[0, 5:] = False
    before = net(**told, mask=mask)
    other = torch.where(mask[..., None], told["context"], 100 * torch.ones(()))
    assert torch.equal(net(**told | {"context": other}, mask=mask), before)
    assert not torch.allclose(net(**told | {"context": other}), net(**told), atol=1e-3)


def test_without_a_mask_attention_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Tensor, attn_mask: Tensor | None) -> Tensor:
        seen.append(attn_mask)
        return attention(*args, attn_mask=attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    native()(**inputs())
    assert seen == [None] * 5
    native()(**inputs(), mask=torch.ones(2, TOKENS, dtype=torch.bool))
    assert all(mask is not None and mask.shape == (2, 1, 1, TOKENS + 24) for mask in seen[5:])


def test_guidance_goes_where_there_is_a_place_for_it() -> None:
    with pytest.raises(ValueError, match="has a guidance_in"):
        native(True)(**inputs(guidance=False))
    with pytest.raises(ValueError, match="has no guidance_in"):
        native(False)(**inputs(guidance=True))


@torch.no_grad()
def test_the_net_runs_in_16_bits() -> None:
    told, net = inputs(), native()
    near = native().bfloat16()(**{name: value if name == "t" else value.bfloat16() for name, value in told.items()})
    assert near.dtype == torch.bfloat16
    torch.testing.assert_close(near.float(), net(**told), atol=0.05, rtol=0.05)


def test_blocks_are_all_that_stands_between_the_ends() -> None:
    net = native()
    held = {id(p) for block in blocks(net) for p in block.parameters()}
    rest = {name.split(".")[0] for name, p in net.named_parameters() if id(p) not in held}
    assert rest == {"img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer"}
    assert blocks(net) == [*net.double_blocks, *net.single_blocks]


@torch.no_grad()
def test_a_pruned_model_has_as_many_blocks_as_its_file() -> None:
    held = {name: t for name, t in tensors().items() if not name.startswith(("double_blocks.1.", "single_blocks.2."))}
    pruned = fill(Flux.of(shapes(held)), held, "transformer")
    whole, told = native(), inputs()
    del whole.double_blocks[1], whole.single_blocks[2]
    assert torch.equal(pruned(**told), whole(**told))


def test_gaps_in_the_numbers_of_blocks_are_refused() -> None:
    sizes = {name: shape for name, shape in shapes(tensors()).items() if not name.startswith("single_blocks.1.")}
    with pytest.raises(UserError, match="single_blocks up to 2, but none numbered 1;"):
        Flux.of(sizes)


@pytest.mark.parametrize(
    "name",
    ["double_blocks.1.txt_mod.lin.weight", "guidance_in.out_layer.weight", "single_blocks.0.norm.key_norm.scale"],
)
def test_a_missing_tensor_is_named(name: str) -> None:
    sizes = shapes(tensors())
    del sizes[name]
    with pytest.raises(UserError, match=f"lacks the tensor '{name}'"):
        Flux.of(sizes)


def test_heads_that_do_not_fit_are_refused() -> None:
    sizes = {name: (48,) if name.endswith("_norm.scale") else shape for name, shape in shapes(tensors()).items()}
    with pytest.raises(UserError, match="heads of 48"):
        Flux.of(sizes)


def test_axes_keep_the_ratio_of_the_real_ones() -> None:
    assert axes(128) == (16, 56, 56)
    assert axes(flux.HEAD) == flux.AXES
    assert all(sum(axes(d)) == d and all(n % 2 == 0 and n > 0 for n in axes(d)) for d in range(8, 257, 2))
