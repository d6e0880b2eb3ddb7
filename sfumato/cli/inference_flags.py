"""Command lines of kohya's minimal inference scripts, and of `sfumato sample` with their flags: defaults, and what each
flag is here."""

from __future__ import annotations

import math
import re
from argparse import SUPPRESS, Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import families
from sfumato.cli import flags, options, tools
from sfumato.cli.flags import Parser
from sfumato.config.memory import ATTENTION
from sfumato.errors import UserError

if TYPE_CHECKING:
    from sfumato.config import Config
    from sfumato.sampling.prompts import Prompt


SAMPLE = """
    sample_prompts sample_sampler output_dir output_name network_weights base_weights base_weights_multiplier seed
    mixed_precision xformers sdpa no_half_vae vae_tile_size stream_text_encoders blocks_to_swap zero_terminal_snr
    torch_compile dynamo_backend quantize quantize_text_encoders quantize_budget int8_matmul attn_mode
    textual_inversion_embeddings
"""
"""What `sfumato sample` reads, besides the model and the family's own settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """One of kohya's scripts, or our own command."""

    prompt: str = ""
    """Sampled where the command line has none; "": it must have one."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of prompts, where they differ from those of the family."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Variant of the model -> other defaults."""
    precision: str | None = "bf16"
    """Of the computation, where the command line says none; None: what --mixed_precision says."""
    folder: str | None = "."
    """Of the results, where the command line names none; None: it must name one."""
    below: str = ""
    """Folder in it that images are written into."""
    guidance: str = "scale"
    """What the flag --guidance_scale is, and the option `--g` of a line of prompts."""
    keeps: bool = True
    """Whether options of a line stay for the next ones, where lines are asked for."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Flags of this script that have another name here."""
    without: frozenset[str] = frozenset(
        {"sample_prompts", "sample_sampler", "output_dir", "output_name", "network_weights", "seed"}
    )
    """Settings of `sfumato sample` that these scripts say by other flags, or not at all."""


SAMPLER = "euler"
"""What kohya's scripts sample with."""
_CAT = "A photo of a cat"
SCRIPTS: Mapping[str, Script] = {
    "sdxl_minimal_inference": Script(prompt=_CAT, precision="fp16", defaults={"sample_steps": 50, "scale": 7.0}),
    "sd3_minimal_inference": Script(
        prompt=_CAT, precision="no", defaults={"sample_steps": 50, "scale": 5.0, "seed": 1}
    ),
    "flux_minimal_inference": Script(
        prompt=_CAT,
        defaults={"width": 1360, "height": 768, "sample_steps": 50, "scale": 1.0, "guidance_scale": 3.5},
        variants={"schnell": {"sample_steps": 4}},
        guidance="guidance_scale",
    ),
    "lumina_minimal_inference": Script(prompt="A beautiful sunset over the mountains", folder="outputs"),
    "hunyuan_image_minimal_inference": Script(folder=None, keeps=False),
    "anima_minimal_inference": Script(
        folder=None, keeps=False, defaults={"flow_shift": 5.0}, renamed={"text_encoder": "qwen3"}
    ),
}
"""kohya's script, without `.py` -> what it is."""
OWN = Script(
    precision=None,
    folder="output",
    below="sample",
    guidance="guidance_scale",
    without=frozenset({"sample_prompts", "output_dir", "output_name", "seed"}),
)
"""`sfumato sample` where it is given a prompt, and not a file of prompts alone."""
CONTROLNET = "controlnet_model_name_or_path"
BY_PROMPT = ("prompt", "from_file", "interactive", "latent_path", "save_merged_model")
"""Flags by which `sfumato sample` has all the others of these scripts."""

