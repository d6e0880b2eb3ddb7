"""What a run of Chroma can be told, on kohya's command line and on ours, and what is answered to the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sparse import sparse

from sfumato.adapters import parse
from sfumato.cli import flags, kohya
from sfumato.config import NetworkConfig
from sfumato.errors import UserError
from sfumato.families.chroma.facts import FACTS, NetworkArgs, Options
from sfumato.sampling.prompts import default

BASE = ["--pretrained_model_name_or_path=chroma.safetensors", "--dataset_config=data.toml"]
KOHYA = [
    *(
        "--clip_l",
        "clip_l.safetensors",
        "--t5xxl",
        "t5xxl.safetensors",
        "--ae",
        "ae.safetensors",
        "--model_type",
        "chroma",
    ),
    *(
        "--apply_t5_attn_mask",
        "--guidance_scale",
        "0.0",
        "--timestep_sampling",
        "sigmoid",
        "--model_prediction_type",
        "raw",
    ),
    *(
        "--network_module",
        "networks.lora_flux",
        "--network_train_unet_only",
        "--network_args",
        "split_qkv=True",
        "train_blocks=double",
    ),
]
"""What sd-scripts' documentation tells for Chroma."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse(
        tmp_path / "chroma.safetensors", {"distilled_guidance_layer.in_proj.weight": (8, 4), "img_in.weight": (8, 64)}
    )
    for name in ("clip_l", "t5xxl", "ae"):
        sparse(tmp_path / f"{name}.safetensors", {"x": (1,)})
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a")
    (tmp_path / "data.toml").write_text('[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "images"\n')
    monkeypatch.chdir(tmp_path)


def ours(*argv: str) -> Options:
    options = flags.resolve_all([*BASE, *argv], "network").config.family
    assert isinstance(options, Options)
    return options


def refused(*argv: str) -> list[str]:
    with pytest.raises(UserError) as error:
        ours(*argv)
    return error.value.messages


@pytest.mark.usefixtures("home")
def test_a_command_of_kohyas_is_read_whole() -> None:
    found = kohya.resolve("flux_train_network", [*BASE, *KOHYA])
    options = found.config.family
    assert isinstance(options, Options)
    # CLIP-L is stated to do nothing, and nothing reads it.
    assert [n for n in found.notices if "clip_l" in n] == [
        "--clip_l: accepted, no effect: Chroma has no CLIP; T5 alone reads its captions"
    ]
    assert (options.clip_l, options.t5xxl, found.config.model.vae) == (None, "t5xxl.safetensors", "ae.safetensors")
    assert found.config.sample.sample_sampler == "euler"
    plan = parse(found.config.network, FACTS.network_args)
    assert plan.family == NetworkArgs(split_qkv=True, train_blocks="double")


@pytest.mark.usefixtures("home")
def test_defaults_are_what_chroma_is_trained_with() -> None:
    options = ours()
    assert (options.timestep_sampling, options.model_prediction_type, options.weighting_scheme) == (
        "sigmoid",
        "raw",
        "uniform",
    )
    assert (options.guidance_scale, options.apply_t5_attn_mask, options.t5xxl_max_token_length) == (0, True, 512)
    prompt = default(options)
    assert (prompt.width, prompt.height, prompt.sample_steps, prompt.scale, prompt.guidance_scale) == (
        1024,
        1024,
        35,
        5,
        None,
    )


@pytest.mark.usefixtures("home")
def test_other_ways_to_draw_noise_levels_can_be_chosen() -> None:
    options = ours(
        "--timestep_sampling", "shift", "--discrete_flow_shift", "2", "--model_prediction_type", "sigma_scaled"
    )
    assert (options.timestep_sampling, options.discrete_flow_shift, options.model_prediction_type) == (
        "shift",
        2,
        "sigma_scaled",
    )


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--clip_l", "clip_l.safetensors"], "--clip_l: would have no effect: Chroma has no CLIP"),
        (["--guidance_scale", "3.5"], "--guidance_scale: expected 0, as Chroma takes no guidance"),
        (
            ["--apply_t5_attn_mask", "false"],
            "--apply_t5_attn_mask: expected true, as Chroma was trained with T5's padding hidden",
        ),
        (["--t5xxl_max_token_length", "0"], "--t5xxl_max_token_length: expected 1 or more, found 0"),
        (["--model_type", "flux"], "--model_type: expected one of chroma, found the text 'flux'"),
        (["--discrete_flow_shift", "3"], "--discrete_flow_shift: would have no effect"),
        (["--noise_offset", "0.1"], "--noise_offset: a flow is sampled from plain noise"),
        (["--min_snr_gamma", "5"], "--min_snr_gamma: it weighs the timesteps of older models"),
        (["--timestep_sampling", "shift", "--discrete_flow_shift", "0"], "--discrete_flow_shift: expected above 0"),
        (["--clip_skip", "2"], "--clip_skip: is a setting of"),
        (["--t5xxl", "missing.safetensors"], "--t5xxl: file or folder missing.safetensors does not exist"),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, list) else "",
)
def test_what_would_do_nothing_or_harm_is_refused_by_name(argv: list[str], said: str) -> None:
    (message,) = refused(*argv)
    assert message.startswith(said)


@pytest.mark.parametrize(
    "args", [(), ("img_attn_dim=8", "single_dim=0"), ("img_mod_dim=0", "in_dims=[4,0,0,0,4]"), ("train_t5xxl=True",)]
)
def test_network_args_of_flux_hold_where_there_are_layers(args: tuple[str, ...]) -> None:
    assert isinstance(parse(NetworkConfig(network_args=args), NetworkArgs).family, NetworkArgs)


@pytest.mark.parametrize(
    ("arg", "said"),
    [
        ("img_mod_dim=4", "img_mod_dim=4: Chroma makes its modulations outside of the blocks"),
        ("txt_mod_dim=4", "txt_mod_dim=4: Chroma makes its modulations outside of the blocks"),
        ("single_mod_dim=4", "single_mod_dim=4: Chroma makes its modulations outside of the blocks"),
        ("in_dims=[4,4,0,0,4]", "Chroma has no time_in, vector_in, guidance_in"),
        ("in_dims=4,0,0,2,4", "Chroma has no time_in, vector_in, guidance_in"),
        ("in_dims=[4,4]", "in_dims"),
        ("train_blocks=none", "train_blocks"),
        ("img_attn_dim=-1", "img_attn_dim"),
    ],
)
def test_network_args_without_a_layer_are_refused(arg: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse(NetworkConfig(network_args=(arg,)), NetworkArgs)
    (message,) = error.value.messages
    assert message.startswith("network_args ") and said in message


def test_names_in_metadata() -> None:
    assert (FACTS.architecture(Options()), FACTS.base_model_version(Options())) == ("chroma", "chroma")
    assert {name for name in FACTS.metadata if not hasattr(Options(), name)} == set()


def test_the_facts_import_no_torch() -> None:
    code = "import sys; import sfumato.families.chroma.facts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
