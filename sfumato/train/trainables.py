"""What is trained: whole nets or adapters on them. The loop sees no difference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sfumato.adapters import AdapterPlan
from sfumato.adapters.insert import Inserted, choose, from_state
from sfumato.config import Config
from sfumato.errors import UserError
from sfumato.families.base import Family, Models
from sfumato.families.loading import check_folder, save
from sfumato.formats import dialect, files
from sfumato.formats.metadata import hashes
from sfumato.optim.groups import Group
from sfumato.tensors.random import Draws

SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Trainable(Protocol):
    """Something with weights to train, that can say them, take them back and write them to a file."""

    kind: str
    """Ending of the modelspec architecture: "" for a whole model, "lora" for an adapter."""
    trained: tuple[str, ...]
    """Components that change."""

    def weights(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, or was before it was frozen, by a name that stays the same from run to run."""
        ...

    def groups(self) -> list[Group]:
        """The weights in groups with their learning rates."""
        ...

    def modules(self) -> nn.Module:
        """A module that holds the weights, for gradient exchange."""
        ...

    def train(self, mode: bool) -> None:
        """Dropouts on or off."""
        ...

    def on_batch(self, multiplier: Tensor, draws: Draws) -> None:
        """Told before each batch: the strength (b,) of its samples and where their dropouts come from."""
        ...

    def after_step(self) -> None:
        """Told after each optimizer step."""
        ...

    def freeze_encoders(self) -> None:
        """Train the text encoders no longer."""
        ...

    def suffix(self) -> str:
        """Ending of the result's file name; empty for a folder."""
        ...

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the result."""
        ...


def whole_nets(family: Family, config: Config, encoders: Iterable[str]) -> tuple[str, ...]:
    """The components that change when a whole model is trained; `encoders`: those that there are."""
    may = family.trainable(config.family, None)
    text = [n for n in encoders if n not in ("denoiser", "vae") and (may is None or n in may)] if config.train.train_text_encoder else []
    return ("denoiser", *text)


class Full:
    """The denoiser's own weights, and the text encoders' if asked for."""

    kind = ""

    def __init__(self, models: Models, config: Config) -> None:
        self.models, self.config = models, config
        self.trained: tuple[str, ...] = whole_nets(models.family, config, models.encoders)
        self._weights: dict[str, nn.Parameter] = {}
        self._rates: dict[str, dict[float, list[nn.Parameter]]] = {name: {} for name in self.trained}
        for name in self.trained:
            for path, p in models.nets()[name].named_parameters():
                own = models.family.rate(models.options, name, path)
                if own != 0:
                    p.requires_grad_(True)
                    self._weights[f"{name}.{path}"] = p
                    self._rates[name].setdefault(self._common(name) if own is None else own, []).append(p)
        if not self._weights:
            raise UserError("nothing is left to train: every learning rate of a part or block is 0")
        if self._layout()[0] == "diffusers":
            check_folder(models)

    def weights(self) -> dict[str, nn.Parameter]:
        return self._weights

    def _common(self, component: str) -> float:
        """The learning rate of a component's weights that have none of their own."""
        o = self.config.optimizer
        return o.learning_rate if component == "denoiser" or o.learning_rate_te is None else o.learning_rate_te

    def groups(self) -> list[Group]:
        return [
            Group(name=component if len(rates) == 1 else f"{component} {i}", lr=rate, parameters=parameters)
            for component, rates in self._rates.items()
            for i, (rate, parameters) in enumerate(rates.items())
        ]

    def modules(self) -> nn.Module:
        return nn.ModuleDict({name: self.models.nets()[name] for name in self.trained})

    def train(self, mode: bool) -> None:
        for name in self.trained:
            self.models.nets()[name].train(mode)

    def on_batch(self, multiplier: Tensor, draws: Draws) -> None:
        pass

    def after_step(self) -> None:
        pass

    def freeze_encoders(self) -> None:
        for name in self.trained[1:]:
            self.models.nets()[name].requires_grad_(False)

    def _layout(self) -> tuple[str, str]:
        asked = self.config.output.save_model_as
        if asked is None:
            source = self.models.source
            asked = "diffusers" if source and source.layout == "diffusers" else "safetensors"
        return ("diffusers", "") if asked.startswith("diffusers") else ("single_file", f".{asked}")

    def suffix(self) -> str:
        return self._layout()[1]

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        precision = self.config.output.save_precision
        dtype = SAVE_DTYPES[precision] if precision else None
        save(self.models, path, layout=self._layout()[0], dtype=dtype, metadata=metadata, trained=self.trained)


