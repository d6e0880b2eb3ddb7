from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from cli_files import safetensors

from sfumato.cli import flags, options
from sfumato.config import Config
from sfumato.errors import UserError
from sfumato.families.sd.facts import Options

ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
BASE = ["--pretrained_model_name_or_path", "base.safetensors", "--dataset_config", "data.toml"]


def errors(argv: list[str], method: flags.Method = "network") -> list[str]:
    with pytest.raises(UserError) as e:
        flags.resolve_all(argv, method)
    return list(e.value.messages)


def test_three_mistakes_are_told_at_once_without_torch(home: Path) -> None:
    Path("run.toml").write_text(
        "[model]\npretrained_model_name_or_path = 'base.safetensors'\ntrain_data_dir = 'image'\n\n[x]\nlearning_rat = 1e-4\nmax_train_steps = 'many'\n"
    )
    code = "import sys; from sfumato.cli.main import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "network", "--config", "run.toml"],
        capture_output=True,
        text=True,
        env=ENV,
    )
    assert done.returncode == 2
    assert sorted(done.stderr.splitlines()) == [
        "error: run.toml:3: train_data_dir: folder image does not exist; did you mean 'images'?",
        "error: run.toml:6: learning_rat: unknown setting; did you mean 'learning_rate'?",
        "error: run.toml:7: max_train_steps: expected a whole number, found the text 'many'",
    ]


def test_help_imports_neither_torch_nor_pydantic() -> None:
    code = "import sys; from sfumato.cli.main import main; main(['--help']); assert not {'torch', 'pydantic', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=ENV)


def test_every_setting_has_a_help_text_a_flag_and_one_place() -> None:
    said = flags.parser("x").format_help()
    for option in options.known().values():
        assert option.help and f"--{option.name}" in said
    everywhere = [f.name for record in options.sections().values() for f in fields(record)]
    assert len(everywhere) == len(set(everywhere))
    assert not set(everywhere) & set(options.owners())


def test_defaults_give_way_to_files_and_files_to_flags(home: Path) -> None:
    Path("run.toml").write_text("[any]\nlearning_rate = 3e-4\nseed = 7\nflip_aug = true\n")
    config = flags.resolve_all(
        [*BASE, "--config", "run.toml", "--learning_rate=5e-4", "--flip_aug", "false"], "network"
    ).config
    assert (config.optimizer.learning_rate, config.train.seed, config.data.flip_aug, config.loss.loss_type) == (
        5e-4,
        7,
        False,
        "l2",
    )
    assert config.family == Options()


def test_the_resolved_config_reads_back_to_the_same(home: Path) -> None:
    argv = [
        *BASE, "--text_encoder_lr", "1e-5", "2e-5", "--lr_scheduler", "cosine", "--lr_warmup_steps", "10%", "--optimizer_args", "weight_decay=0.01",
        "betas=0.9,0.99", "--network_args", "conv_dim=4", "--resolution", "512,768", "--training_comment", 'a "quoted" \\ line\nand another \x7f é',
        "--max_token_length", "225", "--clip_skip", "2",
    ]  # fmt: skip
    argv[argv.index("data.toml")] = str(home / "data.toml")
    Path("data.toml").write_text('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "images"\n')
    first = flags.resolve_all(argv, "network")
    Path("resolved.toml").write_text(flags.write_toml(first.config), encoding="utf-8")
    again = flags.resolve_all(["--config", "resolved.toml"], "network")
    assert again == first
    assert first.datasets[0].resolution == (512, 768)
    assert isinstance(first.config.family, Options) and first.config.family.clip_skip == 2


def test_a_default_config_is_written_whole(home: Path) -> None:
    text = flags.write_toml(replace(Config(), family=Options()))
    for option in {**options.common(), **options.of_family("sd")}.values():
        assert (f"\n{option.name} = " in text) == (option.default is not None)


