"""What every kind of adapter is: a change of one layer, made in hooks before and after its forward.

An adapter takes its sizes from its base layer and never owns the layer. It knows nothing of nets, quantisation or
training; `insert.py` puts it in place, `files.py` names its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.config.rules import Chance
from sfumato.errors import UserError
from sfumato.formats.dialect import ALPHA, AdapterTensors
from sfumato.tensors.random import SampleRandom, generator
from sfumato.tensors.shapes import per_sample


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOptions:
    """Settings of one layer's adapter. A kind with more settings has a subclass with more fields."""

    rank: int = 4
    alpha: float = 1.0
    """The change is scaled by alpha / rank; 0 means the rank."""
    dropout: Chance = 0.0
    """Chance that a number between the two factors is dropped."""
    rank_dropout: Chance = 0.0
    """Chance that a rank is dropped, for a sample at a time."""
    module_dropout: Chance = 0.0
    """Chance that the whole change of a layer is dropped, for a sample at a time."""
    pieces: tuple[int, ...] = ()
    """Output rows that have an adapter of their own within the layer (q, k and v of a fused one); none: all rows share
    one."""

    @property
    def scale(self) -> float:
        return (self.alpha or self.rank) / self.rank


@dataclass(slots=True)
class AdapterContext:
    """What holds for the forward passes of now; all adapters of a net share one."""

    multiplier: float | Tensor = 1.0
    """Strength of the change: a number, or (b,), one per sample."""
    rng: SampleRandom | None = None
    """Where the dropouts of this batch come from; needed only in training mode and only if there are dropouts."""
    noise_level: Tensor | None = None
    """(b,) how much noise the latents of this batch have, 0 to 1; None outside of training."""

    @property
    def acts(self) -> bool:
        """Whether there is a change at all: not at the number 0."""
        return isinstance(self.multiplier, Tensor) or self.multiplier != 0


