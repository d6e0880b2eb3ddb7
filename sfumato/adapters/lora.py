"""LoRA: the change is a product of two thin matrices (arXiv:2106.09685); for convolutions, LoCon as LyCORIS has it.

A fused layer's pieces may have pairs of their own. In a file they are one pair: the `down`s stacked, the `up`s on a
diagonal of blocks, and alpha times their number, as the rank has grown so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.adapters.additive import Additive, AdditiveOptions, dora_options, peft_magnitude
from sfumato.adapters.base import LayerOptions, as_input, device_of, init_device, is_meta
from sfumato.adapters.perturbation import Perturbation
from sfumato.adapters.starts import Start, start_factors
from sfumato.config.rules import Amount, Must
from sfumato.errors import UserError
from sfumato.formats.dialect import ALPHA, DORA, DOWN, MID, UP, AdapterTensors
from sfumato.tensors.meta import without_values

_INITS = ("pissa", "olora")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAOptions(AdditiveOptions):
    use_tucker: bool = False
    """A convolution's kernel stands in a third factor of rank x rank, between the two."""
    init: Annotated[str, Must(("default", *_INITS).__contains__, f"default, {' or '.join(_INITS)}")] = "default"
    """"pissa" or "olora": the start is a part of the layer's own weight; the file has twice the rank."""
    ggpo_sigma: Amount | None = None
    """GGPO, with ggpo_beta: noise in training by the norms of the layer's weight, times this."""
    ggpo_beta: Amount | None = None
    """The same by the squared norms of its gradient."""


