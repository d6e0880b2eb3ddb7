"""The transformer of HunyuanImage-2.1 against diffusers', through the name table."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from flux_checks import within
from tinies import hunyuan_image
from tinies.llms import BYT5_WIDTH, QWEN25VL_WIDTH
from torch import Tensor

from sfumato.errors import UserError
from sfumato.families.hunyuan_image.names import transformer_keys
from sfumato.families.hunyuan_image.net import HunyuanImage, blocks
from sfumato.models.meta_init import fill, shapes

each_kind = pytest.mark.parametrize("distilled", [False, True], ids=["base", "distilled"])
OURS = ("x", "t", "text", "glyphs", "text_mask", "glyphs_mask", "guidance", "t_next")
THEIRS = (
    *("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_2"),
    *("encoder_attention_mask", "encoder_attention_mask_2", "guidance", "timestep_r"),
)


def tensors(*, distilled: bool = False) -> dict[str, Tensor]:
    foreign = hunyuan_image.transformer(distilled=distilled).state_dict()
    return transformer_keys(shapes(foreign)).to_native(foreign)


@cache
def native(*, distilled: bool = False) -> HunyuanImage:
    held = tensors(distilled=distilled)
    return fill(HunyuanImage.of(shapes(held)), held, "transformer").requires_grad_(True)


def inputs(*, distilled: bool = False, b: int = 2) -> dict[str, Tensor]:
    """Prompts of 9, 4 and 6 tokens; the first has text in quotes, and the third."""
    g = torch.Generator().manual_seed(1)
    told = {
        "x": torch.randn(b, 64, 3, 5, generator=g).requires_grad_(),
        "t": torch.tensor([3.1, 977.0, 500.5])[:b],
        "text": torch.randn(b, 9, QWEN25VL_WIDTH, generator=g).requires_grad_(),
        "glyphs": torch.randn(b, 5, BYT5_WIDTH, generator=g).requires_grad_(),
        "text_mask": torch.arange(9) < torch.tensor([9, 4, 6])[:b, None],
        "glyphs_mask": torch.arange(5) < torch.tensor([3, 0, 5])[:b, None],
    }
    more = {"guidance": torch.tensor([3.25, 1.0, 7.5])[:b], "t_next": torch.tensor([0.0, 850.0, 420.0])[:b]}
    return told | (more if distilled else {})


def diffusers(model: Any, told: Mapping[str, Tensor]) -> Tensor:
    said = {theirs: told[ours] for ours, theirs in zip(OURS, THEIRS, strict=True) if ours in told}
    if "guidance" in said:
        said["guidance"] = said["guidance"] * 1000
    out: Tensor = model(**said).sample
    return out


@each_kind
def test_forward_and_gradient_equal_diffusers(distilled: bool) -> None:
    ours, theirs = native(distilled=distilled), hunyuan_image.transformer(distilled=distilled)
    told = inputs(distilled=distilled)
    a, b = ours(**told), diffusers(theirs, told)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    given = {name: told[name] for name in ("x", "text", "glyphs")}
    mine, own = given | dict(ours.named_parameters()), given | dict(theirs.named_parameters())
    got = dict(zip(mine, torch.autograd.grad(a.square().sum(), [*mine.values()]), strict=True))
    want = dict(zip(own, torch.autograd.grad(b.square().sum(), [*own.values()]), strict=True))
    within({name: got.pop(name) for name in given}, {name: want.pop(name) for name in given})
    # A bias of keys adds the same to all scores of a query, so that its gradient is rounding alone.
    keys = transformer_keys(shapes(got)).to_foreign(got)
    noise = {name for name in want if name.endswith("refiner_blocks.0.attn.to_k.bias")}
    noise |= {name for name in want if name.endswith("refiner_blocks.1.attn.to_k.bias")}
    within({n: t for n, t in keys.items() if n not in noise}, {n: t for n, t in want.items() if n not in noise})


@each_kind
@torch.no_grad()
def test_a_batch_equals_its_prompts_one_by_one_without_padding(distilled: bool) -> None:
    net, told = native(distilled=distilled), inputs(distilled=distilled, b=3)
    together = net(**told)
    for i in range(3):
        one = {name: value[i : i + 1] for name, value in told.items() if not name.endswith("_mask")}
        one |= {name: one[name][:, told[f"{name}_mask"][i]] for name in ("text", "glyphs")}
        torch.testing.assert_close(together[i : i + 1], net(**one), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_changes_nothing_whatever_stands_in_it() -> None:
    net, told = native(), inputs(b=3)
    other = {n: told[n].masked_fill(~told[f"{n}_mask"][..., None], 50.0) for n in ("text", "glyphs")}
    assert torch.equal(net(**told), net(**{**told, **other}))


@torch.no_grad()
def test_the_time_that_is_not_given_is_that_of_the_step() -> None:
    net, told = native(distilled=True), inputs(distilled=True)
    now = net(**{**told, "t_next": told["t"]})
    assert torch.equal(net(**{name: value for name, value in told.items() if name != "t_next"}), now)
    assert (net(**told) - now).abs().max() > 1e-3


def test_a_guidance_is_for_distilled_nets_alone() -> None:
    guidance = {"guidance": torch.ones(2)}
    with pytest.raises(ValueError, match="the net has no guidance_in"):
        native()(**inputs(), **guidance)
    with pytest.raises(ValueError, match="the net has a guidance_in"):
        native(distilled=True)(**inputs())


def test_blocks_are_all_that_stands_between_the_ends() -> None:
    net = native()
    held = {id(p) for block in blocks(net) for p in block.parameters()}
    rest = {name.rpartition(".")[0] for name, p in net.named_parameters() if id(p) not in held}
    assert {name.partition(".")[0] for name in rest} == {"img_in", "txt_in", "byt5_in", "time_in", "final_layer"}
    assert not [name for name in rest if "individual_token_refiner" in name]


@torch.no_grad()
def test_sixteen_bits() -> None:
    """Under autocast, where weights and activations differ in format, and with weights in 16 bits; the time is fp32."""
    net, told = native(), inputs()
    exact = net(**told)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(**told)
    half = fill(HunyuanImage.of(shapes(tensors())), {n: t.bfloat16() for n, t in tensors().items()}, "transformer")
    said = half(**{n: t.bfloat16() if n in ("x", "text", "glyphs") else t for n, t in told.items()})
    with torch.autocast("cpu", torch.bfloat16):  # text that was kept in 16 bits, and weights in them alone
        kept = net(**{n: t.bfloat16() if n in ("text", "glyphs") else t for n, t in told.items()})
        light = half(**told)
    for near in (mixed, said, kept, light):
        assert near.dtype == torch.bfloat16
        assert (near - exact).square().mean() < 1e-3 * exact.square().mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_in.proj.weight": (64, 64, 2, 2)}, "patches of 2 x 2; 1 x 1 was expected"),
        ({"img_in.proj.weight": (64, 128, 1, 1, 1)}, "patches of 1 x 1 x 1; 1 x 1 was expected"),
        ({"double_blocks.0.img_attn_q_norm.weight": (24,)}, "64 channels, which cannot be cut into heads of 24"),
        ({"byt5_in.fc2.weight": None}, r"lacks the tensor 'byt5_in\.fc2\.weight'"),
        ({"single_blocks.1.": None}, "has single_blocks up to 2, but none numbered 1;"),
    ],
)
def test_another_net_is_refused(change: dict[str, tuple[int, ...] | None], message: str) -> None:
    sizes = {
        n: change.get(n) or s
        for n, s in shapes(tensors()).items()
        if not any(n.startswith(k) and not v for k, v in change.items())
    }
    with pytest.raises(UserError, match=message):
        HunyuanImage.of(sizes)
