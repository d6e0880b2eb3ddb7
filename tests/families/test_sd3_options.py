"""Stable Diffusion 3's settings on a command line, ours and kohya's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tinies import sd3
from tinies.cases import Files

from sfumato.cli import kohya
from sfumato.cli.flags import Resolved, resolve_all
from sfumato.errors import UserError
from sfumato.families.sd3.facts import FACTS, Completed, Options, scheme
from sfumato.families.sd3.family import FAMILY
from sfumato.models.flow_options import METADATA
from sfumato.sampling.prompts import default


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return sd3.write("3.5_medium", tmp_path_factory.mktemp("model"))


@pytest.fixture
def base(files: Files, images: Path) -> list[str]:
    (images.parent / "data.toml").write_text(
        f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{images}"\n'
    )
    told = {
        "pretrained_model_name_or_path": files.model,
        "dataset_config": images.parent / "data.toml",
        **files.options,
    }
    return [word for name, value in told.items() for word in (f"--{name}", str(value))]


def resolved(base: list[str], *more: str, script: str = "sd3_train_network") -> Resolved:
    return kohya.resolve(script, [*base, *more])


def test_the_defaults_are_the_papers_recipe(base: list[str], files: Files) -> None:
    config = resolved(base).config
    options: Any = config.family
    assert isinstance(options, Options)
    assert (options.timestep_sampling, scheme(options), options.model_prediction_type) == (
        "sigma",
        "logit_normal",
        "raw",
    )
    assert (options.t5xxl_max_token_length, options.apply_lg_attn_mask, options.apply_t5_attn_mask) == (
        256,
        False,
        False,
    )
    assert {name: getattr(options, name) for name in ("clip_l", "clip_g", "t5xxl")} == files.options
    assert config.sample.sample_sampler == "euler"


def test_a_usual_command_line_of_kohya(base: list[str]) -> None:
    """As its own documentation has it, but for what spares memory."""
    line = (
        "--output_dir out --output_name sd3 --save_model_as safetensors --network_module networks.lora_sd3 --network_dim 16 "
        "--network_alpha 1 --learning_rate 1e-4 --optimizer_type AdamW8bit --lr_scheduler constant --sdpa --max_train_epochs 4 "
        "--save_every_n_epochs 1 --mixed_precision bf16 --gradient_checkpointing --weighting_scheme uniform --logit_mean 0.0 "
        "--logit_std 1.0 --mode_scale 1.29 --training_shift 1.0 --apply_lg_attn_mask --apply_t5_attn_mask --clip_l_dropout_rate 0.1 "
        "--clip_g_dropout_rate 0.1 --t5_dropout_rate 0.1 --pos_emb_random_crop_rate 0.2 --t5xxl_max_token_length 256 "
        "--cache_latents --cache_text_encoder_outputs_to_disk --t5xxl_device cuda --t5xxl_dtype bf16 --save_clip --save_t5xxl "
        "--disable_mmap_load_safetensors --network_args train_block_indices=all emb_dims=[4,0,0,0,0,4] x_attn_dim=8 split_qkv=True"
    )
    found = resolved(base, *line.split())
    options: Any = found.config.family
    assert (options.training_shift, options.weighting_scheme, options.apply_lg_attn_mask) == (1.0, "uniform", True)
    assert (options.clip_l_dropout_rate, options.t5_dropout_rate, options.pos_emb_random_crop_rate) == (0.1, 0.1, 0.2)
    idle = {notice.split(":")[0] for notice in found.notices if "no effect" in notice}
    assert {"--logit_mean", "--logit_std", "--mode_scale"} <= idle
    assert (options.logit_mean, options.mode_scale) == (None, None)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--training_shift 3 --discrete_flow_shift 3", "training_shift.*the same as discrete_flow_shift"),
        ("--training_shift 0", "training_shift.*expected above 0"),
        ("--discrete_flow_shift -2", "discrete_flow_shift.*expected above 0"),
        ("--t5xxl_max_token_length 0", "t5xxl_max_token_length.*expected between 1 and 512, found 0"),
        ("--t5xxl_max_token_length 1024", "t5xxl_max_token_length.*expected between 1 and 512, found 1024"),
        ("--t5_dropout_rate 1.1", "t5_dropout_rate.*expected between 0 and 1, found 1.1"),
        ("--pos_emb_random_crop_rate -0.1", "pos_emb_random_crop_rate.*expected between 0 and 1"),
        ("--noise_offset 0.05", "noise_offset: .*plain noise"),
        ("--min_snr_gamma 5", "min_snr_gamma.*weighting_scheme"),
        ("--weighting_scheme logit", "weighting_scheme.*logit_normal"),
        ("--clip_g nowhere.safetensors", r"clip_g: .*nowhere\.safetensors does not exist"),
    ],
)
def test_mistakes_are_refused(base: list[str], flags: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        resolved(base, *flags.split())
    assert len(error.value.messages) == 1


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        ("--logit_mean 0.5", ""),
        ("--weighting_scheme logit_normal --logit_std 0.5", ""),
        ("--weighting_scheme mode --mode_scale 1", ""),
        ("--timestep_sampling uniform --logit_mean 0.5", "logit_mean"),
        ("--weighting_scheme uniform --logit_std 2", "logit_std"),
        ("--timestep_sampling uniform --weighting_scheme logit_normal", "weighting_scheme"),
        ("--timestep_sampling sigmoid --training_shift 2", "training_shift"),
        ("--timestep_sampling shift --training_shift 2", ""),
        ("--mode_scale 1", "mode_scale"),
    ],
)
def test_what_does_nothing_is_stated_or_refused(base: list[str], flags: str, idle: str) -> None:
    notices = resolved(base, *flags.split()).notices
    assert [n.split(":")[0] for n in notices if "no effect" in n] == ([f"--{idle}"] if idle else [])
    if idle:
        with pytest.raises(UserError, match=f"--{idle}"):
            resolve_all([*base, *flags.split()], "network")


@pytest.mark.parametrize(
    ("script", "flags", "idle"),
    [
        ("sd3_train_network", "--learning_rate_te1 1e-5", "learning_rate_te1"),
        ("sd3_train_network", "--train_t5xxl --network_train_unet_only", "train_t5xxl"),
        ("sd3_train_network", "--train_t5xxl --cache_text_encoder_outputs", "train_t5xxl"),
        ("sd3_train_network", "--train_t5xxl --text_encoder_lr 1e-5 1e-6 1e-7", ""),
        ("sd3_train", "--train_t5xxl", "train_t5xxl"),
        ("sd3_train", "--learning_rate_te2 1e-5", "learning_rate_te2"),
        ("sd3_train", "--train_text_encoder --learning_rate_te3 1e-5", "learning_rate_te3"),
        (
            "sd3_train",
            "--train_text_encoder --learning_rate_te1 1e-5 --learning_rate_te2 1e-5 --learning_rate_te 1e-4",
            "learning_rate_te",
        ),
        ("sd3_train", "--train_text_encoder --learning_rate_te1 1e-5 --learning_rate_te 1e-4", ""),
        (
            "sd3_train",
            "--train_text_encoder --train_t5xxl --learning_rate_te1 1e-5 --learning_rate_te2 0 --learning_rate_te3 1e-6",
            "",
        ),
    ],
)
def test_rates_and_encoders_that_are_not_trained(base: list[str], script: str, flags: str, idle: str) -> None:
    notices = resolved(base, *flags.split(), script=script).notices
    assert [n.split(":")[0] for n in notices if "no effect" in n] == ([f"--{idle}"] if idle else [])


def test_rates_of_whole_models() -> None:
    """What the text looks for in the last block has no say, and so no rate."""
    o = Completed(
        version="3.5-large",
        blocks=38,
        has_t5=True,
        learning_rate_te1=1e-5,
        learning_rate_te2=0.0,
        learning_rate_te3=1e-6,
    )
    assert [FAMILY.rate(o, name, "x.weight") for name in ("denoiser", "clip_l", "clip_g", "t5xxl")] == [
        None,
        1e-5,
        0.0,
        1e-6,
    ]
    assert FAMILY.rate(o, "denoiser", "joint_blocks.37.context_block.attn.ln_q.weight") == 0
    assert FAMILY.rate(o, "denoiser", "joint_blocks.36.context_block.attn.ln_q.weight") is None
    assert FAMILY.rate(o, "denoiser", "joint_blocks.37.x_block.attn.ln_q.weight") is None


def test_prompts_are_drawn_as_the_models_are(base: list[str]) -> None:
    drawn = default(resolved(base).config.family)
    assert (drawn.width, drawn.height, drawn.sample_steps, drawn.scale, drawn.guidance_scale) == (
        1024,
        1024,
        28,
        5.0,
        None,
    )


def test_the_encoders_have_kohyas_order() -> None:
    assert FAMILY.encoder_lr_order == ("clip_l", "clip_g", "t5xxl")


def test_what_is_written_into_results() -> None:
    """All of sd-scripts' fields of this family, and more."""
    assert set(METADATA) | {"apply_lg_attn_mask", "apply_t5_attn_mask"} <= set(FACTS.metadata)
    o = Completed(version="medium", blocks=24, has_t5=True)
    assert all(hasattr(o, name) for name in FACTS.metadata)


def test_another_familys_model_is_refused_by_the_script(base: list[str], model: Path) -> None:
    """The launcher of a family trains that family."""
    words = [str(model) if word == base[1] else word for word in base[:4]]
    with pytest.raises(
        UserError, match=r"sd3_train_network\.py is for the family sd3, but the base model is of the family sd"
    ):
        resolved(words)
