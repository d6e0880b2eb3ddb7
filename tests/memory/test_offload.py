"""What blocks were given waits on the host: the same gradients, whenever copies are made, in less memory."""

from __future__ import annotations

import pytest
import torch
from delayed import Delayed
from torch import Tensor, nn

from sfumato.memory import offload
from sfumato.memory.checkpoint import checkpoint_blocks
from sfumato.memory.offload import Offload


@pytest.fixture(autouse=True)
def all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors too."""
    monkeypatch.setattr(offload, "SMALL", 0)


class Block(nn.Module):
    """Needs what it is given twice, and what all blocks are given."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        y: Tensor = x + torch.tanh(self.a(x)) * shared
        return y


@pytest.fixture
def blocks() -> list[Block]:
    torch.manual_seed(0)
    return [Block() for _ in range(6)]


def gradients(blocks: list[Block], x: Tensor, shared: Tensor) -> list[Tensor]:
    for block in blocks:
        block.zero_grad()
    for block in blocks:
        x = block(x, shared)
    x.square().sum().backward()
    return [p.grad.clone() for block in blocks for p in block.parameters() if p.grad is not None]


def test_a_late_copy_fails(blocks: list[Block], monkeypatch: pytest.MonkeyPatch) -> None:
    x, shared = torch.randn(16, 64), torch.randn(16, 64)
    plain = gradients(blocks, x, shared)
    backend = Delayed(0)
    checkpoint_blocks(blocks, offload=Offload(backend))
    assert all(map(torch.equal, gradients(blocks, x, shared), plain))
    monkeypatch.setattr(backend, "wait", lambda copy: None)
    assert not all(map(torch.equal, gradients(blocks, x, shared), plain))


def test_the_host_holds_what_the_device_gave_up(blocks: list[Block]) -> None:
    """At the end of the forward pass only the last block's is there; copies come one block ahead; what all blocks are
    given is copied once; nothing is allocated in later steps, of smaller images neither."""
    backend, shared = Delayed(0), torch.randn(16, 64)
    moved = Offload(backend)
    checkpoint_blocks(blocks, offload=moved)
    x = torch.randn(16, 64)
    for block in blocks:
        x = block(x, shared)
    kept = list(moved._known.values())
    assert len(kept) == len(blocks) + 1
    assert sum(each.here is not None for each in kept) == 2  # and what all are given
    order = []
    for i, block in enumerate(blocks):
        block.a.weight.register_hook(lambda grad, i=i: order.append((i, backend.loads)))
    del kept
    x.sum().backward()
    assert order == [(5, 1), (4, 2), (3, 3), (2, 4), (1, 5), (0, 5)]
    made = backend.hosts
    del x
    for rows in (16, 15, 9):
        gradients(blocks, torch.randn(rows, 64), shared[:rows])
    assert backend.hosts == made == len(blocks) + 1


def test_what_cannot_be_copied_as_it_lies_stays(blocks: list[Block]) -> None:
    """Transposed, it can; expanded, it takes no memory worth it."""
    moved = Offload(Delayed(0))
    checkpoint_blocks(blocks, offload=moved)
    x, shared = torch.randn(64, 16).T, torch.randn(1, 64).expand(16, 64)
    before = gradients(blocks, x, shared)
    y = blocks[0](x, shared)
    assert [each.stride for each in moved._known.values()] == [(1, 16)]
    del y
    for block in blocks:
        del block.forward
    assert all(map(torch.equal, gradients(blocks, x, shared), before))
