"""FLUX.1's settings on a command line, ours and kohya's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tinies import flux

from sfumato.cli import kohya
from sfumato.cli.flags import Resolved, resolve_all
from sfumato.errors import UserError
from sfumato.families.flux.facts import FACTS, Options
from sfumato.families.flux.family import FAMILY
from sfumato.sampling.prompts import default


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return flux.write(True, tmp_path_factory.mktemp("model"))


@pytest.fixture
def base(files: Any, images: Path) -> list[str]:
    (images.parent / "data.toml").write_text(
        f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{images}"\n'
    )
    told = {
        "pretrained_model_name_or_path": files.model,
        "dataset_config": images.parent / "data.toml",
        **files.options,
        "ae": files.vae,
    }
    return [word for name, value in told.items() for word in (f"--{name}", str(value))]


def resolved(base: list[str], *more: str, script: str = "flux_train_network") -> Resolved:
    return kohya.resolve(script, [*base, *more])


def test_the_defaults_are_the_recommended_run(base: list[str], files: Any) -> None:
    config = resolved(base).config
    options: Any = config.family
    assert isinstance(options, Options)
    assert (options.timestep_sampling, options.discrete_flow_shift, options.model_prediction_type) == (
        "shift",
        None,
        "raw",
    )
    assert (options.guidance_scale, options.apply_t5_attn_mask, options.t5xxl_max_token_length) == (None, False, None)
    assert (options.clip_l, options.t5xxl, config.model.vae) == (
        files.options["clip_l"],
        files.options["t5xxl"],
        files.vae,
    )
    assert config.sample.sample_sampler == "euler"


def test_a_usual_command_line_of_kohya(base: list[str]) -> None:
    """As its own documentation has it, but for what spares memory."""
    line = (
        "--output_dir out --output_name flux --save_model_as safetensors --network_module networks.lora_flux --network_dim 16 "
        "--network_alpha 1 --learning_rate 1e-4 --optimizer_type AdamW8bit --lr_scheduler constant --sdpa --max_train_epochs 10 "
        "--save_every_n_epochs 1 --mixed_precision bf16 --gradient_checkpointing --apply_t5_attn_mask --timestep_sampling shift "
        "--discrete_flow_shift 3.1582 --model_prediction_type raw --guidance_scale 1.0 --loss_type l2 --model_type flux "
        "--cache_latents --cache_text_encoder_outputs_to_disk --t5xxl_max_token_length 512 --network_args train_blocks=double split_qkv=True"
    )
    options: Any = resolved(base, *line.split()).config.family
    assert (options.discrete_flow_shift, options.guidance_scale, options.apply_t5_attn_mask, options.model_type) == (
        3.1582,
        1.0,
        True,
        "flux",
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model_type chroma", "model_type"),
        ("--noise_offset 0.05", "noise_offset: .*plain noise"),
        ("--min_snr_gamma 5", "min_snr_gamma.*weighting_scheme"),
        ("--t5xxl_max_token_length 0", "t5xxl_max_token_length.*expected 1 or more"),
        ("--guidance_scale -1", "guidance_scale.*expected 0 or more, found -1"),
        ("--discrete_flow_shift -2", "discrete_flow_shift.*expected above 0"),
        ("--timestep_sampling fluxshift", "timestep_sampling.*flux_shift"),
        ("--t5xxl nowhere.safetensors", r"t5xxl: .*nowhere\.safetensors does not exist"),
    ],
)
def test_mistakes_are_refused(base: list[str], flags: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        resolved(base, *flags.split())
    assert len(error.value.messages) == 1


@pytest.mark.parametrize("kind", ["sigma", "uniform", "sigmoid", "shift", "flux_shift"])
@pytest.mark.parametrize("prediction", ["raw", "additive", "sigma_scaled"])
def test_all_kinds_can_be_chosen(base: list[str], kind: str, prediction: str) -> None:
    options: Any = resolved(base, "--timestep_sampling", kind, "--model_prediction_type", prediction).config.family
    assert (options.timestep_sampling, options.model_prediction_type) == (kind, prediction)


def test_what_does_nothing_is_stated_or_refused(base: list[str]) -> None:
    told = ["--timestep_sampling", "flux_shift", "--discrete_flow_shift", "3"]
    assert any("--discrete_flow_shift" in notice and "no effect" in notice for notice in resolved(base, *told).notices)
    with pytest.raises(UserError, match="discrete_flow_shift"):
        resolve_all([word.replace("--ae", "--vae") for word in base] + told, "network")


@pytest.mark.parametrize(
    ("script", "flags", "idle"),
    [
        ("flux_train_network", "--learning_rate_te1 1e-5", "learning_rate_te1"),
        ("flux_train_network", "--train_t5xxl --network_train_unet_only", "train_t5xxl"),
        ("flux_train_network", "--train_t5xxl --cache_text_encoder_outputs", "train_t5xxl"),
        ("flux_train", "--train_t5xxl", "train_t5xxl"),
        ("flux_train", "--train_text_encoder --learning_rate_te3 1e-5", "learning_rate_te3"),
        ("flux_train", "--train_text_encoder --learning_rate_te1 1e-5 --learning_rate_te 1e-4", "learning_rate_te"),
        ("flux_train", "--train_text_encoder --train_t5xxl --learning_rate_te1 1e-5 --learning_rate_te 1e-4", ""),
        ("flux_train", "--train_text_encoder --train_t5xxl --learning_rate_te1 1e-5 --learning_rate_te3 1e-6", ""),
        ("flux_train_network", "--train_t5xxl --text_encoder_lr 1e-5 1e-6", ""),
    ],
)
def test_rates_and_encoders_that_are_not_trained(base: list[str], script: str, flags: str, idle: str) -> None:
    notices = resolved(base, *flags.split(), script=script).notices
    assert [n.split(":")[0] for n in notices if "no effect" in n] == ([f"--{idle}"] if idle else [])


def test_rates_of_whole_models() -> None:
    options = Options(learning_rate_te1=1e-5, learning_rate_te3=1e-6)
    assert [FAMILY.rate(options, name, "x.weight") for name in ("denoiser", "clip_l", "t5xxl")] == [None, 1e-5, 1e-6]


def test_prompts_are_drawn_as_the_models_are(base: list[str]) -> None:
    prompt = default(resolved(base).config.family)
    assert (prompt.width, prompt.height, prompt.sample_steps, prompt.scale, prompt.guidance_scale) == (
        1024,
        1024,
        20,
        1.0,
        3.5,
    )


def test_fields_of_the_metadata_are_options() -> None:
    assert set(FACTS.metadata) <= set(Options.__dataclass_fields__)
    assert {"guidance_scale", "apply_t5_attn_mask", "timestep_sampling", "discrete_flow_shift"} <= set(FACTS.metadata)
    assert FACTS.base_model_version(Options()) == "flux1"