def test_every_mistyped_key_stops_the_run_and_most_name_the_right_one(home: Path) -> None:
    # One of those that differ in their last letter alone, such as clip_l and clip_g.
    mistyped = {name[:-1] + ("q" if name[-1] != "q" else "z"): name for name in options.known()}
    Path("run.toml").write_text("".join(f"{wrong} = 1\n" for wrong in mistyped))
    found = errors([*BASE, "--config", "run.toml", *(f"--{wrong}=1" for wrong in mistyped)])
    assert len(found) == 2 * len(mistyped)
    for line, (wrong, name) in enumerate(mistyped.items(), 1):
        messages = [
            m for m in found if m.startswith((f"run.toml:{line}: {wrong}: unknown setting", f"--{wrong}: unknown flag"))
        ]
        assert len(messages) == 2
        assert all("; did you mean '" in m for m in messages) or len(name) < 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_train_steps", "0"], "--max_train_steps: expected 1 or more, found 0"),
        (["--caption_dropout_rate", "1.5"], "--caption_dropout_rate: expected between 0 and 1"),
        (["--learning_rate", "1e38"], "--learning_rate: expected between 0 and 1000, found 1e+38"),
        (["--text_encoder_lr", "1e-4", "1e38"], "--text_encoder_lr: expected between 0 and 1000"),
        (["--full_bf16"], "--full_bf16: weights in bf16 are trained with mixed_precision bf16 alone; set it too"),
        (["--full_bf16", "--mixed_precision", "fp16"], "--full_bf16: weights in bf16 are trained with"),
        (["--learning_rate"], "expected one argument"),
        (["run.toml"], "'run.toml': a flag was expected"),
        (["--config", "rum.toml"], "config file rum.toml does not exist"),
        (["--config", "images"], "config file images is a folder, not a file"),
        (["--output_dir", "data.toml"], "--output_dir: data.toml is a file, not a folder; choose another folder"),
        (["--cache_dir", "data.toml/x"], "--cache_dir: data.toml is a file, not a folder; choose another folder"),
        (["--network_weights", "nothing"], "--network_weights: file nothing does not exist"),
        (["--vae", "x.safetensors"], "--vae: file or folder x.safetensors does not exist"),
        (["--output_name", "a/b"], "--output_name: expected a file name without folders"),
        (["--network_train_unet_only", "--network_train_text_encoder_only"], "exclude each other"),
        (["--min_timestep", "500", "--max_timestep", "300"], "--max_timestep: min_timestep must be below max_timestep"),
        (["--save_model_as", "diffusers"], "--save_model_as: an adapter is saved as"),
        (["--masked_loss"], "--masked_loss: no folder has masks"),
        (["--cache_latents", "--random_crop"], "random_crop cannot be used with cache_latents"),
        (
            ["--cache_text_encoder_outputs", "--shuffle_caption"],
            "shuffle_caption cannot be used with cache_text_encoder_outputs",
        ),
    ],
)
def test_mistakes_are_told(argv: list[str], message: str, home: Path) -> None:
    assert any(message in m for m in errors([*BASE, *argv]))


IDLE: list[tuple[flags.Method, list[str], str]] = [
    ("full", ["--network_dim", "8"], "network_dim"),
    ("full", ["--unet_lr", "1e-4"], "unet_lr"),
    ("full", ["--learning_rate_te", "1e-5"], "learning_rate_te"),
    ("network", ["--train_text_encoder"], "train_text_encoder"),
    ("network", ["--text_encoder_lr", "1e-5", "--network_train_unet_only"], "text_encoder_lr"),
    ("network", ["--text_encoder_lr", "1e-5", "--cache_text_encoder_outputs"], "text_encoder_lr"),
    ("network", ["--save_last_n_steps", "3"], "save_last_n_steps"),
    ("network", ["--max_train_steps", "3", "--max_train_epochs", "2"], "max_train_steps"),
    ("network", ["--lr_scheduler_power", "2", "--lr_scheduler", "cosine"], "lr_scheduler_power"),
    ("network", ["--lr_warmup_steps", "3"], "lr_warmup_steps"),
    ("network", ["--huber_c", "0.3"], "huber_c"),
    ("network", ["--adaptive_noise_scale", "0.1"], "adaptive_noise_scale"),
    ("network", ["--sample_every_n_steps", "5"], "sample_every_n_steps"),
    ("network", ["--prior_loss_weight", "0.5"], "prior_loss_weight"),
    ("network", ["--cache_dir", "c"], "cache_dir"),
    ("network", ["--stream_text_encoders"], "stream_text_encoders"),
    ("network", ["--resolution", "128"], "resolution"),
    ("network", ["--logging_dir", "logs"], "logging_dir"),
]


