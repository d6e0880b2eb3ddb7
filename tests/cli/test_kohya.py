from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sfumato.cli import flags, kohya, kohya_settings, options
from sfumato.config import relations
from sfumato.errors import UserError
from sfumato.train import plan, run

BASE = ["--pretrained_model_name_or_path=base.safetensors", "--dataset_config=data.toml"]


def test_new_names_are_settings_of_ours() -> None:
    assert {new for new, _ in kohya_settings.RENAMED.values()} <= set(options.known())


def test_kohyas_way_of_choosing_an_attention(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in ("--use_flash_attn --sdpa", "--attn_mode=xformers"):
        found = resolved(*words.split())
        assert found.config.memory.attention == "sdpa"
        assert any("no effect: its library is not installed" in notice for notice in found.notices)
    monkeypatch.setattr(relations, "find_spec", lambda library: library)
    ways = {"--attn_mode=torch": "sdpa", "--attn_mode=xformers": "xformers", "--attn_mode=flash --split_attn": "flash"}
    ways |= {"--use_flash_attn": "flash", "--use_sage_attn": "sageattn", "--mem_eff_attn": "sdpa", "": "sdpa"}
    for words, kind in ways.items():
        assert resolved(*words.split()).config.memory.attention == kind
    both = resolved("--attn_mode=flash", "--sdpa")
    assert both.config.memory.attention == "flash"
    assert "--sdpa: accepted, no effect: attn_mode chooses another attention" in both.notices
    with pytest.raises(UserError, match="--use_sage_attn: --use_flash_attn sets attn_mode to something else; leave"):
        resolved("--use_flash_attn", "--use_sage_attn")
    for words in ("--mem_eff_attn=false --sdpa", "--sdpa --mem_eff_attn=false"):  # as front ends write them
        assert resolved(*words.split()).config.memory.sdpa
    assert any(n.startswith("--mem_eff_attn: read as sdpa, PyTorch's own") for n in resolved("--mem_eff_attn").notices)


def test_swapped_blocks_of_whole_models_bring_what_they_need(home: Path) -> None:
    for flag in ("--blocks_to_swap=2", "--single_blocks_to_swap=2"):
        found = kohya.resolve("fine_tune", [*BASE, flag, "--fused_backward_pass", "--blockwise_fused_optimizers"])
        optimizer = found.config.optimizer
        assert optimizer.optimizer_state_on_cpu and optimizer.blockwise_fused_optimizers
        assert not optimizer.fused_backward_pass
        said = {n.split(": ")[0] for n in found.notices}
        assert {flag.split("=")[0], "--fused_backward_pass"} <= said


def resolved(*argv: str) -> flags.Resolved:
    return kohya.resolve("train_network", [*BASE, *argv])


def test_each_flag_without_effect_is_stated_once(home: Path) -> None:
    found = kohya.resolve("train_network", [*BASE, *(f"--{flag}=1" for flag in kohya_settings.INERT)])
    said = [n.split(":")[0] for n in found.notices if ": accepted, no effect: " in n]
    assert sorted(said) == sorted(f"--{flag}" for flag in kohya_settings.INERT)


def test_each_unsupported_flag_is_refused_by_name(home: Path) -> None:
    with pytest.raises(UserError) as e:
        flags.resolve_all([*BASE, *(f"--{flag}=5" for flag in kohya_settings.REFUSED)], "network")
    assert sorted(m.split(":")[0] for m in e.value.messages) == sorted(f"--{flag}" for flag in kohya_settings.REFUSED)


def test_a_secret_stands_in_no_message_and_no_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_text('huggingface_token = "hf_secret"\nwandb_api_key = "key_secret"\n')
    for words in (["--huggingface_token=hf_secret", "--wandb_api_key", "key_secret"], ["--config_file=run.toml"]):
        assert kohya.run("train_network", [*BASE, *words]) == 2
        said = capsys.readouterr().err
        assert "secret" not in said and "`hf auth login` or the variable HF_TOKEN" in said and "`wandb login`" in said
    assert {p.name for p in home.iterdir()} == {"base.safetensors", "data.toml", "images", "more", "run.toml"}


def test_settings_are_written_to_a_file_and_read_from_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*BASE, "--learning_rate=1e-5", "--caption_extension=.txt", "--network_args", "conv_dim=4"]
    assert kohya.run("train_network", [*words, "--output_config", "--config_file", "run"]) == 0
    assert kohya.resolve("train_network", ["--config_file", "run"]).config == resolved(*words[2:]).config
    assert kohya.run("train_network", [*words, "--output_config", "--config_file=run.toml"]) == 2
    assert kohya.run("train_network", [*words, "--output_config"]) == 2
    said = capsys.readouterr().err
    assert "run.toml is there already" in said and "say with --config_file which file" in said


