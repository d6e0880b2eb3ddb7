"""The optimizer's step in parts: its numbers are those of the plain step, whatever waits where."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from memory.delayed import Delayed
from torch import Tensor, nn

from sfumato.config import OptimizerConfig
from sfumato.optim import build, host
from sfumato.optim.fused import FusedStep, parts
from sfumato.optim.groups import Group
from sfumato.optim.trial import steps_alone

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
NAMES = [name for name, path in build.NAMES.items() if find_spec(path.partition(".")[0])]
CPU = torch.device("cpu")
BATCHES = 2
"""Added up for a step."""


class Toy:
    """A net, its optimizer in two groups (with a weight that never gets a gradient), and batches."""

    def __init__(
        self, name: str = "AdamW", *args: str, dtype: torch.dtype = torch.float32, kahan: bool = False
    ) -> None:
        g = torch.Generator().manual_seed(0)
        self.weights = [
            nn.Parameter((0.3 * torch.randn(shape, generator=g)).to(dtype))
            for shape in ((20, 24), (24,), (24, 20), (20,), (7, 3))
        ]
        together = name.startswith(("DAdapt", "Prodigy"))
        lr = 1.0 if together else 1e-2
        self.config = OptimizerConfig(optimizer_type=name, optimizer_args=args, learning_rate=lr)
        self.groups = [
            Group(name="a", lr=lr, parameters=self.weights[:3]),
            Group(name="b", lr=lr if together else lr / 2, parameters=self.weights[3:]),
        ]
        self.optimizer = build.optimizer(self.config, self.groups)
        if dtype is torch.bfloat16:
            build.in_low_bits(self.optimizer, 0, kahan=kahan)
        build.training(self.optimizer)
        self.done = 0
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.overflows: tuple[int, ...] = ()
        self.ended: Callable[[], None] = lambda: None
        """Called at the end of the passes."""

    def fused(self, **settings: Any) -> FusedStep:
        settings = {"copies": Delayed(0), **settings}
        made = FusedStep(self.optimizer, [[p] for p in self.weights], device=CPU, **settings)
        self.step: Callable[[], Tensor] = partial(self._fused, made)
        return made

    def plain(self, max_norm: float = 0.0) -> None:
        self.step = partial(self._plain, max_norm)

    def train(self, steps: int) -> list[Tensor]:
        for _ in range(steps):
            self.step()
            self.done += 1
        return [p.detach().clone() for p in self.weights]

    def _backward(self, last: Callable[[bool], None]) -> Tensor:
        g = torch.Generator().manual_seed(self.done)
        for number in range(BATCHES):
            last(number == BATCHES - 1)
            x = torch.randn(6, 20, generator=g).to(self.weights[0].dtype)
            w1, b1, w2, b2, _ = self.weights
            error = (torch.tanh(x @ w1 + b1) @ w2 + b2 - x.flip(1)).float()
            factor = torch.inf if self.done in self.overflows and number == 0 else 1.0
            self.scaler.scale(error.square().sum() * factor).backward()
        self.ended()
        return error.detach().sum()

    def _fused(self, fused: FusedStep) -> Tensor:
        norm = fused.step(partial(self._backward, partial(setattr, fused, "last")), self.scaler, lambda: None)[1]
        assert not fused.in_backward or all(p.grad is None for p in self.weights)
        self.optimizer.zero_grad()
        return norm

    def _plain(self, max_norm: float) -> Tensor:
        self._backward(lambda last: None)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.weights, max_norm or torch.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm


def assert_close(a: Sequence[Tensor], b: Sequence[Tensor], rtol: float = 1e-4, atol: float = 1e-6) -> None:
    for one, two in zip(a, b, strict=True):
        torch.testing.assert_close(one, two, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_plain_step(name: str) -> None:
    """With clipping, accumulation, and the state on the host wherever a weight steps by itself."""
    plain, fused = Toy(name), Toy(name)
    alone = steps_alone(fused.config, fused.groups)
    assert alone == (not name.startswith(("DAdapt", "Prodigy")))
    plain.plain(0.5)
    made = fused.fused(max_norm=0.5, together=not alone, state_on_host=alone)
    start = plain.train(0)
    expected = plain.train(7)
    assert not torch.equal(expected[0], start[0])
    assert_close(fused.train(7), expected)
    for one, two in zip(plain.optimizer.param_groups, fused.optimizer.param_groups, strict=True):
        for key in one.keys() - {"params"}:
            assert one[key] == (pytest.approx(two[key]) if isinstance(one[key], float) else two[key]), key
    with build.evaluating(plain.optimizer), build.evaluating(fused.optimizer, made.each):
        assert_close(fused.weights, plain.weights)
    assert_close(fused.weights, plain.weights)


@pytest.mark.parametrize("settings", [{}, {"clipping": "two_passes"}, {"in_backward": False}], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "fp16"])
def test_exact_clipping(settings: dict[str, Any], scaled: bool) -> None:
    """With fp16's scaler, too: a step whose gradients overflow is left out."""
    plain, fused = Toy(), Toy()
    plain.plain(0.5)
    fused.fused(max_norm=0.5, **settings)
    for toy in (plain, fused):
        if scaled:
            toy.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            toy.overflows = (1,)
    before = plain.train(1)
    assert_close(plain.train(2), fused.train(3))
    assert plain.scaler.get_scale() == fused.scaler.get_scale() == (2.0**9 if scaled else 1.0)
    torch.testing.assert_close(plain.step(), fused.step())
    assert not torch.equal(before[0], plain.weights[0])


