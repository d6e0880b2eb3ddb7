"""HunyuanImage-2.1's settings on a command line of kohya's, and how training, guidance and samples go by them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from noising import noised
from run_fixtures import make_images
from tinies import hunyuan_image
from torch import Tensor

from sfumato.cli import kohya
from sfumato.cli.flags import Resolved
from sfumato.config import LossConfig, NoiseConfig
from sfumato.errors import UserError
from sfumato.families.hunyuan_image import facts
from sfumato.families.hunyuan_image.facts import FACTS, Completed, Options
from sfumato.families.hunyuan_image.family import FAMILY, Unguided
from sfumato.models.base import Models, SampleInfo
from sfumato.sampling.prompts import default
from sfumato.tensors.flow import Flow
from sfumato.tensors.guidance import GuidanceInfo, ProjectedMix
from sfumato.tensors.random import SampleRandom


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("base")
    files, images = hunyuan_image.write(False, folder / "model"), make_images(folder)
    (folder / "data.toml").write_text(f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{images}"\n')
    told = {
        "pretrained_model_name_or_path": files.model,
        "dataset_config": folder / "data.toml",
        **files.options,
        "vae": files.vae,
    }
    return [word for name, value in told.items() for word in (f"--{name}", str(value))]


def resolved(base: list[str], *more: str, script: str = "hunyuan_image_train_network") -> Resolved:
    return kohya.resolve(script, [*base, *more])


def test_a_usual_command_line_of_kohya(base: list[str]) -> None:
    """As its own documentation has it, but for what spares memory."""
    line = (
        "--output_dir out --output_name h --save_model_as safetensors --network_module networks.lora_hunyuan_image "
        "--network_dim 16 --network_alpha 1 --learning_rate 1e-4 --optimizer_type AdamW8bit --lr_scheduler constant "
        "--attn_mode torch --split_attn --max_train_epochs 10 --save_every_n_epochs 1 --mixed_precision bf16 "
        "--gradient_checkpointing --timestep_sampling sigma --discrete_flow_shift 5.0 --model_prediction_type raw "
        "--cache_text_encoder_outputs --cache_latents --vae_chunk_size 16 --text_encoder_cpu --fp8_vl --loss_type l2 "
        "--network_args img_attn_dim=8 train_single_block_indices=none"
    )
    found = resolved(base, *line.split())
    options: Any = found.config.family
    assert (options.discrete_flow_shift, options.timestep_sampling, options.guidance_scale) == (5.0, "sigma", None)
    assert found.config.memory.attention == "sdpa"
    assert found.config.memory.encoder_format == "fp8"
    stated = {n.split(":")[0] for n in found.notices if "accepted, no effect" in n}
    assert stated == {"--split_attn", "--vae_chunk_size", "--text_encoder_cpu"}


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        ("hunyuan_image_train", "--train_text_encoder", "train_text_encoder: Qwen2.5-VL and byT5 are never trained"),
        ("hunyuan_image_train_network", "--network_train_text_encoder_only", "Qwen2.5-VL and byT5 are never trained"),
        ("hunyuan_image_train_network", "--noise_offset 0.05", "noise_offset: .*plain noise"),
    ],
)
def test_what_cannot_be_is_refused(base: list[str], script: str, flags: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        resolved(base, *flags.split(), script=script)
    assert len(error.value.messages) == 1


def test_whole_models_are_trained_by_a_script_of_our_own(base: list[str]) -> None:
    assert resolved(base, script="hunyuan_image_train").config.network == resolved(base).config.network
    notices = resolved(base, "--text_encoder_lr", "1e-5").notices
    assert any("--text_encoder_lr: accepted, no effect: Qwen2.5-VL and byT5 are never trained" in n for n in notices)


def test_prompts_are_drawn_as_the_models_are() -> None:
    prompt = default(Options())
    assert (prompt.width, prompt.height, prompt.sample_steps, prompt.scale) == (2048, 2048, 50, 3.5)
    assert (prompt.guidance_scale, prompt.flow_shift) == (3.25, 5.0)
    assert (prompt.apg_start_step_general, prompt.apg_start_step_ocr) == (5, 38)


def test_metadata() -> None:
    assert set(FACTS.metadata) <= set(Options.__dataclass_fields__)
    assert FACTS.architecture(Options()) == FACTS.base_model_version(Options()) == "hunyuan-image-2.1"


# --- models ---


def made(variant: facts.Variant = "base", **more: Any) -> Models:
    options = Completed(variant=variant, double_blocks=2, single_blocks=3, **more)
    return Models(FAMILY, options, torch.nn.Identity(), {}, {}, None)


def test_noise_levels_are_neither_cut_nor_rounded() -> None:
    """Shifted by 5 unless asked otherwise; sd-scripts cuts timesteps to whole numbers."""
    process = made().process(NoiseConfig(), LossConfig())
    assert process == Flow(shift=5.0)
    found = noised(process, torch.zeros(64, 64, 2, 2), SampleRandom(range(64)))
    assert found.t.dtype == torch.float32 and (found.t % 1 > 0).sum() > 50
    u = found.t / 1000 / (5 - 4 * found.t / 1000)
    assert 0.35 < u.mean() < 0.65
    torch.testing.assert_close(found.target, found.x / (found.t / 1000).view(-1, 1, 1, 1), atol=1e-4, rtol=1e-4)
    assert made(discrete_flow_shift=3.0).process(NoiseConfig(), LossConfig()).discrete_flow_shift == 3.0  # type: ignore[attr-defined]


def test_samplers_steps_are_shifted() -> None:
    even = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    torch.testing.assert_close(FAMILY.sigmas(made(), 4, 64, 4.0), 4 * even / (1 + 3 * even))  # type: ignore[misc]


def conditioned(models: Models, guidance: Tensor | None) -> Any:
    cond = {"text": torch.zeros(2, 3, 4), "glyphs": torch.zeros(2, 0, 4)}
    return models.condition(cond, SampleInfo(sizes=torch.zeros(2, 6), guidance=guidance))


def test_the_distilled_model_takes_a_guidance_and_the_base_model_none(caplog: pytest.LogCaptureFixture) -> None:
    asked = torch.tensor([2.0, 3.0])
    distilled = made("distilled", guidance_scale=1.5)
    assert conditioned(distilled, None)["guidance"].tolist() == [1.5, 1.5]
    assert conditioned(distilled, asked)["guidance"] is asked
    with caplog.at_level(logging.WARNING):
        assert "guidance" not in conditioned(made(), torch.tensor([3.25, 3.25]))
        assert not caplog.records
        assert "guidance" not in conditioned(made(), asked)
    assert "guidance_scale (--g) has no effect" in caplog.text


def guided(models: Models, scale: float = 3.5, masks: bool = True) -> Any:
    mask = {"glyphs_mask": torch.tensor([[False, False], [True, False]])} if masks else {}
    info = GuidanceInfo(
        scale=torch.full((2, 1, 1, 1), scale),
        steps=50,
        cond={"glyphs": torch.zeros(2, 2 if masks else 0, 4), **mask},
        values={
            "apg_start_step_general": 5,
            "apg_start_step_ocr": 38,
            "guidance_rescale": 0.1,
            "guidance_rescale_apg": 0.2,
        },
    )
    return FAMILY.guidance(models, info)


def test_text_in_quotes_is_guided_plainly_for_longer() -> None:
    """Each sample by itself, where diffusers' pipeline goes by the batch."""
    rule = guided(made())
    assert isinstance(rule, ProjectedMix) and rule.start.flatten().tolist() == [5, 38]
    assert (rule.guidance_rescale, rule.guidance_rescale_apg) == (0.1, 0.2)
    assert guided(made(), masks=False).start.flatten().tolist() == [5, 5]


def test_distilled_models_are_not_guided_again(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rule = guided(made("distilled"))
        assert isinstance(rule, Unguided) and not rule.uses_negative(3) and not caplog.records
        guided(made("distilled"), scale=7.0)
    assert "scale (--l) has no effect" in caplog.text
    x = torch.ones(1, 1, 1, 1)
    assert rule.combine(x, -x, 0) is x
