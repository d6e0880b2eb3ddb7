"""Blocks are compiled one by one: few graphs, the same gradients, and a reason where it does not work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from racing import Racing
from tiny_steps import CASES, TinyStep
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from sfumato.config import MemoryConfig
from sfumato.errors import UserError
from sfumato.memory import offload
from sfumato.memory.checkpoint import checkpoint_blocks
from sfumato.memory.compile import backend_of, check_backend, compile_blocks
from sfumato.memory.offload import Offload
from sfumato.memory.plan import apply_memory_options
from sfumato.memory.quantise import store
from sfumato.memory.swap import Swap
from sfumato.memory.swap_plan import choose
from sfumato.tensors.stored import Int8

SIZES = [(8, 8), (16, 16), (8, 12), (12, 8), (4, 16), (16, 4), (10, 8), (8, 10), (6, 12), (12, 6)]
"""Ten buckets."""


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Neither before a test nor after it; settings of torch are as they were."""
    with (
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=False),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=False),
        torch.fx.experimental._config.patch(use_duck_shape=True),
    ):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield
    torch._dynamo.reset()


class Counting:
    """A compiler that leaves graphs as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        forward: Callable[..., Any] = graph.forward
        return forward


class Tokens(nn.Module):
    """(b, n, c), and a hook that changes what a layer gives, as adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        down, up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.trained = [*down.parameters(), *up.parameters()]
        self.a.requires_grad_(False).register_forward_hook(lambda layer, args, y: y + up(down(args[0])))

    def forward(self, x: Tensor, *, shared: Tensor) -> Tensor:
        y: Tensor = x + torch.tanh(self.a(x)) * shared
        return y


class Codes(Tokens):
    """Whose frozen weights are kept in fewer bits."""

    def __init__(self) -> None:
        super().__init__()
        store(self.a, Int8())


class Pixels(nn.Module):
    """(b, c, h, w)"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.trained = list(self.parameters())

    def forward(self, x: Tensor, *, shared: Tensor) -> Tensor:
        y: Tensor = x + torch.tanh(self.a(x)) * shared.mean()
        return y


@pytest.fixture(params=[Tokens, Pixels])
def blocks(request: pytest.FixtureRequest) -> list[Any]:
    torch.manual_seed(0)
    return [request.param() for _ in range(4)]


def gradients(blocks: list[Any], height: int = 8, width: int = 8) -> list[Tensor]:
    for block in blocks:
        for p in block.trained:
            p.grad = None
    g = torch.Generator().manual_seed(1)
    shape = (2, height * width, 8) if isinstance(blocks[0], Tokens) else (2, 8, height, width)
    x = torch.randn(shape, generator=g, requires_grad=True)
    for block in blocks:
        x = block(x, shared=torch.full((2, 1, 8), 0.5))
    x.square().sum().backward()
    return [p.grad for block in blocks for p in block.trained]


def test_ten_buckets_make_two_graphs(blocks: list[Any]) -> None:
    plain = [gradients(blocks, *size) for size in SIZES]
    backend = Counting()
    compile_blocks(blocks, backend, pytest.fail)
    checkpoint_blocks(blocks[1:], keep="costly")
    for size, wanted in zip(SIZES, plain, strict=True):
        assert all(map(torch.equal, gradients(blocks, *size), wanted))
    assert backend.graphs == 2
    with torch.no_grad():  # samples are not trained on, which is another graph
        blocks[0](torch.randn(2, *((9, 8) if isinstance(blocks[0], Tokens) else (8, 3, 5))), shared=torch.ones(2, 1, 8))
    assert backend.graphs == 3


@pytest.mark.parametrize("blocks", [Tokens], indirect=True)
def test_aot_autograd_and_the_handle(blocks: list[Any]) -> None:
    plain = gradients(blocks)
    handle = compile_blocks(blocks, "aot_eager", pytest.fail)
    for a, b in zip(gradients(blocks), plain, strict=True):
        torch.testing.assert_close(a, b)
    handle.remove()
    assert "forward" not in vars(blocks[0])


@pytest.mark.parametrize("blocks", [Codes], indirect=True)
def test_together_with_all_that_comes_and_goes(blocks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In fewer bits, compiled, recomputed but for what costs much, their inputs on the host, and they themselves."""
    monkeypatch.setattr(offload, "SMALL", 0)
    sizes = [*SIZES[:3], SIZES[0]]
    plain = [gradients(blocks, *size) for size in sizes]
    inputs, weights = Racing(seed=1), Racing(seed=2)
    compile_blocks(blocks, "aot_eager", pytest.fail)
    checkpoint_blocks(blocks, keep="costly", offload=Offload(inputs))
    Swap(nn.ModuleList(blocks), blocks, choose(len(blocks), 2), weights)
    for size, wanted in zip(sizes, plain, strict=True):
        for a, b in zip(gradients(blocks, *size), wanted, strict=True):
            torch.testing.assert_close(a, b)
    assert inputs.loads and weights.loads


