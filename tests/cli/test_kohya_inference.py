"""Command lines of kohya's minimal inference scripts: read, and done with tiny models."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import launch
from PIL import Image
from safetensors.torch import save_file
from tinies import flux, lumina2, sd3, sdxl

from sfumato.cli.inference_flags import SCRIPTS, given, parse, read
from sfumato.cli.main import main
from sfumato.errors import UserError
from sfumato.formats.files import read_header
from sfumato.sampling.prompts import Prompt
from sfumato.train.pipeline import Pipeline

LINES: dict[str, tuple[str, dict[str, str], str]] = {
    "sdxl_minimal_inference": (
        "--ckpt_path m.safetensors --prompt cat --prompt2 cat --negative_prompt bad --output_dir out --lora_weights a.safetensors;0.5 b.safetensors",
        {"prompt": "cat", "negative_prompt": "bad"},
        "--pretrained_model_name_or_path m.safetensors",
    ),
    "sd3_minimal_inference": (
        "--ckpt_path m.safetensors --clip_l l --clip_g g --t5xxl t --t5xxl_token_length 77 --apply_lg_attn_mask --apply_t5_attn_mask --prompt cat "
        "--cfg_scale 5 --offload --output_dir out --bf16 --seed 1 --steps 50 --merge_lora_weights --width 512 --height 768",
        {"prompt": "cat", "scale": "5", "seed": "1", "sample_steps": "50", "width": "512", "height": "768"},
        "--pretrained_model_name_or_path m.safetensors --clip_l l --clip_g g --t5xxl t --t5xxl_max_token_length 77 --apply_lg_attn_mask --apply_t5_attn_mask",
    ),
    "flux_minimal_inference": (
        "--ckpt_path=m.safetensors --model_type chroma --clip_l l --t5xxl t --ae v --prompt cat --dtype bfloat16 --clip_l_dtype fp16 --ae_dtype float32 "
        "--t5xxl_dtype bf16 --flux_dtype bf16 --guidance 3.5 --cfg_scale 1.0 --negative_prompt bad --interactive --offload",
        {"prompt": "cat", "guidance_scale": "3.5", "scale": "1.0", "negative_prompt": "bad"},
        "--pretrained_model_name_or_path=m.safetensors --model_type chroma --clip_l l --t5xxl t --vae v",
    ),
    "lumina_minimal_inference": (
        "--pretrained_model_name_or_path m.safetensors --gemma2_path g --ae_path v --image_width 512 --image_height 768 --steps 20 --guidance_scale 4 "
        "--dtype bf16 --gemma2_dtype bf16 --ae_dtype bf16 --device cpu --offload --system_prompt Draw. --gemma2_max_token_length 300 "
        "--discrete_flow_shift 6 --cfg_trunc_ratio 0.5 --renorm_cfg 0 --use_flash_attn --use_sage_attn",
        {"width": "512", "height": "768", "sample_steps": "20", "scale": "4", "flow_shift": "6"}
        | {"cfg_trunc_ratio": "0.5", "renorm_cfg": "0"},
        "--pretrained_model_name_or_path m.safetensors --gemma2 g --vae v --system_prompt Draw. --gemma2_max_token_length 300",
    ),
    "hunyuan_image_minimal_inference": (
        "--dit m.safetensors --vae v --text_encoder q --byt5 b --lora_weight a b --lora_multiplier 0.5 --include_patterns double --guidance_scale 3.5 "
        "--apg_start_step_ocr 38 --apg_start_step_general 5 --guidance_rescale 0.1 --guidance_rescale_apg 0.2 --prompt cat --image_size 2048 1024 "
        "--infer_steps 50 --save_path out --flow_shift 5 --vae_chunk_size 16 --attn_mode flash --output_type latent_images --no_metadata --lycoris",
        {"prompt": "cat", "scale": "3.5", "height": "2048", "width": "1024", "sample_steps": "50", "flow_shift": "5"}
        | {
            "apg_start_step_ocr": "38",
            "apg_start_step_general": "5",
            "guidance_rescale": "0.1",
            "guidance_rescale_apg": "0.2",
        },
        "--pretrained_model_name_or_path m.safetensors --vae v --text_encoder q --byt5 b",
    ),
    "anima_minimal_inference": (
        "--dit m.safetensors --vae v --vae_disable_cache --text_encoder q --from_file p.txt --save_path out --fp16_safe_patch --attn_mode sageattn --seed 3",
        {"prompt": "", "seed": "3"},
        "--pretrained_model_name_or_path m.safetensors --vae v --qwen3 q",
    ),
}
"""Script -> a command line with its flags, what it says of the prompt, and what remains for `sfumato sample`."""


def test_blocks_are_counted_as_the_script_counts_them(dev: Tiny, medium: Tiny) -> None:
    """Of FLUX, half of the number are of two streams, and twice the other half of one."""
    assert dev.parse("--blocks_to_swap 3").config.memory.blocks_to_swap == 5
    assert medium.parse("--blocks_to_swap 3").config.memory.blocks_to_swap == 3


def test_weights_are_kept_in_fp8_where_the_script_does_so(dev: Tiny) -> None:
    def kept(line: str) -> tuple[str | None, str | None]:
        memory = dev.parse(line).config.memory
        return memory.denoiser_format, memory.encoder_format

    assert kept("--flux_dtype fp8_e4m3fn") == kept("--fp8_scaled") == ("fp8", None)
    assert kept("--fp8 --t5xxl_dtype float8_e4m3fn") == ("fp8", "fp8")
    assert kept("--clip_l_dtype bf16 --quantize nf4") == ("nf4", None)


@pytest.mark.parametrize("script", list(SCRIPTS))
def test_flags_are_read(script: str) -> None:
    line, wanted, rest = LINES[script]
    args, words = read(script, SCRIPTS[script], line.split())
    assert given(SCRIPTS[script], args) == {"prompt": ""} | wanted
    assert " ".join(words) == rest


@pytest.mark.parametrize(
    ("script", "line", "words"),
    [
        ("anima_minimal_inference", "--prompt a --save_path o --text_encoder_cpu", "use --offload"),
        ("anima_minimal_inference", "--prompt a", "--save_path is missing"),
        ("anima_minimal_inference", "--save_path o", "say what to sample: --prompt, --from_file or --interactive"),
        ("anima_minimal_inference", "--save_path o --from_file p --interactive", "exclude each other"),
        ("flux_minimal_inference", "--ae_dtype fp8_e4m3fn", "--ae_dtype fp8_e4m3fn: expected float"),
        ("flux_minimal_inference", "--dtype int8", "--dtype int8: expected float"),
        ("flux_minimal_inference", "--attn_mode x", "--attn_mode: invalid choice"),
        ("sd3_minimal_inference", "--merge_lora_weights --exclude_patterns a", "do nothing where adapters are merged"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_what_to_do(script: str, line: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        read(script, SCRIPTS[script], line.split())
    assert words in str(refused.value)


# --- with tiny models ---


class Tiny:
    """A model's files, and the flags that name them."""

    def __init__(self, script: str, files: Any) -> None:
        self.script = script
        named = {"ckpt_path": files.model, **files.options} | ({"ae": files.vae} if files.vae else {})
        self.words = [word for name, path in named.items() for word in (f"--{name}", str(path))]

    def parse(self, line: str) -> Any:
        return parse(f"{self.script}.py", SCRIPTS[self.script], [*self.words, *line.split()])

    def launch(self, folder: Path, words: Sequence[str]) -> str:
        return launch(self.script, [*self.words, *words], folder)


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny("sdxl_minimal_inference", sdxl.write(tmp_path_factory.mktemp("sdxl")))


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny("sd3_minimal_inference", sd3.CASES[0].write(tmp_path_factory.mktemp("sd3")))


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny("flux_minimal_inference", flux.write(True, tmp_path_factory.mktemp("dev")))


