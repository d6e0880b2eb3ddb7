"""kohya's tools under their old names and flags: what each of them is here."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfumato.cli import adapter_tools, flags, main, svd_tools
from sfumato.cli.flags import Parser


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
    return main.guarded(lambda: _run(script, argv))


def _run(script: str, argv: Sequence[str]) -> int:
    tool = TOOLS[script]
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
    parser.add_argument("--save_precision", choices=svd_tools.PRECISIONS)
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


def _extract_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--model_org", type=Path, required=True)
    parser.add_argument("--model_tuned", type=Path, required=True)
    parser.add_argument("--save_to", type=Path, required=True)
    parser.add_argument("--dim", type=int, default=4)
    parser.add_argument("--conv_dim", type=int)
    parser.add_argument("--save_precision", choices=svd_tools.PRECISIONS, default="float")
    parser.add_argument("--clamp_quantile", type=float, default=0.99)
    parser.add_argument("--min_diff", type=float, default=0.01)
    parser.add_argument("--device", default="cpu")


def _extract(args: Namespace) -> int:
    from sfumato.tools.extract import Extraction

    how = Extraction(
        rank=args.dim, conv_rank=args.conv_dim, min_diff=args.min_diff,
        clamp_quantile=args.clamp_quantile if args.clamp_quantile < 1 else None,
        dtype=svd_tools.dtype_of(args.save_precision),
    )  # fmt: skip
    return svd_tools.run_extract(args.model_org, args.model_tuned, args.save_to, how, device=args.device)


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
    "resize_lora": Tool(flags=_resize_flags, run=_resize, idle={}),
    "extract_lora_from_models": _EXTRACT,
    "flux_extract_lora": _EXTRACT,
}
"""kohya's script, without `.py` -> what it is."""
