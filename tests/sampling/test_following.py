"""Samples that follow images, against diffusers' pipeline with the same ControlNets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tiny
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from tinies.cases import PROMPT, cases
from torch import Tensor

from sfumato.cli.inference_flags import take_controls
from sfumato.cli.main import main
from sfumato.config import LossConfig, NoiseConfig
from sfumato.errors import UserError
from sfumato.formats.files import load
from sfumato.models.base import Models
from sfumato.models.controlled import follow_by
from sfumato.sampling.following import check_images
from sfumato.sampling.sample import sample_latents, scheduler_for
from sfumato.tensors.noise import DDPM
from sfumato.train.pipeline import Pipeline

CASE = next(case for case in cases() if case.name == "sd-1")
NOISE = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_sd1(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two ControlNets with open doors."""
    made, generator = [], torch.Generator().manual_seed(3)
    for i in range(2):
        net = ControlNetModel.from_unet(CASE.pipeline().unet)
        for p in net.parameters():
            p.data += 0.02 * torch.randn(p.shape, generator=generator)
        made.append(tmp_path_factory.mktemp("net") / str(i))
        net.save_pretrained(made[-1])
    return made


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two, the second of another size than what is sampled."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, (width, height) in enumerate([(48, 32), (96, 64)]):
        noise = np.random.default_rng(i).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height)).save(folder / f"{i}.png")
    return [folder / "0.png", folder / "1.png"]


def theirs(nets: list[Path], pictures: list[Path], strengths: list[float]) -> Tensor:
    pipe: Any = StableDiffusionControlNetPipeline(
        **CASE.pipeline().components,
        controlnet=[ControlNetModel.from_pretrained(net) for net in nets],
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler_for(DDPM(), "euler")
    latents: Tensor = pipe(
        PROMPT.prompt,
        [Image.open(picture) for picture in pictures],
        negative_prompt=PROMPT.negative_prompt,
        height=PROMPT.height,
        width=PROMPT.width,
        num_inference_steps=PROMPT.sample_steps,
        guidance_scale=PROMPT.scale,
        controlnet_conditioning_scale=strengths,
        latents=NOISE,
        output_type="latent",
    ).images[0]
    return latents


def test_several_are_followed_as_by_diffusers(model: Path, nets: list[Path], pictures: list[Path]) -> None:
    models = CASE.models(CASE.write(model.parent / "again"))
    plain = replace(PROMPT, prompt="a dog")
    for net, strength in zip(nets, (0.7, 1.3), strict=True):
        follow_by(models, str(net), strength)
    followed = replace(PROMPT, controlnet_image=f"{pictures[0]}; {pictures[1]}")
    # With a neighbour that follows nothing.
    ours, other = sampled(models, followed, plain)
    torch.testing.assert_close(ours, theirs(nets, pictures, [0.7, 1.3]), atol=1e-4, rtol=1e-4)
    for follower in models.followers:
        follower.remove()
    models.followers.clear()
    alone, same = sampled(models, PROMPT, plain)
    torch.testing.assert_close(other, same, atol=1e-4, rtol=1e-4)
    assert (ours - alone).abs().max() > 1e-2


def sampled(models: Models, *prompts: Any) -> list[Tensor]:
    noise = NOISE.expand(len(prompts), -1, -1, -1)
    process = models.process(NoiseConfig(), LossConfig())
    return sample_latents(models, prompts, process=process, sampler="euler", noise=noise, batch_size=len(prompts))


def test_the_command_line_names_nets_strengths_and_images(
    model: Path, nets: list[Path], pictures: list[Path], tmp_path: Path
) -> None:
    words = ["sample", "--pretrained_model_name_or_path", str(model), "--output_dir", str(tmp_path / "out")]
    words += [
        "--prompt",
        "a cat",
        "--steps",
        "1",
        "--width",
        "48",
        "--height",
        "32",
        "--output_type",
        "latent",
        "--seed",
        "1",
    ]
    followed = [
        "--controlnet_model_name_or_path",
        str(nets[0]),
        "{}",
        str(nets[1]),
        "--control_image",
        *map(str, pictures),
    ]
    found = []
    for strength in ("1.0", "0.5"):
        assert main([*words, *(word.format(strength) for word in followed)]) == 0
        (file,) = (tmp_path / "out" / "sample").iterdir()
        found.append(load(file)["latent"])
        file.unlink()
    assert (found[0] - found[1]).abs().max() > 1e-3
    with patch.object(Pipeline, "of", side_effect=RuntimeError("weights are read")):
        assert main([*words, *(word.format("1.0") for word in followed[:-1])]) == 2
    (tmp_path / "p.txt").write_text(f"a cat --w 48 --h 32 --s 1 --cn {pictures[0]}")
    words = [*words[:5], "--sample_prompts", str(tmp_path / "p.txt")]
    assert main([*words, "--controlnet_model_name_or_path", str(nets[0])]) == 0
    assert main(words) == 2


def test_images_and_nets_must_go_together(pictures: list[Path]) -> None:
    one = replace(PROMPT, controlnet_image=str(pictures[0]))
    check_images([one], 1)
    check_images([PROMPT, one], 1, needed=False)
    with pytest.raises(UserError, match="there is no ControlNet"):
        check_images([one], 0)
    with pytest.raises(UserError, match="0 images to follow"):
        check_images([PROMPT], 1)
    with pytest.raises(UserError, match=r"1 images to follow .* for 2"):
        check_images([one], 2, needed=False)
    with pytest.raises(UserError, match=r"nothing\.png: no such file"):
        check_images([replace(one, controlnet_image="nothing.png")], 1)
    with pytest.raises(UserError, match=r"controlnet_image .*test_following\.py: not an image"):
        check_images([replace(one, controlnet_image=__file__)], 1)


@pytest.mark.parametrize(
    ("words", "nets", "images"),
    [
        ("--seed 1 --controlnet_model_name_or_path=a 0.5 b --control_image=c d", [("a", 0.5), ("b", 1.0)], "c;d"),
        ("--controlnet_model_name_or_path a -1 --control_image c --seed 1", [("a", -1.0)], "c"),
        ("--seed 1", [], None),
    ],
)
def test_nets_and_images_are_taken_off_a_command_line(words: str, nets: list[Any], images: str | None) -> None:
    given = words.split()
    assert take_controls(given) == ([(Path(name), strength) for name, strength in nets], images)
    assert given == [word for word in ("--seed", "1") if word in words]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a --control_image c --control_image d", "control_image: stands there twice"),
        ("a --controlnet_model_name_or_path b --control_image c d", "path: stands there twice"),
        ("a --control_image", "control_image: expected a value"),
        ("--control_image c", "controlnet_model_name_or_path: expected a value"),
        ("a nan --control_image c", "nan: a strength is a finite number"),
    ],
)
def test_what_is_set_of_nets_and_images_acts_or_fails(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        take_controls(["--controlnet_model_name_or_path", *words.split()])
