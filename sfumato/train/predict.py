"""What a training step will need, from the headers of files alone: one step is traced without values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree

from sfumato.adapters import AdapterPlan
from sfumato.config import Config, Method
from sfumato.data.batch import Batch
from sfumato.errors import UserError
from sfumato.memory.as_on_card import AsOnCard
from sfumato.memory.trace import BlockTracer, Trace, alike, signature, without_values
from sfumato.memory.tracker import Tracker
from sfumato.models.base import Models
from sfumato.optim import build
from sfumato.optim.groups import Group
from sfumato.optim.trial import stand_in, trial
from sfumato.tensors import attention
from sfumato.train import dist, trainables
from sfumato.train.devices import formats, outline_models
from sfumato.train.step import Step
from sfumato.train.trainables import Adapters, LLLite, Trainable, caches_latents, caches_text


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of what is on the device for the whole of a training."""

    denoiser: int
    others: int
    """Text encoders and VAE, where they are used in the step."""
    trained: int
    """Adapters; none for whole models, whose weights are the nets' own."""
    state: int
    """The optimizer's, and the moving average."""
    blocks: tuple[int, ...]
    """Frozen weights of each of the denoiser's blocks: what may wait on the host."""

    @property
    def total(self) -> int:
        return self.denoiser + self.others + self.trained + self.state


@dataclass(frozen=True, slots=True)
class Predicted:
    """A step as it was traced: in plain form, from which others follow (`Trace.peaks`)."""

    weights: Weights
    step: Trace
    before: int
    """How many of its calls are of blocks of text encoders and control nets; they come first."""
    gradients: int
    """Of all that is trained."""
    update: int
    """What the optimizer needs for a moment, besides its state."""


def predict(
    config: Config,
    method: Method,
    plan: AdapterPlan | None,
    batches: Sequence[Callable[[Models], Batch]],
    *,
    card: bool,
) -> list[Predicted]:
    """Trace a step on each of these batches (made without values). `card`: as on an accelerator, not as on a CPU.
    Errors: as `outline_models`."""
    return predict_of(outline_models(config, method), config, method, plan, batches, card=card)


def predict_of(
    models: Models,
    config: Config,
    method: Method,
    plan: AdapterPlan | None,
    batches: Sequence[Callable[[Models], Batch]],
    *,
    card: bool,
) -> list[Predicted]:
    """The same for an outline, which is used up."""
    # Parameters are replaced here: a whole model's are listed afterwards, any other trainable has its own.
    own = None if method == "full" else trainables.make(method, models, config, plan)
    with FakeTensorMode(allow_non_fake_inputs=True):
        dtypes = formats(config, models.family, method)
        for name in used(config, models):
            without_values(models.vae if name == "vae" else models.nets()[name], dtypes[name])
        if own:
            without_values(own.modules())
        trainable = own or trainables.make(method, models, config, plan)
        return [_traced(config, models, trainable, batch(models), card=card) for batch in batches]


def used(config: Config, models: Models) -> list[str]:
    """Components that are on the device in a step."""
    encoders = [] if caches_text(config) else list(models.encoders)
    vae = models.vaes is not None and (models.encodes() or not caches_latents(config))
    return ["denoiser", *encoders, *(["vae"] if vae else [])]


def _traced(config: Config, models: Models, trainable: Trainable, batch: Batch, *, card: bool) -> Predicted:
    tracker, names = Tracker(), used(config, models)
    nets = {name: models.vae if name == "vae" else models.nets()[name] for name in names}
    trained = {id(p): p for group in trainable.groups() for p in group.parameters}
    sizes = {name: tracker.know((*net.parameters(), *net.buffers())) for name, net in nets.items()}
    adapters = tracker.know(trainable.modules().parameters())
    tracker.know(_tensors(batch))
    blocks = models.family.blocks(models.denoiser)
    frozen = tuple(sum(p.nbytes for p in (*b.parameters(), *b.buffers()) if id(p) not in trained) for b in blocks)
    own = [follower.net for follower in models.followers]
    step = Step(
        models, trainable, models.process(config.noise, config.loss), config.loss,
        dist.precision(config.train.mixed_precision),
    )  # fmt: skip
    trainable.train(True)
    if isinstance(trainable, LLLite):
        trainable.lite.apart = True
    before = [b for n in models.encoders if n in names for b in _encoder_blocks(models, n)]
    before += [block for follower in models.followers for block in follower.blocks]
    tracer = BlockTracer(tracker, _signatures(trainable, models))
    inner = [part for net in (*nets.values(), *own) for part in alike(net, tracer.signature)]
    weights = tracker.live
    with (
        attention.plain(),
        _freed(trained.values(), tracer),
        _as_on(card),
        tracker,
        tracer.on([*before, *blocks], inner) as trace,
    ):
        step(batch).backward()
        if isinstance(trainable, LLLite):
            trainable.lite.backward()
    state, update = _optimizer(config, trainable, card=card)
    if config.optimizer.ema_decay:
        state += sum(p.nbytes for p in trainable.weights().values())
    whole = Weights(
        denoiser=sizes["denoiser"], others=sum(sizes.values()) - sizes["denoiser"], trained=adapters, state=state,
        blocks=frozen,
    )  # fmt: skip
    for i, event in enumerate(trace.events):
        trace.events[i] = replace(event, level=event.level - weights)
    return Predicted(whole, trace, len(before), sum(p.nbytes for p in trained.values()), update)