def test_delayed_clipping_goes_by_the_norm_of_the_last_step() -> None:
    plain, fused = Toy("SGDNesterov"), Toy("SGDNesterov")
    fused.fused(max_norm=0.5, clipping="delayed")
    plain.plain(0.5)
    norm = plain.step()
    torch.testing.assert_close(fused.step(), norm)  # the first step is exact
    plain.done = fused.done = 1
    for _ in range(3):
        last, _ = norm, plain._backward(lambda last: None)
        norm = nn.utils.get_total_norm([p.grad for p in plain.weights if p.grad is not None])
        for p in plain.weights[:4]:
            p.grad *= (0.5 / (last + 1e-6)).clamp(max=1)
        plain.optimizer.step()
        plain.optimizer.zero_grad()
        torch.testing.assert_close(fused.step(), norm)
        plain.done = fused.done = fused.done + 1
    assert_close(plain.weights, fused.weights)


@pytest.mark.parametrize("kahan", [False, True], ids=["stochastic", "kahan"])
def test_bf16_rounds_as_in_the_plain_step(kahan: bool) -> None:
    plain, fused = (Toy("AdamW", dtype=torch.bfloat16, kahan=kahan) for _ in range(2))
    plain.plain()
    fused.fused(state_on_host=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.train(4), fused.train(4), strict=True))


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "AdamWScheduleFree"])
def test_resumed_equals_unbroken(name: str) -> None:
    if name not in NAMES:
        pytest.skip("bitsandbytes is not installed")
    dtype = torch.float32 if name.endswith("Free") else torch.bfloat16
    settings: dict[str, Any] = {"max_norm": 0.5, "clipping": "delayed", "state_on_host": True}
    whole, half = Toy(name, dtype=dtype), Toy(name, dtype=dtype)
    first = whole.fused(**settings)
    made = half.fused(**settings)
    for p, value in zip(half.weights, whole.train(3), strict=True):
        p.data.copy_(value)
    first.settle()
    with made.loading():
        half.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    half.done = 3
    assert all(torch.equal(a, b) for a, b in zip(whole.train(3), half.train(3), strict=True))


def test_no_more_gradients_live_than_those_of_a_part() -> None:
    weights = [nn.Parameter(torch.eye(8)) for _ in range(10)]
    optimizer = build.optimizer(OptimizerConfig(), [Group(name="a", lr=0.1, parameters=weights)])
    cut = parts(weights, size=2 * weights[0].nbytes)
    assert [len(part) for part in cut] == [2] * 5
    fused, seen = FusedStep(optimizer, cut, device=CPU, copies=Delayed(0)), []
    fused.before.append(lambda part: seen.append((len(part), sum(p.grad is not None for p in weights))))

    def backward() -> Tensor:
        x = torch.ones(8)
        for p in weights:
            x = p @ x
        x.sum().backward()
        return x.sum()

    fused.step(backward, torch.amp.GradScaler("cpu", enabled=False), lambda: None)
    assert seen == [(2, 2)] * 5


def test_parts_hold_weights_of_one_block_alone() -> None:
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))
    stem = nn.Linear(4, 4)
    weights = [*blocks.parameters(), *stem.parameters()]
    assert [len(part) for part in parts(weights, list(blocks))] == [2, 4, 4, 4]
    assert [len(part) for part in parts(weights, list(blocks), size=1)] == [1] * 14


