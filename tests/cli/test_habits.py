"""What kohya's command lines and front ends write otherwise acts, or is refused with one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_files import pairs

from sfumato.adapters import parse
from sfumato.cli import flags, habits, kohya, kohya_settings, options
from sfumato.cli.report import Report
from sfumato.errors import UserError

FLAGS = {flag for theirs in pairs().values() for flag in theirs} & {*flags.every_name()}
BASE = [
    "--pretrained_model_name_or_path=base.safetensors",
    "--dataset_config=data.toml",
    "--learning_rate=1e-4",
    "--caption_extension=.txt",
]


def from_file(text: str, *argv: str) -> flags.Resolved:
    Path("gui.toml").write_text(text)
    return kohya.resolve("train_network", [*BASE, "--config_file", "gui", *argv])


def test_front_ends_write_0_and_1_for_switches_and_numbers_of_any_type(home: Path) -> None:
    found = from_file(
        "persistent_data_loader_workers = 1\nmax_data_loader_n_workers = 1.0\ngradient_checkpointing = 0\nno_half_vae = 'true'\n"
        "clip_skip = 2.0\nnetwork_dim = '8'\nnetwork_alpha = '4'\nmax_token_length = '150'\nmem_eff_attn = 1\nuse_8bit_adam = 0\n"
    ).config
    assert (
        found.train.persistent_data_loader_workers,
        found.memory.gradient_checkpointing,
        found.memory.no_half_vae,
    ) == (
        True,
        False,
        True,
    )
    assert (found.train.max_data_loader_n_workers, found.network.network_dim, found.network.network_alpha) == (
        1,
        8,
        4.0,
    )
    assert (found.family.clip_skip, found.family.max_token_length, found.memory.sdpa) == (2, 150, True)  # type: ignore[attr-defined]
    assert found.optimizer.optimizer_type == "AdamW"


@pytest.mark.parametrize(
    "line",
    [
        "gradient_checkpointing = 2",
        "gradient_checkpointing = 'maybe'",
        "clip_skip = 1.5",
        "clip_skip = true",
        "network_module = 3",
    ],
)
def test_what_is_no_value_of_a_setting_stays_a_mistake_in_any_file(line: str, home: Path) -> None:
    with pytest.raises(UserError, match=rf"gui\.toml:1: {line.split()[0]}: expected "):
        from_file(line + "\n")


def test_types_count_in_our_own_files(home: Path) -> None:
    Path("run.toml").write_text("gradient_checkpointing = 1\nnetwork_dim = '8'\n")
    with pytest.raises(UserError) as e:
        flags.resolve_all([*BASE, "--config", "run.toml"], "network")
    assert [m.split(": ")[1] for m in e.value.messages] == ["gradient_checkpointing", "network_dim"]


def test_loraplus_at_the_top_of_a_file_acts_and_is_told(home: Path) -> None:
    found = from_file(
        'network_args = ["conv_dim=4"]\nloraplus_lr_ratio = 16\nloraplus_unet_lr_ratio = 0\nblock_dims = ""\n'
    )
    assert found.config.network.network_args == ("conv_dim=4", "loraplus_lr_ratio=16")
    assert "gui.toml:2: loraplus_lr_ratio: taken as network_args loraplus_lr_ratio=16" in found.notices


def test_loraplus_at_the_top_and_otherwise_in_network_args_is_refused(home: Path) -> None:
    assert from_file('network_args = ["loraplus_lr_ratio=4"]\nloraplus_lr_ratio = 4\n').config.network.network_args == (
        "loraplus_lr_ratio=4",
    )
    with pytest.raises(UserError, match="loraplus_lr_ratio: network_args says something else"):
        from_file('network_args = ["loraplus_lr_ratio=2"]\nloraplus_lr_ratio = 4\n')


def test_loraplus_at_the_top_of_our_own_files_is_unknown(home: Path) -> None:
    Path("run.toml").write_text("loraplus_lr_ratio = 4\n")
    with pytest.raises(UserError, match="loraplus_lr_ratio: unknown setting"):
        flags.resolve_all([*BASE, "--config", "run.toml"], "network")


def test_arguments_of_adapters_are_no_settings() -> None:
    assert not habits.network_args() & {*options.known(), *kohya_settings.names()}


def test_an_empty_text_in_a_front_ends_file_sets_nothing(home: Path) -> None:
    found = from_file(
        'save_precision = ""\nclip_skip = ""\nresume = ""\noutput_name = ""\nlr_scheduler_args = []\nmin_snr_gamma = 0\n'
    ).config
    assert (found.output.save_precision, found.output.resume, found.output.output_name) == (None, None, "last")


OFF = {
    "loss": ("min_snr_gamma", "v_pred_like_loss"),
    "noise": ("noise_offset", "adaptive_noise_scale", "ip_noise_gamma", "multires_noise_iterations"),
    "network": ("scale_weight_norms", "network_dropout"),
    "output": (
        "save_every_n_epochs",
        "save_every_n_steps",
        "save_last_n_epochs",
        "save_last_n_steps",
        "save_n_epoch_ratio",
    ),
    "sample": ("sample_every_n_epochs", "sample_every_n_steps"),
}


def test_what_front_ends_write_as_0_is_off(home: Path) -> None:
    config = from_file("".join(f"{name} = 0\n" for names in OFF.values() for name in names)).config
    assert {getattr(getattr(config, section), name) for section, names in OFF.items() for name in names} == {None}


@pytest.mark.parametrize(
    ("short", "flag"),
    [
        ("save_every_n_step", "save_every_n_steps"),
        ("max_train_epoch", "max_train_epochs"),
        ("config_f", "config_file"),
        ("dataset_co", "dataset_config"),
    ],
)
def test_a_flag_may_be_shortened_to_what_no_other_begins_with(short: str, flag: str) -> None:
    names, report = kohya.flags_of(kohya.scripts()["train_network"]), Report()
    assert (
        habits.full_name(f"--{short}=3", names, report) == f"--{flag}=3"
        and habits.full_name(f"--{short}", names, report) == f"--{flag}"
    )
    assert report.notices == [f"--{short}: read as --{flag}"]


def test_shortened_flags_act_in_kohyas_lines(home: Path) -> None:
    found = kohya.resolve("train_network", [*BASE, "--save_every_n_step", "3", "--gradient_check", "--network_al=4"])
    assert (
        found.config.output.save_every_n_steps == 3
        and found.config.memory.gradient_checkpointing
        and found.config.network.network_alpha == 4
    )
    assert "--save_every_n_step: read as --save_every_n_steps" in found.notices


def test_a_shortened_flag_that_could_be_several_is_refused_with_all_of_them(home: Path) -> None:
    with pytest.raises(UserError) as e:
        kohya.resolve(
            "train_network", [*BASE, "--cache_lat", "--network_train", "--save_last_n_steps_stat=1", "--nonsense"]
        )
    said = dict(m.split(": ", 1) for m in e.value.messages)
    assert said["--cache_lat"] == "could be --cache_latents, --cache_latents_to_disk: write it out"
    assert (
        said["--network_train"] == "could be --network_train_text_encoder_only, --network_train_unet_only: write it out"
    )
    assert said["--nonsense"].startswith("unknown flag")


def test_a_flag_whose_name_begins_anothers_is_itself(home: Path) -> None:
    config = kohya.resolve("train_network", [*BASE, "--cache_latents"]).config
    assert config.data.cache_latents and not config.data.cache_latents_to_disk
    # One of ours, which the words of a mistake name, and which begins tokenizer_cache_dir.
    Path("words").mkdir()
    assert kohya.resolve("train_network", [*BASE, "--tokenizer", "words"]).config.model.tokenizer == "words"


def test_flags_are_shortened_over_kohyas_own_list() -> None:
    for script in kohya.scripts().values():
        theirs = {name for family in script.families for name in options.of_family(family)}
        assert kohya.flags_of(script) - theirs <= FLAGS
        assert kohya.flags_of(script) | set(options.owners()) >= FLAGS


def test_our_own_commands_take_no_shortened_flags(home: Path) -> None:
    with pytest.raises(UserError, match="--save_every_n_step: unknown flag; did you mean 'save_every_n_steps'"):
        flags.resolve_all([*BASE, "--save_every_n_step", "3"], "network")


@pytest.mark.parametrize(
    "argv", [["--config", "run.toml"], ["--config_file", "run.toml"], ["--config", "run.toml", "--seed", "x"]]
)
def test_after_a_syntax_error_only_that_is_told(argv: list[str], home: Path) -> None:
    Path("run.toml").write_text("seed = 1\nvae = \n")
    with pytest.raises(UserError) as e:
        flags.resolve_all(argv, "network")
    assert len(e.value.messages) == 1 and e.value.messages[0].startswith("run.toml:2: is not TOML")


def test_after_a_config_that_is_missing_only_that_is_told(home: Path) -> None:
    with pytest.raises(UserError) as e:
        flags.resolve_all(["--config", "rum.toml"], "network")
    assert len(e.value.messages) == 1 and "rum.toml does not exist" in e.value.messages[0]


@pytest.mark.parametrize("key", ["config", "config_file"])
def test_a_dataset_file_given_as_config_is_told_in_one_sentence(key: str, home: Path) -> None:
    with pytest.raises(UserError) as e:
        flags.resolve_all([f"--{key}", "data.toml"], "network")
    assert e.value.messages == (
        f"data.toml: is a dataset file, with [[datasets]], not a config file: name it with --dataset_config, not --{key}",
    )


def test_a_training_config_given_as_dataset_config_is_told_in_one_sentence(home: Path) -> None:
    Path("run.toml").write_text(
        "[model]\npretrained_model_name_or_path = 'base.safetensors'\n[train]\nmax_train_steps = 3\nseed = 1\n"
    )
    with pytest.raises(UserError) as e:
        flags.resolve_all(["--pretrained_model_name_or_path=base.safetensors", "--dataset_config=run.toml"], "network")
    assert e.value.messages == (
        "run.toml: is a config file (it sets pretrained_model_name_or_path), not a dataset file with [[datasets]]: name it with --config",
    )


def test_arguments_of_adapters_that_only_print_are_stated(home: Path) -> None:
    found = kohya.resolve("train_network", [*BASE, "--network_args", "verbose=True", "conv_dim=4"])
    plan = parse(found.config.network)
    assert plan.conv_rank == 4 and plan.more == {}
    assert plan.notices == ("network_args verbose=True: accepted, no effect: it only changes what is printed",)


def test_a_rate_of_text_encoders_that_are_not_trained_is_stated(home: Path) -> None:
    found = from_file("stop_text_encoder_training = 0\ntext_encoder_lr = 1e-4\nverbose = true\n")
    said = {n.split(": ")[1] for n in found.notices if "accepted, no effect" in n}
    assert found.config.optimizer.text_encoder_lr == () and said == {"text_encoder_lr", "verbose"}


def test_validation_seed_without_a_split_is_stated(home: Path) -> None:
    Path("data.toml").write_text("[general]\nvalidation_seed = 3\n" + Path("data.toml").read_text())
    found = kohya.resolve("train_network", [*BASE, "--validation_seed=4"])
    said = [n for n in found.notices if "accepted, no effect: no images are held out" in n]
    assert [n.split(":")[0] for n in said] == ["--validation_seed", "validation_seed of a folder"]


def test_a_config_file_of_a_front_end_is_read_whole(home: Path) -> None:
    (home / "set").mkdir()
    (home / "images").rename(home / "set" / "3_cat")
    found = kohya.resolve(
        "train_network", ["--config_file", str(Path(__file__).parents[1] / "fixtures" / "front_end.toml")]
    )
    config = found.config
    assert (config.network.network_dim, config.network.network_args) == (8, ("loraplus_lr_ratio=16",))
    assert (config.noise.adaptive_noise_scale, config.loss.min_snr_gamma, config.output.save_last_n_steps) == (
        None,
        None,
        None,
    )
    assert config.noise.max_timestep == 1000 and config.optimizer.text_encoder_lr == (1e-4,)
    said = {n.split(": ")[1] for n in found.notices if "accepted, no effect" in n}
    assert {"epoch", "noise_offset_type", "lowvram", "highvram", "wandb_run_name"} <= said
    assert not config.memory.torch_compile and "dynamo_backend" not in said  # "no" acts: nothing is compiled
