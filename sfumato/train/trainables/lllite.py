"""A ControlNet-LLLite: small nets at layers of the model's denoiser, which stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.config import Config
from sfumato.data.batch import Batch
from sfumato.errors import UserError
from sfumato.models.base import Models
from sfumato.models.lllite import LiteNet
from sfumato.models.lllites import Lite, new_net, read_net, save_net
from sfumato.optim.groups import Group
from sfumato.tensors.random import generator
from sfumato.train import checkpoints
from sfumato.train.trainables.base import Trainable, save_dtype

NAME = "lllite"
DIM = 64


class LLLite(Trainable):
    """A net at work on the denoiser, which samples follow as well."""

    kind = "control-net-lllite"
    trained: tuple[str, ...] = (NAME,)

    def __init__(self, models: Models, config: Config) -> None:
        self.models, self.config = models, config
        dtype = torch.bfloat16 if config.train.full_bf16 else torch.float32
        self.net = _net(models, config).to(dtype).requires_grad_(True)
        self.lite = Lite(models, self.net)
        self._keys: tuple[int, ...] = ()
        models.followers.append(self.lite)

    def weights(self) -> dict[str, nn.Parameter]:
        return dict(self.net.named_parameters())

    def groups(self) -> list[Group]:
        return [Group(name=NAME, lr=self.config.optimizer.learning_rate, parameters=list(self.net.parameters()))]

    def modules(self) -> nn.Module:
        return self.net

    def train(self, mode: bool) -> None:
        self.net.train(mode)
        self.lite.multiplier = None
        self.lite.drop = self._dropped if mode and self.config.network.network_dropout else None

    def on_batch(self, batch: Batch) -> None:
        if batch.control is None:
            raise RuntimeError("a batch without images to follow")
        self._keys, self.lite.multiplier = tuple(batch.keys), batch.multiplier
        self.lite.follow(batch.control)

    def _dropped(self, path: str, x: Tensor) -> Tensor:
        """A part of what is inside the net at a layer, by the samples' own random numbers."""
        chance = self.config.network.network_dropout or 0.0
        made = [generator(key, "dropout", f"{NAME}.{path}", device=x.device) for key in self._keys]
        mask = torch.stack([torch.rand(x.shape[1:], generator=each, device=x.device) for each in made]) >= chance
        return x * mask.to(x.dtype) / (1 - chance)

    def suffix(self) -> str:
        return checkpoints.ending(self.config.output, "lllite", "single_file")

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        save_net(self.models, self.net, path, metadata=metadata, dtype=save_dtype(self.config))

    def remove(self) -> None:
        self.lite.remove()
        self.models.followers.remove(self.lite)


def _net(models: Models, config: Config) -> LiteNet:
    """That of `network_weights`, or a new one. Errors: `UserError` for a file of other sizes than those asked for."""
    network = config.network
    if not network.network_weights:
        return new_net(models, network.cond_emb_dim, network.network_dim or DIM, config.train.seed)
    net = read_net(models, Path(network.network_weights), outline=next(models.denoiser.parameters()).is_meta)
    if network.network_dim not in (None, net.dim):
        raise UserError(
            f"network_dim {network.network_dim}: the nets of network_weights {network.network_weights} are {net.dim} "
            "wide; leave it out"
        )
    return net