def test_a_state_on_the_hub_is_no_folder_here(home: Path) -> None:
    found = resolved("--resume=me/thing/last-state", "--resume_from_huggingface", "--huggingface_repo_id=me/thing")
    assert found.config.output.resume == "me/thing/last-state" and found.config.hub.huggingface_repo_id == "me/thing"
    with pytest.raises(UserError, match="--resume: folder me/thing/last-state does not exist"):
        resolved("--resume=me/thing/last-state", "--resume_from_huggingface=false")
    with pytest.raises(UserError, match="--huggingface_repo_id: expected a repository of the hub, owner/name"):
        resolved("--huggingface_repo_id=thing")


def test_a_dataset_is_shown_in_place_of_a_training(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(plan, "show", lambda *args: shown.append(args))
    assert kohya.run("train_network", [*BASE, "--debug_dataset", "--seed=3"]) == 0
    assert shown[0][0].train.seed == 3 and shown[0][1] == "network"


def test_an_unsupported_setting_passes_when_it_is_off(home: Path) -> None:
    Path("off.toml").write_text("".join(f"{flag} = false\n" for flag in kohya_settings.REFUSED))
    kohya.resolve("train_network", [*BASE, "--config_file", "off"])


def test_a_typical_command_is_read_whole(home: Path) -> None:
    Path("train/10_lines").mkdir(parents=True)
    Path("train/10_lines/a.png").write_bytes(b"")
    Path("prompts.txt").write_text("a cat --d 1\n")
    found = kohya.resolve(
        "train_network",
        [
            "--pretrained_model_name_or_path=base.safetensors", "--train_data_dir", "train", "--output_dir", "out", "--output_name=lines",
            "--resolution=512,512", "--network_module=networks.lora", "--network_dim=8", "--network_alpha", "4", "--network_args", "conv_dim=4",
            "conv_alpha=1", "--train_batch_size=2", "--max_train_epochs=10", "--learning_rate=1e-4", "--unet_lr=1e-4", "--text_encoder_lr", "5e-5",
            "--lr_scheduler=cosine_with_restarts", "--lr_scheduler_num_cycles=2", "--lr_warmup_steps=10%", "--optimizer_type=AdamW",
            "--optimizer_args", "weight_decay=0.01", "betas=0.9,0.99", "--mixed_precision=fp16", "--save_precision=fp16", "--seed=42",
            "--save_model_as=safetensors", "--save_every_n_epochs=1", "--caption_extension=.txt", "--shuffle_caption", "--keep_tokens=1",
            "--clip_skip=2", "--max_token_length=225", "--cache_latents", "--gradient_checkpointing", "--enable_bucket", "--min_snr_gamma=5",
            "--noise_offset=0.05", "--sample_prompts=prompts.txt", "--sample_every_n_epochs=1", "--sample_sampler=euler_a", "--prior_loss_weight=1.0",
            "--max_data_loader_n_workers=2", "--persistent_data_loader_workers", "--mem_eff_attn", "--no_half_vae",
        ],
    )  # fmt: skip
    config = found.config
    assert (config.network.network_dim, config.network.network_args) == (8, ("conv_dim=4", "conv_alpha=1"))
    assert (config.optimizer.text_encoder_lr, config.optimizer.lr_warmup_steps) == ((5e-5,), "10%")
    assert found.datasets[0].subsets[0].num_repeats == 10 and found.datasets[0].batch_size == 2 and config.memory.sdpa
    assert [n.split(": ")[:2] for n in found.notices] == [
        [
            "--mem_eff_attn",
            "read as sdpa, PyTorch's own attention, which needs as little memory and gives the same result",
        ]
    ]


def test_kohyas_defaults_are_used_and_said(home: Path) -> None:
    found = kohya.resolve("train_network", BASE)
    assert found.config.optimizer.learning_rate == 2e-6 and found.datasets[0].subsets[0].caption_extension == ".caption"
    assert {n.split(":")[0] for n in found.notices} == {"--learning_rate", "--caption_extension"}


def test_a_default_that_the_dataset_file_overrules_is_not_told(home: Path) -> None:
    Path("data.toml").write_text("[general]\ncaption_extension = '.txt'\n" + Path("data.toml").read_text())
    assert {n.split(":")[0] for n in kohya.resolve("train_network", BASE).notices} == {"--learning_rate"}


def test_kohyas_config_files_are_read_as_they_are(home: Path) -> None:
    Path("kohya.toml").write_text(
        """
        [model_arguments]
        pretrained_model_name_or_path = "base.safetensors"
        vae = ""
        [training]
        learning_rate = 0.0001
        text_encoder_lr = 5e-5
        optimizer_args = []
        lr_scheduler = "cosine"
        lr_scheduler_power = 2
        max_train_steps = 100
        max_train_epochs = 3
        save_every_n_steps = 0
        fp8_base = false
        epoch = 1
        noise_offset_type = "Original"
        resolution = "64,64"
        cache_latents = true
        """
    )
    found = kohya.resolve("train_network", ["--config_file", "kohya", "--dataset_config", "data.toml"])
    assert (found.config.output.save_every_n_steps, found.config.train.max_train_epochs, found.config.model.vae) == (
        None,
        3,
        None,
    )
    said = {n.split(":")[2].strip() for n in found.notices if "accepted, no effect" in n}
    assert said == {"epoch", "noise_offset_type", "lr_scheduler_power", "max_train_steps"}


@pytest.mark.parametrize(
    ("argv", "trains"),
    [
        ([], True),
        (["--stop_text_encoder_training=-1"], False),
        (["--stop_text_encoder_training=0"], False),
        (["--stop_text_encoder_training=5"], True),
    ],
)
def test_train_db_trains_the_text_encoder_unless_told_otherwise(argv: list[str], trains: bool, home: Path) -> None:
    config = kohya.resolve("train_db", [*BASE, *argv]).config
    assert config.train.train_text_encoder is trains
    assert config.train.stop_text_encoder_training == (5 if argv[-1:] == ["--stop_text_encoder_training=5"] else None)


def test_fine_tune_trains_the_text_encoder_only_when_told(home: Path) -> None:
    assert kohya.resolve("fine_tune", BASE).config.train.train_text_encoder is False
    assert kohya.resolve("fine_tune", [*BASE, "--train_text_encoder"]).config.train.train_text_encoder is True


def test_a_log_folder_alone_switches_tensorboard_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kohya, "find_spec", lambda name: object())
    assert kohya.resolve("train_network", [*BASE, "--logging_dir", "logs"]).config.log.log_with == "tensorboard"
    monkeypatch.setattr(kohya, "find_spec", lambda name: None)
    found = kohya.resolve("train_network", [*BASE, "--logging_dir", "logs"])
    assert found.config.log.log_with is None and any("tensorboard is not installed" in n for n in found.notices)


