"""A ControlNet, grown from the model's own denoiser or from a file; the model stays as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from sfumato.config import Config
from sfumato.data.batch import Batch
from sfumato.families.detect import control_net
from sfumato.formats import files
from sfumato.models.base import Models
from sfumato.models.controlled import Controlled, denoiser_shapes, new_net, read_net, save_folder, save_net, spec_of
from sfumato.models.meta_init import shapes
from sfumato.optim.groups import Group
from sfumato.tensors.random import generator
from sfumato.train import checkpoints
from sfumato.train.trainables.base import Trainable, save_dtype

NAME = "controlnet"


class ControlNet(Trainable):
    """A control net at work on the denoiser, which samples follow as well."""

    kind = NAME
    trained: tuple[str, ...] = (NAME,)

    def __init__(self, models: Models, config: Config) -> None:
        self.models, self.config = models, config
        dtype = torch.bfloat16 if config.train.full_bf16 else torch.float32
        if name := config.control.controlnet_model_name_or_path:
            with control_net(name, models.family.name):
                net = read_net(models, name, dtype)
        else:
            net = new_net(models, generator(NAME, config.train.seed))
        self.net = net.to(dtype)
        spec = spec_of(models)
        if not self.suffix():
            spec.config(shapes(net.state_dict()))  # what diffusers has no class for is reported now
        unused = spec.unused(net)
        for name, p in net.named_parameters():
            p.requires_grad_(not re.fullmatch(unused, name))
        self.control = Controlled(models, self.net)
        models.followers.append(self.control)
        self._copied = denoiser_shapes(models).keys()

    def weights(self) -> dict[str, nn.Parameter]:
        return {f"{NAME}.{name}": p for name, p in self.net.named_parameters() if p.requires_grad}

    def groups(self) -> list[Group]:
        common, own = self.config.optimizer.learning_rate, self.config.control.control_net_lr
        rates: dict[float, list[nn.Parameter]] = {}
        for path, p in self.weights().items():
            name = path.removeprefix(f"{NAME}.")
            rate = common if own is None or name in self._copied else own
            rates.setdefault(rate, []).append(p)
        return [
            Group(name=NAME if len(rates) == 1 else f"{NAME} {i}", lr=rate, parameters=parameters)
            for i, (rate, parameters) in enumerate(rates.items())
        ]

    def modules(self) -> nn.Module:
        return self.net

    def on_batch(self, batch: Batch) -> None:
        if batch.control is None:
            raise RuntimeError("a batch without images to follow")
        self.control.follow(batch.control)

    def suffix(self) -> str:
        return checkpoints.ending(self.config.output, "controlnet", "single_file")

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        dtype, tensors = save_dtype(self.config), self.net.state_dict()
        if dtype:
            tensors = {name: t.to(dtype) for name, t in tensors.items()}
        files.check_finite(tensors, f"the ControlNet {path.name}", dtype)
        save = save_net if self.suffix() else save_folder  # a name may have a dot in it
        save(self.models, tensors, path, metadata)

    def remove(self) -> None:
        self.control.remove()
        self.models.followers.remove(self.control)
