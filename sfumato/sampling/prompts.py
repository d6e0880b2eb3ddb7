"""Prompt files: what to sample, as sd-scripts' `--sample_prompts` spells it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sfumato import families
from sfumato.config import Config, DatasetConfig, FamilyOptions
from sfumato.errors import UserError, nearest
from sfumato.formats.files import read_header
from sfumato.formats.text import parse_json, parse_toml, read_text

log = logging.getLogger(__name__)

SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    # The first-generation solver cannot step onto sigma 0.
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    # With an odd number of steps the last one must be of a lower order.
    "dpmsingle": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
}
"""Sampler name -> diffusers' scheduler class, and its arguments besides the process's own settings."""
ALIASES = {f"k_{name}": name for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One image to sample; fields are spelled as the keys of sd-scripts' TOML and JSON prompt files."""

    prompt: str = ""
    """Text; "" samples without one."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    width: int = 512
    """In pixels."""
    height: int = 512
    """In pixels."""
    sample_steps: int = 30
    """Steps of the sampler."""
    scale: float = 7.5
    """Classifier-free guidance; at 1 or below the negative prompt is not used."""
    guidance_scale: float | None = None
    """The guidance embedding of distilled models; others take none."""
    seed: int | None = None
    """Default: one that follows from the run's seed and the prompt's place."""
    sample_sampler: str | None = None
    """As the setting of this name; default: the run's."""
    flow_shift: float | None = None
    """Shift of the noise levels, above 1 towards more noise."""
    cfg_trunc_ratio: float | None = None
    """Share of the steps, the first ones, that are guided by the negative prompt, as in diffusers; sd-scripts guides as
    long as 1 - the noise level is below it, which are more steps."""
    renorm_cfg: float | None = None
    """Norm of the guided prediction, in those of the prediction with the prompt alone, row by row as in diffusers
    (sd-scripts limits the norm of the whole); 0: as guidance makes it."""
    apg_start_step_general: int | None = None
    """The last step, counted from 0, that is guided plainly, and not by adaptive projected guidance."""
    apg_start_step_ocr: int | None = None
    """The same for a prompt that has text to be drawn, in quotes."""
    guidance_rescale: float | None = None
    """How far a guided prediction is moved to the deviation of that with the prompt alone, from 0 to 1."""
    guidance_rescale_apg: float | None = None
    """The same in the steps of adaptive projected guidance."""
    controlnet_image: str | None = None
    """File of the image to follow; for several control nets one for each, with ; between them."""


OPTIONS = {
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "sample_steps",
    "l": "scale",
    "g": "guidance_scale",
    "n": "negative_prompt",
    "ss": "sample_sampler",
    "ctr": "cfg_trunc_ratio",
    "rcfg": "renorm_cfg",
    "fs": "flow_shift",
    "cn": "controlnet_image",
}
"""Option of a prompt line -> field."""
OWN = (
    "flow_shift", "cfg_trunc_ratio", "renorm_cfg", "apg_start_step_general", "apg_start_step_ocr", "guidance_rescale",
    "guidance_rescale_apg",
)  # fmt: skip
"""Fields that only families have whose `FACTS.prompt` gives them a default."""
_LONG_DASH = re.compile(r"(?:^|\s)(-*[\u2010-\u2015\u2212\ufe58\uff0d]+-*)([A-Za-z]+)(?=\s)")
"""What word processors and web pages make of two hyphens."""
KINDS: Mapping[str, type] = {
    "prompt": str,
    "negative_prompt": str,
    "sample_sampler": str,
    "width": int,
    "height": int,
    "sample_steps": int,
    "seed": int,
    "scale": float,
    "guidance_scale": float,
    "controlnet_image": str,
    **{name: int if name.startswith("apg_start_step") else float for name in OWN},
}
LIMITS: Mapping[str, tuple[float, float]] = {
    "width": (8, 16384),
    "height": (8, 16384),
    "sample_steps": (1, 1000),
    "seed": (0, 2**64 - 1),
    "flow_shift": (0.01, 100),
    "cfg_trunc_ratio": (0, 1),
    "renorm_cfg": (0, 100),
    "apg_start_step_general": (-1, 1000),
    "apg_start_step_ocr": (-1, 1000),
    "guidance_rescale": (0, 1),
    "guidance_rescale_apg": (0, 1),
}


