"""Every check of a run that needs no image and no weight; `plan` and `train` call the same function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sfumato import adapters, families
from sfumato.adapters import AdapterPlan
from sfumato.config import FOLLOWING, Config, DatasetConfig, Method, Settings
from sfumato.config.data import PRESERVED
from sfumato.errors import Mistakes, UserError
from sfumato.formats.clients import Loaded
from sfumato.formats.metadata import thumbnail
from sfumato.memory.plan import check_memory_options
from sfumato.models.base import Models
from sfumato.optim.arguments import literals
from sfumato.optim.trial import for_length, trial
from sfumato.sampling.following import check_images
from sfumato.sampling.prompts import Prompt, of_run, sampler
from sfumato.sampling.sample import check_prompts, check_samplers
from sfumato.tensors import attention
from sfumato.train import dist, fusing, hub, log, outputs, resume, swapping, trainables
from sfumato.train.devices import check_base_weights, outline_models, streaming_notes, widening_notes
from sfumato.train.trainables import Adapters, Trainable


@dataclass(frozen=True, slots=True)
class Trained:
    """A component that is trained, as far as shapes show."""

    component: str
    layers: int
    """Layers with an adapter; of a whole net, its tensors."""
    numbers: int
    """Numbers that the optimizer changes."""
    rates: tuple[float, ...]
    """Their learning rates."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Kind and rank of adapters -> layers with one."""
    sets: dict[str, int] = field(default_factory=dict)
    """Named set of layers -> those of it with an adapter; a layer may be in several."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a run will be, as far as its settings and the headers of its files show."""

    prompts: list[Prompt]
    plan: AdapterPlan | None
    """None: a whole model is trained."""
    models: Models
    """Nets without values (on the meta device); `load_models` fills them."""
    trained: tuple[Trained, ...]
    suffix: str
    """Ending of the result's file name; empty for a folder."""
    notes: tuple[str, ...] = ()
    """What a user should know: settings that do not act, and what differs from the state that is resumed."""
    loads_in: tuple[Loaded, ...] = ()
    """Of an adapter: what other programs load of the result."""


def check(config: Config, method: Method, datasets: tuple[DatasetConfig, ...], read: Sequence[Path] = ()) -> Checked:
    """All that is known before an image or a weight is read. Errors: one `UserError` with everything that was found.

    Every check that needs only settings, headers or shapes has its place here, in one of three steps: what needs the
    settings alone, what needs the model's shapes, and what needs the weights that are trained (without values).
    `read`: the config files that the settings came from, which no result may overwrite.
    """
    wrong, prompts, plan, models = Mistakes(), list[Prompt](), None, None
    facts = families.facts_of(config.family)
    with wrong:
        facts.check(Settings.of(config, method))
    with wrong:
        half = dist.precision(config.train.mixed_precision) != "no"
        attention.choose(config.memory.attention, training=True, half=half)
    with wrong:
        log.check(config.log)
    with wrong:
        hub.check(config.hub)
    with wrong:
        thumbnail(config.metadata.metadata_thumbnail)
    for name in ("optimizer_args", "lr_scheduler_args"):
        with wrong:
            literals(name, getattr(config.optimizer, name))
    with wrong:
        prompts = _prompts(config, datasets)
        check_images(prompts, int(method in FOLLOWING), needed=False)
    with wrong:
        plan = adapters.parse(config.network, facts.network_args) if method == "network" else None
    with wrong:
        models = outline_models(config, method)
        check_model(config, models)
        check_prompts(models, prompts, config.sample.sample_sampler)
        process = models.process(config.noise, config.loss)
        check_samplers(models, process, prompts, config.sample.sample_sampler)
    with wrong:
        outputs.check(config, method, datasets, models.source if models else None, read)
    wrong.raise_all()
    assert models is not None
    with outlined(models, config, method, plan) as trainable:
        with wrong:
            _check_preserved(trainable, datasets)
        notes = [*plan.notices, *_rates_notes(config, models)] if plan else []
        notes += [*trainable.notices, *streaming_notes(config, models, method), *swapping.notes(config, models)]
        notes += [*widening_notes(config, models, method), *_parts_notes(config, datasets)]
        with wrong:
            tried = trial(config.optimizer, trainable.groups(), low_bits=config.train.full_bf16, steps=_steps(config))
            notes += [
                *tried.notices,
                *fusing.check(config, tried, trainable),
                *resume.check(config, plan, models.source, tried, trainable.weights()),
            ]
        wrong.raise_all()
        loads = trainable.loads_in(trainable.tensors()) if isinstance(trainable, Adapters) else []
        trained = tuple(_trained(trainable))
        return Checked(prompts, plan, models, trained, trainable.suffix(), tuple(notes), tuple(loads))


