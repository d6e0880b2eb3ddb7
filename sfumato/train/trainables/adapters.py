"""Adapters on chosen layers of frozen nets."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato import families
from sfumato.adapters import AdapterPlan
from sfumato.adapters import files as adapter_files
from sfumato.adapters.base import Adapter
from sfumato.adapters.insert import AdapterNetwork, check_kinds, choose, from_state
from sfumato.config import Config, FamilyOptions
from sfumato.data.batch import Batch
from sfumato.errors import UserError
from sfumato.formats import dialect, files
from sfumato.formats.clients import Loaded, loads_in, together
from sfumato.formats.metadata import hashes
from sfumato.models import embedding_files
from sfumato.models.base import Family, Models
from sfumato.optim.groups import Group
from sfumato.tensors.random import SampleRandom
from sfumato.train import checkpoints, targets
from sfumato.train.progress import console
from sfumato.train.trainables.adapter_files import read_adapter
from sfumato.train.trainables.base import Trainable, caches_text, save_dtype


class Adapters(Trainable):
    """Small changes to chosen layers of frozen nets."""

    def __init__(self, models: Models, config: Config, plan: AdapterPlan) -> None:
        self.models, self.config, self.plan = models, config, plan
        self.kind = plan.kind.file_kind()
        network = config.network
        nets = models.nets()
        self.notices: tuple[str, ...] = targets.check_sets(models.family.targets, plan)
        self.rates = adapter_rates(models.family, models.options, models.encoders, config, plan)
        self.trained: tuple[str, ...] = tuple(self.rates)
        _check(models, config, plan, self.trained)
        given = (
            read_adapter(models, Path(network.network_weights), "network_weights") if network.network_weights else {}
        )
        self.notices += _left_out(config)
        loaded = {path: tensors for path, tensors in given.items() if path[0] in self.trained}
        self.frozen = _frozen_adapters(
            models, config, {path: tensors for path, tensors in given.items() if path not in loaded}
        )
        if self.frozen:
            names = ", ".join(self.frozen.components)
            self.notices += (
                f"network_weights: {names} is not trained; the file's part for it acts and goes into the result as it "
                "is",
            )
        if network.dim_from_weights:
            self.trained = _in_file(self.trained, loaded, config)
            if lacking := ", ".join(name for name in self.rates if name not in self.trained):
                self.notices += (
                    f"network_weights has nothing for {lacking}, which dim_from_weights therefore leaves untrained",
                )
            with _named(network.network_weights):
                self.network = from_state(nets, loaded, plan, seed=config.train.seed)
        else:
            target = partial(models.family.target_layer, models.options, plan)
            layers = {
                name: choose(nets[name], name, models.family.targets[name], plan, target, models.dialects["kohya"])
                for name in self.trained
            }
            self.network = AdapterNetwork(layers, seed=config.train.seed)
            if loaded:
                with _named(network.network_weights):
                    self.notices += self._load(loaded)
        self._settle_rates()

    def _settle_rates(self) -> None:
        """The rate of each layer, and what is checked of the network as a whole."""
        models, config, plan = self.models, self.config, self.plan
        self.called = called = targets.named_layers(models, self.trained)
        """What every layer of what is trained is called, with an adapter or without."""
        targets.check_trained(plan, self.trained, called)
        self.layer_rates = {
            path: targets.rate(plan, path, called[path], self.rates[path[0]]) for path in self.network.by_path()
        }
        """Of each layer that has an adapter."""
        for path, adapter in self.network.by_path().items():
            if not self.layer_rates[path]:
                adapter.requires_grad_(False)
        if config.network.scale_weight_norms:
            self.network.scale_norms(math.inf)  # a kind for which that has no meaning says so now
        if config.train.full_bf16:
            self.network.to(torch.bfloat16)
        # What these names cannot hold is reported now, not after the training.
        self.tensors()
        by_path = self.network.by_path().items()
        # What an adapter keeps of its start is among them: a run's state holds it, and no optimizer does.
        self._weights = {"|".join((*path, name)): p for path, a in by_path for name, p in a.named_parameters()}

    def weights(self) -> dict[str, nn.Parameter]:
        return self._weights

    def groups(self) -> list[Group]:
        out = []
        for component in self.trained:
            by_rate: dict[float, list[Adapter]] = {}
            for path, adapter in self.network.by_path().items():
                if path[0] == component and (rate := self.layer_rates[path]):
                    by_rate.setdefault(rate, []).append(adapter)
            out += [
                Group(
                    name=component if len(by_rate) == 1 else f"{component} {i}",
                    lr=rate,
                    parameters=[p for a in adapters for p in a.parameters() if p.requires_grad],
                    plus=[p for a in adapters for p in a.loraplus_parameters()],
                    loraplus_ratio=self.plan.loraplus_ratio(component),
                )
                for i, (rate, adapters) in enumerate(by_rate.items())
            ]
        return out

    def _load(self, given: Mapping[dialect.ModulePath, dialect.AdapterTensors]) -> tuple[str, ...]:
        """Start from a file; notices of what it does not hold, which starts anew. Errors: `UserError` for what is of
        another kind or rank, or would be lost."""
        check_kinds(given, self.plan)
        own = self.network.state()
        self.network.load({**own, **given})
        lacking = [path for path in own if path not in given]
        return tuple(
            f"network_weights has nothing for {count} of the {whole} trained layers of {name}, which start anew"
            for name in self.trained
            if (count := sum(path[0] == name for path in lacking)) and (whole := sum(path[0] == name for path in own))
        )

    def state(self) -> dict[dialect.ModulePath, dialect.AdapterTensors]:
        """All that a result holds: what is trained, and what a file brought besides."""
        return {**self.network.state(), **(self.frozen.state() if self.frozen else {})}

    def tensors(self) -> dict[str, Tensor]:
        """The same in the names of the result. Errors: `UserError` for what these names cannot hold."""
        return adapter_files.write(self.models.dialects[self.config.output.dialect], self.state())

    def loads_in(self, tensors: Mapping[str, Tensor]) -> list[Loaded]:
        """What other programs load of a file with these tensors."""
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        return loads_in(shapes, families.facts_of(self.models.options).loads_in)

    def remove(self) -> None:
        for each in (self.network, self.frozen):
            if each:
                each.remove()

    def modules(self) -> nn.Module:
        return nn.ModuleList([self.network, self.frozen]) if self.frozen else self.network

    def train(self, mode: bool) -> None:
        self.network.train(mode)
        self.network.noise_level = None
        self._strength(1.0)

    def on_batch(self, batch: Batch) -> None:
        self.network.rng = SampleRandom(batch.keys)
        self._strength(batch.multiplier)

    @contextmanager
    def without(self) -> Iterator[None]:
        before = self.network.multiplier
        self._strength(0.0)
        try:
            yield
        finally:
            self._strength(before)

    def on_noise(self, level: Tensor) -> None:
        self.network.noise_level = level

    def _strength(self, multiplier: float | Tensor) -> None:
        for each in (self.network, self.frozen):
            if each:
                each.multiplier = multiplier

    def kept_gradients(self) -> Iterable[nn.Parameter]:
        return [p for adapter in self.network.by_path().values() for p in adapter.kept_gradients()]

    def after_step(self) -> Mapping[str, Tensor]:
        self.network.after_step()
        if not (limit := self.config.network.scale_weight_norms):
            return {}
        norms = self.network.scale_norms(limit)
        return {  # by sd-scripts' names
            "max_norm/keys_scaled": norms.scaled,
            "max_norm/average_key_norm": norms.mean,
            "max_norm/max_key_norm": norms.largest,
        }

    def freeze_encoders(self) -> None:
        for (component, _), adapter in self.network.by_path().items():
            if component != "denoiser":
                adapter.requires_grad_(False)

    def frozen_digest(self) -> str:
        state = self.frozen.state().items() if self.frozen else ()
        return (
            files.fingerprint({"|".join((*path, name)): t for path, tensors in state for name, t in tensors.items()})
            if state
            else ""
        )

    def suffix(self) -> str:
        return checkpoints.ending(self.config.output, "network", "single_file")

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        tensors = self.tensors()
        dtype = save_dtype(self.config)
        if dtype:
            tensors = {name: t.to(dtype) for name, t in tensors.items()}
        files.check_finite(tensors, f"the adapter {path.name}", dtype)
        files.save(path, tensors, {**metadata, **hashes(tensors, metadata)})
        for line in together(self.loads_in(tensors)):
            console.print(f"{path.name} in {line}")


def _left_out(config: Config) -> tuple[str, ...]:
    """A notice of words in `network_weights` that are not learnt on."""
    file, word = config.network.network_weights, config.embedding.token_string
    others = ", ".join(each for each in embedding_files.named_in(Path(file)) if each != word) if file else ""
    text = f"network_weights has words, too, which are left out: {others}; token_string goes on learning one"
    return (text,) if others else ()


def _frozen_adapters(
    models: Models, config: Config, given: Mapping[dialect.ModulePath, dialect.AdapterTensors]
) -> AdapterNetwork | None:
    """What `network_weights` brings for components that are not trained: it acts as it is, and goes into the result."""
    if not given:
        return None
    names = ", ".join(dict.fromkeys(path[0] for path in given))
    if caches_text(config) and any(path[0] != "denoiser" for path in given):
        raise UserError(
            f"network_weights {config.network.network_weights} changes {names}, which cache_text_encoder_outputs "
            "cannot take into account: "
            "leave cache_text_encoder_outputs out, or start from a file of the denoiser alone"
        )
    with _named(config.network.network_weights):
        frozen = from_state(models.nets(), given)
    return frozen.eval().requires_grad_(False)


@contextmanager
def _named(file: str | None) -> Iterator[None]:
    """What is wrong with the file that a run starts from names it."""
    try:
        yield
    except UserError as error:
        raise UserError(*(f"network_weights {file}: {message}" for message in error.messages)) from None


def _in_file(
    trained: tuple[str, ...], given: Mapping[dialect.ModulePath, dialect.AdapterTensors], config: Config
) -> tuple[str, ...]:
    """Those of the components that a file has layers for. Errors: `UserError` if there are none."""
    found, file = {path[0] for path in given}, config.network.network_weights
    if not found:
        raise UserError(
            f"network_weights {file}: nothing for {', '.join(trained)} is in it; leave dim_from_weights out"
        )
    return tuple(name for name in trained if name in found)


def _check(models: Models, config: Config, plan: AdapterPlan, trained: tuple[str, ...]) -> None:
    """Errors: `UserError` for a dialect that has no names for what is trained, and for settings of encoders that are
    not trained."""
    dialect, rates = config.output.dialect, config.optimizer.text_encoder_lr
    nameless = [name for name in trained if name not in models.dialects[dialect].prefix]
    wrong = [
        f"dialect {dialect}: it has no names for {name}, which is trained; choose kohya or comfy" for name in nameless
    ]
    encoders = [n for n in models.family.encoder_lr_order if n in models.encoders]
    if any(rates) and not set(encoders) & set(trained):
        wrong.append("text_encoder_lr: no text encoder is trained in this run; leave it out")
    wrong += [
        f"network_args train_{name}: does nothing beside network_train_unet_only, cache_text_encoder_outputs or a "
        "text_encoder_lr of 0"
        for name in encoders
        if getattr(plan.family, f"train_{name}", False) and name not in trained
    ]
    if plan.conv_rank and "denoiser" not in trained:
        wrong.append("network_args conv_dim: does nothing, as the denoiser is not trained; leave it out")
    if wrong:
        raise UserError(*wrong)


def adapter_rates(
    family: Family, options: FamilyOptions, encoders: Collection[str], config: Config, plan: AdapterPlan
) -> dict[str, float]:
    """Component -> learning rate, of those that adapters are trained on; a rate of 0 leaves a component out.

    `encoders`: the text encoders that there are. Errors: `UserError` if nothing is left.
    """
    network, may = config.network, family.trainable(options, plan)
    text = not (network.network_train_unet_only or config.train.stop_text_encoder_training == 0 or caches_text(config))
    names = [] if network.network_train_text_encoder_only else ["denoiser"]
    names += [name for name in encoders if text and name != "vae" and (may is None or name in may)]
    names = [name for name in names if plan.sets(name, family.targets[name])]
    order = [name for name in family.encoder_lr_order if name in encoders]
    rates = {name: _adapter_lr(name, order, config) for name in names}
    if not any(rates.values()):
        raise UserError(
            "nothing is left to train: network_train_unet_only, network_train_text_encoder_only, network_args' target "
            "and the rates exclude everything"
        )
    return {name: rate for name, rate in rates.items() if rate}


def _adapter_lr(name: str, order: Sequence[str], config: Config) -> float:
    o = config.optimizer
    if name == "denoiser":
        return o.learning_rate if o.unet_lr is None else o.unet_lr
    if not o.text_encoder_lr:
        return o.learning_rate
    return o.text_encoder_lr[min(order.index(name), len(o.text_encoder_lr) - 1)]