def default(options: FamilyOptions) -> Prompt:
    """What a prompt leaves out, for the family whose options these are."""
    return Prompt(**families.facts_of(options).prompt) if options.family else Prompt()


def own(prompt: Prompt, default: Prompt) -> dict[str, float]:
    """The values of the fields `OWN` that the family whose `default` this is has."""
    values = {name: getattr(prompt, name) for name in OWN}
    defaults = {name: getattr(default, name) for name in OWN}
    return {
        name: defaults[name] if value is None else value for name, value in values.items() if defaults[name] is not None
    }


def of_no_use(given: Iterable[str], default: Prompt) -> list[str]:
    """A message for each of the `given` fields that the family whose `default` this is does not have."""
    return [
        f"{name}: the samples of this model have no use for it; leave it out"
        for name in given
        if name in OWN and getattr(default, name) is None
    ]


def of_run(config: Config, datasets: Sequence[DatasetConfig]) -> list[Prompt]:
    """The prompts that are sampled while training; one without a size is sampled at the resolution of the run."""
    if not config.sample.sample_prompts:
        return []
    width, height = datasets[0].resolution if datasets else config.data.resolution
    return read_prompts(config.sample.sample_prompts, replace(default(config.family), width=width, height=height))


def sized(default: Prompt, *paths: Path | str) -> Prompt:
    """`default` at the size that the first of these weight files that says one (modelspec.resolution) was trained
    at."""
    for path in map(Path, paths):
        if path.suffix.lower() == ".safetensors" and path.is_file():
            size = re.fullmatch(
                r"([0-9]{1,5})x([0-9]{1,5})", read_header(path).metadata.get("modelspec.resolution", "")
            )
            width, height = map(int, size.groups()) if size else (0, 0)
            low, high = LIMITS["width"]
            if low <= min(width, height) and max(width, height) <= high:
                return replace(default, width=width, height=height)
    return default