def _check_preserved(trainable: Trainable, datasets: tuple[DatasetConfig, ...]) -> None:
    """Errors: `UserError` for images whose target is the model's own prediction, where that cannot be had."""
    kept = [subset.source for dataset in datasets for subset in dataset.subsets if subset.preserved]
    if kept and trainable.without() is None:
        why = "only an adapter can be left out to see what the model predicted before; leave it out"
        raise UserError(*(f"{each}: custom_attributes.{PRESERVED}: {why}" for each in kept))


def _parts_notes(config: Config, datasets: tuple[DatasetConfig, ...]) -> list[str]:
    """What is said of a micro_batch that cuts no batch."""
    most, asked = max((d.batch_size for d in datasets), default=0), config.memory.micro_batch
    if asked is None or asked < most:
        return []
    return [f"micro_batch {asked}: no effect, as batches have {most} image{'s' if most > 1 else ''} at most"]


def check_length(config: Config, steps: int) -> list[str]:
    """What depends on the number of steps, which max_train_epochs leaves to the images: notes. Errors: `UserError`."""
    resume.check_left(config, steps)
    return for_length(config.optimizer, steps) if _steps(config) is None else []


def _steps(config: Config) -> int | None:
    """Optimizer steps of the run, where the settings alone give them."""
    return None if config.train.max_train_epochs else config.train.max_train_steps or 1600


def _rates_notes(config: Config, models: Models) -> list[str]:
    order, rates = (
        [name for name in models.family.encoder_lr_order if name in models.encoders],
        config.optimizer.text_encoder_lr,
    )
    if len(rates) <= len(order):
        return []
    return [
        f"text_encoder_lr: {len(rates)} rates for {len(order)} text encoders ({', '.join(order)}); the others do "
        "nothing"
    ]


def check_model(config: Config, models: Models) -> None:
    """The model's own options against its shapes, and adapters that are merged into it. Errors: `UserError`."""
    wrong = Mistakes()
    for strategy in (models.family.tokenize, models.family.encode, models.family.outputs):
        with wrong:
            strategy(models)
    with wrong:
        check_base_weights(config, models)
    with wrong:
        check_memory_options(models.family.blocks(models.denoiser), config.memory)
    with wrong:
        swapping.chosen(config, models)
    wrong.raise_all()


@contextmanager
def outlined(models: Models, config: Config, method: Method, plan: AdapterPlan | None) -> Iterator[Trainable]:
    """What will be trained, without values; the nets are as before when the context ends. Errors: as the trainable
    itself."""
    trainable = trainables.make(method, models, config, plan)
    try:
        yield trainable
    finally:
        trainable.remove()


def _prompts(config: Config, datasets: tuple[DatasetConfig, ...]) -> list[Prompt]:
    """The sample prompts, if there are some, and the sampler's name."""
    wrong, prompts = Mistakes(), list[Prompt]()
    with wrong:
        sampler(config.sample.sample_sampler)
    with wrong:
        prompts = of_run(config, datasets)
    wrong.raise_all()
    return prompts


def _trained(trainable: Trainable) -> Iterator[Trained]:
    """One row per component."""
    by_path = trainable.network.by_path() if isinstance(trainable, Adapters) else None
    rates: dict[str, list[float]] = {}
    numbers: dict[str, int] = {}
    tensors: dict[str, int] = {}
    for group in trainable.groups():
        component = group.name.partition(" ")[0]
        rates.setdefault(component, []).append(group.lr)
        numbers[component] = numbers.get(component, 0) + sum(p.numel() for p in group.parameters)
        tensors[component] = tensors.get(component, 0) + len(group.parameters)
    for component in trainable.trained:
        layers = tensors.get(component, 0) if by_path is None else sum(path[0] == component for path in by_path)
        ranks, sets = _adapted(trainable, component) if isinstance(trainable, Adapters) else ({}, {})
        yield Trained(
            component, layers, numbers.get(component, 0), tuple(rates.get(component, ())), ranks=ranks, sets=sets
        )


def _adapted(trainable: Adapters, component: str) -> tuple[dict[str, int], dict[str, int]]:
    """The layers of a component that have adapters, by rank and by set."""
    by_path = {path: a for path, a in trainable.network.by_path().items() if path[0] == component}
    kinds = Counter(
        f"{type(a).__name__} {a.options.rank}" if a.has_rank else type(a).__name__ for a in by_path.values()
    )
    sets = Counter(name for path in by_path for name in trainable.called[path].sets if name.islower())
    return dict(kinds), dict(sorted(sets.items()))