def failing(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler here\nand more")


WAYS = {
    "forward": failing,
    "backward": aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=failing),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("blocks", [Tokens], indirect=True)
def test_a_failing_compiler_is_told_once(blocks: list[Any], way: str) -> None:
    plain, told = gradients(blocks), list[str]()
    compile_blocks(blocks, WAYS[way], told.append)
    checkpoint_blocks(blocks)
    for _ in range(2):
        assert all(map(torch.equal, gradients(blocks), plain))
    assert told == ["torch_compile: Tokens is not compiled, but run as it is: no compiler here"]


@pytest.mark.parametrize("blocks", [Tokens], indirect=True)
def test_too_many_variants_are_told(blocks: list[Any]) -> None:
    """As torch would go on without the compiler and not say so."""
    plain, told = gradients(blocks), list[str]()
    compile_blocks(blocks, Counting(), told.append)
    with torch._dynamo.config.patch(recompile_limit=1):
        gradients(blocks, 9)
        assert all(map(torch.equal, gradients(blocks), plain))
    assert told == ["torch_compile: Tokens is not compiled, but run as it is: there are more than 1 variants of it"]


def test_who_asks_for_which_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert backend_of(MemoryConfig()) is None
    assert backend_of(MemoryConfig(torch_compile=True)) == "inductor"
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    assert backend_of(MemoryConfig()) == "aot_eager"
    assert backend_of(MemoryConfig(torch_compile=True, dynamo_backend="EAGER")) == "eager"
    with pytest.raises(UserError, match=r"dynamo_backend fast: torch knows .*inductor"):
        check_backend(MemoryConfig(torch_compile=True, dynamo_backend="fast"))


@pytest.mark.parametrize("blocks", [Tokens], indirect=True)
def test_the_plan_does_what_the_config_says(blocks: list[Any]) -> None:
    """Below checkpointing; while samples are made as well."""
    config = MemoryConfig(torch_compile=True, dynamo_backend="eager", gradient_checkpointing=True)
    plain = gradients(blocks)
    apply_memory_options(blocks[:2], config, torch.device("cpu"), pytest.fail)
    apply_memory_options(blocks[2:], config, torch.device("cpu"), pytest.fail, training=False)
    assert [hasattr(block.forward, "_checkpointed") for block in blocks] == [True, True, False, False]
    assert all(map(torch.equal, gradients(blocks), plain))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.family) for case in CASES])
def test_few_graphs_of_every_family(case: Any) -> None:
    """Two for each way in which a kind of block is called: with a mask or without, for a gradient or not."""
    step = TinyStep.of(case)
    # Where a net halves sizes, none may shrink to 1, which torch takes for another case.
    sizes = [(4 * h, 4 * w) for h, w in SIZES] if case.family in ("sd", "sdxl") else SIZES
    ways: set[object] = set()

    def look(block: nn.Module, args: tuple[Any, ...]) -> None:
        given = [isinstance(value, Tensor) and (value.ndim, value.requires_grad) for value in args]
        ways.add((repr(block), *(p.shape for p in block.parameters()), *given))

    handles = [block.register_forward_pre_hook(look) for block in step.blocks]
    plain = [step.gradients(*size) for size in sizes]
    for handle in handles:
        handle.remove()
    backend = Counting()
    compile_blocks(step.blocks, backend, pytest.fail)
    for size, wanted in zip(sizes, plain, strict=True):
        again = step.gradients(*size)
        for name in wanted:
            torch.testing.assert_close(again[name], wanted[name])
    assert backend.graphs <= 2 * len(ways)


@pytest.mark.slow
def test_inductor() -> None:
    """What people use, with g++ here."""
    step = TinyStep.of(next(case for case in CASES if case.family == "anima"), "target=attention")
    plain = [step.gradients(*size) for size in SIZES[:3]]
    compile_blocks(step.blocks, "inductor", pytest.fail)
    checkpoint_blocks(step.blocks)
    for size, wanted in zip(SIZES, plain, strict=False):
        again = step.gradients(*size)
        for name in wanted:
            torch.testing.assert_close(again[name], wanted[name], rtol=1e-3, atol=1e-5)
