"""Block streaming: the numbers are those of a net that is on the device whole; what could go wrong fails at once."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from racing import Racing
from streamed import same, streamed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.config import MemoryConfig
from sfumato.memory import offload, swap_plan
from sfumato.memory.backends import Staged, Streams, Threaded, backend
from sfumato.memory.checkpoint import checkpoint_blocks
from sfumato.memory.swap import Swap
from sfumato.memory.swap_plan import Choice, asked, choose
from sfumato.optim.build import in_low_bits
from sfumato.optim.fused import FusedStep, parts

COUNT = 6


class Block(nn.Module):
    """Of two kinds, with a buffer in a format of its own; called with a keyword, it returns a tuple and passes an input through."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)
        self.register_buffer("codes", torch.randint(-9, 9, (8,), dtype=torch.int8))
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, *, shift: Tensor) -> tuple[Tensor, Tensor]:
        inner = nn.functional.layer_norm(x, (8,), self.scale) + 0.1 * self.codes.to(x.dtype)
        return x + shift * self.down(self.up(inner).relu() ** 2), shift


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block(8 + 8 * (i % 2)) for i in range(COUNT))

    def forward(self, x: Tensor) -> Tensor:
        x, shift = self.head(x), x.new_full((8,), 0.5)
        for block in self.blocks:
            x, shift = block(x, shift=shift)
        return x

    def late(self, x: Tensor) -> Tensor:
        """Without the first blocks."""
        shift = x.new_full((8,), 0.5)
        for block in self.blocks[2:]:
            x, shift = block(x, shift=shift)
        return x


X = torch.linspace(-1, 1, 32).view(4, 8)


def grads(net: nn.Module, passes: int = 1) -> list[Tensor]:
    """Of so many passes, added up."""
    for p in net.parameters():
        p.grad = None
    for i in range(passes):
        net(X * (1 + i)).square().mean().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


@pytest.fixture
def net() -> Net:
    """Of which the first layer alone is trained."""
    made = Net().requires_grad_(False)
    made.head.requires_grad_(True)
    return made


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("swapped", range(1, COUNT))
def test_gradients_are_equal(net: Net, swapped: int, again: bool, whole: bool) -> None:
    net.requires_grad_(whole)
    net.head.requires_grad_(True)
    checkpointing = checkpoint_blocks(net.blocks) if again else None
    plain, shown = grads(net, 2), net(X).detach()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    for seed in range(2):
        backend = Racing(seed=seed)
        with streamed(net, net.blocks, choose(COUNT, swapped), backend):
            assert same(plain, grads(net, 2))
            with torch.no_grad():
                assert torch.equal(net(X), shown)
            assert same(plain, grads(net, 2))
            assert not backend.stores
            assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    if checkpointing:
        checkpointing.remove()
    assert same(plain, grads(net, 2))


def test_the_device_holds_less_by_what_is_swapped() -> None:
    blocks = [nn.Linear(64, 64) for _ in range(COUNT)]
    (size,) = set(swap_plan.bytes_of(blocks))
    for swapped in range(1, COUNT):
        choice = choose(COUNT, swapped)
        assert choice.device([size] * COUNT) == (COUNT - swapped) * size
        assert choice.host([size] * COUNT) == (swapped + choice.slots) * size
        backend = Racing(room=choice.slots * size)
        Swap(nn.ModuleList(blocks), blocks, choice, backend).remove()
        assert backend.taken == choice.slots * size


def test_streamed_blocks_lie_evenly_among_the_others() -> None:
    assert choose(12, 4) == Choice((1, 3, 5, 7, 9, 11), 2)
    assert choose(4, 2).places == choose(4, 3).places == (0, 1, 2, 3)
    assert choose(4, 3).slots == 1


def test_lists_of_blocks_may_be_streamed_by_themselves() -> None:
    paths = [*(f"double_blocks.{i}" for i in range(4)), *(f"single_blocks.{i}" for i in range(6))]
    assert asked(paths, MemoryConfig(single_blocks_to_swap=2)) == Choice((4, 6, 7, 9), 2)
    both = asked(paths, MemoryConfig(double_blocks_to_swap=3, single_blocks_to_swap=2))
    assert both == Choice((0, 1, 2, 3, 4, 6, 7, 9), 2)
    assert asked(paths, MemoryConfig()) is None


