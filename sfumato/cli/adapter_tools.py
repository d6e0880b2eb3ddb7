"""`sfumato verify`, and kohya's scripts that convert adapters and look into them: words in, calls of `sfumato/tools/`
out."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from sfumato.cli.flags import Parser
from sfumato.errors import UserError

SHOWN = 10
KOHYA_FORMATS = {"ai-toolkit": "diffusers", "sd-scripts": "kohya"}
"""What convert_flux_lora.py calls the names -> what they are called here."""


def verify(words: Sequence[str]) -> int:
    """`sfumato verify A B`; 0 if they have the same effect, 1 if not."""
    parser = Parser(
        prog="sfumato verify",
        description="Whether two adapters, or two checkpoints, have the same effect, whatever names they are in. "
        "Exit code 0 if they have, 1 if not.",
        allow_abbrev=False,
    )
    parser.add_argument("one", metavar="A", type=Path, help="adapter file, or a checkpoint")
    parser.add_argument("other", metavar="B", type=Path, help="what it is compared with")
    parser.add_argument("--family", help="of the adapters' model, where the files do not show it")
    parser.add_argument(
        "--model",
        metavar="FILE",
        help="the adapters' model: for other sizes than usual, and for kinds that act on its weights",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    args = parser.parse_args(list(words))
    from sfumato.tools import verify as tool
    from sfumato.train.progress import answers, progress

    with progress("comparing") as advance:
        found = tool.verify(args.one, args.other, family=args.family, model=args.model, progress=advance)
    if args.json:
        print(json.dumps(found.facts(), indent=2, ensure_ascii=False))
        return 0 if found.same else 1
    answers.print(f"{found.verdict}: {found.compared:,} compared, {len(found.differences):,} differ")
    for d in found.differences[:SHOWN]:
        answers.print(
            f"  {d.layer}: {d.why or f'differs by {d.relative:.2g} of its norm, a number by {d.largest:.2g} at most'}"
        )
    if len(found.differences) > SHOWN:
        answers.print(f"  and {len(found.differences) - SHOWN:,} more (all with --json)")
    return 0 if found.same else 1


# --- kohya's ---


def convert_flux_flags(parser: ArgumentParser) -> None:
    """Of convert_flux_lora.py."""
    parser.add_argument("--dst", choices=list(KOHYA_FORMATS), required=True)
    parser.add_argument("--src_path", type=Path, required=True)
    parser.add_argument("--dst_path", type=Path, required=True)


def convert_flux(args: Namespace) -> int:
    """convert_flux_lora.py"""
    return _convert(args.src_path, args.dst_path, KOHYA_FORMATS[args.dst])


def to_comfy_flags(parser: ArgumentParser) -> None:
    """Of convert_anima_lora_to_comfy.py and convert_hunyuan_image_lora_to_comfy.py."""
    parser.add_argument("src_path", type=Path)
    parser.add_argument("dst_path", type=Path)
    parser.add_argument("--reverse", action="store_true")


def to_comfy(args: Namespace) -> int:
    """convert_anima_lora_to_comfy.py and convert_hunyuan_image_lora_to_comfy.py, of every family."""
    return _convert(args.src_path, args.dst_path, "kohya" if args.reverse else "comfy")


def _convert(source: Path, target: Path, to: str) -> int:
    from sfumato.tools.convert_adapter import convert
    from sfumato.train.progress import answers

    answers.print(convert(source, target, to).text(target))
    return 0


def weights_flags(parser: ArgumentParser) -> None:
    """Of check_lora_weights.py."""
    parser.add_argument("file", type=Path)
    parser.add_argument("-s", "--show_all_keys", action="store_true")


def weights(args: Namespace) -> int:
    """check_lora_weights.py: the mean and the least of the absolute values of each tensor."""
    from sfumato.formats import files
    from sfumato.train.progress import answers

    tensors = files.load(args.file)
    shown = {
        name: t
        for name, t in tensors.items()
        if t.is_floating_point() and t.numel() and (args.show_all_keys or not name.endswith((".alpha", ".dora_scale")))
    }
    if not shown:
        raise UserError(f"{args.file}: holds no weights")
    answers.print(f"number of tensors: {len(tensors):,}, shown: {len(shown):,}")
    for name, t in shown.items():
        values = t.float().abs()
        answers.print(f"{name},{str(tuple(t.shape)).replace(', ', '-')},{values.mean():.6g},{values.min():.6g}")
    return 0
