"""`sfumato merge`, and the flags of files with strengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.cli.checkpoint_tools import (
    COMPUTED,
    PRECISIONS,
    dtype_of,
    megabytes,
    part_flags,
    refuse,
    run_merge_models,
    say,
)
from sfumato.cli.flags import Parser
from sfumato.errors import UserError

if TYPE_CHECKING:
    from sfumato.tools.merge import Merging
    from sfumato.tools.merge_adapters import Joining


def merge(words: Sequence[str]) -> int:
    """`sfumato merge --adapters A B --ratios 0.8 0.5 [--model M] --out X`"""
    args = _merge_parser().parse_args(list(words))
    parts = {name: value for name in part_flags() if (value := getattr(args, name, None))}
    of_models, of_one = (*parts, "only"), ("rank", "conv_rank", "to", "family", "layers_of")
    if args.models:
        refuse(args, (*parts, *of_one, "adapters", "model", "lbws", "no_metadata"), "does nothing beside --models")
        return run_merge_models(
            args.models, args.out, args.ratios or None, precision=args.precision or "fp32",
            save_precision=args.dtype, only=args.only or None, device=args.device or "cpu", as_json=args.json,
        )  # fmt: skip
    if not args.adapters:
        raise UserError("sfumato merge: say what is merged: --adapters FILE ..., or --models FILE FILE ...")
    refuse(args, ("precision", "device"), "is for --models")
    if args.dtype == "fp8_scaled":
        raise UserError("--dtype fp8_scaled: is for --models; a model in it stays so when adapters are merged")
    common = {
        "adapters": paired(args.adapters, args.ratios),
        "out": args.out.expanduser(),
        "block_weights": [block_weights(text) for text in args.lbws],
        "dtype": dtype_of(args.dtype),
        "metadata": not args.no_metadata,
    }
    if args.model is None:
        refuse(args, of_models, "is for merging into a model, which --model names")
        from sfumato.tools.merge_adapters import Joining

        one = Joining(
            **common, rank=args.rank, conv_rank=args.conv_rank, dialect=args.to or "kohya", family=args.family,
            model=args.layers_of,
        )  # fmt: skip
        return run_join(one, as_json=args.json)
    refuse(args, of_one, "is for one adapter made of several, without --model")
    from sfumato.tools.merge import Merging

    what = Merging(**common, model=args.model.expanduser(), options=parts, only=args.only)
    return run_merge(what, as_json=args.json)


def _merge_parser() -> Parser:
    parser = Parser(
        prog="sfumato merge",
        description="Adapters merged into a model, or without --model into one adapter file; or --models into one.",
        allow_abbrev=False,
    )
    parser.add_argument("--adapters", nargs="+", type=Path, default=[], metavar="FILE", help="merged in this order")
    parser.add_argument("--models", nargs="+", type=Path, default=[], metavar="FILE", help="checkpoints to be added")
    parser.add_argument("--ratios", nargs="+", type=float, default=[], help="one for each; default 1, of models equal")
    parser.add_argument("--out", type=Path, required=True, help="file to write, or folder where the model is one")
    parser.add_argument(
        "--lbws", nargs="+", default=[], help="layer-wise weights for each adapter, or one for all: [1,0.5,...]"
    )
    parser.add_argument("--dtype", choices=PRECISIONS, help="number format; default: as in the (first) model")
    parser.add_argument("--only", nargs="+", default=[], metavar="COMPONENT", help="change these alone: denoiser ...")
    parser.add_argument("--no_metadata", action="store_true", help="the result does not say what it was made of")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    models = parser.add_argument_group("models into one")
    models.add_argument("--precision", choices=COMPUTED, help="what sums are computed in; default fp32")
    models.add_argument("--device", help="where sums are computed: cpu, cuda ...; default cpu")
    whole = parser.add_argument_group("into a model")
    whole.add_argument("--model", type=Path, metavar="FILE", help="single file or diffusers folder")
    for name in part_flags():
        if name != "vae":
            whole.add_argument(f"--{name}", metavar="FILE", help=f"the model's {name}, in a file of its own")
    one = parser.add_argument_group("into one adapter")
    one.add_argument("--rank", type=int, help="the nearest LoRA of at most this rank; default: exact, ranks add up")
    one.add_argument("--conv_rank", type=int, help="the same for convolutions larger than 1x1; default --rank")
    one.add_argument("--to", metavar="DIALECT", help="names of the file; default kohya")
    one.add_argument("--family", help="of the model, where the files do not show it")
    one.add_argument("--layers_of", metavar="FILE", help="a model of other sizes than the usual ones of its family")
    return parser


def run_merge(what: Merging, *, as_json: bool = False) -> int:
    """Merge into a model, with progress, and say what came out."""
    from sfumato.tools import merge as tool

    with megabytes("merging") as advance:
        facts = tool.merge(what, advance)
    lines = []
    for each in facts["adapters"]:
        layers = ", ".join(f"{count:,} layers of {component}" for component, count in each["layers"].items())
        lines.append(f"{each['path']} at {each['ratio']:g}: {layers} ({', '.join(each['kinds'])})")
    lines += (
        f"{path}: its words are not part of a model: {', '.join(words)}; `--textual_inversion_embeddings {path}` adds "
        "them where it is sampled"
        for path, words in facts["words"].items()
    )
    say(facts, "\n".join([*lines, f"written: {', '.join([facts['out'], *facts['beside']])}"]), as_json)
    return 0


def run_join(what: Joining, *, as_json: bool = False) -> int:
    """Merge into one adapter, with progress, and say what came out."""
    from sfumato.tools import merge_adapters as tool
    from sfumato.train.progress import progress

    with progress("merging") as advance:
        facts = tool.join(what, advance)
    ranks = [layer["rank"] for layer in facts["layers"] if layer["rank"]]
    of = f" of rank {min(ranks)} to {max(ranks)}" if ranks else ""
    lost = (
        f"; the rank leaves out {facts['error']:.2%} of the change (Frobenius norm), "
        f"{max(layer['error'] for layer in facts['layers']):.2%} of a layer's at most"
        if facts["error"]
        else ", exact but for rounding to the number format"
    )
    left_out = "".join(f"\n  left out: {each}" for each in facts["left_out"])
    say(facts, f"{facts['out']}: {len(facts['layers']):,} layers{of}{lost}{left_out}", as_json)
    return 0


def paired(adapters: Sequence[Path], ratios: Sequence[float]) -> list[tuple[Path, float]]:
    """Files with their ratios. Errors: `UserError` for files that are not there, and another number of ratios."""
    wrong = [f"no such file: {path}" for path in adapters if not path.expanduser().exists()]
    if ratios and len(ratios) != len(adapters):
        wrong.append(f"{len(ratios)} ratios for {len(adapters)} adapters; give one for each, or none")
    if wrong:
        raise UserError(*wrong)
    return [(path.expanduser(), ratio) for path, ratio in zip(adapters, ratios or [1.0] * len(adapters), strict=True)]


def block_weights(text: str) -> list[float]:
    """ "[1,0,0.5]" or "1,0,0.5" -> its numbers. Errors: `UserError`."""
    try:
        return [float(part) for part in text.strip().strip("[]").split(",")]
    except ValueError:
        raise UserError(f"--lbws {text}: expected numbers such as [1,0,0.5,...]") from None


def take_adapters(words: list[str], flag: str) -> list[tuple[Path, float]]:
    """Take a flag of several files off a command line, `--flag A 0.8 B 0.5`, each followed by its strength or by none;
    one file alone stays there. Errors: `UserError` for files that are not there."""
    values = _values(words, flag)
    if len(values) < 2:
        return []
    take_values(words, flag)
    return with_strengths(values, flag)


def take_values(words: list[str], flag: str) -> list[str]:
    """Take a flag of several values off a command line; none if it is not there. Errors: `UserError` for one that
    stands there twice, or without a value."""
    values, places = _values(words, flag), _places(words, flag)
    if len(places) > 1:
        raise UserError(f"--{flag}: stands there twice; give all its values behind one")
    if places and not values:
        raise UserError(f"--{flag}: expected a value")
    for at in places:
        joined = "=" in words[at]
        words[at : at + 1 + len(values) - joined] = []
    return values


def _values(words: Sequence[str], flag: str) -> list[str]:
    for at in _places(words, flag):
        _, *joined = words[at].split("=", 1)
        return [*joined, *takewhile(lambda word: not word.startswith("--"), words[at + 1 :])]
    return []


def _places(words: Sequence[str], flag: str) -> list[int]:
    return [i for i, word in enumerate(words) if word.partition("=")[0] == f"--{flag}"]


def with_strengths(values: Sequence[str], flag: str, *, files: bool = True) -> list[tuple[Path, float]]:
    """ "A 0.8 B" -> [(A, 0.8), (B, 1.0)]. `files`: whether these must be files, and no folders or hub ids. Errors:
    `UserError`."""
    found: list[tuple[Path, float]] = []
    wrong, strong = [], True
    for value in values:
        path = Path(value).expanduser()
        number = None if path.exists() else _number(value)
        if number is None:
            if files and not path.is_file():
                wrong.append(f"--{flag}: no such file: {value}")
            found.append((path, 1.0))
        elif strong:
            wrong.append(f"--{flag} {value}: a strength stands after its file, as in `--{flag} a.safetensors 0.8`")
        elif not math.isfinite(number):
            wrong.append(f"--{flag} {value}: a strength is a finite number, such as 0.8")
        else:
            found[-1] = found[-1][0], number
        strong = number is not None
    if wrong:
        raise UserError(*wrong)
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
