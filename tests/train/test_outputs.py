"""No result overwrites what the run reads or what a user keeps, and every path is one that can be written, before the first step."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from training import config

from sfumato.cli.main import main
from sfumato.config import DatasetConfig, Method, SubsetConfig
from sfumato.errors import UserError
from sfumato.families.sd.family import FAMILY
from sfumato.models.loading import examine
from sfumato.train import lock, outputs

Check = Callable[..., None]


@pytest.fixture
def check(model: Path, tmp_path: Path) -> Check:
    """Check a run that writes `out/me` (made here) with these flat options."""
    (tmp_path / "out").mkdir()

    def go(*, method: Method = "network", folder: str = "", read: tuple[Path, ...] = (), **options: Any) -> None:
        settings = {
            "pretrained_model_name_or_path": str(model),
            "output_dir": str(tmp_path / "out"),
            "output_name": "me",
        }
        made = config(**{**settings, **options})
        source = examine(FAMILY, made.model.pretrained_model_name_or_path, made.family, vae=made.model.vae)[1]
        data = (DatasetConfig(subsets=(SubsetConfig(image_dir=folder),)),) if folder else ()
        outputs.check(made, method, data, source, read)

    return go


def base(model: Path, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model, path)
    return str(path)


@pytest.mark.parametrize("name", ["me.safetensors", "me-step00000400.safetensors", "me-000004.safetensors"])
def test_a_base_model_is_not_overwritten(check: Check, model: Path, tmp_path: Path, name: str) -> None:
    path = base(model, tmp_path / "out" / name)
    with pytest.raises(
        UserError, match=r"would overwrite what pretrained_model_name_or_path names; choose another output_name"
    ):
        check(pretrained_model_name_or_path=path, save_every_n_epochs=2)


def test_names_that_this_run_does_not_write_are_no_trouble(check: Check, model: Path, tmp_path: Path) -> None:
    for name in ("me-000003.safetensors", "me2.safetensors", "me.ckpt.safetensors", "other.safetensors"):
        check(pretrained_model_name_or_path=base(model, tmp_path / "out" / name), save_every_n_epochs=2)
    check(pretrained_model_name_or_path=base(model, tmp_path / "out" / "me-000002.safetensors"))


@pytest.mark.parametrize("link", ["symbolic", "hard", "dots"])
def test_links_are_the_file_that_they_name(check: Check, model: Path, tmp_path: Path, link: str) -> None:
    real, name = Path(base(model, tmp_path / "models" / "base.safetensors")), tmp_path / "out" / "me.safetensors"
    try:
        if link == "dots":
            real = tmp_path / "out" / "sub" / ".." / base(model, name).rpartition(os.sep)[2]
            (tmp_path / "out" / "sub").mkdir()
        elif link == "hard":
            name.hardlink_to(real)
        else:
            name.symlink_to(real)
    except OSError:
        pytest.skip("no such links here")
    with pytest.raises(UserError, match="would overwrite"):
        check(pretrained_model_name_or_path=str(real))


def test_a_folder_that_does_not_tell_capitals_apart(check: Check, model: Path, tmp_path: Path) -> None:
    """Elsewhere `Me` and `me` are two files, and nothing is lost."""
    path = base(model, tmp_path / "out" / "Me.Safetensors")
    if (tmp_path / "out" / "me.safetensors").exists():
        with pytest.raises(UserError, match="would overwrite"):
            check(pretrained_model_name_or_path=path)
    else:
        check(pretrained_model_name_or_path=path)


@pytest.mark.parametrize("key", ["network_weights", "base_weights", "vae"])
def test_weights_that_are_read_are_not_overwritten(check: Check, model: Path, tmp_path: Path, key: str) -> None:
    path = base(model, tmp_path / "out" / "me.safetensors")
    with pytest.raises(UserError, match=f"would overwrite what {key} names"):
        check(**{key: (path,) if key == "base_weights" else path})


def test_an_encoder_written_beside_the_result_overwrites_no_input(check: Check, model: Path, tmp_path: Path) -> None:
    path = base(model, tmp_path / "out" / "me_clip_l.safetensors")
    with pytest.raises(UserError, match="would overwrite what network_weights names"):
        check(method="full", network_weights=path)
    check(network_weights=path)


@pytest.mark.parametrize(
    ("name", "key"), [("me.toml", "read"), ("me.toml", "dataset_config"), ("me.toml", "sample_prompts")]
)
def test_a_config_is_not_overwritten(check: Check, tmp_path: Path, name: str, key: str) -> None:
    path = tmp_path / "out" / name
    path.write_text("# mine\n")
    with pytest.raises(UserError, match="would overwrite what"):
        check(**{key: (path,) if key == "read" else str(path)})


@pytest.mark.parametrize(
    ("name", "text"), [("me.toml", "a = 1\n"), ("me.jsonl", '{"file_name": "a.png"}\n'), ("me.jsonl", "\xff")]
)
def test_text_files_that_sfumato_did_not_write_are_not_overwritten(
    check: Check, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / "out" / name).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="which sfumato did not write; choose another output_name"):
        check()


def test_a_run_may_be_started_again_and_resumed(check: Check, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "me.toml").write_text("# sfumato 0.1.0, train network\n")
    (out / "me.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    for name in ("me.safetensors", "me-step00000002.safetensors", "me-loss.png"):
        (out / name).write_text("old")
    (out / "me-state").mkdir()
    (out / "me-state" / "manifest.json").write_text("{}")
    check()
    check(resume=str(out / "me-state"))


def test_a_run_may_be_started_from_the_settings_that_an_earlier_one_wrote(check: Check, tmp_path: Path) -> None:
    path = tmp_path / "out" / "me.toml"
    path.write_text("# sfumato 0.1.0, train network\n")
    check(read=(path,))


@pytest.mark.parametrize("inner", ["", "unet", "new/deeper"])
def test_nothing_is_written_into_the_folder_of_a_model(check: Check, tmp_path: Path, inner: str) -> None:
    folder = tiny.tiny_sd1_diffusers(tmp_path / "base")
    with pytest.raises(
        UserError, match=r"output_dir: .* is in the model that pretrained_model_name_or_path names"
    ) as caught:
        check(pretrained_model_name_or_path=str(folder), output_dir=str(folder / inner))
    assert len(caught.value.messages) == 1, "the folders of its parts are in it: once is enough"
    check(pretrained_model_name_or_path=str(folder), output_dir=str(tmp_path))


def test_a_result_folder_takes_no_place_of_inputs(check: Check, model: Path, tmp_path: Path) -> None:
    folder = tiny.tiny_sd1_diffusers(tmp_path / "out" / "me")
    with pytest.raises(UserError, match="would overwrite what pretrained_model"):
        check(method="full", pretrained_model_name_or_path=str(folder))
    with pytest.raises(UserError, match="is not sfumato's"):
        check(method="full", save_model_as="diffusers")
    shutil.rmtree(folder)
    (folder / "images").mkdir(parents=True)
    with pytest.raises(UserError, match="holds images of the dataset"):
        check(method="full", save_model_as="diffusers", folder=str(folder / "images"))
    with pytest.raises(UserError, match=r"would take the place of a folder that holds .* which vae names"):
        check(method="full", save_model_as="diffusers", vae=base(model, folder / "images" / "vae.safetensors"))


def test_a_image_of_the_dataset_is_not_overwritten(check: Check, tmp_path: Path) -> None:
    (tmp_path / "out" / "me-loss.png").write_text("")
    with pytest.raises(UserError, match="would be written over a file of the dataset"):
        check(folder=str(tmp_path / "out"))
    check(folder=str(tmp_path))  # whose own files alone are read


@pytest.mark.parametrize(
    "name", ["me.safetensors", "me-step00000002.safetensors", "me.toml", "me.jsonl", "me-loss.png"]
)
def test_a_folder_where_a_file_is_to_be_is_found_before_the_first_step(check: Check, tmp_path: Path, name: str) -> None:
    (tmp_path / "out" / name).mkdir()
    with pytest.raises(UserError, match="is a folder, and a file is to be written there"):
        check()


def test_a_file_where_a_folder_is_to_be_is_found_before_the_first_step(check: Check, tmp_path: Path) -> None:
    (tmp_path / "out" / "me-state").write_text("")
    (tmp_path / "out" / "sample").write_text("")
    (tmp_path / "prompts.txt").write_text("a cat")
    with pytest.raises(UserError) as error:
        check(sample_prompts=str(tmp_path / "prompts.txt"))
    assert len(error.value.messages) == 2
    for output_dir in (tmp_path / "prompts.txt", tmp_path / "prompts.txt" / "deeper"):
        with pytest.raises(UserError, match="is a file, not a folder"):
            check(output_dir=str(output_dir))


def test_a_state_of_sd_scripts_is_not_replaced(check: Check, tmp_path: Path) -> None:
    (tmp_path / "out" / "me-state").mkdir()
    (tmp_path / "out" / "me-state" / "train_state.json").write_text("{}")
    with pytest.raises(UserError, match="is not sfumato's; move it away"):
        check()


@pytest.fixture
def mine(model: Path, images: Path, tmp_path: Path) -> Path:
    """`me.toml`, a config of a run that writes `out/me`."""
    shutil.copytree(images, tmp_path / "data" / "1_cat")
    values = {
        "pretrained_model_name_or_path": model,
        "output_dir": tmp_path / "out",
        "output_name": "me",
        "train_data_dir": tmp_path / "data",
    }
    text = "".join(f"{key} = {json.dumps(str(value))}\n" for key, value in values.items()) + "resolution = 64\n"
    (tmp_path / "me.toml").write_text(text, encoding="utf-8")
    return tmp_path / "me.toml"


@pytest.mark.parametrize("command", ["plan", "train"])
def test_the_config_of_a_command_line_is_not_overwritten(
    mine: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main([command, "network", "--config", str(mine), "--output_dir", str(tmp_path)]) == 2
    assert f"output_name: the result {mine} would overwrite what --config names" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_plan_says_that_another_run_writes_the_results_just_now(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with lock.alone(tmp_path / "out", "me"):
        assert main(["plan", "network", "--config", str(mine)]) == 0
    assert "output_name: another run (" in capsys.readouterr().out
    assert main(["plan", "network", "--config", str(mine)]) == 0
    assert "another run" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
