"""The transformer of Anima with its text adapter against diffusers' two nets, through the name table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from test_sd3_net import within
from tinies import anima, llms
from torch import Tensor

from sfumato.errors import UserError
from sfumato.families.anima.names import anima_keys
from sfumato.families.anima.net import ROWS, Anima, blocks
from sfumato.memory.checkpoint import checkpoint_blocks
from sfumato.models.meta_init import fill, shapes


def native() -> Anima:
    held = anima.tensors()
    return fill(Anima.of(shapes(held)), held, "transformer").requires_grad_(True)


@pytest.fixture(scope="module")
def net() -> Anima:
    return native()


def inputs(h: int = 8, w: int = 14, b: int = 2, rows: int = 9) -> dict[str, Tensor]:
    """The second caption is short, the third has no token for Qwen3."""
    g = torch.Generator().manual_seed(1)
    states_mask = torch.arange(7) < torch.tensor([[7], [4], [0]])[:b]
    states = torch.randn(b, 7, llms.QWEN3_WIDTH, generator=g)
    return {
        "x": torch.randn(b, 16, h, w, generator=g).requires_grad_(),
        "t": torch.tensor([0.31, 0.97, 0.5005])[:b],
        "states": (states * states_mask[..., None]).requires_grad_(),
        "ids": torch.randint(0, 40, (b, rows), generator=g),
        "states_mask": states_mask,
        "ids_mask": torch.arange(rows) < torch.tensor([[rows], [3], [1]])[:b],
    }


def diffusers(told: Mapping[str, Tensor], transformer: Any = None, conditioner: Any = None) -> Tensor:
    """As the modular pipeline calls them."""
    transformer, conditioner = transformer or anima.transformer(), conditioner or anima.conditioner()
    text = conditioner(told["states"], told["ids"], told["ids_mask"], told["states_mask"])
    x, mask = told["x"], torch.zeros(1, 1, 8 * told["x"].shape[2], 8 * told["x"].shape[3])
    said: Tensor = transformer(x[:, :, None], told["t"], text, padding_mask=mask).sample[:, :, 0]
    return said


def test_forward_and_gradient_equal_diffusers(net: Anima) -> None:
    told = inputs()
    a, b = net(**told), diffusers(told)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    given = {name: told[name] for name in ("x", "states")}
    theirs = {
        **dict(anima.transformer().named_parameters()),
        **{f"text_conditioner.{name}": p for name, p in anima.conditioner().named_parameters()},
    }
    mine, own = given | dict(net.named_parameters()), given | theirs
    got = dict(zip(mine, torch.autograd.grad(a.square().sum(), [*mine.values()]), strict=True))
    want = dict(zip(own, torch.autograd.grad(b.square().sum(), [*own.values()]), strict=True))
    assert not within({name: got.pop(name) for name in given}, {name: want.pop(name) for name in given})
    assert not within(anima_keys().to_foreign(got), want)


@pytest.mark.parametrize("size", [(2, 2), (40, 2), (6, 22)])
@torch.no_grad()
def test_any_even_size(net: Anima, size: tuple[int, int]) -> None:
    told = inputs(*size)
    torch.testing.assert_close(net(**told), diffusers(told), atol=1e-5, rtol=1e-5)


def test_odd_sizes_are_refused(net: Anima) -> None:
    with pytest.raises(UserError, match="8 x 13 cannot be cut into patches of 2 x 2"):
        net(**inputs(8, 13))


@torch.no_grad()
def test_a_caption_without_a_token_is_as_diffusers_has_it(net: Anima) -> None:
    told = inputs(b=3)
    torch.testing.assert_close(net(**told), diffusers(told), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [9, ROWS, ROWS + 8])
@torch.no_grad()
def test_a_batch_equals_its_samples_one_by_one(net: Anima, rows: int) -> None:
    """Beyond 512 rows too, where diffusers lets short captions of a batch attend to as many zeros as the longest has rows."""
    told = inputs(4, 4, b=3, rows=rows)
    together = net(**told)
    for i, n in enumerate((rows, 3, 1)):
        one = {name: value[i : i + 1] for name, value in told.items()}
        one |= {name: one[name][:, :n] for name in ("ids", "ids_mask")}
        torch.testing.assert_close(together[i : i + 1], net(**one), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together[i : i + 1], diffusers(one), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_no_masks_mean_that_all_is_the_captions_own(net: Anima) -> None:
    told = inputs(b=1)
    unmasked = {name: value for name, value in told.items() if not name.endswith("mask")}
    torch.testing.assert_close(net(**unmasked), net(**told), atol=1e-6, rtol=1e-6)


def test_blocks_are_all_that_stands_between_the_ends(net: Anima) -> None:
    held = {id(p) for block in blocks(net) for p in block.parameters()}
    rest = {name.rpartition(".")[0] for name, p in net.named_parameters() if id(p) not in held}
    ends = {"x_embedder.proj.1", "t_embedder.1.linear_1", "t_embedder.1.linear_2", "t_embedding_norm"}
    last = {"final_layer.linear", "final_layer.adaln_modulation.1", "final_layer.adaln_modulation.2"}
    assert rest == ends | last | {"llm_adapter.embed", "llm_adapter.out_proj", "llm_adapter.norm"}


def test_gradients_are_the_same_when_blocks_run_again() -> None:
    net, told = native(), inputs()
    first = torch.autograd.grad(net(**told).square().sum(), [*net.parameters()])
    checkpoint_blocks(blocks(net))
    again = torch.autograd.grad(net(**told).square().sum(), [*net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@torch.no_grad()
def test_sixteen_bits(net: Anima) -> None:
    """Under autocast, where weights and activations differ in format, and with weights in 16 bits."""
    told = inputs()
    exact = net(**told)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(**told)
    halved = {name: v.bfloat16() if v.is_floating_point() and name != "t" else v for name, v in told.items()}
    half = native().bfloat16()(**halved)
    for said in (mixed, half):
        assert said.dtype == torch.bfloat16
        assert (said - exact).square().mean() < 2e-3 * exact.square().mean()


@torch.no_grad()
def test_sums_that_pass_the_range_of_fp16() -> None:
    """From block to block, as those of published models do, which single layers do not."""
    net, told = native(), inputs()
    for block in net.blocks:
        block.mlp.get_parameter("layer2.weight").data *= 3e3
        block.adaln_modulation_mlp.get_parameter("2.weight").data *= 30
    exact = net(**told)
    with torch.autocast("cpu", torch.float16):
        mixed = net(**told)
    halved = {name: v.half() if v.is_floating_point() and name != "t" else v for name, v in told.items()}
    for said in (mixed, net.half()(**halved)):
        assert (said - exact).square().mean() < 1e-4 * exact.square().mean()


def test_a_text_adapter_of_another_width_than_its_table() -> None:
    """It has a layer between the two then, as diffusers' has."""
    from diffusers import AnimaTextConditioner

    sizes = {"source_dim": llms.QWEN3_WIDTH, "target_dim": anima.TEXT_WIDTH, "target_vocab_size": 50}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = AnimaTextConditioner(**sizes, model_dim=32, num_layers=1, num_attention_heads=2)
    held = {
        **{name: t for name, t in anima.tensors().items() if not name.startswith("llm_adapter.")},
        **{f"llm_adapter.{name}": t for name, t in theirs.state_dict().items()},
    }
    told = inputs()
    given = told["states"], told["ids"]
    masks = told["states_mask"], told["ids_mask"]
    ours = fill(Anima.of(shapes(held)), held, "transformer").llm_adapter
    with torch.no_grad():
        wanted = theirs(*given, masks[1], masks[0])[:, :9]
        torch.testing.assert_close(ours(*given, *masks), wanted, atol=1e-5, rtol=1e-5)


def test_heads_that_do_not_fit_are_refused() -> None:
    sizes = {**shapes(anima.tensors()), "blocks.0.self_attn.q_norm.weight": (48,)}
    with pytest.raises(UserError, match=r"blocks\.0\.self_attn: 64 channels cannot be cut into heads of 48"):
        Anima.of(sizes)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("blocks.1.", "has blocks up to 2, but none numbered 1;"),
        ("llm_adapter.blocks.0.", r"has llm_adapter\.blocks up to 1, but none numbered 0;"),
        ("blocks.0.mlp.layer1.weight", r"lacks the tensor 'blocks\.0\.mlp\.layer1\."),
        ("llm_adapter.embed.weight", r"lacks the tensor 'llm_adapter\.embed\."),
    ],
)
def test_a_missing_tensor_or_block_is_named_in_full(gone: str, message: str) -> None:
    sizes = {name: shape for name, shape in shapes(anima.tensors()).items() if not name.startswith(gone)}
    with pytest.raises(UserError, match=message):
        Anima.of(sizes)