def test_old_names_are_read(home: Path) -> None:
    found = kohya.resolve("train_network", [*BASE, "--use_8bit_adam", "--caption_extention", ".cap"])
    assert found.config.optimizer.optimizer_type == "AdamW8bit" and found.config.data.caption_extension == ".cap"


@pytest.mark.parametrize("script", sorted(kohya.scripts()))
def test_the_launchers_run_from_any_folder_without_installation(script: str, home: Path) -> None:
    path = Path(__file__).parents[2] / "scripts" / f"{script}.py"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, str(path), "--lerning_rate", "1"], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "error: --lerning_rate: unknown flag; did you mean 'learning_rate'?" in done.stderr


def test_a_command_trains_with_the_resolved_config(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[str, Any] = {}
    monkeypatch.setattr(
        run,
        "train",
        lambda config, method, datasets, resolved, read, given: called.update(
            method=method, resolved=resolved(config), datasets=datasets
        ),
    )
    assert kohya.run("train_db", [*BASE, "--learning_rate=1e-5"]) == 0
    assert called["method"] == "full" and len(called["datasets"]) == 1
    assert "learning_rate = 1e-05\n" in called["resolved"] and '# image_dir = "images"' in called["resolved"]
    Path("resolved.toml").write_text(called["resolved"])
    assert flags.resolve_all(["--config", "resolved.toml"], "full").config.optimizer.learning_rate == 1e-5


def test_another_familys_settings_are_stated_not_refused(home: Path) -> None:
    """Graphical front ends write `clip_skip` and the like for every family."""
    found = kohya.resolve("train_network", [*BASE, "--t5xxl_max_token_length", "256"])
    (said,) = [notice for notice in found.notices if notice.startswith("--t5xxl_max_token_length")]
    assert "accepted, no effect: it is a setting of chroma, flux, sd3" in said
    with pytest.raises(UserError, match="--t5xxl_max_token_length: is a setting of"):
        flags.resolve_all([*BASE, "--t5xxl_max_token_length", "256"], "network")


def test_a_control_net_starts_from_a_file_and_has_a_rate_of_its_own(home: Path) -> None:
    Path("follow").mkdir()
    Path("data.toml").write_text(Path("data.toml").read_text() + "\nconditioning_data_dir = 'follow'")
    words = [*BASE, "--controlnet_model_name_or_path=base.safetensors", "--learning_rate=1e-5", "--save_model_as=ckpt"]
    found = kohya.resolve("train_control_net", words).config
    assert found.control.controlnet_model_name_or_path == "base.safetensors" and found.control.control_net_lr is None
    assert kohya.resolve("train_controlnet", [*words, "--control_net_lr=2e-5"]).config.control.control_net_lr == 2e-5
    assert kohya.scripts()["sdxl_train_control_net"].defaults["control_net_lr"] == 1e-4
