"""kohya's tools under their old names and flags: what each of them is here."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.cli import adapter_tools, flags, main, svd_tools, tools
from sfumato.cli.checkpoint_tools import COMPUTED, PRECISIONS, dtype_of
from sfumato.cli.flags import Parser
from sfumato.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One of kohya's scripts."""

    flags: Callable[[ArgumentParser], object]
    """Adds its flags."""
    run: Callable[[Namespace], int]
    idle: Mapping[str, str]
    """Flags that have no effect, and why; said when they are given."""


def run(script: str, argv: Sequence[str]) -> int:
    """Run a command line of kohya's script of this name (without `.py`); the exit code."""
    return main.guarded(lambda: run_tool(TOOLS[script], script, argv))


def run_tool(tool: Tool, script: str, argv: Sequence[str]) -> int:
    """Run a command line of a tool; the exit code. Errors: `UserError`."""
    parser = Parser(prog=f"{script}.py", allow_abbrev=False)
    tool.flags(parser)
    for name in tool.idle:
        parser.add_argument(f"--{name}", nargs="?", const="True", help="accepted, no effect")
    args = parser.parse_args(list(argv))
    for name, why in tool.idle.items():
        if getattr(args, name) is not None:
            flags.note(f"--{name}: accepted, no effect: {why}")
    return tool.run(args)


_FOUND = "what the files hold is found from their headers"
_LOADED = "tensors are read one by one, in their own number format, where they are used"


def _resize_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--save_to", type=Path, required=True)
    parser.add_argument("--new_rank", type=int, default=4)
    parser.add_argument("--new_conv_rank", type=int)
    parser.add_argument("--dynamic_method", choices=svd_tools.METHODS)
    parser.add_argument("--dynamic_param", type=float)
    parser.add_argument("--save_precision", choices=COMPUTED)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--verbose", action="store_true")


def _resize(args: Namespace) -> int:
    from sfumato.tools.resize import Resizing

    how = Resizing(
        rank=args.new_rank, conv_rank=args.new_conv_rank, method=args.dynamic_method, parameter=args.dynamic_param
    )
    return svd_tools.run_resize(
        args.model, args.save_to, how, dtype=args.save_precision, device=args.device, each=args.verbose
    )


def _dylora_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--save_to", type=Path, required=True)
    parser.add_argument("--unit", type=int, required=True)


def _dylora(args: Namespace) -> int:
    from sfumato.tools.dylora import first_ranks

    for path in first_ranks(args.model, args.save_to, args.unit):
        print(path)
    return 0


def _extract_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--model_org", type=Path, required=True)
    parser.add_argument("--model_tuned", type=Path, required=True)
    parser.add_argument("--save_to", type=Path, required=True)
    parser.add_argument("--dim", type=int, default=4)
    parser.add_argument("--conv_dim", type=int)
    parser.add_argument("--save_precision", choices=COMPUTED, default="float")
    parser.add_argument("--clamp_quantile", type=float, default=0.99)
    parser.add_argument("--min_diff", type=float, default=0.01)
    parser.add_argument("--device", default="cpu")


def _extract(args: Namespace) -> int:
    from sfumato.tools.extract import Extraction

    how = Extraction(
        rank=args.dim, conv_rank=args.conv_dim, min_diff=args.min_diff,
        clamp_quantile=args.clamp_quantile if args.clamp_quantile < 1 else None,
        dtype=dtype_of(args.save_precision),
    )  # fmt: skip
    return svd_tools.run_extract(args.model_org, args.model_tuned, args.save_to, how, device=args.device)


def _merge_flags(base: str, *, lbws: bool = False) -> Callable[[ArgumentParser], None]:
    """`base`: the flag of the model that is merged into."""

    def add(parser: ArgumentParser) -> None:
        if base:
            parser.add_argument(f"--{base}", type=Path)
        parser.add_argument("--save_to", type=Path, required=True)
        parser.add_argument("--models", nargs="+", type=Path, required=True)
        parser.add_argument("--ratios", nargs="+", type=float, default=[])
        parser.add_argument("--save_precision", choices=PRECISIONS[:-1])
        parser.add_argument("--no_metadata", action="store_true")
        if lbws:
            parser.add_argument("--lbws", nargs="+", default=[])

    return add


def _flux_merge_flags(parser: ArgumentParser) -> None:
    _merge_flags("flux_model")(parser)
    for name in FLUX_PARTS:
        parser.add_argument(f"--{name}", type=Path)
        parser.add_argument(f"--{name}_save_to", type=Path)