def test_what_leaves_the_device_steps_before_it() -> None:
    toy = Toy()
    fused = FusedStep(toy.optimizer, [toy.weights], device=CPU, copies=Delayed(0))
    toy.step = partial(toy._fused, fused)
    whole = Toy()
    whole.plain()
    stepped: list[int] = []
    fused.after.append(lambda part: stepped.append(len(part)))
    toy.weights[3].register_post_accumulate_grad_hook(lambda p: fused.flush([p]))
    assert_close(toy.train(3), whole.train(3))
    assert stepped == [1, 3] * 3


def test_a_part_waits_for_no_weight_that_got_no_gradient_before() -> None:
    """And such a weight steps when it gets one again."""
    toy, whole, events = Toy(), Toy(), list[object]()
    whole.plain()
    fused = FusedStep(toy.optimizer, [toy.weights], device=CPU, copies=Delayed(0))
    fused.after.append(lambda part: events.append(len(part)))
    toy.step = partial(toy._fused, fused)
    toy.ended = lambda: events.append("end")
    for frozen in ((), (), (3,), (3,), ()):
        for each in (toy, whole):
            for i, p in enumerate(each.weights):
                p.requires_grad_(i not in frozen)
        assert_close(toy.train(1), whole.train(1))
    assert events == ["end", 4, 4, "end", "end", 3, 3, "end", 3, 1, "end"]


def test_gradients_that_are_kept_stay_until_they_are_cleared() -> None:
    toy = Toy()
    fused = toy.fused(kept=toy.weights[:1])
    fused.step(partial(toy._backward, partial(setattr, fused, "last")), toy.scaler, lambda: None)
    assert [p.grad is not None for p in toy.weights] == [True, False, False, False, False]


def test_an_optimizer_that_looks_at_all_gradients_is_found_out() -> None:
    for name, args, alone in (("Lamb", (), True), ("Lamb", ("pre_norm=True",), False), ("Adai", (), False)):
        toy = Toy(name, *args)
        assert steps_alone(toy.config, toy.groups) is alone


def test_a_late_copy_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused, copies = Toy(), Toy(), Delayed(1)
    plain.plain(0.5)
    fused.fused(copies=copies, max_norm=0.5, state_on_host=True)
    assert_close(fused.train(3), plain.train(3))
    monkeypatch.setattr(copies, "wait", lambda copy: None)
    assert not all(map(torch.equal, fused.train(3), plain.train(3)))


def test_what_waits_on_the_host_sets_out_ahead_of_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on; the memory is the first step's."""
    monkeypatch.setattr(host, "SMALL", 0)
    toy, copies = Toy(), Delayed(0)
    fused, coming = toy.fused(copies=copies, state_on_host=True), dict[Tensor, int]()
    assert fused.state
    fused.before.append(lambda part: coming.update({part[0]: len(fused.state.shelf._coming)}))
    toy.train(2)
    made = copies.hosts
    coming.clear()
    toy.train(2)
    assert list(coming.values()) == [0, 3, 2, 1]
    assert copies.hosts == made


def test_weights_go_with_the_step_that_they_had() -> None:
    toy = Toy()
    toy.fused()
    toy.train(1)
    weight = weakref.ref(toy.weights[0])
    del toy
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("clipping", ["host", "two_passes", "none"])
def test_a_step_that_an_error_ended_may_be_done_again(clipping: str) -> None:
    plain, fused = Toy(), Toy()
    limit = 0.0 if clipping == "none" else 0.5
    plain.plain(limit)
    made = fused.fused(max_norm=limit, **({} if clipping == "none" else {"clipping": clipping}))
    fused.train(1)

    def out_of_memory(last: bool) -> None:
        made.last = last
        if last:
            raise MemoryError

    changed: list[bool] = []
    with pytest.raises(MemoryError):
        made.step(partial(fused._backward, out_of_memory), fused.scaler, lambda: changed.append(True))
    assert not changed
    fused.optimizer.zero_grad()
    assert_close(fused.train(2), plain.train(3))


def test_what_was_given_up_is_let_go() -> None:
    shelf = host.Shelf(Delayed(0))
    for i in range(200):
        shelf.put(i, [torch.ones(3)])
    assert len(shelf._leaving) <= 64
    shelf.settle()
    assert not shelf._leaving
    assert not shelf._given_up


def test_tensors_of_any_format_share_a_run_of_the_hosts_memory() -> None:
    class Run(Delayed):
        left = torch.empty(4096, dtype=torch.uint8)

        def host(self, nbytes: int) -> Tensor:
            flat, self.left = self.left[:nbytes], self.left[nbytes:]
            return flat

    shelf, given = host.Shelf(Run(0)), [torch.arange(257, dtype=torch.uint8), torch.ones(3), torch.tensor(2.0)]
    shelf.put("a", given)
    assert all(map(torch.equal, shelf.take("a"), given))
