"""Anima's settings on a command line, ours and kohya's, and the rates of its components."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tinies import anima
from tinies.cases import Files

from sfumato import families
from sfumato.cli import kohya
from sfumato.cli.flags import Resolved, resolve_all
from sfumato.errors import UserError
from sfumato.families.anima.facts import FACTS, Completed, Options
from sfumato.models.flow_options import METADATA
from sfumato.sampling.prompts import default

FAMILY = families.family("anima")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return anima.write(tmp_path_factory.mktemp("model"))


@pytest.fixture
def base(files: Files, images: Path) -> list[str]:
    (images.parent / "data.toml").write_text(
        f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{images}"\n'
    )
    told = {
        "pretrained_model_name_or_path": files.model,
        "dataset_config": images.parent / "data.toml",
        "vae": files.vae,
        **files.options,
    }
    return [word for name, value in told.items() for word in (f"--{name}", str(value))]


def resolved(base: list[str], *more: str, script: str = "anima_train_network") -> Resolved:
    return kohya.resolve(script, [*base, *more])


def idle(found: Resolved) -> list[str]:
    return [n.split(":")[0] for n in found.notices if "no effect" in n]


def test_the_defaults(base: list[str], files: Files) -> None:
    config = resolved(base).config
    o: Any = config.family
    assert isinstance(o, Options)
    assert (o.timestep_sampling, o.weighting_scheme, o.model_prediction_type) == ("sigmoid", "uniform", "raw")
    assert (o.qwen3, o.qwen3_max_token_length, o.t5_max_token_length) == (files.options["qwen3"], 4096, 4096)
    assert config.sample.sample_sampler == "euler"


def test_a_usual_command_line_of_kohya(base: list[str], files: Files) -> None:
    """As its own documentation has it, but for what spares memory."""
    line = (
        "--output_dir out --output_name anima --save_model_as safetensors --network_module networks.lora_anima "
        "--network_dim 8 --learning_rate 1e-4 --optimizer_type AdamW8bit --lr_scheduler constant --timestep_sampling sigmoid "
        "--discrete_flow_shift 1.0 --max_train_epochs 4 --save_every_n_epochs 1 --mixed_precision bf16 "
        "--gradient_checkpointing --cache_latents --cache_text_encoder_outputs --vae_chunk_size 64 --vae_disable_cache "
        f"--t5_tokenizer_path {files.model.parent} --qwen3_max_token_length 512 --t5_max_token_length 512 "
        "--network_args train_llm_adapter=True exclude_patterns=['.*cross_attn.*'] network_reg_dims=.*mlp.*=4"
    )
    found = resolved(base, *line.split())
    o: Any = found.config.family
    assert (o.qwen3_max_token_length, o.t5_max_token_length, o.t5_tokenizer_path) == (512, 512, str(files.model.parent))
    assert set(idle(found)) == {"--discrete_flow_shift", "--vae_chunk_size", "--vae_disable_cache"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--qwen3_max_token_length 0", "qwen3_max_token_length.*expected between 1 and 4096, found 0"),
        ("--t5_max_token_length 5000", "t5_max_token_length.*expected between 1 and 4096, found 5000"),
        ("--llm_adapter_path a.safetensors", "llm_adapter_path: .*read from the base model's file"),
        ("--attn_mode bogus", "attn_mode: expected one of"),
        ("--noise_offset 0.05", "noise_offset: .*plain noise"),
        ("--min_snr_gamma 5", "min_snr_gamma.*weighting_scheme"),
        ("--qwen3 nowhere.safetensors", r"qwen3: .*nowhere\.safetensors does not exist"),
        ("--t5_tokenizer_path nowhere", "t5_tokenizer_path: .*nowhere"),
    ],
)
def test_mistakes_are_refused(base: list[str], flags: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        resolved(base, *flags.split())
    assert len(error.value.messages) == 1


@pytest.mark.parametrize("name", ["self_attn_lr", "cross_attn_lr", "mlp_lr", "mod_lr", "llm_adapter_lr"])
def test_rates_by_component_are_for_whole_models(base: list[str], name: str) -> None:
    assert idle(resolved(base, f"--{name}", "1e-5", script="anima_train")) == []
    assert idle(resolved(base, f"--{name}", "1e-5")) == [f"--{name}"]
    with pytest.raises(UserError, match=f"--{name}: .*network_reg_lrs"):
        resolve_all([*base, f"--{name}", "1e-5"], "network")


def test_rates_of_whole_models() -> None:
    """As sd-scripts groups the weights."""
    rates = {"self_attn_lr": 1e-5, "cross_attn_lr": 2e-5, "mlp_lr": 3e-5, "mod_lr": 4e-5, "llm_adapter_lr": 0.0}
    o = Completed(blocks=28, **rates)
    wanted = {
        "blocks.3.self_attn.q_proj.weight": 1e-5,
        "blocks.3.self_attn.q_norm.weight": 1e-5,
        "blocks.3.cross_attn.output_proj.weight": 2e-5,
        "blocks.27.mlp.layer1.weight": 3e-5,
        "blocks.3.adaln_modulation_self_attn.1.weight": 4e-5,
        "blocks.3.adaln_modulation_mlp.2.weight": 4e-5,
        "final_layer.adaln_modulation.1.weight": 4e-5,
        "llm_adapter.blocks.0.mlp.0.weight": 0.0,
        "llm_adapter.embed.weight": 0.0,
        "final_layer.linear.weight": None,
        "x_embedder.proj.1.weight": None,
        "t_embedding_norm.weight": None,
    }
    assert {path: FAMILY.rate(o, "denoiser", path) for path in wanted} == wanted
    assert FAMILY.rate(o, "qwen3", "layers.0.mlp.up_proj.weight") is None
    assert not [path for path in wanted if FAMILY.rate(Completed(blocks=28), "denoiser", path) is not None]


def test_prompts_are_drawn_as_the_model_is(base: list[str]) -> None:
    drawn = default(resolved(base).config.family)
    assert (drawn.width, drawn.height, drawn.sample_steps, drawn.scale, drawn.flow_shift) == (1024, 1024, 50, 3.5, 3.0)


def test_what_is_written_into_results() -> None:
    o = Completed(blocks=28)
    assert set(METADATA) <= set(FACTS.metadata) and all(hasattr(o, name) for name in FACTS.metadata)
    assert (FACTS.architecture(o), FACTS.base_model_version(o)) == ("anima-preview", "anima")
    assert FAMILY.encoder_lr_order == ("qwen3",)


def test_of_a_lllite_that_is_there_nothing_is_asked(base: list[str], files: Files) -> None:
    more = ["--network_weights", str(files.model), "--cond_emb_dim", "16", "--lllite_use_aspp"]
    with pytest.raises(UserError) as refused:
        resolve_all([*base, *more], "lllite", prog="sfumato train lllite")
    for name in ("cond_emb_dim", "lllite_use_aspp"):
        assert f"--{name}: would have no effect: that ControlNet-LLLite is as it is" in str(refused.value)
