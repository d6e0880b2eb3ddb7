"""`sfumato bench`: what a training step takes on this machine."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.cli import flags, options
from sfumato.errors import UserError

if TYPE_CHECKING:
    from sfumato.config import Config, Method
    from sfumato.train.outlines import Parts

SECTIONS = ("noise", "loss", "optimizer", "memory", "network", "control")
"""Of settings that change a step, besides these and the family's own."""
SETTINGS = ("mixed_precision", "full_bf16", "kahan_summation")
CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}
ROUNDS, STEPS, WARM = 3, 4, 2


def main(words: Sequence[str], method: Method, command: str) -> int:
    """Measure, print the table, write the figures."""
    parser = _parser(command)
    args, rest = parser.parse_known_args(_joined(words))
    from sfumato.tools import bench

    before = bench.read(args.compare)["rows"] if args.compare else []
    settings = [[*rest, *shlex.split(setting)] for setting in args.setting or [""]]
    cases = [  # all of them, before the first is measured: a mistake in the last one is told at once
        (model, shlex.join(told), _case(args, family, parts, _config(told, method, family, command), method))
        for model, parts, family in _models(args)
        for told in settings
    ]
    if not cases:
        raise UserError(f"{command}: say what is measured: --families NAME ..., or --model FILE")
    rows: list[dict[str, Any]] = []
    for model, told, case in cases:
        flags.note(f"{len(rows) + 1} of {len(cases)}: {model} {told}".rstrip())
        found = bench.apart(case, args.limit)
        rows.append({"model": model, "method": method, "setting": told, **_sizes(args), **found})
        if args.json:
            bench.write(args.json, bench.facts(rows))
    print(bench.table(rows, before))
    return 1 if any("error" in row for row in rows) else 0


def _joined(words: Sequence[str]) -> list[str]:
    """What follows `--setting` may begin with dashes itself."""
    given = iter(words)
    return [f"--setting={next(given, '')}" if word == "--setting" else word for word in given]


def _parser(command: str) -> flags.Parser:
    parser = flags.Parser(
        prog=command,
        description="Seconds and memory of a training step with random weights of real size; other flags are those of "
        "`sfumato train` that change a step.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--families", nargs="+", default=[], metavar="NAME", help="families whose usual model is measured: sdxl flux "
        "..., or NAME:VARIANT")  # fmt: skip
    add("--model", type=Path, nargs="+", default=[], metavar="FILE", help="checkpoints that have the sizes")
    add("--scale", type=float, default=1.0, help="share of the blocks that a model has, 0 to 1 (default: 1)")
    add("--resolution", type=int, default=1024, help="side of the pictures in pixels (default: 1024)")
    add("--batch_size", type=int, default=1, help="pictures of a step (default: 1)")
    add("--setting", action="append", metavar='"--flag ..."', help="further flags; each of several is measured")
    add("--rounds", type=int, default=ROUNDS, help=f"rounds, of which the median counts (default: {ROUNDS})")
    add("--steps", type=int, default=STEPS, help=f"steps of a round (default: {STEPS})")
    add("--limit", type=float, default=600, help="seconds that one case may take (default: 600)")
    add("--json", type=Path, metavar="FILE", help="write the figures and what the machine is")
    add("--compare", type=Path, metavar="FILE", help="figures of before: ratios to them are shown")
    return parser


def _sizes(args: Namespace) -> dict[str, Any]:
    return {"scale": args.scale, "resolution": args.resolution, "batch_size": args.batch_size}


def _models(args: Namespace) -> Iterator[tuple[str, Parts, str]]:
    """Name, shapes and family of what is measured."""
    from sfumato import families
    from sfumato.errors import nearest
    from sfumato.tools import checkpoints
    from sfumato.train import outlines

    if not 0 < args.scale <= 1:
        raise UserError(f"--scale {args.scale:g}: expected more than 0, at most 1")
    for name in args.families:
        family, _, variant = name.partition(":")
        if family not in families.names():
            raise UserError(f"--families {name}: there is no family {family!r}{nearest(family, families.names())}")
        yield name, outlines.usual(family, variant), family
    for path in args.model:
        models = checkpoints.open_parts(path, {})
        parts = {name: w.shapes() for name, w in models.source.components.items() if name != "vae"}
        yield path.stem, parts, models.family.name


def _config(words: Sequence[str], method: Method, family: str, command: str) -> Config:
    """The settings of a case. Errors: `UserError`."""
    known = {**options.common(), **options.of_family(family)}
    only = [n for n, o in known.items() if o.section in SECTIONS or n in SETTINGS or n not in options.common()]
    resolved = flags.resolve_all(
        words, method, data=False, family=family, prog=command, only=only, defaults={**CACHED, "mixed_precision": "no"}
    )
    return resolved.config


def _case(args: Namespace, family: str, parts: Parts, config: Config, method: Method) -> Any:
    from sfumato.train import bench, outlines

    shapes = {**parts, "denoiser": outlines.fewer(parts["denoiser"], args.scale)} if args.scale < 1 else parts
    return bench.Case(
        family=family, method=method, config=config, parts=shapes, resolution=args.resolution,
        batch_size=args.batch_size, warm=min(WARM, args.steps), rounds=args.rounds, steps=args.steps,
    )  # fmt: skip
