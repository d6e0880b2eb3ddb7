"""Metadata and hashes; the hashes against sd-scripts' own way: serialise with the safetensors library, then read the bytes."""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from sfumato.config import Config, DatasetConfig, MetadataConfig, OutputConfig, SubsetConfig
from sfumato.errors import UserError
from sfumato.formats import files, metadata

RUN = metadata.RunFacts(
    sfumato_version="0",
    session_id=1, training_started_at=1.5, training_finished_at=2.5, base_model_version="sd_v1", v2=False, optimizer="torch.optim.adamw.AdamW",
    mixed_precision="no", num_train_images=40, num_reg_images=0, num_batches_per_epoch=20, num_epochs=2, max_train_steps=40, steps=40, epoch=2,
    network_module="networks.lora", network_dim=4, network_alpha=1.0, network_args={"conv_dim": 4},
)  # fmt: skip


def sd_scripts_hashes(tensors: dict[str, Tensor], meta: dict[str, str]) -> dict[str, str]:
    file = io.BytesIO(safetensors.torch.save(tensors, {k: v for k, v in meta.items() if k.startswith("ss_")}))
    length = int.from_bytes(file.read(8), "little")
    file.seek(8 + length)
    model = hashlib.sha256(file.read()).hexdigest()
    file.seek(0x100000)
    return {"sshs_model_hash": model, "sshs_legacy_hash": hashlib.sha256(file.read(0x10000)).hexdigest()[:8]}


@pytest.mark.parametrize("rows", [4, 60, 300], ids=["ends before the window", "ends in it", "ends after it"])
def test_hashes_are_sd_scripts(rows: int) -> None:
    tensors = {f"layer{i}.lora_up.weight": torch.rand(rows, 1000) for i in range(4)} | {
        "layer0.alpha": torch.tensor(1.0),
        "half": torch.rand(300, 700).half(),
    }
    meta = {"ss_seed": "42", "ss_é": "ü", "modelspec.title": "left out", "sshs_model_hash": "left out"}
    assert metadata.hashes(tensors, meta) == sd_scripts_hashes(tensors, meta)


def test_hashes_see_every_value() -> None:
    a, b = torch.zeros(10), torch.zeros(10)
    b[-1] = 1e-30
    assert metadata.hashes({"a": a}, {}) != metadata.hashes({"a": b}, {})
    assert metadata.hashes({"a": a}, {})["sshs_model_hash"] == hashlib.sha256(bytes(40)).hexdigest()


def test_the_hashes_of_a_base_model(tmp_path: Path) -> None:
    path, memo = tmp_path / "model.safetensors", tmp_path / "cache" / "hashes.json"
    path.write_bytes(bytes(range(256)) * 5000)
    data = path.read_bytes()
    assert metadata.base_model(str(path), memo=memo) == {
        "ss_sd_model_name": "model.safetensors",
        "ss_sd_model_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
        "ss_new_sd_model_hash": hashlib.sha256(data).hexdigest(),
    }
    assert metadata.base_model(str(path), "vae", memo).keys() == {"ss_vae_name", "ss_vae_hash", "ss_new_vae_hash"}
    assert metadata.base_model(str(tmp_path)) == {"ss_sd_model_name": tmp_path.name}
    assert metadata.base_model("owner/name") == {"ss_sd_model_name": "owner/name"}


def test_a_base_model_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, memo, reads = tmp_path / "a", tmp_path / "hashes.json", []
    monkeypatch.setattr(metadata, "file_digest", lambda p: reads.append(p) or files.file_digest(p))
    path.write_bytes(b"one")
    assert metadata.model_hash(path, memo) == metadata.model_hash(path, memo) == hashlib.sha256(b"one").hexdigest()
    assert len(reads) == 1
    path.write_bytes(b"other")
    assert metadata.model_hash(path, memo) == hashlib.sha256(b"other").hexdigest()
    memo.write_text("{ not json")
    assert metadata.model_hash(path, memo) == hashlib.sha256(b"other").hexdigest()
    memo_in_a_file = path / "hashes.json"
    assert metadata.model_hash(path, memo_in_a_file) == hashlib.sha256(b"other").hexdigest()


def test_a_file_of_the_same_size_and_time_put_in_its_place_is_another(tmp_path: Path) -> None:
    """A VAE replaced so would else be taken for the old one, and the latents that the old one made for its own."""
    path, memo = tmp_path / "vae.safetensors", tmp_path / "hashes.json"
    path.write_bytes(b"old")
    os.utime(path, (1, 1))
    assert metadata.remembered("vae", [path], path.read_text, memo) == "old"
    (tmp_path / "new").write_bytes(b"new")
    os.utime(tmp_path / "new", (1, 1))
    os.replace(tmp_path / "new", path)
    assert metadata.remembered("vae", [path], path.read_text, memo) == "new"


