"""The U-Net of Stable Diffusion XL against diffusers', through the name table."""

from __future__ import annotations

import pytest
import torch
from tinies import sdxl
from torch import Tensor

from sfumato.errors import UserError
from sfumato.families.sdxl.names import unet_keys
from sfumato.families.sdxl.net import UNet, blocks
from sfumato.models.layers import timestep_embedding
from sfumato.models.meta_init import fill, shapes


def native(refiner: bool = False) -> UNet:
    tensors = sdxl.unet(refiner=refiner).state_dict()
    tensors = {name: t.clone() for name, t in unet_keys(tensors).to_native(tensors).items()}
    return fill(UNet.of(shapes(tensors)), tensors, "unet").requires_grad_(True)


def inputs(h: int = 12, w: int = 8, *, refiner: bool = False) -> dict[str, Tensor]:
    config, g = sdxl.unet(refiner=refiner).config, torch.Generator().manual_seed(1)
    sizes = (config.projection_class_embeddings_input_dim - sdxl.G_WIDTH) // sdxl.SIZE_WIDTH
    return {
        "x": torch.randn(2, 4, h, w, generator=g).requires_grad_(),
        "t": torch.tensor([3, 977]),
        "context": torch.randn(2, 9, config.cross_attention_dim, generator=g).requires_grad_(),
        "pooled": torch.randn(2, sdxl.G_WIDTH, generator=g).requires_grad_(),
        "sizes": torch.randint(1, 1500, (2, sizes), generator=g),
    }


def label(given: dict[str, Tensor]) -> Tensor:
    sizes = given["sizes"]
    return torch.cat(
        [given["pooled"], timestep_embedding(sizes.flatten(), sdxl.SIZE_WIDTH).unflatten(0, sizes.shape).flatten(1)], 1
    )


def theirs(given: dict[str, Tensor], *, refiner: bool = False) -> tuple[Tensor, Tensor]:
    """What diffusers' net says, and the label that it made of the pooled text and the sizes."""
    net, labels = sdxl.unet(refiner=refiner), []
    handle = net.add_embedding.register_forward_pre_hook(lambda _, args: labels.append(args[0]))
    more = {"text_embeds": given["pooled"], "time_ids": given["sizes"]}
    said = net(given["x"], given["t"], given["context"], added_cond_kwargs=more).sample
    handle.remove()
    return said, labels[0]


@pytest.mark.parametrize("refiner", [False, True])
def test_forward_and_gradient_equal_diffusers(refiner: bool) -> None:
    net, given = native(refiner), inputs(refiner=refiner)
    x, context, y = given["x"], given["context"], label(given)
    a, (b, their_y) = net(x, given["t"], context, y), theirs(given, refiner=refiner)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y, their_y, atol=1e-5, rtol=1e-5)
    names, parameters = zip(*net.named_parameters(), strict=True)
    expected = dict(sdxl.unet(refiner=refiner).named_parameters())
    *got, grads = grouped(torch.autograd.grad(a.square().sum(), (x, context, y, *parameters)), names)
    *want, wants = grouped(
        torch.autograd.grad(b.square().sum(), (x, context, their_y, *expected.values())), tuple(expected)
    )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(unet_keys(names).to_foreign(grads), wants, atol=1e-5, rtol=1e-5)


def grouped(grads: tuple[Tensor, ...], names: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    x, context, y, *rest = grads
    return x, context, y, dict(zip(names, rest, strict=True))


@pytest.mark.parametrize("size", [(9, 13), (10, 12), (8, 7)])
def test_any_size_of_latents(size: tuple[int, int]) -> None:
    given = inputs(*size)
    with torch.no_grad():
        said = native()(given["x"], given["t"], given["context"], label(given))
        torch.testing.assert_close(said, theirs(given)[0], atol=1e-5, rtol=1e-5)


def test_blocks_are_all_that_stands_between_the_ends() -> None:
    net = native()
    held = {id(p) for block in blocks(net) for p in block.parameters()}
    rest = {name.rpartition(".")[0] for name, p in net.named_parameters() if id(p) not in held}
    assert rest == {
        "time_embed.0",
        "time_embed.2",
        "label_emb.0.0",
        "label_emb.0.2",
        "input_blocks.0.0",
        "out.0",
        "out.2",
    }


def test_blocks_stand_in_forward_order() -> None:
    net, given = native(), inputs()
    called: list[object] = []
    for block in blocks(net):
        block.register_forward_hook(lambda block, *_: called.append(block))
    net(given["x"], given["t"], given["context"], label(given))
    assert called == blocks(net)


def test_a_net_without_a_label_is_refused() -> None:
    sizes = {name: shape for name, shape in shapes(native().state_dict()).items() if not name.startswith("label_emb.")}
    with pytest.raises(UserError, match=r"lacks the tensor 'label_emb\.0\.0\.weight'"):
        UNet.of(sizes)
