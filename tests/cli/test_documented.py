"""Every dataset file that sd-scripts documents, in own words and on small folders, means what its documentation says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sfumato.cli import datasets, kohya
from sfumato.config import DatasetConfig, SubsetConfig
from sfumato.data.plan import Plan, make_plan
from sfumato.data.store import FileIndex

TWO_WAYS = """
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1

# folders whose captions lie beside the images
[[datasets]]
resolution = 64
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = 'cat'
  class_tokens = 'a cat'

  [[datasets.subsets]]
  image_dir = 'dog'
  class_tokens = 'a dog'
  keep_tokens = 3

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'any'
  class_tokens = 'animal'
  keep_tokens = 1

# a folder whose captions stand in one file
[[datasets]]
resolution = [96, 96]
batch_size = 2

  [[datasets.subsets]]
  image_dir = 'owl'
  metadata_file = 'owl/owl.json'
"""
SIZES = """
[general]
enable_bucket = true
bucket_no_upscale = true
max_bucket_reso = 1536
[[datasets]]
resolution = 64
  [[datasets.subsets]]
  image_dir = 'cat'
[[datasets]]
resolution = 128
skip_image_resolution = 64
  [[datasets.subsets]]
  image_dir = 'cat'
[[datasets]]
resolution = [192, 192]
skip_image_resolution = [128, 128]
  [[datasets.subsets]]
  image_dir = 'cat'
"""
SEPARATORS = """
[general]
flip_aug = true
color_aug = false
resolution = [128, 128]

[[datasets]]
batch_size = 6
enable_bucket = true
bucket_no_upscale = true
caption_extension = ".txt"
keep_tokens_separator= "|||"
shuffle_caption = true
caption_tag_dropout_rate = 0.1
secondary_separator = ";;;"
enable_wildcard = true

  [[datasets.subsets]]
  image_dir = "cat"
  num_repeats = 1
  caption_prefix = "a cat, of mine |||"
  caption_suffix = ", photograph ||| sharp, rating: general"
"""
EVERY_OPTION = """
[general]
caption_separator = ";"
caption_dropout_rate = 0.05
caption_dropout_every_n_epochs = 10
caption_tag_dropout_rate = 0.1
token_warmup_min = 2
token_warmup_step = 0.5
face_crop_aug_range = [1.0, 3.0]
resize_interpolation = "lanczos"
random_crop = true
cache_info = true
class_tokens = "a cat"
[[datasets]]
resolution = 64
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 128
bucket_reso_steps = 64
network_multiplier = 0.5
validation_split = 0.5
validation_seed = 7
  [[datasets.subsets]]
  image_dir = "cat"
  num_repeats = 3
  [[datasets.subsets]]
  image_dir = "dog"
  [datasets.subsets.custom_attributes]
  diff_output_preservation = true
"""
MASKS = """
[[datasets]]
resolution = 64
  [[datasets.subsets]]
  image_dir = "cat"
  caption_extension = ".txt"
  conditioning_data_dir = "cat_masks"
  num_repeats = 8
"""
ALPHA = """
[[datasets]]
resolution = 64
  [[datasets.subsets]]
  image_dir = "cat"
  alpha_mask = true
"""
FOLLOWED = MASKS.replace("  num_repeats = 8\n", "")
METADATA_ALONE = """
[[datasets]]
resolution = 64
enable_bucket = true
min_bucket_reso = 64
  [[datasets.subsets]]
  metadata_file = "owl/owl.jsonl"
  num_repeats = 2