@pytest.mark.parametrize("again", [False, True])
def test_frozen_weights_are_copied_one_way_and_twice_a_step_at_most(net: Net, again: bool) -> None:
    """Those that are there when the pass turns, or when the next step begins, are not copied anew."""
    if again:
        checkpoint_blocks(net.blocks)
    for swapped in range(1, COUNT):
        backend, choice = Racing(longest=0), choose(COUNT, swapped)
        with streamed(net, net.blocks, choice, backend):
            grads(net)
            backend.loads.clear()
            grads(net)
        assert len(backend.loads) == 2 * (len(choice.places) - choice.slots) == 2 * swapped
        assert not backend.stores


@pytest.mark.parametrize("unseen", [False, True])
def test_trained_weights_that_step_in_the_backward_pass_come_home(net: Net, unseen: bool) -> None:
    """As they do in an unstreamed net; a block that was not changed is not written. `unseen`: by torch, as by kernels of
    other libraries."""
    swaps = list[Swap]()
    net.requires_grad_(True)
    net.blocks[0].requires_grad_(False)

    def step(p: nn.Parameter) -> None:
        assert p.grad is not None
        with torch.no_grad():
            (p.data if unseen else p).sub_(0.1 * p.grad)
        p.grad = None
        for swap in swaps if unseen else ():
            swap.changed([p])

    for p in net.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(step)
    start = {name: t.clone() for name, t in net.state_dict().items()}

    def run() -> dict[str, Tensor]:
        net.load_state_dict(start)
        for _ in range(3):
            net(X).square().mean().backward()
        for swap in swaps:
            swap.settle()
        return {name: torch.empty(t.shape, dtype=t.dtype).copy_(t) for name, t in net.state_dict().items()}

    plain = run()
    backend = Racing(seed=1)
    with streamed(net, net.blocks, choose(COUNT, 4), backend) as swap:
        swaps.append(swap)
        ours = run()
    assert all(torch.equal(t, ours[name]) for name, t in plain.items())
    assert not torch.equal(plain["blocks.5.up.weight"], start["blocks.5.up.weight"])
    sizes = swap_plan.bytes_of(net.blocks)
    assert sorted(backend.stores) == sorted(sizes[1:] * 3)


@pytest.mark.parametrize("clipping", ["host", "two_passes", "delayed"])
def test_blocks_come_for_the_step_of_their_weights(clipping: Any) -> None:
    """Whenever that is: in the backward pass, or after it, for gradients that have waited; with state on the host."""

    def run(net: Net, swap: Swap | None) -> dict[str, Tensor]:
        optimizer = in_low_bits(torch.optim.AdamW(net.parameters(), 0.1), 1)
        cut = parts(list(net.parameters()), list(net.blocks), size=100)
        settings = {"copies": Threaded(), "max_norm": 0.1, "clipping": clipping, "state_on_host": True}
        fused = FusedStep(optimizer, cut, device=X.device, **settings)
        if swap:
            fused.before.append(swap.bring)
            fused.after.append(swap.changed)
            swap.leaving.append(fused.flush)
        for i in range(3):
            fused.step(partial(_loss, net, fused, i), torch.amp.GradScaler("cpu", enabled=False), lambda: None)
            if swap:
                swap.settle()
        return {name: torch.empty(t.shape, dtype=t.dtype).copy_(t) for name, t in net.state_dict().items()}

    plain, net = run(Net().bfloat16(), None), Net().bfloat16()
    with streamed(net, net.blocks, choose(COUNT, 4), Racing(seed=1)) as swap:
        ours = run(net, swap)
    assert all(torch.equal(t, ours[name]) for name, t in plain.items())