def test_the_newest_files_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them would make every run read and write a longer list."""
    monkeypatch.setattr(metadata, "REMEMBERED", 3)
    path, memo = tmp_path / "a", tmp_path / "hashes.json"
    path.write_bytes(b"one")
    for name in "abcbd":
        os.utime(path, (len(name), ord(name)))
        metadata.remembered(name, [path], lambda name=name: name, memo)  # type: ignore[misc]
    assert list(json.loads(memo.read_text())) == ["c", "b", "d"]


def test_modelspec() -> None:
    given = MetadataConfig(
        metadata_author="A. Nonym", metadata_tags="line art, ink", metadata_merged_from="a, b", metadata_preprocessor="canny",
        metadata_thumbnail="data:image/jpeg;base64,AAAA", metadata_is_negative_embedding=True,
    )  # fmt: skip
    spec = metadata.modelspec(
        "stable-diffusion-v1", given, title="lineart", adapter="lora", implementation="diffusers", resolution=(512, 768), prediction="epsilon",
        date=datetime(2026, 1, 2, 3, 4, 5, 678), encoder_layer=2, timestep_range=(0, 1000),
    )  # fmt: skip
    assert spec == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "lineart",
        "modelspec.resolution": "512x768",
        "modelspec.date": "2026-01-02T03:04:05",
        "modelspec.author": "A. Nonym",
        "modelspec.tags": "line art, ink",
        "modelspec.thumbnail": "data:image/jpeg;base64,AAAA",
        "modelspec.merged_from": "a, b",
        "modelspec.preprocessor": "canny",
        "modelspec.is_negative_embedding": "true",
        "modelspec.prediction_type": "epsilon",
        "modelspec.encoder_layer": "2",
        "modelspec.timestep_range": "0,1000",
    }


def test_a_thumbnail_is_a_file_or_a_data_url(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    assert metadata.thumbnail(str(tmp_path / "a.png")) == "data:image/png;base64,cGljdHVyZQ=="
    assert metadata.thumbnail("data:image/png;base64,AA==") == "data:image/png;base64,AA=="
    (tmp_path / "a.txt").write_bytes(b"text")
    (tmp_path / "large.png").write_bytes(bytes(metadata.THUMBNAIL + 1))
    for name in ("a.txt", "large.png", "none.png"):
        with pytest.raises(
            UserError, match=f"metadata_thumbnail .*{name}: (expected an image of at most|No such file)"
        ):
            metadata.thumbnail(str(tmp_path / name))


def test_training_fields() -> None:
    config = Config(output=OutputConfig(output_name="lineart"), metadata=MetadataConfig(training_comment="note"))
    fields = metadata.training(config, RUN)
    assert all(key.startswith("ss_") and isinstance(value, str) for key, value in fields.items())
    wanted = {
        "ss_learning_rate": "0.0001",
        "ss_unet_lr": "None",
        "ss_text_encoder_lr": "None",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "1.0",
        "ss_network_args": '{"conv_dim": 4}',
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_num_train_images": "40",
        "ss_steps": "40",
        "ss_output_name": "lineart",
        "ss_training_comment": "note",
        "ss_min_snr_gamma": "None",
        "ss_debiased_estimation": "False",
        "ss_lr_scheduler": "constant",
        "ss_seed": "42",
    }
    assert wanted.items() <= fields.items()


def test_no_metadata_leaves_what_loaders_need() -> None:
    fields = metadata.training(Config(metadata=MetadataConfig(no_metadata=True)), RUN, [facts()])
    assert set(fields) == set(metadata.NEEDED)
    assert set(
        metadata.training(Config(metadata=MetadataConfig(no_metadata=True)), replace(RUN, network_args=None))
    ) == set(metadata.NEEDED) - {"ss_network_args"}


def test_fields_of_what_is_not_done_are_as_sd_scripts_writes_them_without_it() -> None:
    fields = metadata.training(Config(), RUN)
    off = {"ss_lowram", "ss_full_fp16", "ss_fp8_base", "ss_fp8_base_unet"}
    assert {fields[name] for name in off} == {"False"} and fields["ss_sd_scripts_commit_hash"] == ""
    assert fields["ss_validation_split"] == "0.0" and fields["ss_num_validation_images"] == "0"
    others = ("validation_seed", "max_validation_steps", "validate_every_n_epochs", "validate_every_n_steps")
    assert {fields[f"ss_{name}"] for name in others} == {"None"}


def test_a_whole_model_has_no_fields_of_adapters() -> None:
    run = replace(RUN, network_module=None, network_dim=None, network_alpha=None, network_args=None)
    fields = metadata.training(Config(), run, [facts()])
    assert (
        not [name for name in fields if "network" in name and name != "ss_datasets"]
        and "ss_scale_weight_norms" not in fields
    )
    assert set(metadata.training(Config(metadata=MetadataConfig(no_metadata=True)), run)) == {
        "ss_v2",
        "ss_base_model_version",
    }


def test_an_adapter_has_no_fields_that_say_whether_a_whole_text_encoder_was_trained() -> None:
    whole = replace(RUN, network_module=None, network_args=None)
    names = {"ss_train_text_encoder", "ss_learning_rate_te"}
    assert not names & metadata.training(Config(), RUN).keys() and names <= metadata.training(Config(), whole).keys()


def test_an_optimizer_is_called_by_its_class() -> None:
    assert metadata.called(torch.optim.AdamW, {"weight_decay": 0.1, "betas": (0.9, 0.99)}) == (
        "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))"
    )
    assert metadata.called(torch.optim.SGD, {}) == "torch.optim.sgd.SGD"


def facts() -> metadata.DatasetFacts:
    subsets = (
        SubsetConfig(image_dir="/home/me/10_cat", num_repeats=10),
        SubsetConfig(image_dir="/home/me/1_animal", is_reg=True, caption_separator=";"),
    )
    return metadata.DatasetFacts(
        config=DatasetConfig(subsets=subsets, resolution=(512, 448), batch_size=2, enable_bucket=True),
        images=(3, 5),
        tags=({"a cat": 2, "sitting": 1}, {"x": 2, "y": 1}),
        buckets={(512, 448): 20, (448, 512): 15},
        mean_ar_error=0.25,
    )


def test_dataset_fields() -> None:
    fields = metadata.training(Config(), RUN, [facts()])
    (dataset,) = json.loads(fields["ss_datasets"])
    assert dataset["num_train_images"] == 30
    assert dataset["num_reg_images"] == 5
    assert dataset["resolution"] == [512, 448]
    assert dataset["bucket_info"] == {
        "buckets": {"0": {"resolution": [448, 512], "count": 15}, "1": {"resolution": [512, 448], "count": 20}},
        "mean_img_ar_error": 0.25,
    }
    assert [(s["image_dir"], s["img_count"], s["num_repeats"], s["is_reg"]) for s in dataset["subsets"]] == [
        ("10_cat", 3, 10, False),
        ("1_animal", 5, 1, True),
    ]
    assert json.loads(fields["ss_tag_frequency"]) == {
        "10_cat": {"a cat": 2, "sitting": 1},
        "1_animal": {"x": 2, "y": 1},
    }
    assert json.loads(fields["ss_dataset_dirs"]) == {"10_cat": {"n_repeats": 10, "img_count": 3}}
    assert json.loads(fields["ss_reg_dataset_dirs"]) == {"1_animal": {"n_repeats": 1, "img_count": 5}}
    assert fields["ss_resolution"] == "(512, 448)"
    flat = {
        "min_bucket_reso": "256",
        "max_bucket_reso": "1024",
        "bucket_no_upscale": "False",
        "flip_aug": "False",
        "keep_tokens": "0",
    }
    assert {f"ss_{name}": value for name, value in flat.items()}.items() <= fields.items()
    assert "/home/me" not in json.dumps(fields)


def test_two_datasets_add_up() -> None:
    fields = metadata.training(Config(), RUN, [facts(), facts()])
    assert len(json.loads(fields["ss_datasets"])) == 2
    assert json.loads(fields["ss_tag_frequency"])["10_cat"] == {"a cat": 4, "sitting": 2}
    assert fields["ss_bucket_info"] == "None"


def test_names_that_are_no_text_can_be_saved(tmp_path: Path) -> None:
    odd = "/home/me/caf\udce9"
    subsets = (SubsetConfig(image_dir=odd, conditioning_data_dir=odd),)
    fields = metadata.training(
        Config(), RUN, [metadata.DatasetFacts(config=DatasetConfig(subsets=subsets), images=(1,), tags=({"a": 1},))]
    )
    assert json.loads(fields["ss_tag_frequency"]) == {"caf\\xe9": {"a": 1}} and "/home/me" not in json.dumps(fields)
    files.save(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {"ss_sd_model_name": "m\udcff.safetensors", **fields})
    assert files.read_header(tmp_path / "a.safetensors").metadata["ss_sd_model_name"] == "m\\xff.safetensors"