@pytest.mark.parametrize(("method", "argv", "key"), IDLE)
def test_a_setting_without_effect_is_refused(method: flags.Method, argv: list[str], key: str, home: Path) -> None:
    found = errors([*BASE, *argv], method)
    assert [m for m in found if m.startswith(f"--{key}: would have no effect")] == found


@pytest.mark.parametrize(("method", "argv", "key"), IDLE)
def test_in_a_kohya_command_it_is_stated_and_has_its_default(
    method: flags.Method, argv: list[str], key: str, home: Path
) -> None:
    found = flags.resolve_all([*BASE, *argv], method, kohya=True)
    assert any(n.startswith(f"--{key}: accepted, no effect: ") for n in found.notices)
    option = options.known()[key]
    assert getattr(getattr(found.config, option.section), key) == option.default


def test_settings_that_act_are_not_refused(home: Path) -> None:
    argv = [
        "--lr_scheduler",
        "polynomial",
        "--lr_scheduler_power",
        "2",
        "--lr_warmup_steps",
        "3",
        "--loss_type",
        "huber",
        "--huber_c",
        "0.3",
    ]
    assert flags.resolve_all([*BASE, *argv], "network").notices == ()


def test_a_family_is_read_from_the_header_and_others_are_told(home: Path) -> None:
    safetensors(home / "lora.safetensors", {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 8)})
    safetensors(home / "upscaler.safetensors", {"params_ema.body.0.rdb1.conv1.weight": (4, 4, 3, 3)})
    (home / "cut.safetensors").write_bytes((home / "base.safetensors").read_bytes()[:-10])
    for name, said in (("lora", "an adapter"), ("upscaler", "an upscaler"), ("cut", "")):
        found = errors(
            ["--pretrained_model_name_or_path", f"{name}.safetensors", "--dataset_config", "data.toml", "--seed", "x"]
        )
        assert len(found) == 2 and found[0].startswith("--pretrained_model_name_or_path: ") and said in found[0]
        assert found[1] == "--seed: expected a whole number, found the text 'x'"


def test_another_familys_setting_says_whose_it_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "pretrained_model_name_or_path": flags.Given("pretrained_model_name_or_path", "base.safetensors", "", True)
    }
    given["guidance"] = flags.Given("guidance", "3.5", "", True)
    monkeypatch.setattr(options, "owners", lambda: {"guidance": ("flux",)})
    report = flags.Report()
    assert flags.find_family(given, report) == "sd"
    assert report.errors == ["--guidance: is a setting of flux, but the base model is of the family sd"]


def test_datasets_in_a_config_file_are_told_where_to_go(home: Path) -> None:
    Path("run.toml").write_text("[[datasets]]\nresolution = 64\n")
    assert any("run.toml" in m and "dataset_config" in m for m in errors([*BASE, "--config", "run.toml"]))


def test_no_model_and_no_images_are_told_together(home: Path) -> None:
    assert [m.split(":")[0] for m in errors([])] == ["no base model", "no images"]
    assert [m.split(":")[0] for m in errors(["--dataset_class", "none"])] == ["no base model", "--dataset_class"]


def test_paths_may_stand_beside_the_file_that_names_them(home: Path) -> None:
    folder = home / "deep"
    folder.mkdir()
    (folder / "data.toml").write_text('[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "../images"\n')
    (folder / "run.toml").write_text(
        'dataset_config = "data.toml"\npretrained_model_name_or_path = "base.safetensors"\n'
    )
    (home / "data.toml").unlink()
    found = flags.resolve_all(["--config", "deep/run.toml"], "network")
    assert found.config.data.dataset_config == "deep/data.toml"
    assert Path(found.datasets[0].subsets[0].image_dir).samefile(home / "images")


def test_a_state_whose_replacement_was_killed_halfway_may_be_resumed(home: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    old = home / f".out-state.{ended.pid}.old"
    old.mkdir()
    (old / "manifest.json").write_text("{}")
    assert flags.resolve_all([*BASE, "--resume", "out-state"], "network").config.output.resume == "out-state"
    assert (home / "out-state" / "manifest.json").is_file() and not old.exists()
