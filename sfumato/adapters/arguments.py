"""Flags and network_args -> the plan of a run's adapters. Imports no torch until a kind is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from sfumato.adapters import presets, values
from sfumato.adapters.find import LYCORIS, kind, kinds
from sfumato.adapters.plan import CONVOLUTIONS, DEFAULT, DROPOUTS, AdapterPlan, LayerRule
from sfumato.config import NetworkConfig, rules
from sfumato.config.pairs import several
from sfumato.config.rules import Amount, Must, Natural, Positive
from sfumato.errors import UserError, nearest

if TYPE_CHECKING:
    from sfumato.adapters.base import Adapter


_Patterns = Annotated[str | None, Must(values.patterns, "a list of patterns, such as ['.*attn.*', '.*mlp.*']")]
_Ranks = Annotated[
    str | None,
    Must(
        lambda text: (found := values.by_pattern(text)) and all(n >= 0 and n.is_integer() for _, n in found),
        "patterns with their ranks, such as .*attn.*=8,.*mlp.*=4",
    ),
]
_Amounts = Annotated[
    str | None,
    Must(
        lambda text: (found := values.by_pattern(text)) and all(n >= 0 for _, n in found),
        "patterns with their numbers, 0 or more, such as .*attn.*=1e-4,.*mlp.*=5e-5",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonArgs:
    """network_args of every kind of adapter, on every family."""

    target: str | None = None
    """What gets adapters, in place of the family's default, separated by commas: sets of layers (`attention,mlp`; see
    docs/adapters.md for each family's), `all`, a component (`denoiser`, `clip_l`, `text_encoders`: its default layers),
    or a component's set (`clip_l.attention`). What is not named is not trained."""
    include_patterns: _Patterns = None
    """Layers that get adapters besides, whatever exclude_patterns says: a list of regular expressions, each for the
    whole of a module path, `['.*attn.*', 'final_layer.*']`."""
    exclude_patterns: _Patterns = None
    """Layers that get none, in the same way."""
    network_reg_dims: _Ranks = None
    """Ranks by layer, `PATTERN=RANK,...`: the first regular expression that is the whole of a module path, or is found
    in a layer's name in kohya's files, holds; 0 leaves the layer out."""
    network_reg_alphas: _Amounts = None
    """Alphas by layer, in the same way."""
    network_reg_lrs: _Amounts = None
    """Learning rates by layer, in the same way, in place of the common ones; 0 leaves the layer out."""
    conv_dim: Natural | None = None
    """Rank on convolutions larger than 1x1, which get adapters then; 0: none. Default: none; with target or LyCORIS'
    presets, network_dim."""
    conv_alpha: Amount | None = None
    """The same as network_alpha for these; default 1, with LyCORIS network_alpha."""
    loraplus_lr_ratio: Positive | None = None
    """LoRA+ (arXiv:2402.12354): factor on the rate of the factors that start at 0."""
    loraplus_unet_lr_ratio: Positive | None = None
    """The same for the denoiser."""
    loraplus_text_encoder_lr_ratio: Positive | None = None
    """The same for text encoders."""
    enable_all_linear: bool = False
    """With kohya's `networks.oft`, which is on attention alone: on all layers that others are on by default."""
    enable_conv: bool = False
    """With it: on convolutions besides."""
    algo: str | None = None
    """With `lycoris.kohya`: the kind of adapter; default lora."""
    preset: str | None = None
    """With `lycoris.kohya`: what gets adapters, one of LyCORIS' presets, or a TOML file as it reads."""


SHAPING = (
    *("target", "include_patterns", "exclude_patterns", "network_reg_dims", "network_reg_alphas"),
    *("conv_dim", "conv_alpha", "enable_all_linear", "enable_conv", "preset"),
)
"""Arguments that do nothing where a file says which layers have adapters, and of which rank."""
_SPELLINGS = {
    "use_cp": "use_tucker",
    "use_conv_cp": "use_tucker",
    "constrain": "constraint",
    "weight_decompose": "dora_wd",
    "block_size": "unit",
    "wd_on_out": "wd_on_output",
    "wd_on_output": "wd_on_out",
}
"""Other names of options, where a kind has them by the second name alone."""
_NO_EFFECT = {
    "rank_dropout_scale": "what a rank_dropout leaves is always scaled up",
    "verbose": "it only changes what is printed",
    "bypass_mode": "a change is computed beside its layer or in its weight, whichever is cheaper, with the same result",
}
"""Arguments that change no result, and why."""
_ELSEWHERE = {
    "train_norm": "layers of normalisation have no adapters here",
    "use_scalar": "there is no trained factor on a layer's whole change",
    "disable_conv_cp": "write use_tucker",
    "train_on_input": "there is no such choice",
    "train_llm_adapter": "this family has no such part",
    "train_t5xxl": "this family has no T5",
    "split_qkv": "this family has no fused layers",
}
"""Arguments of other programs that no kind or not every family has."""