def read_prompts(path: Path | str, default: Prompt | None = None, options: Mapping[str, str] = OPTIONS) -> list[Prompt]:
    """The prompts of a .txt, .toml or .json file; `default` fills in what they leave out, `options` are those of lines.

    Raises one `UserError` with every mistake in the file, each with its line or its place.
    """
    path, default = Path(path), default or Prompt()
    readers: Mapping[str, Callable[[Path, str], Iterable[tuple[str, Any]]]] = {
        ".txt": _lines,
        ".toml": _toml,
        ".json": _json,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: a prompt file ends in .txt, .toml or .json")
    prompts: list[Prompt] = []
    mistakes: list[str] = []
    for place, entry in reader(path, read_text(path)):
        try:
            prompts.append(
                parse_line(entry, place, default, options) if isinstance(entry, str) else checked(entry, place, default)
            )
        except UserError as error:
            mistakes += error.messages
    if mistakes:
        raise UserError(*mistakes)
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write one per line")
    return prompts


def parse_line(
    line: str, place: str = "prompt", default: Prompt | None = None, options: Mapping[str, str] = OPTIONS
) -> Prompt:
    """`a cat --w 512 --h 768 --d 1 --s 20 --l 7 --n blurry --ss euler` -> a prompt.

    An option is `--` and letters after a space or at the start; any other `--` is text. `place` begins the messages of
    `UserError`.
    """
    text, *parts = re.split(r"(?:^|\s+)--(?=[A-Za-z])", line.strip())
    for dash, name in _LONG_DASH.findall(line):
        if name.lower() in options:
            log.warning("%s: %s%s is read as text: an option begins with two hyphens, --%s", place, dash, name, name)
    given: dict[str, str] = {"prompt": text.strip()}
    mistakes = []
    for part in parts:
        name, _, value = part.strip().partition(" ")
        field = options.get(name.lower())
        if field is None:
            mistakes.append(_unknown(place, f"option --{name}", name.lower(), options, "--"))
        elif field in given:
            mistakes.append(f"{place}: --{name} is given twice; give it once")
        elif not value.strip():
            mistakes.append(f"{place}: --{name} needs a value")
        else:
            given[field] = value.strip()
    if mistakes:
        raise UserError(*mistakes)
    return checked(given, place, default or Prompt())


def _lines(path: Path, text: str) -> Iterable[tuple[str, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.strip().startswith("#"):
            yield f"{path}:{number}", line


def _toml(path: Path, text: str) -> Iterable[tuple[str, Any]]:
    data = parse_toml(path, text)
    shared = data.pop("prompt", None)
    if data or not isinstance(shared, dict):
        raise UserError(f"{path}: [prompt] with [[prompt.subset]] below it was expected, and nothing else")
    subsets = shared.pop("subset", [{}])
    if not isinstance(subsets, list):
        raise UserError(f"{path}: subsets are written [[prompt.subset]], with two brackets")
    for number, subset in enumerate(subsets, 1):
        yield f"{path}: [[prompt.subset]] {number}", {**shared, **subset}


def _json(path: Path, text: str) -> Iterable[tuple[str, Any]]:
    data = parse_json(path, text)
    if not isinstance(data, list) or not all(isinstance(entry, str | dict) for entry in data):
        raise UserError(
            f'{path}: a list of prompts was expected, each a table such as {{"prompt": "a cat"}} or a prompt line'
        )
    for number, entry in enumerate(data, 1):
        yield f"{path}: entry {number}", entry


def checked(given: Mapping[str, Any], place: str, default: Prompt) -> Prompt:
    """Fields with their right types and within their limits, put over `default`. Errors: one `UserError` with all
    mistakes, which `place` begins."""
    known = {f.name for f in fields(Prompt)}
    mistakes = [_unknown(place, f"key {key!r}", key, known) for key in given if key not in known]
    mistakes += [f"{place}: {message}" for message in of_no_use(given, default)]
    if "prompt" not in given:
        mistakes.append(f'{place}: `prompt` is missing; "" samples without one')
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name in known:
            try:
                values[name] = _value(name, value)
            except ValueError as error:
                mistakes.append(f"{place}: {name}: {error}")
            except UserError as error:
                mistakes.append(f"{place}: {error}")
    if mistakes:
        raise UserError(*mistakes)
    return replace(default, **values)


def _value(name: str, value: Any) -> Any:
    kind = KINDS[name]
    wrong = (
        f"{'a whole number' if kind is int else 'a number' if kind is float else 'text'} was expected, not {value!r}"
    )
    # Lines give text for everything; TOML and JSON give types, and True is not a number there.
    if (
        isinstance(value, bool)
        or (kind is str and not isinstance(value, str))
        or (kind is int and isinstance(value, float))
    ):
        raise ValueError(wrong)
    try:
        value = kind(value)
    except (ValueError, TypeError) as error:
        raise ValueError(wrong) from error
    low, high = LIMITS.get(name, (value, value))
    if not low <= value <= high:
        raise ValueError(f"{low} to {high} was expected, not {value}")
    return sampler(str(value)) if name == "sample_sampler" else value


def sampler(name: str) -> str:
    """A sampler's own name for a name or alias; `UserError` for one that is not known."""
    name = ALIASES.get(name, name)
    if name not in SAMPLERS:
        raise UserError(
            f"sample_sampler: there is no {name!r}{nearest(name, SAMPLERS)}; there are {', '.join(SAMPLERS)}"
        )
    return name


def _unknown(place: str, what: str, name: str, known: Iterable[str], prefix: str = "") -> str:
    return f"{place}: unknown {what}{nearest(name, known)}; known are {', '.join(prefix + k for k in sorted(known))}"
