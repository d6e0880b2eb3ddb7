"""`sfumato extract` and `sfumato resize`: command lines of the tools that decompose weights."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.cli.checkpoint_tools import COMPUTED, dtype_of
from sfumato.cli.flags import Parser

if TYPE_CHECKING:
    from sfumato.tools.extract import Extraction
    from sfumato.tools.resize import Resizing

METHODS = ("sv_ratio", "sv_fro", "sv_cumulative")


def extract(words: Sequence[str]) -> int:
    """`sfumato extract ORIGINAL TUNED OUT --rank 32`"""
    parser = _parser("extract", "A LoRA file of what a fine-tuned model differs in from the one it was made of.")
    parser.add_argument("original", type=Path, help="the model before: a file or a diffusers folder")
    parser.add_argument("tuned", type=Path, help="the model after, of the same family")
    parser.add_argument("out", type=Path, help="the LoRA file to write")
    parser.add_argument("--rank", type=int, required=True, help="rank on linear layers and 1x1 convolutions")
    parser.add_argument("--conv_rank", type=int, help="rank on larger convolutions; without it they are left out")
    parser.add_argument(
        "--min_diff", type=float, default=0.0, help="text encoder layers that changed less are left out"
    )
    parser.add_argument("--dtype", choices=COMPUTED, default="fp16", help="number format of the file; default fp16")
    parser.add_argument("--to", metavar="DIALECT", default="kohya", help="names of the file; default kohya")
    parser.add_argument("--seed", type=int, default=0, help="of the randomised decomposition")
    parser.add_argument("--device", default="cpu", help="where the matrices are decomposed: cpu, cuda ...")
    _json(parser)
    args = parser.parse_args(list(words))
    from sfumato.tools.extract import Extraction

    how = Extraction(
        rank=args.rank, conv_rank=args.conv_rank, min_diff=args.min_diff, dialect=args.to, seed=args.seed,
        dtype=dtype_of(args.dtype),
    )  # fmt: skip
    return run_extract(args.original, args.tuned, args.out, how, device=args.device, as_json=args.json)


def run_extract(original: Path, tuned: Path, out: Path, how: Extraction, *, device: str, as_json: bool = False) -> int:
    """Extract, with progress, and say what came out."""
    from sfumato.tools import extract as tool
    from sfumato.train.progress import console, progress

    with progress("comparing") as advance:
        facts = tool.extract(original, tuned, out, how, device=device, progress=advance)
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    errors = [layer["error"] for layer in facts["layers"]]
    console.print(
        f"{out}: {len(errors):,} layers; what the ranks leave out is {sum(errors) / len(errors):.1%} of a layer's "
        f"difference on average, {max(errors):.1%} at most (Frobenius norm)"
    )
    if facts["unheld"]:
        console.print(
            f"{len(facts['unheld']):,} more tensors differ that this LoRA does not hold (norms, biases, layers without "
            f"an adapter): {', '.join(facts['unheld'][:3])}{' ...' if len(facts['unheld']) > 3 else ''}"
        )
    return 0


def resize(words: Sequence[str]) -> int:
    """`sfumato resize IN OUT --rank 8`"""
    parser = _parser("resize", "A LoRA file with smaller ranks: the nearest that they allow.")
    parser.add_argument("source", metavar="IN", type=Path, help="LoRA file, in any names")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write")
    parser.add_argument("--rank", type=int, required=True, help="the largest rank")
    parser.add_argument(
        "--conv_rank", type=int, help="the largest rank of convolutions larger than 1x1; default --rank"
    )
    parser.add_argument("--dynamic_method", choices=METHODS, help="a rank for each layer, by its singular values")
    parser.add_argument(
        "--dynamic_param", type=float, help="sv_ratio: a ratio; sv_fro, sv_cumulative: the share to keep"
    )
    parser.add_argument("--dtype", choices=COMPUTED, help="number format of the file; default: as it was")
    parser.add_argument("--device", default="cpu", help="where the matrices are decomposed: cpu, cuda ...")
    _json(parser)
    args = parser.parse_args(list(words))
    from sfumato.tools.resize import Resizing

    how = Resizing(rank=args.rank, conv_rank=args.conv_rank, method=args.dynamic_method, parameter=args.dynamic_param)
    return run_resize(args.source, args.out, how, dtype=args.dtype, device=args.device, as_json=args.json)


def run_resize(
    source: Path, out: Path, how: Resizing, *, dtype: str | None, device: str, as_json: bool = False, each: bool = False
) -> int:
    """Resize, with progress, and say what came out; `each`: of every layer."""
    from sfumato.tools import resize as tool
    from sfumato.train.progress import console, print_table, progress

    with progress("resizing") as advance:
        facts = tool.resize(source, out, how, dtype=dtype_of(dtype), device=device, progress=advance)
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    layers = facts["layers"]
    if each:
        rows = [(layer["name"], layer["rank"], layer["new_rank"], f"{layer['kept']:.1%}") for layer in layers]
        print_table(("layer", "rank", "new rank", "kept"), rows)
    kept, ranks = [layer["kept"] for layer in layers], [layer["new_rank"] for layer in layers]
    console.print(
        f"{out}: {len(layers):,} layers of rank {min(ranks)} to {max(ranks)}; {sum(kept) / len(kept):.1%} of a layer's "
        f"change is kept on average, {min(kept):.1%} at least (Frobenius norm)"
    )
    return 0


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return Parser(prog=f"sfumato {command}", description=description, allow_abbrev=False)


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable: every layer")