def parse(network: NetworkConfig, family: type | None = None) -> AdapterPlan:
    """Flags and network_args -> a plan. `family`: the dataclass of the family's own network_args.

    Errors: one `UserError` with all that is wrong.
    """
    errors, notices = list[str](), list[str]()
    texts = dict(_pairs(network.network_args, errors))
    chosen = _kind(network, texts)
    records = (CommonArgs, chosen.Options, *((family,) if family else ()))
    known = {name: hint for record in records for name, hint in values.types(record).items()}
    args = dict(_values(texts, known, chosen, errors, notices))
    if network.network_dropout is not None:
        if "dropout" in args:
            errors.append("the dropout is set twice: by network_dropout and by dropout in network_args; leave one out")
        args["dropout"] = network.network_dropout
    errors += _sense(chosen, args, network)
    if network.dim_from_weights and network.network_weights:
        errors += _fixed_by_file(args, chosen, family)
    notices += _without_rank(network, chosen)
    if errors:
        raise UserError(*errors)
    own = {} if family is None else {name: args.pop(name) for name in values.types(family) if name in args}
    common = {name: args.pop(name) for name in values.types(CommonArgs) if name in args}
    made = None if family is None else family(**own)
    return _plan(network, chosen, CommonArgs(**common), made, args, tuple(notices))


def _kind(network: NetworkConfig, texts: Mapping[str, str]) -> type[Adapter]:
    """The kind that is asked for; where none is, that of the file that the run starts from. Errors: `UserError`."""
    if network.network_module is None and network.network_weights:
        from sfumato.adapters.files import kind_of
        from sfumato.formats.files import load

        with suppress(UserError):  # which is reported where the file is read
            return kind_of(load(network.network_weights)) or kind("lora")
    return kind(network.network_module or "lora", texts.get("algo", "lora"))


def _plan(
    network: NetworkConfig,
    chosen: type[Adapter],
    args: CommonArgs,
    family: object,
    more: Mapping[str, Any],
    notices: tuple[str, ...],
) -> AdapterPlan:
    """The plan that these arguments ask for. Errors: `UserError` for a preset that cannot be read."""
    rank = 4 if network.network_dim is None else network.network_dim
    alpha = 1.0 if network.network_alpha is None else network.network_alpha
    plan = AdapterPlan(
        kind=chosen,
        rank=rank,
        alpha=alpha,
        conv_rank=args.conv_dim or None,
        conv_alpha=1.0 if args.conv_alpha is None else args.conv_alpha,
        plus=args.loraplus_lr_ratio,
        loraplus_denoiser=args.loraplus_unet_lr_ratio,
        loraplus_encoders=args.loraplus_text_encoder_lr_ratio,
        family=family,
        more={**(chosen.kohya_options(alpha) if _is_kohyas(network) else {}), **more},
        targets=(targets := _targets(network, chosen, args)),
        targets_from="target" if args.target or not targets else "preset",
        large=args.conv_dim != 0,
        include=values.patterns(args.include_patterns or "[]") or (),
        exclude=values.patterns(args.exclude_patterns or "[]") or (),
        rules=tuple(_rules(args)),
        notices=notices,
    )
    return presets.apply(plan, args.preset, args.conv_alpha) if network.network_module == LYCORIS else plan


def _targets(network: NetworkConfig, chosen: type[Adapter], args: CommonArgs) -> tuple[str, ...]:
    if args.target:
        return tuple(name.strip() for name in args.target.split(",") if name.strip())
    if not chosen.kohya_targets or not _is_kohyas(network):
        return ()
    first = (DEFAULT,) if args.enable_all_linear else chosen.kohya_targets
    convolutions = args.enable_conv or bool(args.conv_dim)
    return (*first, CONVOLUTIONS) if convolutions else first


def _is_kohyas(network: NetworkConfig) -> bool:
    return (network.network_module or "").startswith("networks.")


def _without_rank(network: NetworkConfig, chosen: type[Adapter]) -> Iterator[str]:
    """Notices of a rank and an alpha that mean nothing for the kind."""
    if network.network_dim is not None and not chosen.has_rank:
        yield f"network_dim: accepted, no effect: {chosen.__name__} has no rank"
    alpha = chosen.has_alpha or (_is_kohyas(network) and chosen.kohya_options(1.0))
    if network.network_alpha is not None and not alpha:
        yield f"network_alpha: accepted, no effect: {chosen.__name__} has no alpha"


def _rules(args: CommonArgs) -> Iterator[LayerRule]:
    for pattern, rank in values.by_pattern(args.network_reg_dims or "") or ():
        yield LayerRule(pattern=pattern, rank=int(rank))
    for pattern, alpha in values.by_pattern(args.network_reg_alphas or "") or ():
        yield LayerRule(pattern=pattern, alpha=alpha)
    for pattern, rate in values.by_pattern(args.network_reg_lrs or "") or ():
        yield LayerRule(pattern=pattern, rate=rate)


