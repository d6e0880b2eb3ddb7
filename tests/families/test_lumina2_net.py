"""The transformer of Lumina Image 2.0 against diffusers', through the name table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tinies import lumina2
from torch import Tensor

from sfumato.errors import UserError
from sfumato.families.lumina2.names import transformer_keys
from sfumato.families.lumina2.net import Lumina2, blocks
from sfumato.memory.checkpoint import checkpoint_blocks
from sfumato.models.meta_init import fill, shapes

LENGTHS = [9, 4, 1]
"""Tokens of the captions of a batch."""


def tensors() -> dict[str, Tensor]:
    foreign = lumina2.transformer().state_dict()
    return {name: t.clone() for name, t in transformer_keys(shapes(foreign)).to_native(foreign).items()}


def native() -> Lumina2:
    held = tensors()
    return fill(Lumina2.of(shapes(held)), held, "transformer").requires_grad_(True)


def inputs(h: int = 8, w: int = 14, b: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(b, 16, h, w, generator=g).requires_grad_(),
        "t": torch.tensor([0.0031, 0.977, 0.5])[:b],
        "context": torch.randn(b, 9, lumina2.CONTEXT, generator=g).requires_grad_(),
        "mask": torch.arange(9) < torch.tensor(LENGTHS[:b])[:, None],
    }


def diffusers(model: Any, told: Mapping[str, Tensor]) -> Tensor:
    mask = told.get("mask", torch.ones(told["context"].shape[:2]))
    said: Tensor = model(told["x"], told["t"], told["context"], mask.long()).sample
    return said


def within(got: Mapping[str, Tensor], want: Mapping[str, Tensor], part: float = 1e-5) -> None:
    """Every tensor is known to a small part of its own largest value, and none is 0 throughout."""
    assert got.keys() == want.keys()
    for name, t in want.items():
        assert t.any(), name
        assert (got[name] - t).abs().max() <= part * t.abs().max(), name


def test_forward_and_gradient_equal_diffusers() -> None:
    """With captions of several lengths in one batch, which diffusers takes out of their padding one by one."""
    ours, theirs, told = native(), lumina2.transformer(), inputs()
    a, b = ours(**told), diffusers(theirs, told)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    given = {name: told[name] for name in ("x", "context")}
    mine, own = given | dict(ours.named_parameters()), given | dict(theirs.named_parameters())
    got = dict(zip(mine, torch.autograd.grad(a.square().sum(), [*mine.values()]), strict=True))
    want = dict(zip(own, torch.autograd.grad(b.square().sum(), [*own.values()]), strict=True))
    within({name: got.pop(name) for name in given}, {name: want.pop(name) for name in given})
    within(transformer_keys(shapes(tensors())).to_foreign(got), want)


@pytest.mark.parametrize("size", [(2, 2), (6, 22), (24, 2)])
@torch.no_grad()
def test_any_even_size(size: tuple[int, int]) -> None:
    """Without a mask too: then every row is a token."""
    net, told = native(), inputs(*size)
    torch.testing.assert_close(net(**told), diffusers(lumina2.transformer(), told), atol=1e-5, rtol=1e-5)
    del told["mask"]
    torch.testing.assert_close(net(**told), diffusers(lumina2.transformer(), told), atol=1e-5, rtol=1e-5)


def test_odd_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="8 x 13 cannot be cut into patches of 2 x 2"):
        native()(**inputs(8, 13))


@torch.no_grad()
def test_a_batch_equals_its_captions_one_by_one_whatever_their_padding_holds() -> None:
    net, told = native(), inputs()
    together = net(**told)
    other = told["context"].masked_fill(~told["mask"][..., None], 70.0)
    torch.testing.assert_close(net(**{**told, "context": other}), together, atol=1e-6, rtol=1e-6)
    for i, length in enumerate(LENGTHS):
        one = {name: told[name][i : i + 1] for name in ("x", "t")}
        alone = net(**one, context=told["context"][i : i + 1, :length])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_blocks_are_all_that_stands_between_the_ends() -> None:
    net = native()
    held = {id(p) for block in blocks(net) for p in block.parameters()}
    rest = {name.partition(".")[0] for name, p in net.named_parameters() if id(p) not in held}
    assert rest == {"x_embedder", "t_embedder", "cap_embedder", "final_layer"}


def test_gradients_are_the_same_when_blocks_run_again() -> None:
    net, told = native(), inputs()
    first = torch.autograd.grad(net(**told).square().sum(), [*net.parameters()])
    checkpoint_blocks(blocks(net))
    again = torch.autograd.grad(net(**told).square().sum(), [*net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@torch.no_grad()
def test_sixteen_bits() -> None:
    """Under autocast, where weights and activations differ in format, and with weights in 16 bits."""
    net, told = native(), inputs()
    exact = net(**told)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(**told)
    half = net.bfloat16()(**{name: t.bfloat16() if name in ("x", "context") else t for name, t in told.items()})
    for said in (mixed, half):
        assert said.dtype == torch.bfloat16
        assert (said - exact).square().mean() < 1e-3 * exact.square().mean()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers.0.attention.q_norm.weight": (32,)}, "heads of 32 channels, which three axes cannot share evenly"),
        ({"layers.1.attention.qkv.weight": (200, 96)}, r"layers\.1\.attention: 200 rows cannot be cut into queries"),
        ({"layers.1.attention.qkv.weight": (96, 96)}, r"layers\.1\.attention: 96 rows cannot be cut into queries"),
        ({"layers.1.attention.qkv.weight": (96 + 6 * 24, 96)}, r"layers\.1\.attention: 240 rows cannot be cut"),
    ],
)
def test_heads_that_do_not_fit_are_refused(changed: Mapping[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Lumina2.of({**shapes(tensors()), **changed})


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("layers.1.", "has layers up to 2, but none numbered 1;"),
        ("noise_refiner.0.feed_forward.w3", r"lacks the tensor 'noise_refiner\.0\.feed_forward\.w3\.weight'"),
        ("cap_embedder.0", r"lacks the tensor 'cap_embedder\.0\.weight'"),
    ],
)
def test_a_missing_tensor_or_block_is_named_in_full(gone: str, message: str) -> None:
    sizes = {name: shape for name, shape in shapes(tensors()).items() if not name.startswith(gone)}
    with pytest.raises(UserError, match=message):
        Lumina2.of(sizes)