def _loss(net: Net, fused: FusedStep, i: int) -> Tensor:
    """Of two batches; the first block has a gradient from the first alone."""
    for last in (False, True):
        fused.last = last
        x = X.to(net.head.weight.dtype) * (i + 1)
        x = net.late(x) if last else net(x)
        loss = x.square().mean()
        loss.backward()
    return loss.detach()


def test_values_that_are_written_between_steps_are_those_of_the_next(net: Net) -> None:
    """As a resumed state, or an average, is."""
    with streamed(net, net.blocks, choose(COUNT, 4), Racing()):
        grads(net)
        with torch.no_grad():
            net(X)
    other = Net()
    with torch.no_grad():
        for p in other.parameters():
            p *= 1.1
    backend = Racing()
    with streamed(net, net.blocks, choose(COUNT, 4), backend) as swap:
        grads(net)
        with torch.no_grad():
            net(X)  # the last blocks are still there
        net.load_state_dict(other.state_dict())
        swap.settle()
        got = grads(net)
    other.requires_grad_(False)
    other.head.requires_grad_(True)
    assert same(got, grads(other))


def test_a_net_that_is_streamed_is_moved_by_nobody_else(net: Net) -> None:
    with streamed(net, net.blocks, choose(COUNT, 4), Racing()):
        assert net.to("meta").blocks[0].up.weight.device.type == "cpu"
        with pytest.raises(RuntimeError, match="number format"):
            net.to(torch.float16)
    assert net.half().blocks[0].up.weight.dtype == torch.float16


def test_what_trained_weights_were_cast_to_leaves_with_them(net: Net) -> None:
    """Autocast keeps it for the whole pass otherwise."""
    net.requires_grad_(True)
    checkpoint_blocks(net.blocks)
    sizes = {p.shape for block in net.blocks for p in (block.up.weight, block.down.weight)}

    def kept() -> int:
        with Casts() as casts, torch.autocast("cpu", torch.bfloat16):
            out = net(X)
            alive = sum(cast is not None and cast.shape in sizes for cast in (each() for each in casts.made))
        out.sum().backward()
        return alive

    assert kept() == 2 * COUNT + 1  # the first layer has one such, too
    with streamed(net, net.blocks, choose(COUNT, 4), Racing()):
        assert kept() <= 3


class Casts(TorchDispatchMode):
    """Notes what is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.made = list[weakref.ref[Tensor]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.made.append(weakref.ref(out))
        return out


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks(net: Net) -> None:
    net.requires_grad_(True)
    plain = grads(net)
    for block in net.blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager")
    compiled = grads(net)
    swap = Swap(net, net.blocks, choose(COUNT, 4), Racing())
    assert same(compiled, grads(net))
    swap.remove()
    assert all(torch.allclose(a, b) for a, b in zip(plain, compiled, strict=True))


@pytest.mark.parametrize("how", [{"every": 2}, {"keep": "costly"}, {"offload": True}], ids=str)
def test_blocks_that_are_recomputed_in_any_way(net: Net, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALL", 0)
    net.requires_grad_(True)
    plain = grads(net)
    checkpoint_blocks(net.blocks, **({"offload": offload.Offload(Threaded())} if "offload" in how else how))
    with streamed(net, net.blocks, choose(COUNT, 4), Racing()):
        assert same(plain, grads(net))
        assert same(plain, grads(net))


# --- an accelerator ---


class Stream:
    """Records what an accelerator's stream is asked for, and keeps to the order."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def record_event(self) -> Event:
        self.calls.append(f"{self.name} records")
        return Event(self.calls)

    def wait_event(self, event: Event) -> None:
        self.calls.append(f"{self.name} waits")

    def synchronize(self) -> None:
        self.calls.append("the host waits")


class Event:
    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def synchronize(self) -> None:
        self.calls.append("a thread waits")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(torch.accelerator, "set_stream", lambda stream: None)
    monkeypatch.setattr(Streams, "_pinned", lambda self, nbytes: torch.empty(nbytes, dtype=torch.uint8))
    return []


