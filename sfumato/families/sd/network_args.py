"""network_args of kohya's lora for models with a U-Net: ranks, alphas and rates by block; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from sfumato.config.rules import Amount, Must
from sfumato.models.block_choices import Arguments, Blocks, is_chosen

if TYPE_CHECKING:
    from sfumato.adapters import AdapterPlan
    from sfumato.adapters.insert import TargetLayer
    from sfumato.config import FamilyOptions

BlockNumbers = Mapping[str, tuple[int, int]]
"""Part of the U-Net -> the number of its first block, and how many it has."""
UNET_BLOCKS: BlockNumbers = {"input_blocks": (0, 12), "middle_block": (12, 1), "output_blocks": (13, 12)}
"""sd-scripts' count of 1.x and 2.x: 12 on the way down, the middle, 12 on the way up."""
_WAYS = {"down_lr_weight": "input_blocks", "mid_lr_weight": "middle_block", "up_lr_weight": "output_blocks"}
_BY_BLOCK = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
_PRESETS: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda x: math.cos(math.pi / 2 * x),
    "sine": lambda x: math.sin(math.pi / 2 * x),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}
"""Name -> weight of a block at x, from 0 (the first) to 1 (the last)."""


def block_number(blocks: BlockNumbers, path: str) -> int | None:
    """Which block a layer is in; None: none that is counted."""
    part, _, rest = path.partition(".")
    if part not in blocks:
        return None
    first, count = blocks[part]
    return first + min(int(rest.partition(".")[0]), count - 1)


def total(blocks: BlockNumbers) -> int:
    """How many blocks are counted."""
    return max(first + count for first, count in blocks.values())


def numbers(text: str | None) -> tuple[float, ...] | None:
    """ "1,,0.5" -> (1.0, 0.0, 0.5); None if it cannot be read."""
    try:
        return None if text is None else tuple(float(part or 0) for part in map(str.strip, text.split(",")))
    except ValueError:
        return None


def weights(text: str, count: int) -> tuple[float, ...] | None:
    """A weight for each of so many blocks: of a list, or of a preset's name, "cosine+0.25"; None if it cannot be
    read."""
    name, _, base = text.strip().partition("+")
    if name not in _PRESETS:
        return numbers(text)
    if len(given := numbers(base) or ()) != 1:
        return None
    return tuple(_PRESETS[name](i / max(count - 1, 1)) + given[0] for i in range(count))


_NUMBERS = Must(
    lambda text: all(0 <= n < math.inf for n in numbers(text) or (-1,)), "numbers with commas between them, 0 or more"
)
_INTEGERS = Must(
    lambda text: all(n >= 0 and n.is_integer() for n in numbers(text) or (-1.0,)),
    "whole numbers with commas between them, 0 or more",
)
_WEIGHTS = Must(
    lambda text: all(0 <= w < math.inf for w in weights(text, 2) or (-1,)),
    f"numbers with commas between them, 0 or more, or one of {', '.join(_PRESETS)}, with +x for x more",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkArgs(Arguments):
    """A rank of 0 leaves a block out; blocks without one of their own have network_dim."""

    BLOCKS: ClassVar[BlockNumbers] = UNET_BLOCKS
    RATES: ClassVar[tuple[str, ...]] = (*_WAYS, "block_lr_zero_threshold")
    """Arguments that act on layers from a file as well."""

    block_dims: Annotated[str | None, _INTEGERS] = None
    """Ranks of the U-Net's blocks, one for each: 25 numbers (12 down, middle, 12 up); of Stable Diffusion XL 23 (the
    embedders of time and sizes, 9 input blocks, 3 middle blocks, 9 output blocks, the last layer)."""
    block_alphas: Annotated[str | None, _NUMBERS] = None
    """Their alphas."""
    conv_block_dims: Annotated[str | None, _INTEGERS] = None
    """Ranks of their convolutions larger than 1x1, which get adapters then."""
    conv_block_alphas: Annotated[str | None, _NUMBERS] = None
    """Alphas of these; default conv_alpha."""
    train_block_indices: Blocks = None
    """Numbers of the blocks that get adapters, in the same count: "all", "none" or "0-5,8"."""
    down_lr_weight: Annotated[str | None, _WEIGHTS] = None
    """Factors on the rate of the blocks on the way down, one for each: 12 numbers, of Stable Diffusion XL 9; or cosine,
    sine, linear, reverse_linear or zeros, with +x for x more. A block of factor 0 has no adapters."""
    mid_lr_weight: Annotated[str | None, _WEIGHTS] = None
    """The same for the middle: one number, of Stable Diffusion XL 3."""
    up_lr_weight: Annotated[str | None, _WEIGHTS] = None
    """The same for the blocks on the way up."""
    block_lr_zero_threshold: Amount | None = None
    """Factors of this or below are taken for 0."""

    def sets(self) -> tuple[str, ...]:
        """See `Arguments.sets`."""
        return () if self.conv_block_dims is None else ("conv",)

    def contradictions(self) -> list[str]:
        """See `Arguments.contradictions`."""
        counts = dict.fromkeys(
            ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"), total(self.BLOCKS)
        )
        counts |= {name: self.BLOCKS[part][1] for name, part in _WAYS.items()}
        wrong = [
            f"{name}={text}: expected {count} numbers, found {len(found)}"
            for name, count in counts.items()
            if (text := getattr(self, name)) is not None
            and (found := weights(text, count)) is not None
            and len(found) != count
        ]
        if self.conv_block_alphas is not None and self.conv_block_dims is None:
            wrong.append("conv_block_alphas: does nothing without conv_block_dims; set it, or leave it out")
        if self.block_lr_zero_threshold is not None and not any(getattr(self, name) for name in _WAYS):
            wrong.append(f"block_lr_zero_threshold: does nothing without {', '.join(_WAYS)}; leave it out")
        return wrong

    def rate_factor(self, path: str) -> float:
        """See `Arguments.rate_factor`."""
        part = path.partition(".")[0]
        text = next((getattr(self, name) for name, each in _WAYS.items() if each == part), None)
        number = block_number(self.BLOCKS, path)
        if text is None or number is None:
            return 1.0
        first, count = self.BLOCKS[part]
        found = (weights(text, count) or ())[number - first]
        return found if found > (self.block_lr_zero_threshold or 0) else 0.0


def target_layer(options: FamilyOptions, plan: AdapterPlan, target: TargetLayer) -> TargetLayer | None:
    """For `Family.target_layer`. Errors: `UserError` for numbers of blocks that there are not."""
    args: NetworkArgs | None = plan.family
    number = None if args is None else block_number(args.BLOCKS, target.path)
    if args is None or number is None:
        return target
    if not is_chosen(args, "train_block_indices", number, total(args.BLOCKS)) or not args.rate_factor(target.path):
        return None
    ranks, alphas = numbers(args.block_dims), numbers(args.block_alphas)
    if target.is_large:
        ranks, alphas = numbers(args.conv_block_dims), numbers(args.conv_block_alphas)
    rank, alpha = target.options.rank, target.options.alpha
    if ranks and not target.ranked:
        rank = int(ranks[number])
    if alphas or (ranks and target.is_large):
        alpha = alphas[number] if alphas else plan.conv_alpha
    return target._replace(options=replace(target.options, rank=rank, alpha=alpha)) if rank else None
