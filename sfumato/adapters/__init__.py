"""Floor 2: kinds of adapters, one file each, found by the file's name; a new kind adds no line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from torch import Tensor

from sfumato.adapters.base import Adapter, LayerOptions
from sfumato.config import NetworkConfig
from sfumato.config.pairs import several
from sfumato.errors import UserError, nearest

_HELPERS = {"__init__", "base", "insert", "files", "operation", "merging"}
_KOHYA = {f"lora_{family}": "lora" for family in ("flux", "sd3", "lumina", "hunyuan_image", "anima")} | {
    "oft_flux": "oft"
}
_ALSO = {"weight_decompose": "dora_wd"}
"""network_args that have another name in other programs."""
_LATER = (
    *("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"),
    *("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold"),
    *(
        "network_reg_dims",
        "network_reg_lrs",
        "include_patterns",
        "exclude_patterns",
        "split_qkv",
        "ggpo_beta",
        "ggpo_sigma",
    ),
)
"""network_args of sd-scripts that sfumato does not have yet."""


@cache
def kinds() -> tuple[str, ...]:
    """All kinds' names."""
    return tuple(sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in _HELPERS))


def kind(name: str) -> type[Adapter]:
    """A kind by its name, or by kohya's (`networks.lora`, `networks.lora_flux`). Errors: `UserError` for an unknown
    one."""
    own = name.removeprefix("networks.")
    own = _KOHYA.get(own, own)
    if own in kinds():
        return cast("type[Adapter]", import_module(f"sfumato.adapters.{own}").ADAPTER)
    if name.startswith("lycoris"):
        raise UserError(
            f"network_module {name!r}: name the algorithm itself, one of {', '.join(kinds())} (locon: lora with "
            "conv_dim)"
        )
    raise UserError(f"network_module {name!r} is not known; known: {', '.join(kinds())}{nearest(own, kinds())}")


