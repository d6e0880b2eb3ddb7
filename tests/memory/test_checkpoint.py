"""Checkpointing from outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from delayed import Delayed
from tiny_steps import CASES, TinyStep
from torch import Tensor, nn
from watch import Watch

from sfumato.config import MemoryConfig
from sfumato.errors import UserError
from sfumato.memory import offload
from sfumato.memory.checkpoint import checkpoint_blocks
from sfumato.memory.offload import Offload
from sfumato.memory.plan import apply_memory_options, check_memory_options


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)
        self.runs = 0

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        self.runs += 1
        return x + scale * self.b(nn.functional.dropout(self.a(x).relu(), 0.3))


def _run(blocks: list[Block], x: Tensor) -> list[Tensor]:
    torch.manual_seed(5)
    for p in (p for b in blocks for p in b.parameters()):
        p.grad = None
    for block in blocks:
        x = block(x, scale=0.5)
    x.square().sum().backward()
    return [p.grad.clone() for b in blocks for p in b.parameters()]


@pytest.fixture
def blocks() -> list[Block]:
    torch.manual_seed(0)
    return [Block() for _ in range(3)]


def test_gradients_are_equal_with_dropout(blocks):
    x = torch.randn(4, 8)
    plain = _run(blocks, x)
    handle = checkpoint_blocks(blocks)
    again = _run(blocks, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert [b.runs for b in blocks] == [3, 3, 3]  # once before, twice now
    handle.remove()
    _run(blocks, x)
    assert [b.runs for b in blocks] == [4, 4, 4]


def test_less_is_remembered(blocks):
    def saved() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            x = torch.randn(64, 8, requires_grad=True)
            for block in blocks:
                x = block(x, scale=0.5)
        return sum(sizes)

    plain = saved()
    checkpoint_blocks(blocks)
    assert saved() < plain / 2


def test_without_gradients_nothing_changes(blocks):
    checkpoint_blocks(blocks)
    with torch.no_grad():
        blocks[0](torch.randn(2, 8), scale=1.0)
    assert blocks[0].runs == 1


def test_names_stay(blocks):
    keys = list(blocks[0].state_dict())
    checkpoint_blocks(blocks)
    assert list(blocks[0].state_dict()) == keys


def test_twice_is_refused_and_leaves_no_trace(blocks):
    handle = checkpoint_blocks(blocks[2:])
    with pytest.raises(RuntimeError, match="checkpointed already"):
        checkpoint_blocks(blocks)
    assert "forward" not in vars(blocks[0])
    handle.remove()
    checkpoint_blocks(blocks)


@pytest.mark.parametrize("asked", [True, False])
def test_the_plan_does_what_the_config_says(blocks, asked):
    apply_memory_options(blocks, MemoryConfig(gradient_checkpointing=asked), torch.device("cpu"))
    assert all(("forward" in vars(b)) is asked for b in blocks)


@pytest.fixture(scope="module", params=[pytest.param(case, id=case.family) for case in CASES])
def step(request: pytest.FixtureRequest) -> TinyStep:
    return TinyStep.of(request.param, "rank_dropout=0.2")


WAYS = {
    "every block": {},
    "every other": {"every": 2},
    "attention kept": {"keep": "attention"},
    "costly kept": {"keep": "costly"},
}


def test_gradients_of_every_family_are_equal(step: TinyStep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALL", 0)
    plain = step.gradients()
    backends = [Delayed(0), Delayed(1)]
    moved = [Offload(backend) for backend in backends]
    ways: dict[str, dict[str, Any]] = {
        "every block": {},
        "costly kept, offloaded": {"keep": "costly", "offload": moved[0]},
        "every other, attention kept, offloaded": {"every": 2, "keep": "attention", "offload": moved[1]},
    }
    for name, way in ways.items():
        handle = checkpoint_blocks(step.blocks, **way)
        again = step.gradients()
        handle.remove()
        assert again.keys() == plain.keys()
        assert all(torch.equal(again[each], plain[each]) for each in plain), name
    assert backends[0].loads
    assert not any(each._known for each in moved), "what was moved is forgotten when its step ends"


def test_what_is_kept_is_not_computed_again_and_takes_less(step: TinyStep) -> None:
    """Of attention: nothing again. Of products: those with long sums."""
    if step.models.family.name != "flux":
        return  # one is enough

    def watched(way: dict[str, Any] | None) -> tuple[int, int, int]:
        handle = checkpoint_blocks(step.blocks, **way) if way is not None else None
        with Watch() as watch:
            loss = step.loss(16, 16)
            alive = watch.alive
            loss.backward()
        if handle:
            handle.remove()
        calls = watch.operators
        attended = sum(n for name, n in calls.items() if "attention" in name and not name.endswith("backward"))
        products = calls["aten::mm"] + calls["aten::addmm"] + calls["aten::convolution"]
        return alive, attended, products

    plain = watched(None)
    whole, other, attention, costly = (watched(way) for way in WAYS.values())
    assert whole[0] < attention[0] < costly[0] < plain[0] and whole[0] < other[0] < plain[0]
    assert plain[1] == attention[1] == costly[1] < other[1] < whole[1]
    assert plain[2] < costly[2] < attention[2] == whole[2]


def test_convolutions_with_long_sums_are_kept() -> None:
    """A 3x3 from 8 to 8 channels has sums of 72 terms, a 1x1 of 8."""
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 1), nn.Tanh())
    checkpoint_blocks([net], keep="costly")
    with Watch() as watch:
        net(torch.randn(1, 8, 5, 5)).sum().backward()
    assert watch.operators["aten::convolution"] == 3


def test_more_than_there_are_blocks_is_refused(blocks: list[Block]) -> None:
    check_memory_options(blocks, MemoryConfig(gradient_checkpointing_every=3))
    with pytest.raises(UserError, match="gradient_checkpointing_every 4: the model has 3 blocks"):
        check_memory_options(blocks, MemoryConfig(gradient_checkpointing_every=4))
