"""BOFT against LyCORIS, given the same blocks, and against ComfyUI's formula."""

from __future__ import annotations

import pytest
import torch
from layers import LAYERS
from lycoris.functional import power2factorization
from lycoris.modules.boft import ButterflyOFTModule
from torch import Tensor, nn

from sfumato.adapters import from_tensors
from sfumato.adapters.boft import BOFT
from sfumato.adapters.oft import OFTOptions
from sfumato.errors import UserError

close = torch.testing.assert_close


def comfy(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """What ComfyUI (comfy/weight_adapter/boft.py) adds at strength 1: its limit is alpha itself, which must be there."""
    q = tensors["oft_blocks"] - tensors["oft_blocks"].mT
    if (alpha := tensors["alpha"].item()) > 0 and (norm := q.norm() + 1e-8) > alpha:
        q = q * alpha / norm
    n, rows = q.shape[-1], len(weight)
    r = (torch.eye(n) + q) @ torch.linalg.inv(torch.eye(n) - q)
    out = weight.flatten(1)
    for i, stage in enumerate(r):
        order = torch.arange(rows).view(-1, 2, 2**i * n // 2).mT.flatten()  # pairs of rows that far apart, together
        turned = torch.block_diag(*stage) @ out[order]
        out = torch.empty_like(out).index_copy(0, order, turned)
    return out.view(weight.shape) * tensors.get("rescale", 1.0) - weight


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("rank", "constraint", "rescaled"), [(6, 0.0, False), (7, 0.05, True), (12, 0.0, True)])
def test_equals_lycoris(name, rank, constraint, rescaled):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make().requires_grad_(False), torch.randn(shape)
    other = ButterflyOFTModule("x", layer, lora_dim=rank, constraint=constraint, rescaled=rescaled)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3 * torch.randn_like(p))
    adapter = BOFT(layer, OFTOptions(rank=rank, constraint=constraint, rescaled=rescaled), torch.Generator())
    assert {n: p.shape for n, p in adapter.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    with torch.no_grad():
        for mine, theirs in zip(adapter.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    change = other.get_diff_weight()[0]
    close(adapter.delta_weight(layer.weight), change, atol=1e-5, rtol=1e-5)
    y = adapter(x, layer(x), layer)

    kind, options = from_tensors(other.state_dict())
    assert kind is BOFT
    again = BOFT(layer, options, torch.Generator())
    again.load_tensors(other.state_dict())
    close(again.delta_weight(layer.weight), change, atol=1e-5, rtol=1e-5)

    written = adapter.tensors()
    close(comfy(layer.weight, written), change, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        back = ButterflyOFTModule.make_module_from_state_dict(
            "x", layer, written["oft_blocks"], written.get("rescale"), written["alpha"]
        )
    close(back.get_diff_weight()[0], change, atol=1e-5, rtol=1e-5)
    back.apply_to()
    close(layer(x), y, atol=1e-5, rtol=1e-5)


def test_the_blocks_are_chosen_as_lycoris_chooses_them():
    for rows in (8, 12, 64, 320, 640, 1280, 3072, 9216):
        for rank in (2, 4, 6, 8, 10, 16, 24, 100, 5000):
            m, count, size, _ = BOFT.shape(rows, OFTOptions(rank=rank))
            theirs = power2factorization(rows, rank)
            assert theirs in ((size, count), (None, 0)), (rows, rank)  # LyCORIS refuses where no block is so small
            assert m == count.bit_length() if count > 1 else m == 1
    with pytest.raises(UserError, match="a layer has 9"):
        BOFT.shape(9, OFTOptions(rank=8))


def test_no_exact_form_for_pieces():
    tensors = BOFT(nn.Linear(3, 12), OFTOptions(rank=6), torch.Generator()).tensors()
    for change in (
        lambda: BOFT.row_count(tensors),
        lambda: BOFT.cut(tensors, [6, 6]),
        lambda: BOFT.join({0: tensors}, [12, 12]),
        lambda: BOFT.move_rows(tensors, lambda t: t.flip(0)),
    ):
        with pytest.raises(UserError, match="mixes all rows"):
            change()