def from_tensors(
    tensors: Mapping[str, Tensor], prefer: type[Adapter] | None = None
) -> tuple[type[Adapter], LayerOptions]:
    """The kind that a layer's tensors are of, with its options. `prefer`: taken if they may be its own, as several
    kinds have files that look alike. Errors: `UserError` if none has such tensors."""
    others = (k for name in kinds() if "read" in vars(k := kind(name)))
    for each in (prefer, *others) if prefer else others:
        if options := each.read(tensors):
            return each, options
    raise UserError(
        f"no kind of adapter has the tensors {', '.join(sorted(tensors))}; known kinds: {', '.join(kinds())}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPlan:
    """Settings of a run's adapters, for all layers."""

    kind: type[Adapter]
    rank: int = 4
    alpha: float = 1.0
    conv_rank: int | None = None
    """Rank on convolutions larger than 1x1; None: no adapters on the "conv" targets."""
    conv_alpha: float = 1.0
    more: Mapping[str, Any] = field(default_factory=dict)
    """Dropouts and the kind's own options, by their names in `kind.Options`."""
    plus: float | None = None
    """LoRA+: factor on the rate of `loraplus_parameters`."""
    loraplus_denoiser: float | None = None
    """The same for the denoiser, in place of `plus`."""
    loraplus_encoders: float | None = None
    """The same for text encoders, in place of `plus`."""
    family: Any = None
    """The family's own network_args: an instance of its `Facts.network_args`."""

    def options(self, *, conv: bool) -> LayerOptions:
        """Settings of a layer's adapter; `conv`: a convolution larger than 1x1."""
        if conv:
            assert self.conv_rank is not None
            return self.kind.Options(rank=self.conv_rank, alpha=self.conv_alpha, **self.more)
        return self.kind.Options(rank=self.rank, alpha=self.alpha, **self.more)

    def loraplus_ratio(self, component: str) -> float | None:
        """LoRA+'s factor for a component; None: no LoRA+."""
        own = self.loraplus_denoiser if component == "denoiser" else self.loraplus_encoders
        return self.plus if own is None else own


def parse(network: NetworkConfig, family: type | None = None) -> AdapterPlan:
    """Flags and network_args -> a plan. `family`: the dataclass of the family's own network_args.

    Errors: one `UserError` with all that is wrong.
    """
    chosen = kind(network.network_module)
    theirs = {} if family is None else _types(family)
    known = _known_args(chosen) | theirs
    errors: list[str] = []
    args: dict[str, Any] = {}
    for text in network.network_args:
        name, equals, value = text.partition("=")
        name = _ALSO.get(name, name)
        if together := several(text):
            errors.append(f"network_args {text!r}: {together}")
        elif not equals:
            errors.append(f"network_args {text!r}: expected key=value")
        elif name in _LATER and name not in known:
            errors.append(f"network_args {name}: not supported yet; leave it out")
        elif name not in known:
            errors.append(f"network_args {name!r} is not known to {network.network_module}{nearest(name, known)}")
        else:
            args[name] = _typed(name, value, known[name], errors)
    if network.network_dropout is not None:
        if "dropout" in args:
            errors.append("the dropout is set twice: by network_dropout and by dropout in network_args; leave one out")
        args["dropout"] = network.network_dropout
    rank = 4 if network.network_dim is None else network.network_dim
    alpha = 1.0 if network.network_alpha is None else network.network_alpha
    errors += _sense(chosen, args)
    if network.dim_from_weights and network.network_weights:
        shaping = {
            name for name, kind_of in theirs.items() if kind_of != "bool" or name == "split_qkv"
        } | chosen.shaping
        given = [name for name in args if name.startswith("conv_") or name in shaping]
        errors += [
            f"network_args {name}: does nothing, as dim_from_weights takes layers and ranks from network_weights"
            for name in given
        ]
    if errors:
        raise UserError(*errors)
    return AdapterPlan(
        kind=chosen,
        rank=rank,
        alpha=alpha,
        conv_rank=args.pop("conv_dim", None) or None,
        conv_alpha=args.pop("conv_alpha", 1.0),
        plus=args.pop("loraplus_lr_ratio", None),
        loraplus_denoiser=args.pop("loraplus_unet_lr_ratio", None),
        loraplus_encoders=args.pop("loraplus_text_encoder_lr_ratio", None),
        family=None if family is None else family(**{name: args.pop(name) for name in theirs if name in args}),
        more=args,
    )


def _known_args(chosen: type[Adapter]) -> dict[str, str]:
    """network_args of a kind -> the name of their type."""
    plan = {"conv_dim": "int", "conv_alpha": "float"}
    plus = dict.fromkeys(("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"), "float")
    own = {
        name: kind_of
        for name, kind_of in _types(chosen.Options).items()
        if name not in ("rank", "alpha", "pieces") and kind_of in ("int", "float", "bool", "str")
    }
    return plan | plus | own


def _types(record: type) -> dict[str, str]:
    """Field of a dataclass -> the name of its type, which may also be None."""
    hints = get_type_hints(record)
    return {f.name: next(iter(get_args(hints[f.name])), hints[f.name]).__name__ for f in fields(record)}


def _typed(name: str, text: str, kind_of: str, errors: list[str]) -> Any:
    """The value of `text`, or None and an error."""
    read = {
        "int": int,
        "float": float,
        "bool": {"true": True, "false": False, "1": True, "0": False}.__getitem__,
        "str": str,
    }[kind_of]
    try:
        return read(text.strip().lower() if kind_of == "bool" else text)  # type: ignore[operator]
    except (ValueError, KeyError):
        errors.append(f"network_args {name}={text}: expected {'True or False' if kind_of == 'bool' else kind_of}")
        return None


def _sense(chosen: type[Adapter], args: Mapping[str, Any]) -> list[str]:
    """What is wrong with values that have the right types."""
    errors = []
    if (args.get("conv_dim") or 0) < 0:
        errors.append(f"network_args conv_dim={args['conv_dim']}: expected 1 or more, or 0 for none")
    if "conv_alpha" in args and not args.get("conv_dim"):
        errors.append("network_args conv_alpha does nothing without conv_dim: set conv_dim, or leave conv_alpha out")
    for name in ("dropout", "rank_dropout", "module_dropout"):
        if not (chance := args.get(name)):
            continue
        if name not in chosen.supports:
            errors.append(f"{name} has no meaning for {chosen.__name__}: leave it out")
        elif not 0 <= chance < 1:
            errors.append(f"{name} {chance}: expected a chance, 0 up to but not 1")
    plus = [name for name in args if name.startswith("loraplus")]
    if plus and chosen.loraplus_parameters is Adapter.loraplus_parameters:
        errors.append(f"{plus[0]} has no meaning for {chosen.__name__}: leave it out")
    return errors
