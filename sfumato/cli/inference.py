"""What a command line of `inference_flags` asks for: prompts sampled, or asked for, latents decoded, or adapters
merged."""

from __future__ import annotations

import re
import secrets
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.cli.inference_flags import KEPT, Command, beside, letters
from sfumato.errors import UserError

if TYPE_CHECKING:
    from sfumato.sampling.prompts import Prompt
    from sfumato.train.inference import Output


def run_command(command: Command) -> int:
    """Do what a command line asks for; the exit code. Errors: `UserError`."""
    if command.args.save_merged_model:
        return _merge(command)
    for path in _decode(command) if command.args.latent_path else _sample(command):
        print(path, flush=True)
    return 0


def _merge(command: Command) -> int:
    from sfumato.cli import tools
    from sfumato.tools.merge import Merging

    model = Path(command.config.model.pretrained_model_name_or_path)
    out = command.args.save_merged_model.expanduser()
    return tools.run_merge(Merging(model=model, adapters=command.adapters, out=out, only=("denoiser",)))


def _output(command: Command) -> Output:
    from sfumato.train.inference import Output

    args = command.args
    folder = Path(args.output_dir or command.script.folder or ".").expanduser() / command.script.below
    kind = args.output_type
    return Output(folder=folder, images=kind != "latent", latents=kind != "images", described=not args.no_metadata)


def _device(args: Namespace) -> Any:
    import torch

    from sfumato.train import dist

    try:
        return torch.device(args.device) if args.device else dist.device_of()
    except RuntimeError:
        raise UserError(f"--device {args.device}: expected a device such as cuda, cuda:0 or cpu") from None


def _decode(command: Command) -> Iterable[Path]:
    from sfumato.train import inference
    from sfumato.train.pipeline import Pipeline

    output = _output(command)
    pipeline = Pipeline.decoder(command.config, _device(command.args))
    return inference.decode(pipeline, command.args.latent_path, output)


def _sample(command: Command) -> Iterator[Path]:
    """Sample the prompts, or those that are asked for; the files as they are written."""
    from sfumato.sampling.following import check_images
    from sfumato.train import inference
    from sfumato.train.pipeline import Pipeline

    args, output = command.args, _output(command)
    check_images(command.prompts, len(command.controls))  # before the weights are read
    merged = [] if beside(args) else command.adapters
    pipeline = Pipeline.of(command.config, _device(args), merged, offload=args.offload, controls=command.controls)
    with ExitStack() as stack:
        networks = [
            stack.enter_context(pipeline.adapted(path, strength=strength, skip=skip))[0]
            for (path, strength), skip in zip(command.adapters, command.skips, strict=True)
            if beside(args)
        ]
        if not args.interactive:
            yield from inference.write(pipeline, [_seeded(p) for p in command.prompts], output, command.sampler)
            return
        for place, prompt in enumerate(_asked(command, networks)):
            try:
                yield from inference.write(pipeline, [_seeded(prompt)], output, command.sampler, place)
            except UserError as error:
                _say(error)


def _seeded(prompt: Prompt) -> Prompt:
    """With a seed; by chance where none is given, as in kohya's scripts. It stands in the file's name."""
    return prompt if prompt.seed is not None else replace(prompt, seed=secrets.randbits(32))


def _say(error: UserError) -> None:
    for message in error.messages:
        print(f"error: {message}", file=sys.stderr)


def _asked(command: Command, networks: Sequence[Any]) -> Iterator[Prompt]:
    """Prompts from the terminal, until an empty line, `exit` or the end of the input."""
    from sfumato.sampling.prompts import OWN, parse_line

    options, base = letters(command.script), replace(command.base, prompt="")
    known = " ".join(f"--{o}" for o, name in options.items() if name not in OWN or getattr(base, name) is not None)
    print(f"prompt, with {known}, --m strengths of adapters (0.5,1); an empty line ends", file=sys.stderr)
    while line := _line():
        try:
            prompt = parse_line(_with_strengths(line, networks), "prompt", base, options)
        except UserError as error:
            _say(error)
            continue
        if command.script.keeps:
            base = replace(base, **{name: getattr(prompt, name) for name in KEPT})
        yield replace(prompt, negative_prompt="") if prompt.negative_prompt == "-" else prompt


def _line() -> str:
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
    return "" if line.lower() == "exit" else line


_STRENGTHS = re.compile(r"(?:^|\s)--m\s+(\S+)")


def _with_strengths(line: str, networks: Sequence[Any]) -> str:
    """Set the adapters' strengths that a line gives as `--m 0.5,1`; the line without them. Errors: `UserError`."""
    if (found := _STRENGTHS.search(line)) is None:
        return line
    try:
        strengths = [float(text) for text in found[1].split(",")]
    except ValueError:
        raise UserError(f"--m {found[1]}: expected numbers, such as 0.5,1") from None
    if len(strengths) != len(networks):
        raise UserError(f"--m {found[1]}: {len(strengths)} strengths for {len(networks)} adapters that are not merged")
    for network, strength in zip(networks, strengths, strict=True):
        network.multiplier = strength
    return line[: found.start()] + line[found.end() :]