# --- texts and values ---


def _pairs(texts: tuple[str, ...], errors: list[str]) -> Iterator[tuple[str, str]]:
    """("key=value", ...) -> keys and values."""
    for text in texts:
        name, equals, value = text.partition("=")
        if not name.startswith("network_reg_") and (together := several(text)):
            errors.append(f"network_args {text!r}: {together}")
        elif not equals:
            errors.append(f"network_args {text!r}: expected key=value")
        else:
            yield name.strip(), value


def _values(
    texts: Mapping[str, str], known: Mapping[str, str], chosen: type[Adapter], errors: list[str], notices: list[str]
) -> Iterator[tuple[str, Any]]:
    """The values of the arguments that the kind and the family have; what else there is goes to errors and notices."""
    for name, text in texts.items():
        if name not in known and _SPELLINGS.get(name) in known:
            name = _SPELLINGS[name]
        if name in known:
            yield name, values.typed(name, text, known[name], errors)
        elif name in _NO_EFFECT:
            if not values.off(text):
                notices.append(f"network_args {name}={text}: accepted, no effect: {_NO_EFFECT[name]}")
        elif why := _elsewhere(name):
            if not values.off(text):
                errors.append(f"network_args {name}: has no meaning for {chosen.__name__}, {why}; leave it out")
        else:
            errors.append(f"network_args {name!r} is not known{nearest(name, known)}")


def _elsewhere(name: str) -> str:
    """Where an argument is at home that this kind does not have; empty: nowhere."""
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    having = [each for each in kinds() if name in values.types(kind(each).Options)]
    return f"as it is for {', '.join(having)}" if having else ""


# --- sense ---


def _sense(chosen: type[Adapter], args: Mapping[str, Any], network: NetworkConfig) -> list[str]:
    """What is wrong with values that have the right types."""
    from sfumato.adapters.base import Adapter

    hints = {**rules.hints(CommonArgs), **rules.hints(chosen.Options)}
    given = {name: value for name, value in args.items() if value is not None and name in hints}
    errors = [
        f"network_args {name}={value}: {message}"
        for name, value in given.items()
        if (message := rules.mistake(hints[name], value))
    ]
    lycoris, wide = network.network_module == LYCORIS, network.network_module == LYCORIS or args.get("target")
    if "conv_alpha" in args and not (args.get("conv_dim") or args.get("conv_block_dims") or wide):
        errors.append("network_args conv_alpha does nothing without conv_dim: set conv_dim, or leave conv_alpha out")
    if args.get("use_tucker") and not (args.get("conv_dim") or args.get("conv_block_dims") or wide):
        errors.append("network_args use_tucker does nothing without conv_dim: set conv_dim, or leave use_tucker out")
    if args.get("full_matrix") and args.get("decompose_both"):
        errors.append("network_args full_matrix, decompose_both: one wants whole factors, the other products of two")
    if "wd_on_out" in args and not args.get("dora_wd", getattr(chosen.Options(), "dora_wd", False)):
        errors.append("network_args wd_on_out does nothing without dora_wd: set dora_wd, or leave wd_on_out out")
    errors += [
        f"{name} has no meaning for {chosen.__name__}: leave it out"
        for name in DROPOUTS
        if args.get(name) and name not in chosen.supports
    ]
    plus = [name for name in args if name.startswith("loraplus")]
    if plus and chosen.loraplus_parameters is Adapter.loraplus_parameters:
        errors.append(f"{plus[0]} has no meaning for {chosen.__name__}: leave it out")
    if not lycoris:
        cure = {"algo": "name the kind in network_module", "preset": "use target"}
        errors += [f"network_args {name}: is for {LYCORIS}; {how}" for name, how in cure.items() if args.get(name)]
    elif args.get("preset") and args.get("target"):
        errors.append("network_args preset, target: both say what gets adapters; leave one of them out")
    for name in ("enable_all_linear", "enable_conv"):
        if args.get(name) and not (chosen.kohya_targets and _is_kohyas(network)):
            errors.append(f"network_args {name}: is for networks.oft, which is on attention alone; use target")
        elif args.get(name) and args.get("target"):
            errors.append(f"network_args {name}: target says what gets adapters; leave it out")
    return errors


def _fixed_by_file(args: Mapping[str, Any], chosen: type[Adapter], family: type | None) -> list[str]:
    theirs = {} if family is None else values.types(family)
    shaping = {name for name, kind_of in theirs.items() if kind_of != "bool" or name == "split_qkv"}
    shaping -= set(getattr(family, "RATES", ()))
    return [
        f"network_args {name}: does nothing, as dim_from_weights takes layers and ranks from network_weights"
        for name in args
        if name in SHAPING or name in shaping | chosen.shaping
    ]
