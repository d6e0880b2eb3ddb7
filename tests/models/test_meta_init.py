"""A net made without values takes a file's tensors, and nothing of it stays without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sfumato.formats import files
from sfumato.models.components import Component, open_component
from sfumato.models.key_formats import native_format
from sfumato.models.meta_init import drop, fill, shapes

TENSORS = {"proj.weight": torch.ones(2, 4), "proj.bias": torch.zeros(2)}


class Net(nn.Module):
    """A projection, and angles of positions, which files do not hold."""

    angles: Tensor

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 2)
        self.register_buffer("angles", torch.arange(3.0), persistent=persistent)


def made(*, persistent: bool) -> Net:
    with torch.device("meta"):
        return Net(persistent=persistent)


def test_a_buffer_that_no_file_fills_is_named_before_a_value_is_read(tmp_path: Path) -> None:
    files.save(tmp_path / "net.safetensors", TENSORS)
    component = Component(
        name="net", title="the net", net=lambda shapes, config: made(persistent=False), key_format=native_format
    )
    weights = open_component(component, str(tmp_path / "net.safetensors"))
    with pytest.raises(
        RuntimeError, match=r"^Net for .*net.safetensors \(the net\): the buffer angles is not persistent"
    ):
        weights.empty()


def test_a_buffer_of_the_file_is_filled() -> None:
    tensors = TENSORS | {"angles": torch.arange(3.0)}
    net = fill(made(persistent=True), tensors, "the file")
    assert shapes(net.state_dict()) == shapes(tensors) and torch.equal(net.angles, tensors["angles"])


def test_a_buffer_that_is_made_on_a_device_stays() -> None:
    net = made(persistent=False)
    net.angles = torch.arange(3.0)
    assert not fill(net, TENSORS, "the file").angles.is_meta
    drop(net)
    assert net.proj.weight.is_meta and not net.angles.is_meta and not net.training
    assert torch.equal(fill(net, TENSORS, "the file").proj.weight, TENSORS["proj.weight"])