class LoRA(Additive):
    """`y + multiplier * alpha / rank * up(down(x))`. A convolution's `down` has its kernel, stride and padding; its
    `up` is 1x1. With `init` a file is a plain LoRA of twice the rank on the untouched model (PEFT saves one of the rank
    for a model that it has changed)."""

    Options: ClassVar[type[LayerOptions]] = LoRAOptions
    aliases = ("locon",)
    supports = frozenset({"dropout", "rank_dropout", "module_dropout"})
    shaping = frozenset({"use_tucker"})
    rows: ClassVar[Mapping[str, int]] = {UP: 0}

    lora_mid: nn.Conv2d | None
    start: Start | None
    ggpo: Perturbation | None

    def __init__(self, base: nn.Module, options: LayerOptions, generator: torch.Generator) -> None:
        super().__init__(base, options, generator)
        self.lora_down: nn.Linear | nn.Conv2d
        self.lora_up: nn.Linear | nn.Conv2d | Diagonal
        tucker = isinstance(options, LoRAOptions) and options.use_tucker
        self.lora_down, self.lora_mid, self.lora_up = _factors(base, options.rank * max(1, len(options.pieces)), tucker)
        for factor in (self.lora_down, self.lora_mid):
            if factor is not None:
                factor.weight = nn.Parameter(
                    self.start_values(base, factor.weight.shape, generator).to(device_of(base))
                )
        if options.pieces:
            self.lora_up = Diagonal(options.pieces, options.rank, device_of(base))
            self.alpha *= len(options.pieces)
        else:
            self.lora_up.weight = nn.Parameter(torch.zeros(self.lora_up.weight.shape, device=device_of(base)))
        self.register_module("start", None)
        self.register_module("ggpo", None)
        if how := self.start_name(options):
            self._start_from(how, base, generator)
        if isinstance(options, LoRAOptions) and (options.ggpo_sigma, options.ggpo_beta) != (None, None):
            self._perturb(base, options.ggpo_sigma, options.ggpo_beta)

    def start_values(self, base: nn.Module, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Those of `lora_down`, and of a Tucker form's `lora_mid`."""
        empty = torch.empty(shape, device=init_device(base))
        return nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)

    @classmethod
    def start_name(cls, options: LayerOptions) -> str:
        """Which of `start_factors` it starts from; empty for none."""
        return options.init if isinstance(options, LoRAOptions) and options.init != "default" else ""

    def start_weight(self, base: nn.Module, generator: torch.Generator) -> Tensor:
        """(out, in): what the start is a part of, fp32."""
        assert isinstance(base.weight, Tensor)
        return base.weight.detach().float().flatten(1)

    def _start_from(self, how: str, base: nn.Module, generator: torch.Generator) -> None:
        if self.lora_mid is not None or isinstance(self.lora_up, Diagonal):
            raise UserError(f"a start from the layer's weight ({how}) has no form beside use_tucker and split_qkv")
        down, up = self.lora_down.weight, self.lora_up.weight
        if is_meta(base):
            up0, down0 = torch.empty_like(up), torch.empty_like(down)
        else:
            weight = self.start_weight(base, generator)
            up0, down0 = start_factors(how, weight, len(down), self.options.scale, generator)
        layer = _factors(base, len(down), tucker=False)[2]
        self.start = Start(layer, up0.reshape(up.shape).contiguous(), down0.reshape(down.shape).contiguous())
        self.lora_down.weight = nn.Parameter(self.start.down.clone())

    def _perturb(self, base: nn.Module, sigma: float | None, beta: float | None) -> None:
        if sigma is None or beta is None:
            raise UserError("network_args ggpo_sigma, ggpo_beta: one does nothing without the other; set both")
        if self.lora_mid is not None or self.start is not None or isinstance(self.lora_up, Diagonal):
            raise UserError("network_args ggpo_sigma: GGPO has no form beside use_tucker, init and split_qkv")
        self.ggpo = Perturbation(base, sigma, beta)
        self.register_forward_hook(_perturbed)

    def kept_gradients(self) -> Iterable[nn.Parameter]:
        return () if self.ggpo is None else (*self.lora_up.parameters(), *self.lora_down.parameters())

    def after_step(self) -> None:
        if self.ggpo is not None:
            self.ggpo.update(self.lora_up.weight, self.lora_down.weight, self.options.scale)

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> LayerOptions | None:
        forms = {DORA: AdditiveOptions, MID: LoRAOptions}
        if tensors.keys() - {ALPHA} - {leaf for leaf, o in forms.items() if issubclass(cls.Options, o)} != {DOWN, UP}:
            return None
        rank = len(tensors[DOWN])
        form = dora_options(tensors) | ({"use_tucker": True} if MID in tensors else {})
        return cls.Options(rank=rank, alpha=float(tensors.get(ALPHA, rank)), **form)

    def delta(self, x: Tensor) -> Tensor:
        x = as_input(x, self.lora_down.weight)
        h = self.lora_down(x)
        if self.lora_mid is not None:
            h = self.lora_mid(h)
        out: Tensor = self.lora_up(self.drop(h))
        return out if self.start is None else out + self.start(self.lora_down, x, self.drop)

    def product(self, weight: Tensor) -> Tensor:
        return self._matrix().view(weight.shape) * self.options.scale

    def _matrix(self) -> Tensor:
        """(out, in), or (out, in * kernel): the factors' product, fp32."""
        up, down = self._pair()
        product = up @ down
        return product if self.start is None else product + self.start.product(self.lora_down.weight)

    def _pair(self) -> tuple[Tensor, Tensor]:
        """(out, r) and (r, in * kernel), fp32: the factors without a start's."""
        up, down = self.lora_up.weight.float(), self.lora_down.weight.float()
        if self.lora_mid is not None:
            down = mixed(self.lora_mid.weight.float(), down)
        return up.flatten(1), down.flatten(1)

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        if self.dora_scale is not None or self.start is not None:
            return None
        up, down = self._pair()
        return up * self.options.scale, down

    def tensors(self) -> AdapterTensors:
        own = {leaf: t for leaf, t in super().tensors().items() if not leaf.startswith("ggpo.")}
        if isinstance(self.lora_up, Diagonal):
            own = {leaf: t for leaf, t in own.items() if leaf not in self.lora_up.names}
            own[UP] = self.lora_up.weight.detach()
        return own if self.start is None else self.start.to_file(own)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        given = dict(tensors)
        if self.start is not None:
            try:
                given = self.start.from_file(given)
            except UserError as error:
                raise UserError(f"{self.name}: {error}") from None
        elif isinstance(self.lora_up, Diagonal):
            down, up = given.get(DOWN), given.pop(UP, None)
            blocks = None if down is None or up is None else self.lora_up.blocks_of(up)
            if down is None or blocks is None:
                raise UserError(
                    f"{self.name}: the file's adapter is not of {len(self.options.pieces)} separate pieces; leave "
                    "split_qkv out"
                )
            given.setdefault(ALPHA, torch.tensor(float(len(down))))
            given.update(zip(self.lora_up.names, blocks, strict=True))
        if self.ggpo is not None:
            given["ggpo.deviation"] = self.ggpo.deviation
        super().load_tensors(given)
        if isinstance(self.lora_up, Diagonal):
            self.options = replace(self.options, alpha=float(self.alpha) / len(self.options.pieces))

    @classmethod
    def with_args(cls, options: LayerOptions, more: Mapping[str, Any]) -> LayerOptions:
        """Half of the file's rank is the start's."""
        options = super().with_args(options, more)
        return replace(options, rank=options.rank // 2, alpha=options.alpha / 2) if cls.start_name(options) else options

    @classmethod
    def join_factors(cls, pieces: Mapping[int, AdapterTensors], rows: Sequence[int]) -> AdapterTensors:
        """At the same rank when all pieces share one `lora_down`, else at the sum of their ranks."""
        if any(piece.keys() != {DOWN, UP, ALPHA} for piece in pieces.values()):
            raise UserError("only LoRA, with lora_down and lora_up in every piece, can be joined to a fused layer")
        first = pieces[min(pieces)]
        if len(pieces) == len(rows) and all(
            torch.equal(p[DOWN], first[DOWN]) and p[ALPHA] == first[ALPHA] for p in pieces.values()
        ):
            return super().join_factors(pieces, rows)
        rank = sum(len(p[DOWN]) for p in pieces.values())
        up, at = first[UP].new_zeros((sum(rows), rank, *first[UP].shape[2:])), 0
        for i, part in sorted(pieces.items()):
            r = len(part[DOWN])
            up[sum(rows[:i]) : sum(rows[: i + 1]), at : at + r] = part[UP] * (part[ALPHA] / r)
            at += r
        down = torch.cat([p[DOWN] for _, p in sorted(pieces.items())])
        return {DOWN: down, UP: up, ALPHA: torch.tensor(float(rank), dtype=up.dtype)}

    @classmethod
    def fold_alpha(cls, tensors: AdapterTensors) -> AdapterTensors:
        up = tensors[UP]
        scale = float(tensors[ALPHA]) / tensors[DOWN].shape[0] if ALPHA in tensors else 1.0
        down = mixed(tensors[MID], tensors[DOWN]) if MID in tensors else tensors[DOWN]
        folded = {DOWN: down, UP: (up.float() * scale).to(up.dtype)}
        return folded | ({DORA: peft_magnitude(tensors[DORA])} if DORA in tensors else {})

    def loraplus_parameters(self) -> list[nn.Parameter]:
        return list(self.lora_up.parameters())

    def norm(self) -> Tensor:
        if self.start is not None:
            raise UserError("scale_weight_norms has no meaning beside init and sig_type: leave it out")
        norm: Tensor = torch.linalg.matrix_norm(self._matrix())
        return norm * abs(self.options.scale)

    @property
    def factors(self) -> int:
        return 2 if self.lora_mid is None else 3

    def drop(self, h: Tensor) -> Tensor:
        """(b, ..., rank) or (b, rank, h, w) with the dropouts of one step."""
        if not self.training:
            return h
        if p := self.options.dropout:
            h = h * self.dropout_mask("dropout", p, h.shape, h.device).to(h.dtype) / (1 - p)
        if p := self.options.rank_dropout:
            mask = self.dropout_mask("rank_dropout", p, (h.shape[0], len(self.lora_down.weight)), h.device)
            h = h * self.per_rank(mask.to(h.dtype) / (1 - p), h)
        return h

    def per_rank(self, values: Tensor, h: Tensor) -> Tensor:
        """(b, rank), shaped to act on what is between the factors."""
        ones = [1] * (h.ndim - 2)
        return values.view(len(h), *((-1, *ones) if isinstance(self.lora_down, nn.Conv2d) else (*ones, -1)))


def _perturbed(adapter: LoRA, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    """A hook after the adapter's forward: GGPO, in training."""
    return y if adapter.ggpo is None or not adapter.training else y + adapter.ggpo(adapter, args[0]).to(y.dtype)


class Diagonal(nn.Module):
    """The `up`s of a layer's pieces: each turns its own share of the ranks into its own rows."""

    def __init__(self, rows: Sequence[int], rank: int, device: torch.device) -> None:
        super().__init__()
        self.blocks = nn.ParameterList([torch.zeros(n, rank, device=device) for n in rows])

    @property
    def weight(self) -> Tensor:
        """(all rows, all ranks), zero off the diagonal of blocks."""
        return _diagonal(self.blocks)

    @property
    def names(self) -> list[str]:
        """What the adapter calls the blocks."""
        return [f"lora_up.blocks.{i}" for i in range(len(self.blocks))]

    def blocks_of(self, weight: Tensor) -> list[Tensor] | None:
        """The blocks of such a weight; None if it has another shape or is not zero elsewhere."""
        if weight.shape != self.weight.shape:
            return None
        rows = torch.split(weight, [len(block) for block in self.blocks])
        blocks = [part.chunk(len(rows), 1)[i] for i, part in enumerate(rows)]
        return blocks if torch.equal(_diagonal(blocks), weight) else None

    def forward(self, h: Tensor) -> Tensor:
        """(..., all ranks) -> (..., all rows)"""
        shares = h.chunk(len(self.blocks), -1)
        return torch.cat(
            [functional.linear(share, block) for share, block in zip(shares, self.blocks, strict=True)], -1
        )


def _diagonal(blocks: Iterable[Tensor]) -> Tensor:
    out: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return out


def mixed(mid: Tensor, down: Tensor) -> Tensor:
    """The `down` (rank, in, *kernel) that does as a Tucker form's 1x1 `down` and its `mid` (rank, rank, *kernel)."""
    return torch.einsum("mn...,ni->mi...", mid, down.flatten(1))


_Factors = (
    tuple[nn.Linear, None, nn.Linear] | tuple[nn.Conv2d, None, nn.Conv2d] | tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d]
)


def _factors(base: nn.Module, rank: int, tucker: bool) -> _Factors:
    """The layers down, mid and up without values: making them so leaves the global random state alone. `tucker`: with a
    mid, where there is a kernel."""
    with without_values():
        return _shaped(base, rank, tucker)


def _shaped(base: nn.Module, rank: int, tucker: bool) -> _Factors:
    if isinstance(base, nn.Linear):
        down = nn.Linear(base.in_features, rank, bias=False)
        return down, None, nn.Linear(rank, base.out_features, bias=False)
    if not isinstance(base, nn.Conv2d) or base.groups != 1 or isinstance(base.padding, str):
        raise TypeError(f"LoRA goes on linear layers and on convolutions without groups, not on {base}")
    tucker = tucker and base.kernel_size != (1, 1)
    conv = nn.Conv2d(
        rank if tucker else base.in_channels,
        rank,
        (base.kernel_size[0], base.kernel_size[1]),
        (base.stride[0], base.stride[1]),
        (int(base.padding[0]), int(base.padding[1])),
        (base.dilation[0], base.dilation[1]),
        bias=False,
        padding_mode=base.padding_mode,
    )
    up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
    if tucker:
        return nn.Conv2d(base.in_channels, rank, 1, bias=False), conv, up
    return conv, None, up


ADAPTER = LoRA
