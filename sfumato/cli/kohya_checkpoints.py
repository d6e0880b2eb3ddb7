"""kohya's tools for whole checkpoints under their old names and flags."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from sfumato.cli import checkpoint_tools, flags, kohya_tools, main
from sfumato.cli.kohya_tools import Tool
from sfumato.errors import UserError

_FOUND = "it is found from the file's header"
_STREAMED = "tensors are read and written one by one anyway"
_NO_COUNTS = "a safetensors file holds tensors and metadata alone; give it in --metadata"


def run(script: str, argv: Sequence[str]) -> int:
    """Run a command line of kohya's script of this name (without `.py`); the exit code."""
    return main.guarded(lambda: kohya_tools.run_tool(TOOLS[script], script, argv))


def _show_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True)


def _show(args: Namespace) -> int:
    """As the original: the metadata as JSON, those values that are JSON unpacked."""
    from sfumato.formats import files

    print(json.dumps({k: _unpacked(v) for k, v in files.read_header(args.model).metadata.items()}, indent=4))
    return 0


def _unpacked(text: str) -> object:
    if not text.startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _merge_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ratios", nargs="*", type=float)
    parser.add_argument("--unet_only", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=checkpoint_tools.COMPUTED, default="float")
    parser.add_argument("--saving_precision", choices=checkpoint_tools.PRECISIONS, default="float")
    parser.add_argument("--show_skipped", action="store_true")


def _merge(args: Namespace) -> int:
    return checkpoint_tools.run_merge_models(
        args.models, args.output, args.ratios or None, precision=args.precision, save_precision=args.saving_precision,
        only=("denoiser",) if args.unet_only else None, device=args.device, each=args.show_skipped,
    )  # fmt: skip


def _merge_sd3_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--dit", type=Path, required=True)
    for name in ("vae", "clip_l", "clip_g", "t5xxl"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--save_precision", choices=checkpoint_tools.PRECISIONS)


def _merge_sd3(args: Namespace) -> int:
    parts = {n: v for n in ("vae", "clip_l", "clip_g", "t5xxl") if (v := getattr(args, n))}
    return checkpoint_tools.run_convert(args.dit, args.output, to="single", dtype=args.save_precision, parts=parts)


def _convert_sd_flags(parser: ArgumentParser) -> None:
    parser.add_argument("model_to_load", type=Path)
    parser.add_argument("model_to_save", type=Path)
    for name in _OF_SD:
        parser.add_argument(f"--{name}", action="store_true")
    for name in ("fp16", "bf16", "float"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--save_precision_as", choices=("no", "fp16", "bf16", "float"), default="no")
    parser.add_argument("--metadata")


_OF_SD = {
    "v1": _FOUND,
    "v2": _FOUND,
    "unet_use_linear_projection": "a folder's config says how its tensors are shaped",
    "use_safetensors": "folders are always written so",
}


def _convert_sd(args: Namespace) -> int:
    for name, why in _OF_SD.items():
        if getattr(args, name):
            flags.note(f"--{name}: accepted, no effect: {why}")
    asked = [name for name in ("fp16", "bf16", "float") if getattr(args, name)]
    if args.save_precision_as != "no":
        asked = [args.save_precision_as]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} contradict; give one")
    return checkpoint_tools.run_convert(
        args.model_to_load, args.model_to_save, dtype=asked[0] if asked else None, metadata=_metadata(args.metadata)
    )


def _metadata(text: str | None) -> dict[str, str]:
    try:
        found = json.loads(text) if text else {}
    except ValueError as error:
        raise UserError(f"--metadata: not JSON ({error}); expected a table of texts") from None
    if not isinstance(found, dict):
        raise UserError("--metadata: expected a table of texts, {...}")
    return {str(key): str(value) for key, value in found.items()}


def _convert_flux_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--diffusers_path", type=Path, required=True)
    parser.add_argument("--save_to", type=Path, required=True)
    parser.add_argument("--mem_eff_load_save", action="store_true")
    parser.add_argument("--save_precision", choices=checkpoint_tools.PRECISIONS)


def _convert_flux(args: Namespace) -> int:
    if args.mem_eff_load_save:
        flags.note(f"--mem_eff_load_save: accepted, no effect: {_STREAMED}")
    return checkpoint_tools.run_convert(args.diffusers_path, args.save_to, to="single", dtype=args.save_precision)


TOOLS: Mapping[str, Tool] = {
    "show_metadata": Tool(flags=_show_flags, run=_show, idle={}),
    "merge_models": Tool(flags=_merge_flags, run=_merge, idle={}),
    "merge_sd3_safetensors": Tool(flags=_merge_sd3_flags, run=_merge_sd3, idle={"device": _STREAMED}),
    "convert_diffusers20_original_sd": Tool(
        flags=_convert_sd_flags,
        run=_convert_sd,
        idle={
            "epoch": _NO_COUNTS,
            "global_step": _NO_COUNTS,
            "variant": "weights of either name are found",
            "reference_model": "the tokenizer and the noise schedule are made from the model itself",
        },
    ),
    "convert_diffusers_to_flux": Tool(flags=_convert_flux_flags, run=_convert_flux, idle={}),
}
"""kohya's script, without `.py` -> what it is."""
