"""A batch without values: that of a run which needs the most memory, as far as sizes and captions show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sfumato.config import Config
from sfumato.data.batch import Batch, Cond, Size
from sfumato.data.plan import Item, Plan
from sfumato.memory.trace import BlockTracer, signature, without_values
from sfumato.memory.tracker import Tracker
from sfumato.models.base import Models
from sfumato.train.step import draw
from sfumato.train.trainables import caches_latents, caches_text


@dataclass(frozen=True, slots=True)
class Largest:
    """The batch with the most pixels of a run: what others need is less."""

    size: Size
    """(width, height) of its bucket, in pixels."""
    count: int
    """Its images."""
    captions: Sequence[str]
    """The longest ones of its bucket."""
    masked: bool
    """Whether there are masks."""
    control: bool
    """Whether there are images to follow."""

    @classmethod
    def of(cls, plan: Plan) -> Largest:
        """The one of these images."""
        return max((cls._in(plan, *each) for each in plan.buckets().items()), key=lambda b: b.count * b.pixels)

    @classmethod
    def _in(cls, plan: Plan, bucket: tuple[int, Size], members: Sequence[int]) -> Largest:
        items = [plan.items[i] for i in members]
        count = min(plan.datasets[bucket[0]].batch_size, sum(item.repeats for item in items))
        texts = sorted((text for item in items for text in item.image.captions), key=len)
        masked = any(_masked(plan, item) for item in items)
        control = any(item.image.control_path for item in items)
        return cls(bucket[1], count, ([""] * count + texts)[-count:], masked, control)

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]

    def batch(self, config: Config, models: Models, count: int) -> Batch:
        """`count` of its images, for nets without values: to be called in their FakeTensorMode."""
        facts, (width, height) = models.family.latents, self.size
        side = height // facts.stride, width // facts.stride
        captions, cached = self.captions[-count:], caches_latents(config)
        with unset_fake_temporarily():
            said = models.tokenize(captions)
            sizes, keys = torch.tensor([[height, width, 0, 0, height, width]] * count), list(range(1, count + 1))
            drawn = draw(models, models.process(config.noise, config.loss), sizes, keys)
        tokens = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in said.items()}
        return Batch(
            captions=captions, keys=keys, weight=torch.ones(count), multiplier=torch.ones(count), sizes=sizes,
            latents=torch.empty(count, facts.channels, *side) if cached else None,
            pixels=None if cached else torch.empty(count, 3, height, width),
            cond=_cached(models, tokens) if caches_text(config) else None,
            tokens=None if caches_text(config) else tokens,
            mask=torch.empty(count, 1, *side) if self.masked else None,
            control=torch.empty(count, 3, height, width) if self.control else None, drawn=drawn,
        )  # fmt: skip


def _masked(plan: Plan, item: Item) -> bool:
    return plan.subset(item).alpha_mask or item.image.mask_path is not None


def _cached(models: Models, tokens: Mapping[str, Tensor]) -> Cond:
    """What is cached of captions, without values."""
    outputs = models.outputs
    for net in models.encoders.values():
        without_values(net, torch.bfloat16)  # any format: only shapes are asked for
    blocks = [b for net in models.encoders.values() for b in models.family.encoder_blocks(net)]
    with torch.no_grad(), (tracker := Tracker()):
        with BlockTracer(tracker, lambda part: signature(part, {})).on(blocks):
            found = models.encode(tokens)
        return {
            name: torch.empty(t.shape, dtype=outputs.dtype if t.is_floating_point() else t.dtype)
            for name, t in found.items()
            if name in outputs.fields
        }
