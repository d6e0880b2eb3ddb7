"""Processes that agree without waiting for each other all stop after the same step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.train.dist import Vote, World


class Exchange:
    """Two processes' all-reduces: what one sends is known when both have sent."""

    def __init__(self) -> None:
        self.sent: list[list[Tensor]] = [[], []]
        self.rank = 0

    def all_reduce(self, value: Tensor, op: Any, *, async_op: bool) -> Any:
        assert async_op and value.device.type == "cpu"
        mine = self.sent[self.rank]
        mine.append(value)
        return Sent(self, len(mine) - 1, value)


class Sent:
    def __init__(self, exchange: Exchange, turn: int, value: Tensor) -> None:
        self.exchange, self.turn, self.value = exchange, turn, value

    def wait(self) -> None:
        self.value.copy_(torch.stack([sent[self.turn] for sent in self.exchange.sent]).max())


@pytest.mark.parametrize("asked", [(2, 9), (9, 0), (1, 1), (3, 9)])
def test_all_stop_after_the_same_step(monkeypatch: pytest.MonkeyPatch, asked: tuple[int, int]) -> None:
    steps, exchange = 4, Exchange()
    monkeypatch.setattr(torch.distributed, "all_reduce", exchange.all_reduce)
    votes, stopped = [Vote(World(rank, 2, torch.device("cpu"))) for rank in range(2)], [steps, steps]
    for step in range(steps):
        for rank, vote in enumerate(votes):
            exchange.rank = rank
            if vote.said_yes(step >= asked[rank], last=step == steps - 1):
                stopped[rank] = step
        if min(stopped) < steps:
            break
    first = min(asked)
    assert stopped == ([first + 1] * 2 if first + 1 < steps else [steps] * 2)
    assert len(exchange.sent[0]) == len(exchange.sent[1])


def test_one_process_stops_at_once() -> None:
    vote = Vote(World(0, 1, torch.device("cpu")))
    assert vote.said_yes(True, last=False) and not vote.said_yes(False, last=False)
