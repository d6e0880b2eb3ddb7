"""kohya's tools/cache_latents.py and tools/cache_text_encoder_outputs.py: `sfumato cache` under their flags."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from sfumato import families
from sfumato.cli import flags, kohya, main
from sfumato.cli.report import Given, Report
from sfumato.errors import UserError

KEPT: Mapping[str, tuple[str, ...]] = {
    "cache_latents": ("cache_latents", "cache_latents_to_disk"),
    "cache_text_encoder_outputs": ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"),
}
"""kohya's script -> the settings that it is."""


def run(script: str, argv: Sequence[str]) -> int:
    """Run a command line of kohya's script of this name (without `.py`); the exit code."""
    return main.guarded(lambda: _run(script, argv))


def _run(script: str, argv: Sequence[str]) -> int:
    resolved = resolve(script, argv)
    for notice in resolved.notices:
        flags.note(notice)
    from sfumato.train import run

    run.cache(resolved.config, resolved.datasets)
    return 0


def resolve(script: str, argv: Sequence[str]) -> flags.Resolved:
    """A checked config from a kohya command line. Errors: one `UserError` with all mistakes."""
    parser = flags.Parser(prog=f"{script}.py", allow_abbrev=False, add_help=False)
    parser.add_argument("--skip_existing", action="store_true")
    for name in families.names():
        parser.add_argument(f"--{name}", action="store_true")
    ours, rest = parser.parse_known_args(list(argv))

    def adapt(given: dict[str, Given], report: Report) -> None:
        given |= {name: Given(name, True, f"{script}.py", False, True) for name in KEPT[script]}

    found = flags.resolve_all(
        rest, "network", prog=f"{script}.py", kohya=True, defaults={"caption_extension": ".caption"}, adapt=adapt
    )
    if ours.skip_existing:
        flags.note("--skip_existing: accepted, no effect: what is kept and fits is never made again")
    _check_family(ours, found.config.family.family)
    return found


def _check_family(ours: argparse.Namespace, family: str) -> None:
    """The model's family is found from its file; a flag that names another one is a mistake."""
    for name in families.names():
        script = kohya.scripts().get(f"{name}_train_network")
        if getattr(ours, name) and family != name and not (script and family in script.families):
            raise UserError(f"--{name}: the base model is of the family {family}; leave the flag out")