@pytest.fixture(scope="module")
def lumina(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny("lumina_minimal_inference", lumina2.write(tmp_path_factory.mktemp("lumina")))


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny("flux_minimal_inference", flux.write(False, tmp_path_factory.mktemp("schnell")))


def test_defaults_are_kohyas(xl: Tiny, medium: Tiny, dev: Tiny, schnell: Tiny, lumina: Tiny, tmp_path: Path) -> None:
    cat = Prompt(prompt="A photo of a cat", width=1024, height=1024, sample_steps=50)
    assert xl.parse("").prompts == [replace(cat, scale=7.0)]
    assert xl.parse("").config.train.mixed_precision == "fp16"
    found = medium.parse("--prompt a --bf16")
    assert found.prompts == [replace(cat, prompt="a", scale=5.0, seed=1, flow_shift=3.0)]
    assert found.config.train.mixed_precision == "bf16" and not found.config.memory.no_half_vae
    flux = Prompt(prompt=cat.prompt, width=1360, height=768, sample_steps=50, scale=1.0, guidance_scale=3.5)
    assert dev.parse("--ae_dtype fp32").prompts == [flux]
    assert dev.parse("--ae_dtype fp32").config.memory.no_half_vae
    assert schnell.parse("").prompts == [replace(flux, sample_steps=4)]
    sunset = replace(cat, prompt="A beautiful sunset over the mountains", sample_steps=36, scale=3.5, flow_shift=6.0)
    found = lumina.parse("--system_prompt Draw. --renorm_cfg 0.5")
    assert found.prompts == [replace(sunset, cfg_trunc_ratio=0.25, renorm_cfg=0.5)]
    assert found.config.family.system_prompt == "Draw."
    # A large text encoder is read once where prompts are asked for, and else streamed.
    assert dev.parse("--interactive").config.memory.stream_text_encoders is False
    assert schnell.parse("").config.memory.stream_text_encoders is None
    (tmp_path / "p.txt").write_text("a fox --g 2 --l 3 --w 64 --d 4\n\n# no prompt\na dog --n bad\n")
    asked = replace(flux, prompt="a fox", width=64, seed=4, scale=3.0, guidance_scale=2.0)
    assert dev.parse(f"--from_file {tmp_path / 'p.txt'}").prompts == [
        asked,
        replace(flux, prompt="a dog", negative_prompt="bad"),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--flow_shift 3", "flow_shift: the samples of this model have no use for it"),
        ("--cfg_trunc_ratio 0.5", "cfg_trunc_ratio: the samples of this model have no use for it"),
        ("--steps 0", "sample_steps: 1 to 1000 was expected, not 0"),
        ("--width 64 --image_size 64 64", "--image_size: width is set by another flag as well"),
        ("--gemma2 g", "--gemma2"),
        ("--sample_prompts p.txt", "--sample_prompts: is not a flag of `flux_minimal_inference.py`"),
        ("--lora_weights none.safetensors;1 a;b", "--lora_weights a;b: expected FILE;STRENGTH"),
        ("--lora_weights none.safetensors;1", "no such adapter file: none.safetensors"),
        ("--lora_weights none.safetensors;nan", "none.safetensors: its strength nan is no finite number"),
        ("--lora_multiplier 1", "--lora_multiplier: 1 for 0 files"),
    ],
)
def test_mistakes_are_named(dev: Tiny, line: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        dev.parse(line)
    assert words in str(refused.value)


SMALL = ["--width", "64", "--height", "64", "--steps", "2", "--output_dir", "out"]


def lora(folder: Path) -> str:
    """An adapter on two layers of the tiny transformer, strong enough to be seen."""
    draw, tensors = torch.Generator().manual_seed(0), dict[str, torch.Tensor]()
    for i in range(2):
        name = f"lora_unet_joint_blocks_{i}_x_block_mlp_fc1"
        down, up = torch.randn(2, 128, generator=draw), torch.randn(512, 2, generator=draw)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    save_file(tensors, folder / "lora.safetensors")
    return str(folder / "lora.safetensors")


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image, float)