class Adapters:
    """Small changes to chosen layers of frozen nets."""

    def __init__(self, models: Models, config: Config, plan: AdapterPlan) -> None:
        self.models, self.config, self.plan = models, config, plan
        self.kind = plan.kind.__name__.lower()
        network = config.network
        nets = models.nets()
        self.trained: tuple[str, ...] = tuple(name for name in nets if _wanted(name, models, config, plan))
        if not self.trained:
            raise UserError(
                "nothing is left to train: network_train_unet_only, network_train_text_encoder_only and the rates exclude everything"
            )
        _check(models, config, plan, self.trained)
        given = read_adapter(models, Path(network.network_weights)) if network.network_weights else {}
        if network.dim_from_weights:
            self.inserted = from_state(
                nets, {site: leaves for site, leaves in given.items() if site[0] in self.trained}, plan, seed=config.train.seed
            )
        else:
            layer = partial(models.family.layer, models.options, plan)
            places = {name: choose(nets[name], name, models.family.targets[name], plan, layer) for name in self.trained}
            self.inserted = Inserted(places, plan.kind, seed=config.train.seed)
            if given:
                self.inserted.load(given)
        if config.train.full_bf16:
            self.inserted.to(torch.bfloat16)
        # What these names cannot hold is told now, not after the training.
        dialect.write(models.family.dialects(models)[config.output.dialect], self.inserted.state())
        sites = self.inserted.sites().items()
        self._weights = {"|".join((*site, name)): p for site, a in sites for name, p in a.named_parameters() if p.requires_grad}

    def weights(self) -> dict[str, nn.Parameter]:
        return self._weights

    def groups(self) -> list[Group]:
        sites = self.inserted.sites()
        return [
            Group(
                name=name,
                lr=_adapter_lr(name, self.models, self.config),
                parameters=[p for site, a in sites.items() if site[0] == name for p in a.parameters() if p.requires_grad],
                plus=[p for site, a in sites.items() if site[0] == name for p in a.plus_parameters()],
                plus_ratio=self.plan.plus_ratio(name),
            )
            for name in self.trained
        ]

    def modules(self) -> nn.Module:
        return self.inserted

    def train(self, mode: bool) -> None:
        self.inserted.train(mode)
        self.inserted.multiplier = 1.0

    def on_batch(self, multiplier: Tensor, draws: Draws) -> None:
        self.inserted.multiplier, self.inserted.draws = multiplier, draws

    def after_step(self) -> None:
        limit = self.config.network.scale_weight_norms
        if limit:
            self.inserted.scale_norms(limit)

    def freeze_encoders(self) -> None:
        for (component, _), adapter in self.inserted.sites().items():
            if component != "denoiser":
                adapter.requires_grad_(False)

    def suffix(self) -> str:
        asked = self.config.output.save_model_as or "safetensors"
        if asked.startswith("diffusers"):
            raise UserError(f"save_model_as = {asked!r} is for whole models; an adapter is saved as safetensors, ckpt or pt")
        return f".{asked}"

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        precision = self.config.output.save_precision
        tensors = dialect.write(self.models.family.dialects(self.models)[self.config.output.dialect], self.inserted.state())
        files.check_finite(tensors, f"the adapter {path.name}")
        if precision:
            tensors = {name: t.to(SAVE_DTYPES[precision]) for name, t in tensors.items()}
        files.save(path, tensors, {**metadata, **hashes(tensors, metadata)})


def read_adapter(models: Models, path: Path) -> dict[dialect.Site, dialect.Leaves]:
    """An adapter file in any dialect of the family -> {site: leaves}. Errors: `UserError` for keys that name no layer."""
    sites = [
        (name, p) for name, net in models.nets().items() for p, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    return dialect.read(models.family.dialects(models).values(), files.load(path), sites)


def _check(models: Models, config: Config, plan: AdapterPlan, trained: tuple[str, ...]) -> None:
    """Errors: `UserError` for a dialect that has no names for what is trained, and for what is said of encoders that are not trained."""
    dialect, rates = config.output.dialect, config.optimizer.text_encoder_lr
    nameless = [name for name in trained if name not in models.family.dialects(models)[dialect].prefix]
    wrong = [f"dialect {dialect}: it has no names for {name}, which is trained; choose kohya or comfy" for name in nameless]
    encoders = [n for n in models.family.encoder_lr_order if n in models.encoders]
    if len(rates) > len(encoders):
        wrong.append(f"text_encoder_lr: {len(rates)} rates for {len(encoders)} text encoders ({', '.join(encoders)}); give one for each")
    elif any(rates) and not set(encoders) & set(trained):
        wrong.append("text_encoder_lr: no text encoder is trained in this run; leave it out")
    wrong += [
        f"network_args train_{name}: does nothing beside network_train_unet_only, cache_text_encoder_outputs or a text_encoder_lr of 0"
        for name in encoders
        if getattr(plan.family, f"train_{name}", False) and name not in trained
    ]
    if wrong:
        raise UserError(*wrong)


def _wanted(name: str, models: Models, config: Config, plan: AdapterPlan) -> bool:
    if name == "denoiser":
        return not config.network.network_train_text_encoder_only
    may = models.family.trainable(models.options, plan)
    if may is not None and name not in may:
        return False
    if config.network.network_train_unet_only or config.train.stop_text_encoder_training == 0 or caches_text(config):
        return False
    return _adapter_lr(name, models, config) > 0


def caches_text(config: Config) -> bool:
    """Whether text outputs are kept, so that no text encoder is trained."""
    return config.data.cache_text_encoder_outputs or config.data.cache_text_encoder_outputs_to_disk


def caches_latents(config: Config) -> bool:
    """Whether latents are kept."""
    return config.data.cache_latents or config.data.cache_latents_to_disk


def _adapter_lr(name: str, models: Models, config: Config) -> float:
    o = config.optimizer
    if name == "denoiser":
        return o.learning_rate if o.unet_lr is None else o.unet_lr
    if not o.text_encoder_lr:
        return o.learning_rate
    order = [name for name in models.family.encoder_lr_order if name in models.encoders]
    return o.text_encoder_lr[min(order.index(name), len(o.text_encoder_lr) - 1)]