"""


@pytest.fixture
def folders(home: Path) -> Path:
    """Folders of images, each with captions beside them; those of owls in metadata files too."""
    for i, name in enumerate(("cat", "dog", "any", "owl", "cat_masks", "10_a dog", "1_animal")):
        (home / name).mkdir()
        for j, size in enumerate(((64, 64), (128, 128), (256, 256))):
            Image.new("RGB", size, (i, j, 0)).save(home / name / f"{j}_{size[0] // 2}_{size[1] // 2}_20_20.png")
            (home / name / f"{j}.txt").write_text(f"{name} {j}, one, two\nanother line")
    sizes = {path.stem: path for path in sorted((home / "owl").glob("*.png"))}
    said = {name: {"caption": f"owl {name[0]}\ntwice", "tags": "bird, night"} for name in sizes}
    (home / "owl" / "owl.json").write_text(json.dumps(said))
    lines = [json.dumps({"image_path": str(sizes[name]), **record}) for name, record in said.items()]
    (home / "owl" / "owl.jsonl").write_text("\n".join(lines))
    for root, name in (("train", "10_a dog"), ("reg", "1_animal")):
        (home / root).mkdir()
        (home / name).rename(home / root / name)
    return home


def resolved(script: str, text: str, *argv: str) -> tuple[DatasetConfig, ...]:
    Path("documented.toml").write_text(text)
    argv = ("--pretrained_model_name_or_path=base.safetensors", "--dataset_config=documented.toml", *argv)
    found = kohya.resolve(script, [*argv, "--max_train_steps=10"]).datasets
    Path("documented.toml").write_text(datasets.write(found))
    assert kohya.resolve(script, [*argv, "--max_train_steps=10"]).datasets == found, (
        "written, it reads back to the same"
    )
    return found


def planned(found: tuple[DatasetConfig, ...], **options: Any) -> Plan:
    return make_plan(found, FileIndex(), **options)


def subsets(found: tuple[DatasetConfig, ...]) -> list[SubsetConfig]:
    return [subset for dataset in found for subset in dataset.subsets]


@pytest.mark.parametrize("script", ["train_network", "fine_tune", "train_db"])
def test_folders_and_metadata_of_two_sizes_in_one_run(folders: Path, script: str) -> None:
    found = resolved(script, TWO_WAYS)
    assert [(d.resolution, d.batch_size) for d in found] == [((64, 64), 4), ((96, 96), 2)]
    assert [s.keep_tokens for s in subsets(found)] == [2, 3, 1, 1] and all(s.shuffle_caption for s in subsets(found))
    captions = {item.image.captions for item in planned(found).items if item.dataset == 1}
    assert captions == {(f"owl {i},bird, night", "twice,bird, night") for i in range(3)}


def test_one_folder_at_three_sizes(folders: Path) -> None:
    plan = planned(resolved("train_network", SIZES))
    assert [(item.dataset, item.placement.bucket[0]) for item in plan.items] == [
        (0, 64), (0, 64), (0, 64), (1, 128), (1, 128), (2, 192),
    ]  # fmt: skip


def test_marks_of_captions(folders: Path) -> None:
    [subset] = subsets(resolved("train_network", SEPARATORS))
    assert (subset.keep_tokens_separator, subset.secondary_separator) == ("|||", ";;;") and subset.enable_wildcard
    assert (
        subset.caption_prefix == "a cat, of mine |||"
        and subset.caption_suffix == ", photograph ||| sharp, rating: general"
    )


def test_every_option_of_folders_and_datasets(folders: Path) -> None:
    found = resolved("train_network", EVERY_OPTION)
    subset, kept = subsets(found)
    assert subset.face_crop_aug_range == (1.0, 3.0) and kept.custom_attributes == {"diff_output_preservation": True}
    assert (found[0].network_multiplier, subset.validation_split, subset.validation_seed) == (0.5, 0.5, 7)
    assert Counter(item.image.subset for item in planned(found).items) == {0: 1, 1: 3}, "half of the first is held out"


CASES: list[tuple[str, str, list[str], Callable[[Plan], bool]]] = [
    ("train_network", MASKS, ["--masked_loss"], lambda plan: all(i.image.mask_path for i in plan.items)),
    ("train_network", ALPHA, ["--masked_loss"], lambda plan: plan.datasets[0].subsets[0].alpha_mask),
    ("fine_tune", METADATA_ALONE, [], lambda plan: {i.repeats for i in plan.items} == {2} and len(plan.items) == 3),
]


@pytest.mark.parametrize(("script", "text", "argv", "right"), CASES, ids=["masks", "alpha", "metadata"])
def test_masks_and_metadata(
    folders: Path, script: str, text: str, argv: list[str], right: Callable[[Plan], bool]
) -> None:
    assert right(planned(resolved(script, text, *argv)))


@pytest.mark.parametrize("script", ["train_controlnet", "train_control_net"])
def test_images_to_follow(folders: Path, script: str) -> None:
    plan = planned(resolved(script, FOLLOWED), control=True)
    assert all(item.image.control_path for item in plan.items) and len(plan.items) == 3


def test_commands_without_a_dataset_file(folders: Path) -> None:
    base = ["--pretrained_model_name_or_path=base.safetensors", "--resolution=64", "--max_train_steps=10"]
    found = kohya.resolve("train_db", [*base, "--train_data_dir=train", "--reg_data_dir=reg"]).datasets
    assert [(s.num_repeats, s.class_tokens, s.is_reg) for s in subsets(found)] == [
        (10, "a dog", False),
        (1, "animal", True),
    ]
    tune = [*base, "--in_json=owl/owl.json", "--train_data_dir=owl", "--dataset_repeats=3"]
    found = kohya.resolve("fine_tune", tune).datasets
    assert [(item.repeats, item.image.captions[0]) for item in planned(found).items] == [
        (3, f"owl {i},bird, night") for i in range(3)
    ]
    both = kohya.resolve("fine_tune", [*tune, "--dataset_config=data.toml"])
    assert subsets(both.datasets)[0].image_dir == "images" and "dataset_config names the folders" in str(both.notices)