PROMPT = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "steps": "sample_steps",
    "infer_steps": "sample_steps",
    "width": "width",
    "image_width": "width",
    "height": "height",
    "image_height": "height",
    "seed": "seed",
    "cfg_scale": "scale",
    "flow_shift": "flow_shift",
    "discrete_flow_shift": "flow_shift",
    "cfg_trunc_ratio": "cfg_trunc_ratio",
    "renorm_cfg": "renorm_cfg",
    "apg_start_step_general": "apg_start_step_general",
    "apg_start_step_ocr": "apg_start_step_ocr",
    "guidance_rescale": "guidance_rescale",
    "guidance_rescale_apg": "guidance_rescale_apg",
}
"""Flag -> field of the prompt, besides --guidance (distilled models) and --guidance_scale (the script's `guidance`)."""
LETTERS = {
    "w": "width",
    "h": "height",
    "s": "sample_steps",
    "d": "seed",
    "n": "negative_prompt",
    "l": "scale",
    "c": "scale",
    "ctr": "cfg_trunc_ratio",
    "rcfg": "renorm_cfg",
    "fs": "flow_shift",
    "cn": "controlnet_image",
}
"""Option of a line of prompts -> field; `g` is the script's `guidance`."""
RENAMED = {
    "ckpt_path": "pretrained_model_name_or_path",
    "ckpt": "pretrained_model_name_or_path",
    "dit": "pretrained_model_name_or_path",
    "ae": "vae",
    "ae_path": "vae",
    "gemma2_path": "gemma2",
    "save_path": "output_dir",
    "t5xxl_token_length": "t5xxl_max_token_length",
}
"""Flag -> the name that it has here."""
REFUSED = {
    "text_encoder_cpu": "use --offload, by which text encoders are on the device only while they are used",
    "add_system_prompt_to_negative_prompt": "write it into --negative_prompt, in front",
}
"""Switches that are refused, and what to do instead."""
_CHUNKS = "it never changes results; --vae_tile_size spares the VAE's memory"
IDLE = {
    "lycoris": "adapters of all kinds are read",
    "fp16_safe_patch": "nets run in bf16",
    "vae_disable_cache": _CHUNKS,
}
"""Switches that have no effect, and why."""
FP8 = ("fp8", "fp8_scaled")
"""Switches by which the denoiser's weights are kept in fp8: here always with scales."""
NETS = {"clip_l": "quantize_text_encoders", "t5xxl": "quantize_text_encoders", "gemma2": "quantize_text_encoders"} | {
    "flux": "quantize"
}
"""Nets that kohya's scripts take a number format for, and what keeps their weights in fp8."""
_DTYPES = {"float": "no", "float32": "no", "fp32": "no", "bf16": "bf16", "bfloat16": "bf16"} | dict.fromkeys(
    ("fp16", "float16", "half"), "fp16"
)
KEPT = ("width", "height", "sample_steps", "scale", "guidance_scale", "cfg_trunc_ratio", "renorm_cfg", "flow_shift")
"""What a line of prompts may set for those that follow it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command line that was read and checked."""

    script: Script
    args: Namespace
    config: Config
    prompts: Sequence[Prompt]
    """Empty where they are asked for, and where nothing is sampled."""
    base: Prompt
    """What a prompt leaves out."""
    adapters: Sequence[tuple[Path, float]]
    controls: Sequence[tuple[Path, float]]
    """Control nets, and their strengths."""
    skips: Sequence[Callable[[str], bool]]
    """For each adapter, whether a key of its file is left out."""
    sampler: str


def parse(prog: str, script: Script, argv: Sequence[str]) -> Command:
    """A command line, checked before any weight is read. Errors: `UserError` with all mistakes of one kind."""
    from sfumato.families.detect import detect_file
    from sfumato.sampling import prompts

    words = list(argv)
    controls, image = take_controls(words) if script is OWN else ([], None)
    args, rest = read(prog, script, words)
    adapters = [*_adapters(args), *tools.take_adapters(rest, "network_weights")]
    config = _config(prog, script, args, rest)
    if config.network.network_weights:
        adapters.append((Path(config.network.network_weights), 1.0))
    model = config.model.pretrained_model_name_or_path
    plain = prompts.default(config.family)
    if script is OWN:
        plain = prompts.sized(plain, *(path for path, _ in adapters), model)
    variant = script.variants.get(detect_file(model).variant or "", {}) if script.variants else {}
    ours = {
        name: value
        for name, value in {**script.defaults, **variant}.items()
        # A script may be for several families, and not all have each of its options.
        if name not in (*prompts.OWN, "guidance_scale") or getattr(plain, name) is not None
    }
    base = prompts.checked(given(script, args), prog, replace(plain, **ours, controlnet_image=image))
    own_sampler = "sample_sampler" not in script.without
    return Command(
        script=script, args=args, config=config, prompts=_prompts(script, args, base), base=base, adapters=adapters,
        controls=controls,
        skips=[_skip(args, i, path) for i, (path, _) in enumerate(adapters)],
        sampler=prompts.sampler(config.sample.sample_sampler) if own_sampler else SAMPLER,
    )  # fmt: skip