def only(folder: Path) -> np.ndarray[Any, Any]:
    """The pixels of the one image in a folder, which is taken away."""
    (path,) = folder.glob("*.png")
    found = pixels(path)
    path.unlink()
    return found


def test_latents_are_kept_and_decoded_and_adapters_taken_in_part(
    medium: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, out = lora(tmp_path), tmp_path / "out"
    medium.launch(tmp_path, [*SMALL, "--output_type", "latent_images"])
    plain = only(out)
    medium.launch(tmp_path, [*SMALL, "--lora_weights", f"{adapter};0.5", "--merge_lora_weights"])
    merged = only(out)
    own = [
        "sample",
        *(w.replace("ckpt_path", "pretrained_model_name_or_path") for w in medium.words),
        *SMALL,
        "--seed",
        "1",
        "--cfg_scale",
        "5",
        "--network_weights",
        adapter,
        "0.5",
    ]
    monkeypatch.chdir(tmp_path)
    assert main([*own, "--sample_sampler", "euler", "--prompt", "A photo of a cat"]) == 0
    assert np.array_equal(only(out / "sample"), merged)
    beside = ["--lora_weight", adapter, "--lora_multiplier", "0.5", "--include_patterns", "lora_unet", "--offload"]
    medium.launch(tmp_path, [*SMALL, *beside, "--no_metadata"])
    assert np.abs(merged - only(out)).mean() < 1 < np.abs(merged - plain).mean()
    with pytest.raises(UserError, match="they leave nothing of"):
        medium.parse(f"--lora_weight {adapter} --exclude_patterns blocks_[01]_x")
    (latent,) = out.glob("*_1_latent.safetensors")
    header = read_header(latent)
    assert header.tensors["latent"].shape == (1, 16, 8, 8)
    assert header.metadata["seeds"] == "1" and header.metadata["prompt"] == "A photo of a cat"
    medium.launch(tmp_path, ["--latent_path", str(latent), "--output_dir", "out"])
    assert np.array_equal(only(out), plain)


def test_prompts_are_asked_for_and_the_model_is_read_once(
    medium: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "a cat --w 32 --d 5 --m 0",
        "a cat --d 5 --n -",
        "a cat --zz 1",
        "a cat --d 5 --m 1",
        "a cat --m 1,2",
        "exit",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    read_models = []
    of = Pipeline.of
    monkeypatch.setattr(Pipeline, "of", lambda *args, **how: read_models.append(of(*args, **how)) or read_models[-1])
    said = medium.launch(tmp_path, [*SMALL, "--interactive", "--lora_weights", lora(tmp_path)])
    assert len(read_models) == 1
    assert [line for line in said.splitlines() if "error" in line] == [
        "error: prompt: unknown option --zz; known are --c, --cn, --ctr, --d, --fs, --g, --h, --l, --n, --rcfg, --s, --w",
        "error: --m 1,2: 2 strengths for 1 adapters that are not merged",
    ]
    first, kept, strong = (pixels(tmp_path / path) for path in capsys.readouterr().out.splitlines())
    assert first.shape == (64, 32, 3)  # the width stays for the next ones
    assert np.array_equal(first, kept) and np.abs(first - strong).mean() > 1


def test_merging_writes_the_model_and_samples_nothing(medium: Tiny, tmp_path: Path) -> None:
    adapter = lora(tmp_path)
    medium.launch(tmp_path, ["--save_merged_model", "merged.safetensors", "--lora_weight", adapter])
    assert sorted(path.name for path in tmp_path.glob("*")) == ["lora.safetensors", "merged.safetensors"]
    with pytest.raises(UserError, match="name the adapters to merge"):
        medium.parse("--save_merged_model merged.safetensors")
