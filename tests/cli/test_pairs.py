"""Command lines of trainings whose images follow others: the folder of these, and kohya's scripts for ControlNet-LLLites."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from sfumato import families
from sfumato.cli import flags, kohya
from sfumato.errors import UserError

BASE = ["--pretrained_model_name_or_path=base.safetensors"]


@pytest.fixture
def pairs(home: Path) -> Path:
    """Images in `pictures`, and others with the same names in `follow`."""
    for name in ("pictures", "follow"):
        Path(name).mkdir()
        Image.new("RGB", (64, 64)).save(Path(name) / "a.png")
    return home


def of(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.families.detect.detect_file", lambda _: SimpleNamespace(family=family))


@pytest.mark.parametrize("script", ["sdxl_train_control_net_lllite", "sdxl_train_control_net_lllite_old"])
def test_kohyas_scripts_for_sdxl(script: str, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of("sdxl", monkeypatch)
    words = "--train_data_dir=pictures --conditioning_data_dir=follow --cond_emb_dim=16 --network_dim=32"
    found = kohya.resolve(script, [*BASE, *words.split(), "--network_dropout=0.1", "--no_half_vae", "--resolution=512"])
    network = found.config.network
    assert (network.cond_emb_dim, network.network_dim, network.network_dropout) == (16, 32, 0.1)
    ((folder,),) = (dataset.subsets for dataset in found.datasets)
    assert (folder.image_dir, folder.conditioning_data_dir, folder.num_repeats) == ("pictures", "follow", 1)
    assert not [notice for notice in found.notices if "no effect" in notice and "no_half_vae" not in notice]


def test_kohyas_script_for_anima(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of("anima", monkeypatch)
    Path("data.toml").write_text(
        "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'pictures'\nconditioning_data_dir = 'follow'\n"
    )
    words = [
        "--dataset_config=data.toml",
        "--cond_emb_dim=16",
        "--lllite_mlp_dim=48",
        "--lllite_dropout=0.2",
        "--lllite_cond_dim=32",
        "--lllite_target_layers=self_attn_q_pre,mlp_fc1_pre",
        "--lllite_cond_resblocks=2",
        "--lllite_use_aspp",
        "--lllite_multiplier=1.0",
        "--lllite_cond_in_channels=3",
    ]
    found = kohya.resolve("anima_train_control_net_lllite", [*BASE, *words]).config
    assert (found.network.network_dim, found.network.network_dropout) == (48, 0.2)
    o = families.facts("anima").options.of(found.family)
    assert (o.lllite_cond_dim, o.lllite_cond_resblocks, o.lllite_use_aspp) == (32, 2, True)  # type: ignore[attr-defined]
    for words_too, message in (
        (["--lllite_target_layers=cross_attn_v"], "lllite_target_layers: expected one of self_attn_q,"),
        (["--lllite_cond_in_channels=4"], "RGB"),
        (["--lllite_cond_dim=33"], "an even number"),
    ):
        with pytest.raises(UserError, match=message):
            kohya.resolve("anima_train_control_net_lllite", [*BASE, *words, *words_too])


def test_a_folder_of_masks_may_be_a_flag_too(pairs: Path) -> None:
    words = [*BASE, "--dataset_config=data.toml", "--conditioning_data_dir=follow"]
    found = kohya.resolve("train_network", [*words, "--masked_loss"])
    assert {s.conditioning_data_dir for d in found.datasets for s in d.subsets} == {"follow"}
    without = kohya.resolve("train_network", words)
    assert {s.conditioning_data_dir for d in without.datasets for s in d.subsets} == {None}
    assert any(n.startswith("--conditioning_data_dir: accepted, no effect: it holds masks") for n in without.notices)
    with pytest.raises(UserError, match="conditioning_data_dir: would have no effect: it holds masks"):
        flags.resolve_all(words, "network")


def test_images_that_follow_need_the_others(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="conditioning_data_dir is missing"):
        flags.resolve_all([*BASE, "--dataset_config=data.toml"], "controlnet")
    words = [*BASE, "--dataset_config=data.toml", "--conditioning_data_dir=follow", "--masked_loss"]
    with pytest.raises(UserError, match=r"no folder has masks: set alpha_mask$"):
        flags.resolve_all(words, "controlnet")
    assert flags.resolve_all([*words, "--alpha_mask"], "controlnet").datasets
    of("sdxl", monkeypatch)
    with pytest.raises(UserError, match="network_alpha: would have no effect: only `train network`"):
        flags.resolve_all([*words, "--alpha_mask", "--network_alpha=2"], "lllite")
