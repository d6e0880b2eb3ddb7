"""The table of Lumina Image 2.0 against real files, at full size, on the meta device, and against diffusers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from diffusers import Lumina2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers
from test_lumina2_net import tensors
from tinies import lumina2
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.families.lumina2.names import transformer_keys
from sfumato.families.lumina2.net import Lumina2
from sfumato.models.meta_init import fill, shapes

Keys = Callable[[str], dict[str, tuple[int, ...]]]
UNUSED = "norm_final.weight"
"""Stands in the file, and is applied by none who run the model."""
CONFIG = {"hidden_size": 2304, "cap_feat_dim": 2304}
"""What `transformer/config.json` of the real model says besides diffusers' defaults."""


def meta(table: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in table.items()}


def real(keys: Keys) -> dict[str, tuple[int, ...]]:
    table = keys("lumina2.transformer")
    assert table.pop(UNUSED) == (2304,)
    return table


def test_the_net_has_the_names_and_shapes_of_the_real_file(keys: Keys) -> None:
    table = real(keys)
    net = fill(Lumina2.of(table), meta(table), "transformer")
    assert shapes(net.state_dict()) == table
    assert net.axes == (32, 32, 32)
    attention = net.layers[0].attention
    assert isinstance(attention, nn.Module) and attention.counts == [24, 8, 8]


def test_the_table_is_whole_in_both_directions(keys: Keys) -> None:
    table = real(keys)
    with torch.device("meta"):
        foreign = shapes(Lumina2Transformer2DModel(**CONFIG).state_dict())
    assert shapes(transformer_keys(foreign).to_native(meta(foreign))) == table
    assert shapes(transformer_keys(table).to_foreign(meta(table))) == foreign


def test_values_go_over_and_back_unchanged() -> None:
    foreign = lumina2.transformer().state_dict()
    back = transformer_keys(shapes(tensors())).to_foreign(tensors())
    assert back.keys() == foreign.keys()
    assert all(torch.equal(back[name], t) for name, t in foreign.items())


def test_values_go_where_diffusers_puts_those_of_a_single_file(keys: Keys) -> None:
    """Which has the real model's rows of q, k and v in its code: here one block of each kind, of the real width."""
    table = {
        name: shape
        for name, shape in real(keys).items()
        if "attention.qkv" in name or "adaLN" in name or "norm" in name or "layers" not in name
    }
    table = {name: (*shape[:1], *(2 for _ in shape[1:])) for name, shape in table.items()}
    table |= {"layers.0.attention.out.weight": (2, 2304)}
    held = {name: torch.rand(shape) for name, shape in table.items() if ".1." not in name or "adaLN" in name}
    theirs = convert_lumina2_to_diffusers(dict(held))
    ours = transformer_keys(table).to_foreign(held)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())


def test_a_tensor_of_no_part_is_refused_by_name(keys: Keys) -> None:
    table = real(keys)
    with pytest.raises(UserError, match=r"mystery\.weight"):
        transformer_keys(table).to_foreign(meta({**table, "mystery.weight": (1,)}))
    more = {**table, "layers.3.attention.v_norm.weight": (96,)}
    with pytest.raises(UserError, match=r"layers\.3\.attention\.v_norm\.weight"):
        fill(Lumina2.of(more), meta(more), "transformer")
