"""Gradients of tiny models whose blocks are streamed, on the card of `racing`; `python tests/streamed.py` tries all of them."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from racing import Guard, Racing
from tinies.cases import cases
from torch import Tensor, nn

from sfumato import families
from sfumato.adapters import parse
from sfumato.adapters.insert import AdapterNetwork, choose
from sfumato.config import NetworkConfig
from sfumato.memory import swap_plan
from sfumato.memory.checkpoint import checkpoint_blocks
from sfumato.memory.swap import Swap
from sfumato.memory.swap_plan import Choice
from sfumato.models.base import Models, SampleInfo
from sfumato.tensors.random import SampleRandom

Inputs = tuple[Tensor, Tensor, dict[str, Tensor]]


def inputs(models: Models) -> Inputs:
    """Latents, times and cond of two samples."""
    facts, n = models.family.latents, 2
    x = torch.randn(n, facts.channels, 8, 8, generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]] * n)
    with torch.no_grad():
        cond = models.condition(models.encode(models.tokenize(["a cat", "blue"])), SampleInfo(sizes=sizes))
    return x, torch.tensor([100.0, 700.0]), dict(cond)


@contextmanager
def adapters(models: Models, kind: str = "lora") -> Iterator[list[nn.Parameter]]:
    """On all layers of the denoiser, away from their start; their weights."""
    plan = parse(
        NetworkConfig(network_module=kind, network_dim=2, network_alpha=1.0),
        families.facts(models.family.name).network_args,
    )
    targets = models.family.targets["denoiser"]
    network = AdapterNetwork({"denoiser": choose(models.denoiser, "denoiser", targets, plan)}, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    network.rng = SampleRandom(torch.tensor([1, 2]))
    try:
        yield [p for p in network.parameters() if p.requires_grad]
    finally:
        network.remove()


@contextmanager
def whole(net: nn.Module) -> Iterator[list[nn.Parameter]]:
    """All weights of a net."""
    net.requires_grad_(True)
    try:
        yield list(net.parameters())
    finally:
        net.requires_grad_(False)


def gradients(models: Models, given: Inputs, weights: Sequence[nn.Parameter]) -> list[Tensor]:
    """The prediction, and the gradients of its squares' sum."""
    for p in weights:
        p.grad = None
    said = models.predict(*given)
    said.square().sum().backward()
    return [said.detach(), *(torch.zeros(()) if p.grad is None else p.grad for p in weights)]


@contextmanager
def streamed(net: nn.Module, blocks: Sequence[nn.Module], choice: Choice, backend: Racing) -> Iterator[Swap]:
    """Within, blocks of a net are streamed, and a touch of what is not there is an error."""
    swap = Swap(net, blocks, choice, backend)
    try:
        with Guard(backend):
            yield swap
    finally:
        swap.remove()


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def equal_gradients(
    models: Models, given: Inputs, kind: str, tries: Iterable[tuple[int, bool]], *, all_weights: bool
) -> None:
    """That they are those of the unstreamed net, with adapters of a kind. `tries`: how many blocks are swapped, and whether they are recomputed;
    `all_weights`: the net is trained, too."""
    net, blocks = models.denoiser, models.family.blocks(models.denoiser)
    with adapters(models, kind) as weights, whole(net) if all_weights else nullcontext([]) as more:
        plain = gradients(models, given, [*weights, *more])
        for swapped, again in tries:
            with ExitStack() as stack:
                if again:
                    stack.callback(checkpoint_blocks(blocks).remove)
                stack.enter_context(streamed(net, blocks, swap_plan.choose(len(blocks), swapped), Racing(seed=swapped)))
                assert same(plain, gradients(models, given, [*weights, *more])), (kind, swapped, again)


def main() -> None:
    """Every variant of every family, any number of blocks, several kinds of adapters and the whole net."""
    for case in cases():
        with tempfile.TemporaryDirectory() as folder:
            models = case.models(case.write(Path(folder)))
            given, count = inputs(models), len(models.family.blocks(models.denoiser))
            tries = list(itertools.product(range(1, count), (False, True)))
            for kind in ("lora", "dora", "diag-oft", "loha"):
                equal_gradients(models, given, kind, tries, all_weights=kind == "loha")
        print(f"{case.name}: 1 to {count - 1} of {count} blocks", flush=True)


if __name__ == "__main__":
    main()