def _tensors(batch: Batch) -> Iterator[Tensor]:
    return (t for t in pytree.tree_leaves([getattr(batch, f.name) for f in fields(batch)]) if isinstance(t, Tensor))


def _encoder_blocks(models: Models, name: str) -> Sequence[nn.Module]:
    return models.family.encoder_blocks(models.encoders[name])


def _as_on(card: bool) -> AbstractContextManager[object]:
    return AsOnCard() if card else nullcontext()


@contextmanager
def _freed(weights: Iterable[nn.Parameter], tracer: BlockTracer) -> Iterator[None]:
    """Gradients are counted and given up as they come: the tracer holds them."""
    handles = [p.register_post_accumulate_grad_hook(tracer.on_gradient) for p in weights]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _signatures(trainable: Trainable, models: Models) -> Callable[[nn.Module], Hashable]:
    """Equal for parts that are alike, adapters included."""
    hooked: dict[nn.Module, Hashable] = {}
    if isinstance(trainable, Adapters):
        for (component, path), adapter in trainable.network.by_path().items():
            layer = models.nets()[component].get_submodule(path)
            hooked[layer] = (signature(adapter, {}), repr(getattr(adapter, "options", None)))
    if isinstance(trainable, LLLite):
        for path, part in trainable.lite.parts.items():
            hooked[models.denoiser.get_submodule(path)] = signature(part, {})
    found: dict[int, Hashable] = {}

    def of(part: nn.Module) -> Hashable:
        if id(part) not in found:
            found[id(part)] = signature(part, hooked)
        return found[id(part)]

    return of


def _optimizer(config: Config, trainable: Trainable, *, card: bool) -> tuple[int, int]:
    """Bytes of the optimizer's state, and of what a step of it needs for a moment: from a step on one weight of each
    shape."""
    groups = trainable.groups()
    weights = [p for group in groups for p in group.parameters]
    counts = Counter((p.shape, p.dtype) for p in weights)
    try:
        held, moment = _tried(config, list(counts), card=card)
    except (RuntimeError, UserError):  # it reads numbers back, or needs a card
        with unset_fake_temporarily():
            a_number = _bytes_a_number(config)
        return a_number * sum(p.numel() for p in weights), 3 * max(p.nbytes for p in weights)
    if config.train.full_bf16 and not (config.optimizer.fused or config.optimizer.optimizer_state_on_cpu):
        # All weights are made wide at once.
        moment = moment * sum(p.numel() for p in weights) // sum(shape.numel() for shape, _ in counts)
    return sum(held[key] * count for key, count in counts.items()), moment


def _tried(
    config: Config, kinds: Sequence[tuple[torch.Size, torch.dtype]], *, card: bool
) -> tuple[dict[tuple[torch.Size, torch.dtype], int], int]:
    """State of each kind of weight, and what a step needs besides."""
    weights = [nn.Parameter(torch.empty(shape, dtype=dtype)) for shape, dtype in kinds]
    for p in weights:
        p.grad = torch.empty_like(p)
    group = Group(name="", lr=config.optimizer.learning_rate, parameters=weights)
    optimizer = build.optimizer(config.optimizer, [group], fused=card)
    if config.train.full_bf16:
        optimizer = build.in_low_bits(optimizer, config.train.seed, kahan=config.train.kahan_summation)
    build.training(optimizer)
    tracker = Tracker()
    tracker.know([*weights, *(p.grad for p in weights if p.grad is not None)])
    with tracker:
        optimizer.step()
    held = {
        kind: sum(t.nbytes for t in optimizer.state[p].values() if isinstance(t, Tensor))
        for kind, p in zip(kinds, weights, strict=True)
    }
    return held, tracker.peak - tracker.live


def _bytes_a_number(config: Config) -> int:
    """State for each number that is trained, where the optimizer cannot be tried without values."""
    tried = trial(config.optimizer, [stand_in("", config.optimizer.learning_rate)])
    if not tried.stepped:  # bitsandbytes': two moments
        return 2 if "8bit" in type(tried.optimizer).__name__ else 8
    p, state = next(iter(tried.optimizer.state.items()))
    return sum(t.element_size() for t in state.values() if isinstance(t, Tensor) and t.numel() == p.numel())