def test_an_accelerator_is_waited_for_by_streams_alone(net: Net, calls: list[str]) -> None:
    """A copy for a block; nothing on the host waits, or asks whether something is done."""
    plain = grads(net)
    backend = Streams(X.device, 0, Stream("copies", calls), lambda: Stream("net", calls))
    swap = Swap(net, net.blocks, choose(COUNT, 4), backend)
    for _ in range(2):
        calls.clear()
        assert same(plain, grads(net))
        swap.settle()
    copied = calls.count("copies records")
    assert copied == 2 * 4
    assert calls.count("copies waits") == calls.count("net records") == calls.count("net waits") == copied
    assert len(calls) == 4 * copied
    # A slot is taken when the net is done with it, and a copy waits for that.
    assert calls[:3] == ["net records", "copies waits", "copies records"]
    swap.remove()


def test_where_memory_cannot_be_pinned_a_thread_copies_through_two_buffers(net: Net, calls: list[str]) -> None:
    """From where the tensors are, a file's pages say; the stream's order is kept."""
    plain, sizes = grads(net), swap_plan.bytes_of(net.blocks)
    before = {name: t.data_ptr() for name, t in net.blocks.named_parameters()}
    backend = Staged(X.device, max(sizes), Stream("copies", calls), lambda: Stream("net", calls))
    swap = Swap(net, net.blocks, choose(COUNT, 4), backend, packed=False)
    for _ in range(2):
        calls.clear()
        assert same(plain, grads(net))
        swap.settle()
    assert {name: t.data_ptr() for name, t in net.blocks.named_parameters()} == before
    assert calls.count("copies records") == calls.count("a thread waits") == 2 * 4
    assert "the host waits" not in calls
    swap.remove()


@pytest.mark.parametrize(
    ("waiting", "available", "processes", "kind"),
    [(30, 40, 1, Streams), (33, 40, 1, Staged), (30, 31, 1, Staged), (10, 40, 3, Streams), (11, 40, 3, Staged)],
)
def test_what_cannot_be_pinned_is_staged(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, waiting: int, available: int, processes: int, kind: type
) -> None:
    """At most half of the memory, as far as it is free, of all processes together."""
    monkeypatch.setattr(torch, "Stream", lambda device: Stream("copies", calls))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=64, available=available))
    made, packed = backend(torch.device("cuda"), waiting, 4, processes)
    assert type(made) is kind and packed is (kind is Streams)