class Adapter(nn.Module):
    """One layer's change. Subclasses fill in `__init__`, `read`, `forward` and `delta_weight`; their parameters are the
    tensors of a file."""

    Options: ClassVar[type[LayerOptions]] = LayerOptions
    supports: ClassVar[frozenset[str]] = frozenset()
    """Which of dropout, rank_dropout, module_dropout the kind has."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Other programs' names of the kind, such as LyCORIS' `algo`."""
    kohya_targets: ClassVar[tuple[str, ...]] = ()
    """Sets of layers that kohya's `networks.KIND` is on by default; none: those that the family has for all."""
    has_alpha: ClassVar[bool] = True
    """Whether a layer's file tensors have an alpha."""
    has_rank: ClassVar[bool] = True
    """Whether network_dim has a meaning."""
    shaping: ClassVar[frozenset[str]] = frozenset()
    """Options that decide which tensors there are; those of a file go before them."""
    any_rank: ClassVar[bool] = False
    """Whether a rank above that of the layer has a meaning."""
    rows: ClassVar[Mapping[str, int]] = {}
    """Tensor of a file -> its dimension along which the layer's output rows lie; those that are not here belong to all
    rows. Empty: the kind has no exact form for a part of a layer's rows."""
    neutral: ClassVar[Mapping[str, float]] = {}
    """Tensor of a file -> the value of rows that change nothing, as those of a missing piece of a fused layer."""

    alpha: Tensor

    def __init__(self, base: nn.Module, options: LayerOptions, generator: torch.Generator) -> None:
        """Starts with no effect. `base`: the layer, whose values a start may depend on. `generator` (CPU) gives the
        start values, in fp32 on the base layer's device."""
        super().__init__()
        self.options = options
        self.name = ""
        """Component and module path of the layer, given by `AdapterNetwork`; for messages, and a key of dropouts."""
        self.context = AdapterContext()
        # Of a layer without values, alpha has one all the same: names and scales of files follow from it.
        place = "cpu" if is_meta(base) else device_of(base)
        if self.has_alpha:
            self.register_buffer(
                "alpha", torch.tensor(options.alpha or options.rank, dtype=torch.float32, device=place)
            )

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> LayerOptions | None:
        """The options of tensors that are of this kind, or None if they are of another. A kind whose files look like
        its parent's leaves this to the parent."""
        raise NotImplementedError

    @classmethod
    def file_kind(cls) -> str:
        """What a reader of a file finds, such as "lora" of the kinds that only train otherwise."""
        return next(kind for kind in cls.__mro__ if "read" in vars(kind)).__name__.lower()

    @classmethod
    def with_args(cls, options: LayerOptions, more: Mapping[str, Any]) -> LayerOptions:
        """Options that `read` found, with a run's own settings."""
        return replace(options, **more)

    @classmethod
    def kohya_options(cls, alpha: float) -> Mapping[str, Any]:
        """The options that kohya's `networks.KIND` has by default. `alpha`: network_alpha."""
        return {}

    def adapt_input(self, x: Tensor) -> Tensor:
        """The layer's input -> the input that it gets in place of that."""
        return x

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """The layer's input and output -> its new output, in y's shape and dtype. `layer`: for its weight and bias."""
        raise NotImplementedError

    def delta_weight(self, weight: Tensor) -> Tensor:
        """What merging adds to the layer's `weight` at multiplier 1, shaped as it, fp32; the effect of a multiplier is
        linear."""
        raise NotImplementedError

    def needs_weight(self) -> bool:
        """Whether `delta_weight` depends on the values of the weight."""
        return True

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """(out, r) and (r, in * kernel), fp32, where `delta_weight` is always their product; merging is much faster
        then."""
        return None

    def delta_bias(self, bias: Tensor) -> Tensor | None:
        """The same for the layer's bias; None: it stays."""
        return None

    def loraplus_parameters(self) -> list[nn.Parameter]:
        """The parameters that LoRA+ (arXiv:2402.12354) gives a higher rate; none: LoRA+ has no meaning for the kind."""
        return []

    def kept_gradients(self) -> Iterable[nn.Parameter]:
        """Those of its parameters whose gradients `after_step` reads."""
        return ()

    def after_step(self) -> None:
        """Called after each optimizer step, while the gradients are still there."""

    def scale_norm(self, limit: float) -> tuple[Tensor, Tensor]:
        """Scale the change so that its Frobenius norm is at most `limit`. Returns (norm after, whether it was scaled),
        0-d tensors; nothing is read back from the device."""
        raise UserError(f"scale_weight_norms has no meaning for {type(self).__name__}: leave it out")

    def tensors(self) -> AdapterTensors:
        """The tensors that a file holds, by kohya's names; not copied."""
        return {name: t.detach() for name, t in self.state_dict().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The reverse of `tensors`; a file without alpha means alpha = rank. Errors: `UserError` for other names or
        shapes."""
        given = {**({ALPHA: torch.tensor(float(self.options.rank))} if self.has_alpha else {}), **tensors}
        own = self.state_dict()
        if wrong := sorted(own.keys() ^ given.keys()):
            raise UserError(f"{self.name}: expected {', '.join(sorted(own))}; missing or not known: {', '.join(wrong)}")
        for name, t in own.items():
            if t.numel() != given[name].numel() or (t.ndim and t.shape != given[name].shape):
                raise UserError(f"{self.name}.{name} has shape {list(given[name].shape)}, expected {list(t.shape)}")
        with torch.no_grad():
            for name, t in own.items():
                t.copy_(given[name].reshape(t.shape))
        if self.has_alpha:
            self.options = replace(self.options, alpha=float(given[ALPHA]))

    # The tensors of a file, of a layer whose rows stand elsewhere in other programs.

    @classmethod
    def own_form(cls, tensors: AdapterTensors) -> AdapterTensors:
        """A file's tensors, in the form in which they are written, where other programs have another one."""
        return tensors

    @classmethod
    def rows_of(cls, tensors: AdapterTensors) -> Mapping[str, int]:
        """`rows`, of a kind whose tensors have several forms."""
        return cls.rows

    @classmethod
    def row_count(cls, tensors: AdapterTensors) -> int:
        """Output rows of the layer that these tensors are of. Errors: `UserError` if that has no exact form in
        pieces."""
        dims = cls.rows_of(tensors)
        if leaf := next((leaf for leaf in tensors if leaf in dims), None):
            return tensors[leaf].shape[dims[leaf]]
        raise UserError(f"{cls.__name__} has no exact form for a part of a layer's rows")

    @classmethod
    def cut(cls, tensors: AdapterTensors, rows: Sequence[int]) -> list[AdapterTensors]:
        """The tensors of a fused layer -> those of its pieces, of so many output rows each. Errors: `UserError` if that
        has no exact form."""
        dims = cls.rows_of(tensors)
        parts = {leaf: torch.split(t, list(rows), dims[leaf]) for leaf, t in tensors.items() if leaf in dims}
        return [{leaf: parts[leaf][i] if leaf in parts else t for leaf, t in tensors.items()} for i in range(len(rows))]

    @classmethod
    def join(cls, pieces: Mapping[int, AdapterTensors], rows: Sequence[int]) -> AdapterTensors:
        """The reverse of `cut`; a piece that is missing changes nothing. Errors: `UserError` if that has no exact
        form."""
        first = pieces[min(pieces)]
        dims = cls.rows_of(first)
        if dims and dims.keys() <= cls.neutral.keys():
            pieces = {i: pieces.get(i) or cls._no_change(first, dims, n) for i, n in enumerate(rows)}
        if (
            not dims
            or len(pieces) < len(rows)
            or any(
                piece.keys() != first.keys()
                or not all(leaf in dims or torch.equal(t, first[leaf]) for leaf, t in piece.items())
                for piece in pieces.values()
            )
        ):
            raise UserError(f"{cls.__name__} of the pieces of a fused layer has no exact form for the whole of it")
        return {
            leaf: torch.cat([pieces[i][leaf] for i in range(len(rows))], dims[leaf]) if leaf in dims else t
            for leaf, t in first.items()
        }

    @classmethod
    def shared(cls, pieces: Mapping[int, AdapterTensors], rows: Sequence[int]) -> AdapterTensors:
        """`join` of tensors that act on a layer's input, and so belong to all rows. Errors: `UserError` unless all
        pieces have the same."""
        first = pieces[min(pieces)]
        if len(pieces) < len(rows) or any(
            piece.keys() != first.keys() or not all(torch.equal(t, first[leaf]) for leaf, t in piece.items())
            for piece in pieces.values()
        ):
            raise UserError(
                f"{cls.__name__} on the inputs of a fused layer's pieces has no exact form unless they are equal"
            )
        return first

    @classmethod
    def _no_change(cls, like: AdapterTensors, dims: Mapping[str, int], rows: int) -> AdapterTensors:
        """Such tensors for so many rows, without effect; what belongs to all rows stays."""
        return {
            leaf: t.new_full((*t.shape[: dims[leaf]], rows, *t.shape[dims[leaf] + 1 :]), cls.neutral[leaf])
            if leaf in dims
            else t
            for leaf, t in like.items()
        }

    @classmethod
    def move_rows(cls, tensors: AdapterTensors, move: Callable[[Tensor], Tensor]) -> AdapterTensors:
        """The tensors of a layer whose rows go through `move`. Errors: `UserError` if that has no exact form."""
        dims = cls.rows_of(tensors)
        if not dims:
            raise UserError(f"{cls.__name__} has no exact form for rows in another order")
        return {
            leaf: move(t.transpose(0, dims[leaf])).transpose(0, dims[leaf]) if leaf in dims else t
            for leaf, t in tensors.items()
        }

    @classmethod
    def fold_alpha(cls, tensors: AdapterTensors) -> AdapterTensors:
        """The tensors without alpha, its effect multiplied into the others (PEFT). Errors: `UserError` if that has no
        exact form."""
        raise UserError(f"PEFT's names have no place for {cls.__name__}; choose kohya or comfy")

    # What subclasses use.

    def add(self, y: Tensor, delta: Tensor, scale: float = 1.0) -> Tensor:
        """y plus scale times `delta`, the change of the output, times multiplier and module dropout, in y's dtype."""
        strength = self.context.multiplier
        if self.training and self.options.module_dropout:
            mask = self.dropout_mask("module_dropout", self.options.module_dropout, (delta.shape[0],), delta.device)
            delta = delta * per_sample(mask, delta).to(delta.dtype)
        if isinstance(strength, Tensor):
            delta = delta if scale == 1.0 else delta * scale
            return torch.addcmul(y, delta.to(y.dtype), per_sample(strength, y).to(y.dtype))
        return torch.add(y, delta.to(y.dtype), alpha=strength * scale)

    def drop_rows(self, delta: Tensor, dim: int) -> Tensor:
        """`rank_dropout` of kinds without an axis of ranks: output rows of the change, which lie along `dim` of
        `delta`, are dropped, as by sd-scripts and LyCORIS."""
        p = self.options.rank_dropout
        if not (self.training and p):
            return delta
        mask = self.dropout_mask("rank_dropout", p, (len(delta), delta.shape[dim]), delta.device).to(delta.dtype)
        shape = [1] * delta.ndim
        shape[0], shape[dim] = mask.shape
        return delta * mask.view(shape) / (1 - p)

    def dropout_mask(self, purpose: str, chance: float, shape: Sequence[int], device: torch.device) -> Tensor:
        """A mask of `shape` (rows of one sample next to each other): False with the given chance, by the batch's own
        random numbers."""
        generators = self.generators(purpose, device)
        rows, odd = divmod(shape[0], len(generators))
        if odd:
            raise RuntimeError(f"{shape[0]} rows do not share out over {len(generators)} samples")
        parts = [torch.rand((rows, *shape[1:]), generator=generator, device=device) for generator in generators]
        return torch.cat(parts) >= chance

    def generators(self, purpose: str, device: torch.device) -> list[torch.Generator]:
        """One for each sample of the batch, by its own random numbers, the purpose and the layer."""
        rng = self.context.rng
        if rng is None:
            raise RuntimeError("adapters with randomness in training mode need `AdapterNetwork.rng` for every batch")
        return [generator(k, purpose, self.name, device=device) for k in rng.keys]


def without_bias(y: Tensor, layer: nn.Module) -> Tensor:
    """A layer's output less its bias."""
    bias = layer.bias
    ones = (1, 1) if isinstance(layer, nn.Conv2d) else ()  # after the channels of y
    return y - bias.view(-1, *ones).to(y.dtype) if isinstance(bias, Tensor) else y


def as_input(x: Tensor, weight: Tensor) -> Tensor:
    """x in the dtype of an adapter's weight; under autocast as it is, for autocast casts both."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)


def is_meta(base: nn.Module) -> bool:
    """Whether a layer has no values: its adapter is there to be counted and checked, and start values need no
    memory."""
    return device_of(base).type == "meta"


def init_device(base: nn.Module) -> torch.device:
    """Where start values are made: on the CPU, so that they are the same on every device."""
    return torch.device("meta" if is_meta(base) else "cpu")


def device_of(base: nn.Module) -> torch.device:
    """Where a layer's weight is, also where it is stored as buffers."""
    return next(chain(base.parameters(), base.buffers())).device
