"""A net made without values takes a file's tensors, and nothing of it stays without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sfumato.models.meta_init import fill, shapes

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


def test_a_buffer_that_no_file_fills_is_named() -> None:
    with pytest.raises(
        RuntimeError, match=r"^Net: angles still on the meta device after loading the file: .* in forward"
    ):
        fill(made(persistent=False), TENSORS, "the file")


def test_a_buffer_of_the_file_is_filled() -> None:
    tensors = TENSORS | {"angles": torch.arange(3.0)}
    net = fill(made(persistent=True), tensors, "the file")
    assert shapes(net.state_dict()) == shapes(tensors) and torch.equal(net.angles, tensors["angles"])


def test_a_buffer_that_is_made_on_a_device_stays() -> None:
    net = made(persistent=False)
    net.angles = torch.arange(3.0)
    assert not fill(net, TENSORS, "the file").angles.is_meta
