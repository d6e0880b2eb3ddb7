"""Drawing with a checkpoint and adapters outside training: `sfumato sample`, the quickstart, notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sfumato import families
from sfumato.adapters.insert import from_state
from sfumato.config import LossConfig, NoiseConfig
from sfumato.families.base import Models
from sfumato.tensors.noise import Process
from sfumato.train import dist, sample
from sfumato.train.prompts import Prompt
from sfumato.train.trainables import read_adapter


@dataclass(frozen=True, slots=True)
class Drawer:
    """A loaded model that draws prompts."""

    models: Models
    process: Process

    @classmethod
    def of(
        cls,
        path: str,
        family: str,
        *,
        options: Any = None,
        vae: str | None = None,
        tokenizer: str | None = None,
        noise: NoiseConfig | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Drawer:
        """Load a checkpoint (file, folder or hub id). `dtype`: of the denoiser and the encoders; the VAE runs in fp32."""
        record = families.family(family)
        options = families.facts(family).Options() if options is None else options
        device = dist.device_of() if device is None else device
        models = record.load(path, options, vae=vae, tokenizer=tokenizer, dtype=dtype)
        for net in models.nets().values():
            net.to(device)
        if models.vae is not None:
            models.vae.to(device, torch.float32)
        return cls(models, record.process(models, noise or NoiseConfig(), LossConfig()))

    @contextmanager
    def adapted(self, *paths: Path, strengths: Sequence[float] = ()) -> Iterator[None]:
        """Adapter files act for as long as the context lasts. `strengths`: one a file; default 1."""
        held = []
        try:
            for i, path in enumerate(paths):
                inserted = from_state(self.models.nets(), read_adapter(self.models, path))
                inserted.multiplier = strengths[i] if i < len(strengths) else 1.0
                inserted.eval()
                held.append(inserted)
            yield
        finally:
            for inserted in held:
                inserted.remove()

    def draw(self, prompts: Sequence[Prompt], *, sampler: str = "ddim", progress: sample.Progress | None = None) -> list[Image.Image]:
        """One picture a prompt."""
        return sample.draw(self.models, prompts, process=self.process, sampler=sampler, batch_size=8, progress=progress)
