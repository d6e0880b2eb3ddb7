"""Whole nets, trained as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torch import nn

from sfumato.config import Config
from sfumato.errors import UserError
from sfumato.models.base import Family, Models
from sfumato.models.loading import check_folder, save
from sfumato.optim.groups import Group
from sfumato.train import checkpoints
from sfumato.train.trainables.base import Trainable, save_dtype


def whole_nets(family: Family, config: Config, encoders: Iterable[str]) -> tuple[str, ...]:
    """The components that change when a whole model is trained; `encoders`: those that there are."""
    may = family.trainable(config.family, None)
    text = (
        [n for n in encoders if n not in ("denoiser", "vae") and (may is None or n in may)]
        if config.train.train_text_encoder
        else []
    )
    return ("denoiser", *text)


class Full(Trainable):
    """The denoiser's own weights, and the text encoders' if asked for."""

    kind = ""

    def __init__(self, models: Models, config: Config) -> None:
        self.models, self.config = models, config
        models.noise = config.noise
        self.trained: tuple[str, ...] = whole_nets(models.family, config, models.encoders)
        self._weights: dict[str, nn.Parameter] = {}
        self._rates: dict[str, dict[float, list[nn.Parameter]]] = {name: {} for name in self.trained}
        common, frozen = net_rates(models.family, models.encoders, config), last_blocks(models, config)
        for name in self.trained:
            for path, p in models.nets()[name].named_parameters():
                if p in frozen:
                    continue
                own = models.family.rate(models.options, name, path)
                if rate := common[name] if own is None else own:
                    p.requires_grad_(True)
                    self._weights[f"{name}.{path}"] = p
                    self._rates[name].setdefault(rate, []).append(p)
        if not self._weights:
            raise UserError("nothing is left to train: every learning rate of a part or block is 0")
        if not self.suffix():
            check_folder(models)

    def weights(self) -> dict[str, nn.Parameter]:
        return self._weights

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

    def freeze_encoders(self) -> None:
        for name in self.trained[1:]:
            self.models.nets()[name].requires_grad_(False)

    def suffix(self) -> str:
        return checkpoints.ending(self.config.output, "full", self.models.source.layout)

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        dtype = save_dtype(self.config)
        layout = "single_file" if self.suffix() else "diffusers"
        save(self.models, path, layout=layout, dtype=dtype, metadata=metadata, trained=self.trained)


def last_blocks(models: Models, config: Config) -> set[nn.Parameter]:
    """What num_last_block_to_freeze keeps as it is. Errors: `UserError` if there are fewer blocks."""
    number, blocks = config.train.num_last_block_to_freeze or 0, models.family.blocks(models.denoiser)
    if number > len(blocks):
        raise UserError(f"num_last_block_to_freeze {number}: the denoiser has {len(blocks)} blocks")
    return {p for block in blocks[len(blocks) - number :] for p in block.parameters()}


def net_rates(family: Family, encoders: Collection[str], config: Config) -> dict[str, float]:
    """Component -> learning rate, when whole nets are trained: of weights that the family gives none of their own."""
    o = config.optimizer
    te = o.learning_rate if o.learning_rate_te is None else o.learning_rate_te
    return {name: o.learning_rate if name == "denoiser" else te for name in whole_nets(family, config, encoders)}
