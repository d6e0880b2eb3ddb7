"""`sfumato convert` and merging whole checkpoints: command lines of the tools that write models anew."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sfumato.cli import options
from sfumato.cli.flags import Parser
from sfumato.config import rules
from sfumato.errors import UserError

COMPUTED = ("float", "fp32", "fp16", "bf16")
PRECISIONS = ("fp32", "float", "fp16", "bf16", "fp8", "fp8_scaled")


def convert(words: Sequence[str]) -> int:
    """`sfumato convert IN OUT`, of checkpoints and of adapters."""
    parser = Parser(
        prog="sfumato convert",
        description="A checkpoint as a single file or as a diffusers folder, or an adapter in another program's names.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="IN", type=Path, help="single file, diffusers folder or adapter file")
    parser.add_argument("out", metavar="OUT", type=Path, help="what to write; without an ending: a diffusers folder")
    parser.add_argument(
        "--to", help="single or diffusers, where OUT does not tell; of adapters kohya, comfy, diffusers or lycoris"
    )
    parser.add_argument("--dtype", choices=PRECISIONS, help="number format; default: as in the files")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    whole = parser.add_argument_group("checkpoints")
    for name in part_flags():
        whole.add_argument(f"--{name}", metavar="FILE", help=f"put this file's {name} in place of the model's own")
    whole.add_argument("--tokenizer", metavar="DIR", help="folder with the model's tokenizers")
    whole.add_argument("--bundle", action="store_true", help="a single file also holds text encoders and VAE")
    adapters = parser.add_argument_group("adapters")
    adapters.add_argument("--family", help="of the model, where the file does not show it")
    adapters.add_argument("--model", metavar="FILE", help="a model of other sizes than the usual ones of its family")
    adapters.add_argument(
        "--rank", type=int, help="a layer without an exact form becomes the nearest LoRA of this rank"
    )
    args = parser.parse_args(list(words))
    from sfumato.tools import convert as tool

    if tool.is_adapter(args.source.expanduser()):
        return _convert_adapter(args)
    refuse(args, ("family", "model", "rank"), "is for adapters, and IN is a whole checkpoint")
    parts = {name: value for name in part_flags() if (value := getattr(args, name))}
    return run_convert(
        args.source, args.out, as_json=args.json, to=args.to, dtype=args.dtype, parts=parts, tokenizer=args.tokenizer,
        bundle=args.bundle,
    )  # fmt: skip


def part_flags() -> list[str]:
    """The settings that name a component's file, of any family."""
    return ["vae", *(n for n in options.owners() if rules.path_to(options.known()[n].hint) == "weights")]


def run_convert(source: Path, out: Path, *, as_json: bool = False, **how: Any) -> int:
    """Convert a checkpoint, with progress, and say what came out."""
    from sfumato.tools import convert as tool

    with megabytes("converting") as advance:
        facts = tool.convert(source.expanduser(), out.expanduser(), progress=advance, **how)
    say(facts, f"{out}: {facts['family']}, {', '.join(facts['parts'])}; {facts['tensors']:,} tensors", as_json)
    return 0


def run_merge_models(
    models: Sequence[Path], out: Path, ratios: Sequence[float] | None, *, as_json: bool = False, each: bool = False,
    **how: Any,
) -> int:  # fmt: skip
    """Merge checkpoints, with progress, and say what came out; `each`: every tensor that a model lacks."""
    from sfumato.tools import merge_models as tool
    from sfumato.train.progress import console

    paths = [path.expanduser() for path in models]
    with megabytes("merging") as advance:
        facts = tool.merge_checkpoints(paths, out.expanduser(), ratios, progress=advance, **how)
    lacking = facts["lacking"]
    text = f"{out}: " + " + ".join(f"{ratio:g} x {path}" for path, ratio in facts["models"].items())
    say(facts, text, as_json)
    if lacking and not as_json:
        console.print(f"{len(lacking):,} tensors are not in all of them, and were summed over those that have them")
        for name, paths_without in lacking.items() if each else ():
            console.print(f"  {name}: not in {', '.join(paths_without)}")
    if (total := sum(facts["models"].values())) and abs(total - 1) > 1e-6 and not as_json:
        console.print(f"the ratios add up to {total:g}; weights keep their size where they add up to 1")
    return 0


def _convert_adapter(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from sfumato.formats.dialect import NAMES
    from sfumato.tools import convert_adapter
    from sfumato.train.progress import progress

    refuse(args, (*part_flags(), "tokenizer", "bundle"), "is for whole checkpoints, and IN is an adapter")
    if args.to is None:
        raise UserError(f"--to: say in whose names; there are {', '.join(NAMES)}")
    with progress("converting") as advance:
        made = convert_adapter.convert(
            args.source, args.out, args.to, family=args.family, model=args.model, dtype=args.dtype, rank=args.rank,
            progress=advance,
        )  # fmt: skip
    say({"out": str(args.out), **asdict(made)}, made.text(args.out), args.json)
    return 0


def refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Errors: `UserError` for each of these flags that is given."""
    if given := [name for name in names if getattr(args, name)]:
        raise UserError(*(f"--{name}: {why}; leave it out" for name in given))


def dtype_of(name: str | None) -> Any:
    """The number format of one of `PRECISIONS`; None: as it is."""
    from sfumato.tools.checkpoints import PRECISIONS

    return None if name is None else PRECISIONS[name]


def say(facts: Mapping[str, Any], text: str, as_json: bool) -> None:
    """What was done, for a reader or for a program."""
    from sfumato.train.progress import console

    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        console.print(text)


@contextmanager
def megabytes(title: str) -> Iterator[Callable[[int, int], None]]:
    """Progress of a job that counts bytes."""
    from sfumato.train.progress import progress

    with progress(title) as advance:
        yield lambda done, total: advance(done >> 20, max(total >> 20, 1))
