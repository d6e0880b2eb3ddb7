"""The transformer of Stable Diffusion 3 and 3.5 against diffusers', through the name table."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from tinies import sd3
from torch import Tensor

from sfumato.errors import UserError
from sfumato.families.sd3.names import transformer_keys
from sfumato.families.sd3.net import MMDiT, blocks
from sfumato.memory.checkpoint import checkpoint_blocks
from sfumato.models.meta_init import fill, shapes

each_kind = pytest.mark.parametrize("kind", sd3.KINDS)


def tensors(kind: sd3.Kind = "3.5_medium") -> dict[str, Tensor]:
    foreign = sd3.transformer(kind).state_dict()
    return {name: t.clone() for name, t in transformer_keys(foreign).to_native(foreign).items()}


def native(kind: sd3.Kind = "3.5_medium") -> MMDiT:
    held = tensors(kind)
    return fill(MMDiT.of(shapes(held)), held, "transformer").requires_grad_(True)


def inputs(h: int = 8, w: int = 14, b: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(b, 16, h, w, generator=g).requires_grad_(),
        "t": torch.tensor([3.1, 977.0, 500.5])[:b],
        "context": torch.randn(b, 9, sd3.CONTEXT, generator=g).requires_grad_(),
        "y": torch.randn(b, sd3.POOLED, generator=g).requires_grad_(),
    }


def diffusers(model: Any, told: Mapping[str, Tensor]) -> Tensor:
    said: Tensor = model(told["x"], told["context"], told["y"], told["t"]).sample
    return said


def within(got: Mapping[str, Tensor], want: Mapping[str, Tensor], part: float = 1e-5) -> set[str]:
    """Every tensor is known to a small part of its own largest value; returns the names of those that are 0 throughout."""
    assert got.keys() == want.keys()
    for name, t in want.items():
        largest = t.abs().max()
        assert (got[name] - t).abs().max() <= part * largest, name
    return {name for name, t in want.items() if not t.any()}


@each_kind
def test_forward_and_gradient_equal_diffusers(kind: sd3.Kind) -> None:
    ours, theirs, told = native(kind), sd3.transformer(kind), inputs()
    a, b = ours(**told), diffusers(theirs, told)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    given = {name: told[name] for name in ("x", "context", "y")}
    mine, own = given | dict(ours.named_parameters()), given | dict(theirs.named_parameters())
    got = dict(zip(mine, torch.autograd.grad(a.square().sum(), [*mine.values()]), strict=True))
    want = dict(zip(own, torch.autograd.grad(b.square().sum(), [*own.values()]), strict=True))
    assert not within({name: got.pop(name) for name in given}, {name: want.pop(name) for name in given})
    idle = {"add_q_proj.weight", "add_q_proj.bias"} | (set() if kind == "medium" else {"norm_added_q.weight"})
    # Nothing sees the text after the last block, so what it looks for there does not count.
    assert within(transformer_keys(tensors(kind)).to_foreign(got), want) == {
        f"transformer_blocks.2.attn.{name}" for name in idle
    }


@pytest.mark.parametrize("size", [(2, 2), (24, 24), (6, 22), (24, 2)])
@torch.no_grad()
def test_any_even_size_up_to_the_table(size: tuple[int, int]) -> None:
    told = inputs(*size)
    torch.testing.assert_close(native()(**told), diffusers(sd3.transformer("3.5_medium"), told), atol=1e-5, rtol=1e-5)


def test_larger_and_odd_sizes_are_refused() -> None:
    net = native()
    assert net.largest == 24
    for size in ((26, 8), (8, 26)):
        with pytest.raises(UserError, match=rf"{size[0]} x {size[1]} are too large .* at most 24 x 24"):
            net(**inputs(*size))
    with pytest.raises(UserError, match="8 x 13 cannot be cut into patches of 2 x 2"):
        net(**inputs(8, 13))


@torch.no_grad()
def test_a_crop_puts_the_image_elsewhere_in_the_table() -> None:
    """diffusers has the middle alone: there the table is moved under the image."""
    net, told, crops = native(), inputs(), [(0, 0), (8, 5)]  # of 4 x 7 patches in 12 x 12
    alone = []
    for top, left in crops:
        theirs = deepcopy(sd3.transformer("3.5_medium"))
        table = theirs.pos_embed.pos_embed.reshape(sd3.SIDE, sd3.SIDE, -1)
        theirs.pos_embed.pos_embed = table.roll((4 - top, 2 - left), (0, 1)).flatten(0, 1)[None]
        alone.append(diffusers(theirs, told))
        torch.testing.assert_close(net(**told, crop=(top, left)), alone[-1], atol=1e-5, rtol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 0.01
    of_each = net(**told, crop=torch.tensor(crops))
    torch.testing.assert_close(of_each, torch.stack([alone[0][0], alone[1][1]]), atol=1e-5, rtol=1e-5)
    assert torch.equal(net(**told, crop=(4, 2)), net(**told)), "the middle is what one gets unasked"


@each_kind
@torch.no_grad()
def test_a_batch_equals_its_samples_one_by_one(kind: sd3.Kind) -> None:
    net, told = native(kind), inputs(b=3)
    together = net(**told)
    for i in range(3):
        one = {name: value[i : i + 1] for name, value in told.items()}
        torch.testing.assert_close(together[i : i + 1], net(**one), atol=1e-5, rtol=1e-5)


def test_blocks_are_all_that_stands_between_the_ends() -> None:
    net = native()
    held = {id(p) for block in blocks(net) for p in block.parameters()}
    rest = {name.partition(".")[0] for name, p in net.named_parameters() if id(p) not in held}
    assert rest == {"x_embedder", "t_embedder", "y_embedder", "context_embedder", "final_layer"}


def test_gradients_are_the_same_when_blocks_run_again() -> None:
    net, told = native(), inputs()
    first = torch.autograd.grad(net(**told).square().sum(), [*net.parameters()])
    checkpoint_blocks(blocks(net))
    again = torch.autograd.grad(net(**told).square().sum(), [*net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@each_kind
@torch.no_grad()
def test_sixteen_bits(kind: sd3.Kind) -> None:
    """Under autocast, where weights and activations differ in format, and with weights in 16 bits."""
    net, told = native(kind), inputs()
    exact = net(**told)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(**told)
    half = net.bfloat16()(**{name: value if name == "t" else value.bfloat16() for name, value in told.items()})
    for said in (mixed, half):
        assert said.dtype == torch.bfloat16
        assert (said - exact).square().mean() < 1e-3 * exact.square().mean()


def test_heads_that_do_not_fit_are_refused() -> None:
    sizes = {
        name: tuple(96 if n == 128 else 288 if n == 384 else n for n in shape)
        for name, shape in shapes(tensors()).items()
    }
    with pytest.raises(UserError, match="96 channels cannot be cut into heads of 64"):
        MMDiT.of(sizes)


def test_positions_that_are_no_square_are_refused() -> None:
    with pytest.raises(UserError, match="pos_embed: 143 positions are no square"):
        MMDiT.of({**shapes(tensors()), "pos_embed": (1, 143, 128)})


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("joint_blocks.1.", "has joint_blocks up to 2, but none numbered 1;"),
        (
            "joint_blocks.0.context_block.mlp.fc1.weight",
            r"lacks the tensor 'joint_blocks\.0\.context_block\.mlp\.fc1\.",
        ),
        ("pos_embed", "lacks the tensor 'pos_embed'"),
    ],
)
def test_a_missing_tensor_or_block_is_named_in_full(gone: str, message: str) -> None:
    sizes = {name: shape for name, shape in shapes(tensors()).items() if not name.startswith(gone)}
    with pytest.raises(UserError, match=message):
        MMDiT.of(sizes)


def test_a_last_block_whose_text_goes_on_is_refused() -> None:
    """Blocks that were taken off the end leave one behind that no MMDiT ends with."""
    held = {name: t for name, t in tensors("medium").items() if not name.startswith("joint_blocks.2.")}
    with pytest.raises(UserError, match=r"joint_blocks\.1\.context_block\.attn\.proj\.weight'.* has no place") as error:
        fill(MMDiT.of(shapes(held)), held, "transformer")
    assert "more such tensors" in str(error.value)
