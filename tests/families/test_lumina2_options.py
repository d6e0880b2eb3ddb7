"""What a run of Lumina Image 2.0 can be told, on kohya's command line and on ours, and what is answered to the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sparse import sparse

from sfumato.adapters import parse
from sfumato.cli import flags, kohya
from sfumato.errors import UserError
from sfumato.families.lumina2.facts import FACTS, Options
from sfumato.families.lumina2.network_args import NetworkArgs
from sfumato.sampling.prompts import default, own, parse_line

BASE = ["--pretrained_model_name_or_path=lumina.safetensors", "--dataset_config=data.toml"]
PROMPT = "You are an assistant designed to generate high-quality images based on user prompts."
KOHYA = [
    *(
        "--gemma2",
        "gemma.safetensors",
        "--ae",
        "ae.safetensors",
        "--output_dir",
        "out",
        "--output_name",
        "my_lumina_lora",
    ),
    *("--save_model_as", "safetensors", "--network_module", "networks.lora_lumina", "--network_dim", "8"),
    *("--network_alpha", "8", "--learning_rate", "1e-4", "--optimizer_type", "AdamW", "--lr_scheduler", "constant"),
    *("--timestep_sampling", "nextdit_shift", "--discrete_flow_shift", "6.0", "--model_prediction_type", "raw"),
    *("--system_prompt", PROMPT, "--max_train_epochs", "10", "--save_every_n_epochs", "1", "--mixed_precision", "bf16"),
    *("--gradient_checkpointing", "--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only"),
    *("--use_flash_attn", "--sample_batch_size", "2", "--gemma2_max_token_length", "256", "--sigmoid_scale", "1.0"),
    *("--network_args", "attn_dim=4", "mlp_dim=4", "mod_dim=4", "refiner_dim=4", "embedder_dims=[4,4,4]"),
]
"""What sd-scripts' documentation tells for Lumina, and further flags of its script."""  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = ("cap_embedder.1.weight", "context_refiner.0.attention.qkv.weight", "layers.0.attention.qkv.weight")
    sparse(tmp_path / "lumina.safetensors", dict.fromkeys(marks, (8, 8)))
    for name in ("gemma", "ae"):
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


@pytest.mark.usefixtures("home")
def test_a_command_of_kohyas_is_read_whole() -> None:
    found = kohya.resolve("lumina_train_network", [*BASE, *KOHYA])
    options = found.config.family
    assert isinstance(options, Options)
    assert (options.gemma2, found.config.model.vae) == ("gemma.safetensors", "ae.safetensors")
    assert (options.timestep_sampling, options.system_prompt) == ("nextdit_shift", PROMPT)
    assert (options.gemma2_max_token_length, found.config.sample.sample_sampler) == (256, "euler")
    idle = [notice.partition(":")[0] for notice in found.notices if "no effect" in notice]
    assert {"--discrete_flow_shift", "--use_flash_attn", "--sample_batch_size"} <= set(idle)
    plan = parse(found.config.network, FACTS.network_args)
    assert plan.family == NetworkArgs(attn_dim=4, mlp_dim=4, mod_dim=4, refiner_dim=4, embedder_dims="[4,4,4]")


@pytest.mark.usefixtures("home")
def test_a_whole_model_by_kohyas_other_script() -> None:
    line = "--sample_prompts p.txt --sample_every_n_steps 9 --gemma2 gemma.safetensors --ae ae.safetensors --mem_eff_save --skip_latents_validity_check"
    Path("p.txt").write_text("a cat --ctr 0.5 --rcfg 0.9 --fs 4\n")
    found = kohya.resolve("lumina_train", [*BASE, *line.split()])
    assert isinstance(found.config.family, Options) and found.config.sample.sample_prompts == "p.txt"
    assert FACTS.scripts == {"lumina_train_network": "network", "lumina_train": "full"}


@pytest.mark.usefixtures("home")
def test_the_defaults_are_the_published_recipe() -> None:
    options = ours()
    assert (options.timestep_sampling, options.discrete_flow_shift, options.model_prediction_type) == (
        "shift",
        None,
        "raw",
    )
    assert (options.gemma2_max_token_length, options.system_prompt) == (256, None)
    prompt = default(options)
    assert (prompt.width, prompt.height, prompt.sample_steps, prompt.scale) == (1024, 1024, 36, 3.5)
    assert own(prompt, prompt) == {"cfg_trunc_ratio": 0.25, "renorm_cfg": 1.0, "flow_shift": 6.0}
    line = parse_line("a cat --ctr 0.5 --rcfg 0.9 --fs 4", default=prompt)
    assert own(line, prompt) == {"cfg_trunc_ratio": 0.5, "renorm_cfg": 0.9, "flow_shift": 4.0}


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--gemma2_max_token_length", "0"], "--gemma2_max_token_length: expected 1 or more, found 0"),
        (["--gemma2", "missing.safetensors"], "--gemma2: file or folder missing.safetensors does not exist"),
        (["--timestep_sampling", "nextdit"], "--timestep_sampling: expected one of"),
        (["--timestep_sampling", "nextdit_shift", "--sigmoid_scale", "2"], "--sigmoid_scale: would have no effect"),
        (
            ["--timestep_sampling", "nextdit_shift", "--discrete_flow_shift", "6"],
            "--discrete_flow_shift: would have no",
        ),
        (["--noise_offset", "0.1"], "--noise_offset: a flow is sampled from plain noise"),
        (["--clip_skip", "2"], "--clip_skip: is a setting of"),
        (["--t5xxl", "gemma.safetensors"], "--t5xxl: is a setting of"),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, list) else "",
)
def test_what_would_do_nothing_or_harm_is_refused_by_name(argv: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        ours(*argv)
    (message,) = error.value.messages
    assert message.startswith(said)


def test_names_in_metadata() -> None:
    assert (FACTS.architecture(Options()), FACTS.base_model_version(Options())) == ("lumina-2", "lumina2")
    assert {"system_prompt", "gemma2_max_token_length", "timestep_sampling"} <= set(FACTS.metadata)


def test_the_facts_import_no_torch() -> None:
    code = "import sys; import sfumato.families.lumina2.facts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
