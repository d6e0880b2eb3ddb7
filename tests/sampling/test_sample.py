"""Drawing, against diffusers' pipeline of the same weights."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from sfumato import families
from sfumato.config import (
    Config,
    LossConfig,
    ModelConfig,
    NetworkConfig,
    NoiseConfig,
    OutputConfig,
    SampleConfig,
    TrainConfig,
)
from sfumato.errors import UserError
from sfumato.models import loading
from sfumato.models.base import Models
from sfumato.sampling.prompts import SAMPLERS, Prompt
from sfumato.sampling.sample import decode, encode_prompts, generate, sample, sample_latents, scheduler_for
from sfumato.tensors.guidance import ClassifierFree, GuidanceInfo
from sfumato.tensors.noise import DDPM
from sfumato.train.pipeline import main

SD = families.family("sd")
PROMPT = Prompt(prompt="a cat", negative_prompt="dull", width=48, height=32, sample_steps=3, scale=5.0, seed=1)
EPS = DDPM()
START = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    path = tiny.short_sd1(tmp_path_factory.mktemp("sd1"))
    return loading.load(SD, str(path), families.facts("sd").options())


def read(path: Path) -> tuple[np.ndarray[Any, Any], str]:
    with Image.open(path) as image:
        return np.asarray(image, float), image.info["parameters"]


def pipeline(v2: bool, process: Any, sampler: str) -> Any:
    pipe = tiny.pipeline(v2=v2, short=not v2)
    pipe.scheduler = scheduler_for(process, sampler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe: Any, prompt: Prompt, **given: Any) -> Any:
    return pipe(
        prompt.prompt,
        negative_prompt=prompt.negative_prompt,
        height=prompt.height,
        width=prompt.width,
        num_inference_steps=prompt.sample_steps,
        guidance_scale=prompt.scale,
        **{"output_type": "latent", **given},
    ).images


@pytest.mark.parametrize("scale", [5.0, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_a_fixed_latent_becomes_diffusers_latents(models: Models, sampler: str, scale: float) -> None:
    prompt = replace(PROMPT, scale=scale)
    (ours,) = sample_latents(models, [prompt], process=EPS, sampler=sampler, noise=START)
    wanted = theirs(pipeline(False, EPS, sampler), prompt, latents=START)[0]
    torch.testing.assert_close(ours, wanted, atol=1e-3, rtol=1e-3)
    assert (ours - START[0]).abs().mean() > 0.1


@pytest.mark.parametrize(
    "sampler", ["pndm", "lms", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle"]
)
def test_a_seed_gives_diffusers_image_with_every_sampler(models: Models, sampler: str) -> None:
    """The first noise and, for the ancestral ones, the noise on the way."""
    if sampler == "lms":
        pytest.importorskip("scipy")
    (ours,) = sample_latents(models, [PROMPT], process=EPS, sampler=sampler)
    wanted = theirs(pipeline(False, EPS, sampler), PROMPT, generator=torch.Generator().manual_seed(1))[0]
    torch.testing.assert_close(ours, wanted, atol=1e-3, rtol=1e-3)


def test_pixels_are_diffusers(models: Models) -> None:
    ours = decode(models, sample_latents(models, [PROMPT], process=EPS, noise=START)[0], PROMPT)
    wanted = theirs(pipeline(False, EPS, "ddim"), PROMPT, latents=START, output_type="np")[0]
    assert ours.size == (48, 32)
    assert np.abs(np.asarray(ours) / 255 - wanted).max() < 1.01 / 255


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmsolver++"])
def test_v_prediction_from_zero_signal(sampler: str, tmp_path: Path) -> None:
    folder = tiny.tiny_sd2_diffusers(tmp_path, prediction="v_prediction")
    models = loading.load(SD, str(folder), families.facts("sd").options())
    process = models.process(NoiseConfig(zero_terminal_snr=True), LossConfig())
    (ours,) = sample_latents(models, [PROMPT], process=process, sampler=sampler, noise=START)
    scheduler = getattr(diffusers, SAMPLERS[sampler][0])(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        **({"clip_sample": False, "set_alpha_to_one": False} if sampler == "ddim" else {}),
    )
    pipe = pipeline(True, process, sampler)
    pipe.scheduler = scheduler
    torch.testing.assert_close(ours, theirs(pipe, PROMPT, latents=START)[0], atol=1e-3, rtol=1e-3)
    assert scheduler.timesteps[0] == 999


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_a_batch_equals_single_runs(tmp_path: Path, sampler: str) -> None:
    """In fp64: nets this small, with two numbers in a group norm, blow the last digits of fp32 up."""
    models = loading.load(SD, str(tiny.short_sd1(tmp_path)), families.facts("sd").options(), dtype=torch.float64)
    prompts = [
        PROMPT,
        replace(PROMPT, prompt="a dog", seed=2, scale=3.0),
        replace(PROMPT, seed=3, scale=1.0),
        replace(PROMPT, width=32, seed=4),
        replace(PROMPT, seed=5, sample_steps=2),
    ]
    calls: list[tuple[int, int]] = []
    together = sample_latents(
        models, prompts, process=EPS, sampler=sampler, batch_size=4, progress=lambda *n: calls.append(n)
    )
    for one, prompt in zip(together, prompts, strict=True):
        (alone,) = sample_latents(models, [prompt], process=EPS, sampler=sampler)
        torch.testing.assert_close(one, alone, atol=1e-5, rtol=1e-5)
    assert calls == [(n, 11) for n in range(1, 12)]


class Half:
    """Guidance in the first half of the steps, which remembers what it was called with."""

    def __init__(self, info: GuidanceInfo) -> None:
        self.info, self.steps = info, list[int]()

    def uses_negative(self, step: int) -> bool:
        return (step + 1) / self.info.steps <= 0.5

    def combine(self, positive: Tensor, negative: Tensor, step: int) -> Tensor:
        self.steps.append(step)
        return ClassifierFree(self.info.scale).combine(positive, negative, step)


def test_a_family_guides_in_its_own_way(models: Models) -> None:
    """The negative half is predicted in the guided steps alone, and the negative prompt has tokens of its own."""
    rules, batches, negatives = list[Half](), list[int](), list[str]()
    times = list[tuple[float, float]]()

    class Tokens:
        def tokenize(self, captions: list[str]) -> Any:
            negatives.extend(captions)
            return models.tokenize_strategy.tokenize(captions)

    def predict(net: Any, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        batches.append(len(x))
        times.append((float(t[0]), float(cond["t_next"][0])))
        assert {len(tensor) for tensor in cond.values()} == {len(x)}
        return models.family.predict(net, x, t, cond)

    def guidance(models: Models, info: GuidanceInfo) -> Half:
        rules.append(Half(info))
        return rules[-1]

    family = replace(models.family, guidance=guidance, predict=predict, tokenize_negative=lambda m: cast(Any, Tokens()))
    own = replace(models, family=family)
    prompts = [replace(PROMPT, sample_steps=4, seed=seed) for seed in (1, 2)]
    ours = sample_latents(own, prompts, process=EPS, sampler="ddim", batch_size=2)
    assert [there for _, there in times] == [*(here for here, _ in times[1:]), 0]
    assert batches == [4, 4, 2, 2] and rules[0].steps == [0, 1] and negatives == ["dull"]
    assert rules[0].info.scale.flatten().tolist() == [5.0, 5.0] and rules[0].info.values == {}
    plain = sample_latents(models, prompts, process=EPS, sampler="ddim", batch_size=2)
    assert not torch.allclose(ours[0], plain[0])
    with pytest.raises(UserError, match="the prompt 'a cat': renorm_cfg: the samples of this model have no use"):
        sample_latents(models, [replace(PROMPT, renorm_cfg=1.0)], process=EPS)


def test_a_prompt_shifts_the_noise_levels(models: Models) -> None:
    sigmas, scheduler = families.family("sd3").sigmas, diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(6)
    assert sigmas is not None
    torch.testing.assert_close(sigmas(models, 6, 64, 5.0), cast(Any, scheduler).sigmas)


def test_global_randomness_is_not_touched(models: Models) -> None:
    before = torch.random.get_rng_state()
    generate(models, [PROMPT], process=EPS, sampler="euler_a")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_part_gets_its_mode_back(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    net = models.denoiser
    net.train()
    frozen = next(net.children())
    frozen.eval()
    seen = []
    hook = net.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    generate(models, [PROMPT], process=EPS)
    modes = (net.training, frozen.training, list(net.children())[1].training)
    monkeypatch.setattr(models, "family", replace(models.family, predict=lambda *_: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        generate(models, [PROMPT], process=EPS)
    modes += (net.training,)
    hook.remove()
    net.eval()
    assert set(seen) == {(False, False)}
    assert modes == (True, False, True, True)


@pytest.mark.parametrize(
    ("dtype", "mixed"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False)]
)
def test_16_bits_sample_nearly_the_same(models: Models, tmp_path: Path, dtype: torch.dtype, mixed: bool) -> None:
    half = loading.load(SD, str(tiny.short_sd1(tmp_path)), families.facts("sd").options(), dtype=dtype)
    half.vae.to(dtype)
    exact = sample_latents(models, [PROMPT], process=EPS, noise=START)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        near = sample_latents(half, [PROMPT], process=EPS, noise=START)[0]
        image = decode(half, near, PROMPT)
    assert near.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(near.flatten(), exact.flatten(), 0) > 0.995
    difference = np.asarray(image, float) - np.asarray(decode(models, exact, PROMPT), float)
    assert np.abs(difference).mean() < 4


def test_the_vae_keeps_its_own_format_under_autocast(models: Models) -> None:
    seen: list[torch.dtype] = []
    hook = models.vae.decoder.conv_out.register_forward_hook(lambda _m, _x, y: seen.append(y.dtype))  # type: ignore[union-attr, operator, call-arg]
    with torch.autocast("cpu", torch.bfloat16):
        decode(models, START[0], PROMPT)
    hook.remove()
    assert seen == [torch.float32]


def test_files_and_seeds(models: Models, tmp_path: Path) -> None:
    prompts = [PROMPT, replace(PROMPT, seed=None), replace(PROMPT, prompt="a dog", seed=None)]

    def write(folder: Path, **more: Any) -> list[Path]:
        return sample(models, prompts, folder, process=EPS, name="x", step=20, **more)

    first = write(tmp_path / "a")
    assert [re.sub(r"\d{14}", "T", p.name) for p in first] == [
        "x_000020_00_T_1.png",
        "x_000020_01_T.png",
        "x_000020_02_T.png",
    ]
    second = write(tmp_path / "b")
    other = write(tmp_path / "c", seed=43)
    shards = [write(tmp_path / "d", rank=r, world=2) for r in (0, 1)]
    assert [len(s) for s in shards] == [2, 1]

    def pixels(paths: list[Path]) -> list[np.ndarray[Any, Any]]:
        return [read(p)[0] for p in paths]

    for a, b, d in zip(pixels(first), pixels(second), pixels([shards[0][0], shards[1][0], shards[0][1]]), strict=True):
        assert np.array_equal(a, b) and np.array_equal(a, d)
    same = [np.array_equal(a, c) for a, c in zip(pixels(first), pixels(other), strict=True)]
    assert same == [True, False, False]
    assert "Seed: 1," in read(first[0])[1]


def test_a_image_that_is_not_finite_is_reported_and_still_written(
    models: Models, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        image = decode(models, torch.full((4, 2, 2), torch.nan), PROMPT)
    assert image.size == (16, 16) and "diverged" in caplog.text and "'a cat'" in caplog.text


def test_what_has_no_effect_is_reported(models: Models, caplog: pytest.LogCaptureFixture) -> None:
    odd = replace(PROMPT, width=39, guidance_scale=3.5, sample_steps=1)
    with caplog.at_level(logging.WARNING):
        (image,) = generate(models, [odd], process=EPS)
    assert image.size == (32, 32)
    assert "multiples of 8" in caplog.text and "--g" in caplog.text


def test_a_prompt_that_is_cut_is_reported(models: Models, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        encode_prompts(models, [PROMPT, replace(PROMPT, prompt="cat " * 80)])
    (said,) = caplog.messages
    assert re.fullmatch(r"the prompt '(cat ){10} ...' has \d+ tokens, and CLIP reads 75; max_token_length .*", said)


def test_an_image_without_a_latent_is_refused(models: Models) -> None:
    with pytest.raises(UserError, match="the prompt 'a cat': 7x16: both sides must be at least 8"):
        generate(models, [replace(PROMPT, width=7, height=16)], process=EPS)


def test_samplers_that_do_not_fit_are_refused() -> None:
    zero = DDPM(prediction="v", zero_terminal_snr=True)
    for sampler in ("pndm", "heun", "dpm_2", "dpmsingle"):
        with pytest.raises(UserError, match="zero_terminal_snr"):
            scheduler_for(zero, sampler)
    with pytest.raises(UserError, match="did you mean 'euler'"):
        scheduler_for(EPS, "eulr")


def test_a_sampler_whose_library_is_missing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        def __init__(self) -> None:
            raise ImportError("scipy")

    monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", Missing)
    with pytest.raises(UserError, match="pip install scipy"):
        scheduler_for(EPS, "lms")


def test_a_model_without_a_vae_is_refused(models: Models) -> None:
    latent: Tensor = START[0]
    with pytest.raises(UserError, match="--vae"):
        decode(replace(models, vaes=None), latent, PROMPT)


def lora(folder: Path) -> Path:
    """An adapter in sd-scripts' names on one layer, strong enough to be seen."""
    draw = torch.Generator().manual_seed(0)
    layer = "lora_unet_up_blocks_2_attentions_1_proj_out"
    tensors = {f"{layer}.alpha": torch.tensor(2.0)}
    for part, shape in (("lora_down", (2, 32, 1, 1)), ("lora_up", (32, 2, 1, 1))):
        tensors[f"{layer}.{part}.weight"] = torch.randn(shape, generator=draw)
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def run(
    folder: Path, name: str, network: NetworkConfig, precision: Literal["no", "bf16"] = "no"
) -> np.ndarray[Any, Any]:
    """`sfumato sample` with a tiny model and one prompt -> the image."""
    (folder / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    config = Config(
        model=ModelConfig(pretrained_model_name_or_path=str(tiny.short_sd1(folder))),
        output=OutputConfig(output_dir=str(folder / name), output_name=name),
        sample=SampleConfig(sample_prompts=str(folder / "prompts.txt"), sample_sampler="k_euler"),
        train=TrainConfig(mixed_precision=precision),
        network=network,
        family=families.facts("sd").options(),
    )
    (path,) = main(config)
    assert (
        path.parent == folder / name / "sample" and path.name.startswith(f"{name}_00_") and path.name.endswith("_1.png")
    )
    return read(path)[0]


def test_the_command_samples_with_adapters_worn_or_merged(tmp_path: Path) -> None:
    plain = run(tmp_path, "plain", NetworkConfig())
    file = str(lora(tmp_path))
    worn = run(tmp_path, "worn", NetworkConfig(network_weights=file))
    merged = run(tmp_path, "merged", NetworkConfig(base_weights=(file,)))
    half = run(tmp_path, "half", NetworkConfig(network_weights=file), "bf16")
    assert np.abs(worn - plain).mean() > 10
    assert np.abs(worn - merged).mean() < 0.5
    assert np.abs(worn - half).mean() < 5


def test_a_wrong_sampler_is_reported_before_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat")
    for sampling, words in (
        (SampleConfig(sample_prompts=str(tmp_path / "p.txt"), sample_sampler="dimm"), "ddim"),
        (SampleConfig(), "sample_prompts"),
    ):
        with pytest.raises(UserError, match=words):
            main(Config(sample=sampling))


def test_a_folder_that_cannot_be_made_is_reported_before_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat")
    (tmp_path / "sample").write_text("a file")
    with pytest.raises(UserError, match="sample: a folder is to be written here, and this is a file"):
        main(
            Config(
                sample=SampleConfig(sample_prompts=str(tmp_path / "p.txt")),
                output=OutputConfig(output_dir=str(tmp_path)),
            )
        )
