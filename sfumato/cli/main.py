"""The command `sfumato`: one function a sub-command; everything heavy is imported when it is needed."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato import __version__
from sfumato.errors import UserError, nearest

if TYPE_CHECKING:
    from sfumato.cli.flags import Resolved
    from sfumato.config import Config, Method

METHODS: Mapping[Method, str] = {
    "network": "an adapter, such as a LoRA",
    "full": "the whole model",
    "embedding": "a new word",
    "controlnet": "a net that makes images follow others",
    "lllite": "a small one",
}


@dataclass(frozen=True, slots=True)
class Command:
    """A sub-command."""

    run: Callable[[list[str]], int]
    help: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _dispatch(words))


def guarded(job: Callable[[], int]) -> int:
    """Run a job; a user's mistake goes to stderr without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a file's name may have no letter in the terminal's alphabet, or be no text
    # diffusers imports bitsandbytes wherever it is installed, which then tells of kernels that nobody asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return job()
    except UserError as e:
        for message in e.messages:
            print(f"error: {message}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader, such as `head`, has read enough. What is still buffered must go nowhere, or Python complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        if e.filename is None:
            raise
        # A file or folder that may not be read or written, wherever it was met.
        print(f"error: {e.filename}: {e.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"sfumato {__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise UserError(
            f"{words[0]!r} is not a command of sfumato{nearest(words[0], COMMANDS)} (there are {', '.join(COMMANDS)})"
        )
    return COMMANDS[words[0]].run(words[1:])


def usage() -> str:
    """What `sfumato --help` says."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "sfumato: a trainer for image diffusion models",
            "",
            *lines,
            "",
            "`sfumato COMMAND --help` lists the flags of a command.",
        ]
    )


# --- commands -------------------------------------------------------------------------------------


def _train(words: list[str]) -> int:
    method = _method(words, "train", None)
    train(method, _resolved(words, method, f"sfumato train {method}"))
    return 0


def train(method: Method, resolved: Resolved) -> None:
    """Train what was resolved; the config, with the datasets, is written beside the result."""
    # By default it walks through what is imported, again and again while it grows: a fifth of the time to the first
    # step.
    gc.set_threshold(50_000, 20, 20)
    from sfumato.cli import datasets, flags
    from sfumato.train import run

    comment = "".join(f"# {line}\n" for line in datasets.write(resolved.datasets).splitlines())

    def text(config: Config) -> str:
        settings = flags.write_toml(config)
        return f"# sfumato {__version__}, train {method}\n{settings}\n# The datasets of this run:\n{comment}"

    run.train(resolved.config, method, resolved.datasets, resolved=text, read=resolved.read, given=resolved.given)


def _plan(words: list[str]) -> int:
    method = _method(words, "plan", "network")
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    resolved = _resolved(words, method, f"sfumato plan {method}")
    from sfumato.train import plan

    if as_json:
        print(
            json.dumps(
                plan.facts(resolved.config, method, resolved.datasets, resolved.read, resolved.given),
                indent=2,
                ensure_ascii=False,
            )
        )
    else:
        plan.show(resolved.config, method, resolved.datasets, resolved.read, resolved.given)
    return 0


def _cache(words: list[str]) -> int:
    method = _method(words, "cache", "network")
    resolved = _resolved(words, method, f"sfumato cache {method}")
    if not (resolved.config.data.cache_latents_to_disk or resolved.config.data.cache_text_encoder_outputs_to_disk):
        raise UserError(
            "sfumato cache: nothing would be kept: set cache_latents_to_disk, cache_text_encoder_outputs_to_disk or "
            "both"
        )
    from sfumato.train import run

    run.cache(resolved.config, resolved.datasets, method)
    return 0


def _sample(words: list[str]) -> int:
    from sfumato.cli import inference, inference_flags, tools

    if {"-h", "--help"} & {*words}:
        print(inference_flags.help_text())
    if {word.partition("=")[0].removeprefix("--") for word in words} & {*inference_flags.BY_PROMPT}:
        return inference.run_command(inference_flags.parse("sfumato sample", inference_flags.OWN, words))
    adapters = tools.take_adapters(words, "network_weights")
    controls, image = inference_flags.take_controls(words)
    config = inference_flags.sample_config(words, "sfumato sample")
    if not config.sample.sample_prompts:
        raise UserError("sfumato sample: say what to sample: --prompt, or --sample_prompts, a file of prompts")
    from sfumato.train import pipeline

    for path in pipeline.main(config, adapters, controls, image):
        print(path)
    return 0


def _method(words: list[str], command: str, default: Method | None) -> Method:
    """Take the method off the front of the words."""
    found = next((m for m in METHODS if words and words[0] == m), None)
    if found:
        del words[0]
        return found
    if words and not words[0].startswith("-"):
        raise UserError(
            f"sfumato {command} {words[0]}: expected one of {', '.join(METHODS)}{nearest(words[0], METHODS)}"
        )
    if {"-h", "--help"} & {*words}:
        lines = [f"  {f'sfumato {command} {method}':26}  {what}" for method, what in METHODS.items()]
        print("\n".join([*lines, "", "Each has a --help of its own; this is the first one's:", ""]))
    elif default is None:
        each = ", ".join(f"{method} ({what})" for method, what in METHODS.items())
        raise UserError(f"sfumato {command}: say what to train: {each}")
    return default or "network"


def _resolved(words: list[str], method: Method, prog: str) -> Resolved:
    from sfumato.cli import flags

    resolved = flags.resolve_all(words, method, prog=prog)
    for notice in resolved.notices:
        flags.note(notice)
    return resolved


def _bench(words: list[str]) -> int:
    from sfumato.cli import bench

    method = _method(words, "bench", "network")
    return bench.main(words, method, f"sfumato bench {method}")


def _convert(words: list[str]) -> int:
    from sfumato.cli import checkpoint_tools

    return checkpoint_tools.convert(words)


def _merge(words: list[str]) -> int:
    from sfumato.cli import tools

    return tools.merge(words)


def _extract(words: list[str]) -> int:
    from sfumato.cli import svd_tools

    return svd_tools.extract(words)


def _resize(words: list[str]) -> int:
    from sfumato.cli import svd_tools

    return svd_tools.resize(words)


def _show(words: list[str]) -> int:
    parser = _parser("show", "What a weight file is, from its header alone.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="weight file or diffusers folder")
    parser.add_argument("--json", action="store_true", help="machine-readable, one object a file")
    args = parser.parse_args(words)
    from sfumato.tools import show

    for path in args.files:
        facts = show.describe(path)
        print(json.dumps(facts, indent=2, ensure_ascii=False) if args.json else show.text(facts))
    return 0


def _doctor(words: list[str]) -> int:
    parser = _parser("doctor", "What this machine has, and whether it can train.")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    args = parser.parse_args(words)
    from sfumato.tools import doctor

    facts = doctor.examine()
    print(doctor.as_json(facts) if args.json else doctor.text(facts))
    return 1 if doctor.broken(facts) else 0


def _overfit(words: list[str]) -> int:
    parser = _parser("overfit", "Which step of a training to take, by its loss on held-out images (validation_split).")
    parser.add_argument("logs", nargs="+", metavar="LOG.jsonl", type=Path, help="log that stands beside a result")
    parser.add_argument("--json", action="store_true", help="machine-readable, one object a log")
    args = parser.parse_args(words)
    from sfumato.train import monitor

    for log in args.logs:
        found = monitor.read(log.expanduser())
        print(json.dumps(found.facts()) if args.json else f"{log}: {found.text()}")
    return 0


def _verify(words: list[str]) -> int:
    from sfumato.cli import adapter_tools

    return adapter_tools.verify(words)


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    from sfumato.cli.flags import Parser

    return Parser(prog=f"sfumato {command}", description=description, allow_abbrev=False)


COMMANDS: Mapping[str, Command] = {
    "train": Command(_train, "train an adapter, a whole model, a word, a ControlNet (`sfumato train --help`)"),
    "plan": Command(_plan, "check everything and say what a training would do, without training"),
    "cache": Command(_cache, "encode images and captions for later trainings"),
    "sample": Command(_sample, "sample images"),
    "convert": Command(_convert, "a checkpoint as another layout, an adapter in other names"),
    "merge": Command(_merge, "adapters into a model or into one adapter; models into one"),
    "extract": Command(_extract, "a LoRA file of what two models differ in"),
    "resize": Command(_resize, "a LoRA file with smaller ranks"),
    "verify": Command(_verify, "whether two adapters, or two checkpoints, have the same effect"),
    "overfit": Command(_overfit, "which step of a training to take, by its loss on held-out images"),
    "show": Command(_show, "say what a weight file is"),
    "bench": Command(_bench, "measure what a training step takes on this machine"),
    "doctor": Command(_doctor, "say what this machine has and whether it can train"),
}

if __name__ == "__main__":
    raise SystemExit(main())