def test_pinned_memory_is_taken_in_powers_of_two(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    taken = list[int]()
    pinned = Streams._pinned
    monkeypatch.setattr(Streams, "_pinned", lambda self, nbytes: taken.append(nbytes) or pinned(self, nbytes))
    backend = Streams(X.device, 7 * 768, Stream("copies", calls), lambda: Stream("net", calls))
    parts = [backend.host(768) for _ in range(7)]
    assert taken == [4096, 1024, 1024] and sum(taken) < 7 * 1024
    assert len({p.data_ptr() for p in parts}) == 7


class Clock(Threaded):
    """A device with a clock: copies take their time one after another, beside what is computed."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.now, self.free, self.copied, self.waited = seconds, 0.0, 0.0, 0.0, 0.0

    def compute(self, seconds: float, *_: Any) -> None:
        self.now += seconds

    def load(self, source: Any, slot: Tensor) -> Any:
        self.copied += self.seconds
        self.free = max(self.now, self.free) + self.seconds
        return super().load(source, slot), self.free

    def wait(self, copy: Any) -> None:
        super().wait(copy[0])
        self.waited += max(0.0, copy[1] - self.now)
        self.now = max(self.now, copy[1])


@pytest.mark.parametrize(("swapped", "copy"), [(9, 1.0), (9, 2.0), (18, 1.0), (18, 2.0), (18, 6.0)])
def test_copies_hide_behind_computation(swapped: int, copy: float) -> None:
    """Of 20 blocks; `copy`: the time of one, in those of its forward pass (a backward pass takes two). A step takes as long as what takes longest."""
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20))).requires_grad_(True)
    clock = Clock(copy)
    for block in net:
        block.register_forward_hook(partial(clock.compute, 1.0))
        block.weight.register_post_accumulate_grad_hook(partial(clock.compute, 2.0))
    swap = Swap(net, list(net), choose(20, swapped), clock)
    for _ in range(3):
        clock.copied, clock.waited, begun = 0.0, 0.0, clock.now
        net(torch.ones(1, 4)).sum().backward()
        swap.settle()
    assert clock.copied == 2 * swapped * copy
    assert clock.now - begun <= 1.1 * max(60, clock.copied)
    assert clock.waited == 0 or copy > 1
    swap.remove()


def test_a_step_begins_with_blocks_that_are_there_wherever_the_pass_before_ended() -> None:
    """Where the last block alone is trained, no backward pass comes to the first ones."""
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10))).requires_grad_(False)
    net[-1].requires_grad_(True)
    clock = Clock(1.0)
    for block in net:
        block.register_forward_hook(partial(clock.compute, 1.0))
    swap = Swap(net, list(net), choose(10, 4), clock)
    for _ in range(2):
        clock.waited = 0.0
        net(torch.ones(1, 4)).sum().backward()
        swap.settle()
        clock.compute(2.0)
    assert clock.waited == 0
    swap.remove()


# --- what is wrong fails ---


@pytest.mark.parametrize("again", [False, True])
def test_without_the_call_before_the_backward_pass_it_fails(
    net: Net, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or is right all the same: what autograd kept brings its block back."""
    if again:
        checkpoint_blocks(net.blocks)
    plain = grads(net)
    monkeypatch.setattr(Swap, "_backward", lambda *_: None)
    with streamed(net, net.blocks, choose(COUNT, 4), Racing()):
        if again:
            with pytest.raises(RuntimeError, match="is on the host"):
                grads(net)
        else:
            assert same(plain, grads(net))


def test_without_the_call_before_the_forward_pass_it_fails(net: Net) -> None:
    with streamed(net, net.blocks, choose(COUNT, 4), Racing()):
        del net.blocks[1].forward
        with pytest.raises(RuntimeError, match="is on the host"):
            grads(net)
        net.blocks[1].forward = Block.forward.__get__(net.blocks[1])


@pytest.mark.parametrize("again", [False, True])
def test_a_copy_that_nobody_waits_for_poisons_the_gradients(
    net: Net, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if again:
        checkpoint_blocks(net.blocks)
    monkeypatch.setattr(Racing, "wait", lambda *_: None)
    with streamed(net, net.blocks, choose(COUNT, 4), Racing(longest=0.02)):
        assert any(g.isnan().any() for g in grads(net))


def test_what_autograd_keeps_of_a_slot_is_not_its_memory(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would be another block's, where no call comes before the backward pass."""
    monkeypatch.setattr(Swap, "_pack", lambda self, rank, saved: saved)
    monkeypatch.setattr(Swap, "_backward", lambda *_: None)
    with (
        streamed(net, net.blocks, choose(COUNT, 4), Racing(longest=0)),
        pytest.raises(RuntimeError, match="is on the host"),
    ):
        grads(net)


def test_after_an_error_it_goes_on(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = grads(net)
    with streamed(net, net.blocks, choose(COUNT, 4), Racing()):
        for broken in ("forward", "backward", "copy", "_queue"):
            net.late(X)  # the first blocks are not there
            with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
                if broken in ("copy", "_queue"):
                    patch.setattr(Racing, broken, _fail)
                if broken == "forward":
                    patch.setattr(nn.functional, "layer_norm", _Failing(3))
                handle = net.blocks[3].register_forward_hook(_fails_backward) if broken == "backward" else nullcontext()
                with handle:
                    grads(net)
            assert same(plain, grads(net))


def _fail(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


class _Failing:
    """`layer_norm` that fails in a call."""

    def __init__(self, left: int) -> None:
        self.left, self.function = left, nn.functional.layer_norm

    def __call__(self, *args: Any) -> Tensor:
        self.left -= 1
        return _fail() or self.function(*args) if self.left == 0 else self.function(*args)


def _fails_backward(_: nn.Module, args: Any, out: tuple[Tensor, Tensor]) -> None:
    out[0].register_hook(_fail)