def _svd_merge_flags(parser: ArgumentParser) -> None:
    _merge_flags("", lbws=True)(parser)
    parser.add_argument("--new_rank", type=int, default=4)
    parser.add_argument("--new_conv_rank", type=int)


def _merge(args: Namespace) -> int:
    """Into a model if there is one, else into one adapter."""
    base = getattr(args, "sd_model", None) or getattr(args, "flux_model", None)
    parts = {name: path for name in FLUX_PARTS if (path := getattr(args, name, None))}
    outs = {name: path for name in FLUX_PARTS if (path := getattr(args, f"{name}_save_to", None))}
    if base is None and parts:
        raise UserError("--flux_model: the transformer is needed as well, as the layers' names follow from it")
    if odd := sorted(outs.keys() - parts.keys()):
        raise UserError(*(f"--{name}_save_to: does nothing without --{name}" for name in odd))
    common: dict[str, Any] = {
        "adapters": tools.paired(args.models, args.ratios),
        "out": args.save_to.expanduser(),
        "block_weights": [tools.block_weights(text) for text in getattr(args, "lbws", [])],
        "dtype": dtype_of(args.save_precision),
        "metadata": not args.no_metadata,
    }
    if base is None:
        from sfumato.tools.merge_adapters import Joining

        rank, conv_rank = getattr(args, "new_rank", None), getattr(args, "new_conv_rank", None)
        return tools.run_join(Joining(**common, rank=rank, conv_rank=conv_rank))
    from sfumato.tools.merge import Merging

    options = {name: str(path.expanduser()) for name, path in parts.items()}
    only = ("denoiser", *parts) if hasattr(args, "flux_model") else ()
    return tools.run_merge(Merging(**common, model=base.expanduser(), options=options, outs=outs, only=only))


_ADDED = "the ranks of the files always stand side by side: sums of the factors are not sums of the changes"
_MERGE_IDLE = {"concat": _ADDED, "shuffle": _ADDED, "precision": "all is computed in fp32", "v2": _FOUND}
FLUX_PARTS = ("clip_l", "t5xxl")
"""Text encoders that kohya's script takes in files of their own."""
_METADATA = "a file always says what it is and how it was made"
_EXTRACT = Tool(
    flags=_extract_flags,
    run=_extract,
    idle={
        **dict.fromkeys(("v2", "v_parameterization", "sdxl"), _FOUND),
        **dict.fromkeys(("load_precision", "load_original_model_to", "load_tuned_model_to"), _LOADED),
        "mem_eff_safe_open": _LOADED,
        "no_metadata": _METADATA,
    },
)
_TO_COMFY = Tool(flags=adapter_tools.to_comfy_flags, run=adapter_tools.to_comfy, idle={})
TOOLS: Mapping[str, Tool] = {
    "check_lora_weights": Tool(flags=adapter_tools.weights_flags, run=adapter_tools.weights, idle={}),
    "convert_anima_lora_to_comfy": _TO_COMFY,
    "convert_flux_lora": Tool(
        flags=adapter_tools.convert_flux_flags, run=adapter_tools.convert_flux, idle={"src": _FOUND}
    ),
    "convert_hunyuan_image_lora_to_comfy": _TO_COMFY,
    "merge_lora": Tool(flags=_merge_flags("sd_model"), run=_merge, idle=_MERGE_IDLE),
    "sdxl_merge_lora": Tool(flags=_merge_flags("sd_model", lbws=True), run=_merge, idle=_MERGE_IDLE),
    "flux_merge_lora": Tool(
        flags=_flux_merge_flags,
        run=_merge,
        idle=_MERGE_IDLE
        | dict.fromkeys(("mem_eff_load_save", "loading_device", "working_device"), _LOADED)
        | {"diffusers": _FOUND},
    ),
    "svd_merge_lora": Tool(
        flags=_svd_merge_flags, run=_merge, idle=_MERGE_IDLE | {"device": "matrices of the ranks alone are decomposed"}
    ),
    "extract_lora_from_dylora": Tool(flags=_dylora_flags, run=_dylora, idle={}),
    "resize_lora": Tool(flags=_resize_flags, run=_resize, idle={}),
    "extract_lora_from_models": _EXTRACT,
    "flux_extract_lora": _EXTRACT,
}
"""kohya's script, without `.py` -> what it is."""