def read(prog: str, script: Script, argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The flags that these scripts have, and all other words, which are settings. Errors: `UserError`."""
    args, rest = _parser(prog).parse_known_args([_renamed(word, script) for word in argv])
    _check(script, args)
    return args, rest


def _renamed(word: str, script: Script) -> str:
    """A word of the command line, in our words."""
    name, _, value = word.partition("=")
    ours = {**RENAMED, **script.renamed}.get(name.removeprefix("--")) if name.startswith("--") else None
    return word if ours is None else f"--{ours}={value}" if "=" in word else f"--{ours}"


def help_text() -> str:
    """The flags that `sfumato sample` has beside one of `BY_PROMPT`, in words."""
    return _parser("sfumato sample").format_help()


def _parser(prog: str) -> Parser:
    from sfumato.sampling.prompts import Prompt

    made = Parser(prog=prog, description=f"Flags beside --{', --'.join(BY_PROMPT)}:", allow_abbrev=False)
    shown, texts = set[str](), options.help_texts(Prompt)
    for flag, name in {**PROMPT, "guidance_scale": "guidance_scale", "guidance": "guidance_scale"}.items():
        made.add_argument(f"--{flag}", metavar="X", help=SUPPRESS if name in shown else texts[name])
        shown.add(name)
    made.add_argument("--image_size", nargs=2, metavar=("H", "W"), help="--height and --width")
    made.add_argument("--from_file", type=Path, metavar="FILE", help="prompts, one per line with options")
    made.add_argument("--interactive", action="store_true", help="ask for prompts; the model is loaded once")
    made.add_argument("--output_dir", type=Path, metavar="DIR", help="folder for the images")
    kinds = ("images", "latent", "latent_images")
    made.add_argument("--output_type", choices=kinds, default="images", help="images, latents in files, or both")
    made.add_argument("--latent_path", nargs="*", type=Path, default=[], metavar="FILE", help="latents to decode")
    made.add_argument("--no_metadata", action="store_true", help="files do not say how they were sampled")
    made.add_argument("--lora_weights", nargs="*", default=[], metavar="FILE;STRENGTH", help="adapters")
    made.add_argument("--lora_weight", nargs="*", default=[], metavar="FILE", help="adapters, of these strengths:")
    made.add_argument("--lora_multiplier", nargs="*", type=float, default=[], metavar="X")
    made.add_argument("--merge_lora_weights", action="store_true", help="merge adapters, which takes less time")
    made.add_argument("--include_patterns", nargs="*", default=[], metavar="REGEX", help="keys of each adapter")
    made.add_argument("--exclude_patterns", nargs="*", default=[], metavar="REGEX", help="keys left out")
    made.add_argument(f"--{CONTROLNET}", nargs="*", metavar="FILE [STRENGTH]", help="ControlNets to follow images by")
    made.add_argument("--control_image", nargs="*", metavar="IMAGE", help="what each of them follows")
    made.add_argument("--save_merged_model", type=Path, metavar="FILE", help="merge adapters, sample nothing")
    made.add_argument("--offload", action="store_true", help="nets are on the device only while they are used")
    made.add_argument("--device", metavar="X")
    made.add_argument("--dtype", metavar="X", help="number format of the computation")
    made.add_argument("--ae_dtype", metavar="X")
    for net in NETS:
        made.add_argument(f"--{net}_dtype", metavar="X", help=SUPPRESS)
    made.add_argument("--attn_mode", choices=("torch", "sdpa", "xformers", "flash", "sageattn"), default="torch")
    for switch in ("fp16", "bf16"):
        made.add_argument(f"--{switch}", action="store_true", help=f"--dtype {switch}")
    made.add_argument("--vae_chunk_size", type=int, help=SUPPRESS)
    made.add_argument("--prompt2", help=SUPPRESS)
    for switch in (*REFUSED, *IDLE, *FP8, "use_flash_attn", "use_sage_attn"):
        made.add_argument(f"--{switch}", action="store_true", help=SUPPRESS)
    return made


def _check(script: Script, args: Namespace) -> None:
    """Notes on what has no effect. Errors: one `UserError` for all that cannot be done, or not together."""
    wrong = [f"--{name}: {why}" for name, why in REFUSED.items() if getattr(args, name)]
    if args.save_merged_model and not (args.lora_weight or args.lora_weights):
        wrong.append("--save_merged_model: name the adapters to merge with --lora_weight")
    if args.from_file and args.interactive:
        wrong.append("--from_file, --interactive: exclude each other; leave one of the two out")
    if args.include_patterns + args.exclude_patterns and (args.merge_lora_weights or args.save_merged_model):
        wrong.append("--include_patterns, --exclude_patterns: do nothing where adapters are merged; leave them out")
    if not (args.output_dir or script.folder or args.save_merged_model):
        wrong.append("--save_path is missing: name the folder of the results")
    sampled = args.prompt is not None or args.from_file or args.interactive or script.prompt
    if not (sampled or args.latent_path or args.save_merged_model):
        wrong.append("say what to sample: --prompt, --from_file or --interactive")
    for name in ("dtype", *(f"{net}_dtype" for net in NETS), "ae_dtype"):
        value, fewer = getattr(args, name), name.removesuffix("_dtype") in NETS
        if value is not None and value not in _DTYPES and not (fewer and _is_fp8(value)):
            wrong.append(f"--{name} {value}: expected {', '.join(_DTYPES)}")
    if wrong:
        raise UserError(*wrong)
    idle = {name: why for name, why in IDLE.items() if getattr(args, name)}
    if _attention(args) in _missing():
        idle[f"attn_mode {_attention(args)}"] = "its library is not installed; PyTorch's attention is used"
    if args.vae_chunk_size:
        idle["vae_chunk_size"] = _CHUNKS
    if args.prompt2 is not None:
        idle["prompt2"] = "both text encoders read --prompt, as in sd-scripts"
    for net in NETS:
        if (value := getattr(args, f"{net}_dtype")) and not _is_fp8(value):
            idle[f"{net}_dtype"] = "nets run in the format of --dtype; what would overflow in it is computed in fp32"
    for name, why in idle.items():
        flags.note(f"--{name}: accepted, no effect: {why}")


def _config(prog: str, script: Script, args: Namespace, rest: Sequence[str]) -> Config:
    """The config that remains when prompts and adapters are taken off. Errors: `UserError`."""
    asked = "fp16" if args.fp16 else "bf16" if args.bf16 else _DTYPES.get(args.dtype or "", script.precision)
    words = [*rest, "--mixed_precision", asked] if asked else [*rest]
    if args.ae_dtype and _DTYPES[args.ae_dtype] == "no":
        words.append("--no_half_vae")
    if _attention(args) not in _missing():
        words += ["--attn_mode", _attention(args)]
    fp8 = {"quantize"} if args.fp8 or args.fp8_scaled else set[str]()
    fp8 |= {setting for net, setting in NETS.items() if _is_fp8(getattr(args, f"{net}_dtype"))}
    for setting in sorted(fp8):
        words += [f"--{setting}", "fp8"]
    if (args.interactive or beside(args)) and not any(word.startswith("--stream_text_encoders") for word in rest):
        # What is used again and again, or has adapters beside its weights, stays in memory.
        words += ["--stream_text_encoders", "false"]
    config = sample_config(words, prog, without=script.without)
    if script is OWN or not config.memory.blocks_to_swap:
        return config
    count = families.facts(config.family.family).swapped(config.memory.blocks_to_swap)
    return replace(config, memory=replace(config.memory, blocks_to_swap=count))


def _is_fp8(dtype: str | None) -> bool:
    return dtype is not None and dtype.startswith(("fp8", "float8"))


def _attention(args: Namespace) -> str:
    """What computes attention, by the flags of all scripts."""
    asked: str = "flash" if args.use_flash_attn else "sageattn" if args.use_sage_attn else args.attn_mode
    return asked


def _missing() -> list[str]:
    """What is not installed of what may compute attention."""
    return [kind for kind, library in ATTENTION.items() if not find_spec(library)]


def beside(args: Namespace) -> bool:
    """Whether adapters act beside the weights: only then can their strengths be changed, or a part of them be left
    out."""
    return bool(args.interactive or args.include_patterns or args.exclude_patterns) and not args.merge_lora_weights


def sample_config(words: Sequence[str], prog: str, without: Collection[str] = ()) -> Config:
    """The config of a command line with the flags of `sfumato sample`, `without` some. Errors: `UserError`."""
    read = [
        name
        for name, option in options.known().items()
        if name not in without and (option.section == "model" or name in SAMPLE.split() or name in options.owners())
    ]
    resolved = flags.resolve_all(words, "network", data=False, prog=prog, only=read)
    for notice in resolved.notices:
        flags.note(notice)
    return resolved.config


def take_controls(words: list[str]) -> tuple[list[tuple[Path, float]], str | None]:
    """Take control nets off a command line, with their strengths, and the images that they follow
    (`Prompt.controlnet_image`). Errors: `UserError`."""
    nets = tools.with_strengths(tools.take_values(words, CONTROLNET), CONTROLNET, files=False)
    images = tools.take_values(words, "control_image")
    if images and not nets:
        raise UserError(f"--control_image: it needs --{CONTROLNET}, the ControlNet that follows it")
    return nets, ";".join(images) or None


def given(script: Script, args: Namespace) -> dict[str, Any]:
    """The fields of a prompt that the command line sets. Errors: `UserError` for one that it sets twice."""
    found: dict[str, Any] = {"prompt": ""}
    flagged = [("guidance_scale", script.guidance, args.guidance_scale), ("guidance", "guidance_scale", args.guidance)]
    flagged += [(flag, name, getattr(args, flag)) for flag, name in PROMPT.items()]
    if args.image_size:
        flagged += [("image_size", "height", args.image_size[0]), ("image_size", "width", args.image_size[1])]
    twice = []
    for flag, name, value in flagged:
        if value is not None:
            twice += [f"--{flag}: {name} is set by another flag as well; leave one out"] if found.get(name) else []
            found[name] = value
    if twice:
        raise UserError(*twice)
    return found


def letters(script: Script) -> dict[str, str]:
    """Option of a line of prompts -> field."""
    return {**LETTERS, "g": script.guidance}


def _prompts(script: Script, args: Namespace, base: Prompt) -> list[Prompt]:
    from sfumato.sampling.prompts import read_prompts

    if args.interactive or args.latent_path or args.save_merged_model:
        return []
    if args.from_file:
        return read_prompts(args.from_file, replace(base, prompt=""), letters(script))
    return [replace(base, prompt=script.prompt if args.prompt is None else base.prompt)]


def _adapters(args: Namespace) -> list[tuple[Path, float]]:
    """Files and their strengths. Errors: `UserError`."""
    found, wrong = list[tuple[Path, float]](), list[str]()
    for text in args.lora_weights:
        file, _, strength = text.partition(";")
        try:
            found.append((Path(file).expanduser(), float(strength or 1)))
        except ValueError:
            wrong.append(f"--lora_weights {text}: expected FILE;STRENGTH, such as a.safetensors;0.8")
    if len(args.lora_multiplier) > len(args.lora_weight):
        wrong.append(f"--lora_multiplier: {len(args.lora_multiplier)} for {len(args.lora_weight)} files")
    for i, file in enumerate(args.lora_weight):
        found.append((Path(file).expanduser(), [*args.lora_multiplier, *[1.0] * (i + 1)][i]))
    wrong += [f"no such adapter file: {path}" for path, _ in found if not path.is_file()]
    wrong += [f"{path}: its strength {x} is no finite number" for path, x in found if not math.isfinite(x)]
    for name in ("include_patterns", "exclude_patterns"):
        if len(getattr(args, name)) > len(found):
            wrong.append(f"--{name}: {len(getattr(args, name))} for {len(found)} adapters")
    if wrong:
        raise UserError(*wrong)
    return found


def _skip(args: Namespace, place: int, path: Path) -> Callable[[str], bool]:
    """Whether a key of the adapter in this place is left out, by its patterns. Errors: `UserError` if all are."""
    include, exclude = (
        _pattern(name, texts[place]) if place < len(texts := getattr(args, name)) else None
        for name in ("include_patterns", "exclude_patterns")
    )

    def skip(key: str) -> bool:
        return bool((include and not include.search(key)) or (exclude and exclude.search(key)))

    from sfumato.formats.files import read_header

    if (include or exclude) and all(skip(key) for key in read_header(path).tensors):
        raise UserError(f"--include_patterns, --exclude_patterns: they leave nothing of {path}")
    return skip


def _pattern(flag: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"--{flag} {text}: is not a regular expression: {error}") from None
