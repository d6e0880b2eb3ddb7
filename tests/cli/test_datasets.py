from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from sfumato.cli import datasets, flags, toml
from sfumato.config import DatasetConfig, SubsetConfig
from sfumato.data.buckets import check
from sfumato.errors import UserError

MODEL = ["--pretrained_model_name_or_path", "base.safetensors"]
BASE = [*MODEL, "--dataset_config", "data.toml"]

FULL = """
[general]
caption_extension = ".caption"
shuffle_caption = true
keep_tokens = 2
enable_bucket = true

[[datasets]]
resolution = [128, 192]
batch_size = 3
min_bucket_reso = 64
keep_tokens = 1

  [[datasets.subsets]]
  image_dir = "images"
  num_repeats = 5
  class_tokens = "a cat"
  keep_tokens = 0

  [[datasets.subsets]]
  image_dir = "more"
  is_reg = true

[[datasets]]
resolution = 512
  [[datasets.subsets]]
  image_dir = "images"
  caption_dropout_rate = 0.5
"""


def read(text: str, *argv: str, name: str = "data.toml") -> tuple[DatasetConfig, ...]:
    Path(name).write_text(text)
    return flags.resolve_all([*MODEL, "--dataset_config", name, *argv], "network").datasets


def test_a_setting_falls_back_from_subset_to_dataset_to_general_to_flag_to_default(home: Path) -> None:
    first, second = read(FULL, "--train_batch_size", "2", "--flip_aug", "--class_tokens", "thing")
    cat, reg = first.subsets
    assert (first.resolution, first.batch_size, first.min_bucket_reso, first.enable_bucket) == ((128, 192), 3, 64, True)
    assert (second.resolution, second.batch_size, second.min_bucket_reso, second.enable_bucket) == (
        (512, 512),
        2,
        256,
        True,
    )
    assert (cat.keep_tokens, reg.keep_tokens, second.subsets[0].keep_tokens) == (0, 1, 2)
    assert (cat.num_repeats, reg.num_repeats, cat.is_reg, reg.is_reg) == (5, 1, False, True)
    assert (cat.class_tokens, reg.class_tokens) == ("a cat", "thing")
    assert all(s.flip_aug and s.shuffle_caption and s.caption_extension == ".caption" for s in (cat, reg))
    assert second.subsets[0].caption_dropout_rate == 0.5 and cat.caption_dropout_rate == 0.0


def test_json_reads_as_toml_does(home: Path) -> None:
    content = {
        "general": {"shuffle_caption": True, "keep_tokens": 1},
        "datasets": [{"resolution": "64,96", "subsets": [{"image_dir": "images", "num_repeats": 2}]}],
    }
    toml = '[general]\nshuffle_caption = true\nkeep_tokens = 1\n[[datasets]]\nresolution = "64,96"\n[[datasets.subsets]]\nimage_dir = "images"\nnum_repeats = 2\n'
    assert read(json.dumps(content), name="data.json") == read(toml)


def test_what_is_written_reads_back_to_the_same(home: Path) -> None:
    first = read(FULL, "--flip_aug")
    assert read(datasets.write(first)) == first


def test_attributes_of_ones_own_are_read_and_written(home: Path) -> None:
    text = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "images"\n[datasets.subsets.custom_attributes]\n'
    found = read(f'{text}diff_output_preservation = true\n"a b" = 1\n')
    assert found[0].subsets[0].custom_attributes == {"diff_output_preservation": True, "a b": 1}
    assert read(datasets.write(found)) == found and hash(found)
    with pytest.raises(UserError, match=r"data\.toml:4: custom_attributes: expected values that are true"):
        read(f"{text}x = [1]\n")
    with pytest.raises(UserError, match=r"custom_attributes: expected diff_output_preservation = true or false, found"):
        read(f'{text}diff_output_preservation = "false"\n')
    general = "[general.custom_attributes]\ndiff_output_preservation = true\n[[datasets]]\n"
    both = f"{general}{SUBSET.format('images')}{SUBSET.format('more')}custom_attributes = {{}}\n"
    assert [subset.preserved for subset in read(both)[0].subsets] == [True, False]


def test_wildcards_and_cached_text_go_together(home: Path) -> None:
    text = "[general]\nenable_wildcard = true\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'images'\n"
    assert read(text, "--cache_text_encoder_outputs")[0].subsets[0].enable_wildcard
    with pytest.raises(UserError, match="shuffle_caption cannot be used with cache_text_encoder_outputs"):
        read(text.replace("enable_wildcard", "shuffle_caption"), "--cache_text_encoder_outputs")


def test_every_mistake_is_told_with_its_line(home: Path) -> None:
    text = FULL.replace('image_dir = "more"\n  is_reg', 'image_dir = "image"\n  is_reg').replace(
        "batch_size = 3", 'batch_size = "3"'
    )
    text = (
        text.replace("num_repeats = 5", "num_repeat = 5")
        .replace("keep_tokens = 1\n", "keep_tokens = 1\nis_reg = true\n")
        .replace("0.5", "1.5")
    )
    with pytest.raises(UserError) as e:
        read(text)
    rows = list(enumerate(text.splitlines(), 1))
    line = {key: next(i for i, row in rows if key in row) for key in ("batch_size", "num_repeat", "is_reg", "1.5")}
    missing = next(i for i, row in rows if row.endswith('"image"'))
    assert sorted(e.value.messages) == sorted(
        [
            f"data.toml:{line['batch_size']}: batch_size: expected a whole number, found the text '3'",
            f"data.toml:{line['num_repeat']}: num_repeat: unknown setting here; did you mean 'num_repeats'?",
            f"data.toml:{line['is_reg']}: is_reg: unknown setting here; it belongs to [[datasets.subsets]]",
            f"data.toml:{missing}: image_dir: folder image does not exist; did you mean 'images'?",
            f"data.toml:{line['1.5']}: caption_dropout_rate: expected between 0 and 1, found 1.5",
        ]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[general]\n", "expected at least one [[datasets]]"),
        ("[[datasets]]\n", "expected at least one [[datasets.subsets]]"),
        ("[[dataset]]\n", "data.toml:1: dataset: unknown table"),
        ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 1\n", "data.toml:3: image_dir is missing"),
        (
            '[[datasets]]\n[[datasets.subsets]]\nmetadata_file = "x.json"\nimage_dir = "images"\n',
            "data.toml:3: metadata_file: file x.json does not exist",
        ),
        (
            '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "images"\nis_reg = true\n',
            "dataset 1: all of its folders hold regu",
        ),
        (
            '[[datasets]]\nenable_bucket = true\nresolution = 2048\n[[datasets.subsets]]\nimage_dir = "images"\n',
            "above max_bucket_reso",
        ),
        (
            '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "images"\nconditioning_data_dir = "images"\n',
            "needs masked_loss",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'C:\\x'\nface_crop_aug_range = 'a'\n",
            "data.toml:3: image_dir",
        ),
    ],
)
def test_what_is_wrong_is_told(text: str, message: str, home: Path) -> None:
    with pytest.raises(UserError) as e:
        read(text)
    assert any(message in m for m in e.value.messages)


def test_switched_off_or_idle_keys_of_kohya_are_read(home: Path) -> None:
    text = '[[datasets]]\nvalidation_split = 0.0\n[[datasets.subsets]]\nimage_dir = "images"\ncache_info = true\ncustom_attributes = {}\n'
    Path("data.toml").write_text(text)
    found = flags.resolve_all(BASE, "network")
    assert len(found.datasets) == 1 and [n for n in found.notices if "cache_info: accepted, no effect" in n]


def test_folders_of_folders_are_one_dataset(home: Path) -> None:
    for name in ("train/10_my cat", "train/2_dog", "train/notes", "reg/1_cat"):
        Path(name).mkdir(parents=True)
    argv = [
        *MODEL,
        "--train_data_dir",
        "train",
        "--reg_data_dir",
        "reg",
        "--resolution",
        "64",
        "--train_batch_size",
        "4",
    ]
    found = flags.resolve_all(argv, "network")
    [dataset] = found.datasets
    assert (dataset.resolution, dataset.batch_size) == ((64, 64), 4)
    assert [(s.num_repeats, s.class_tokens, s.is_reg) for s in dataset.subsets] == [
        (10, "my cat", False),
        (2, "dog", False),
        (1, "cat", True),
    ]
    assert [n for n in found.notices if "train/notes: left out" in n]


def test_a_folder_of_images_is_no_folder_of_folders(home: Path) -> None:
    with pytest.raises(UserError, match="has no folder `<repeats>_<class tokens>`"):
        flags.resolve_all([*MODEL, "--train_data_dir", "images"], "network")


def test_a_flag_that_the_file_overrules_everywhere_is_told(home: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"--train_batch_size: would have no effect: data\.toml says batch_size itself, for every dataset",
    ):
        read(FULL.replace("resolution = 512", "resolution = 512\nbatch_size = 1"), "--train_batch_size", "2")


def test_dataset_repeats_is_the_fallback_of_num_repeats(home: Path) -> None:
    first, second = read(FULL, "--dataset_repeats", "7")
    assert [s.num_repeats for s in (*first.subsets, *second.subsets)] == [5, 7, 7]


def test_only_keep_tokens_is_told_to_need_shuffling(home: Path) -> None:
    text = (
        "[general]\nkeep_tokens = 1\nkeep_tokens_separator = '|||'\nsecondary_separator = ';;;'\n"
        + Path("data.toml").read_text()
    )
    Path("data.toml").write_text(text)
    notices = [n for n in flags.resolve_all(BASE, "network").notices if "no effect without" in n]
    assert len(notices) == 1 and "images: keep_tokens: " in notices[0]


def bucketed(limits: str) -> str:
    return f'[[datasets]]\nenable_bucket = true\n{limits}\n[[datasets.subsets]]\nimage_dir = "images"\n'


@pytest.mark.parametrize(
    "limits",
    [
        "resolution = 1024\nmax_bucket_reso = 1000",
        "resolution = 256\nmin_bucket_reso = 300\nmax_bucket_reso = 300",
        "resolution = 320\nmin_bucket_reso = 330\nmax_bucket_reso = 300",
        "resolution = 2048\nbucket_no_upscale = true",
    ],
)
def test_bucket_limits_are_rounded_before_they_are_checked(limits: str, home: Path) -> None:
    [dataset] = read(bucketed(limits))
    assert check(dataset, 8) == []


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ("resolution = 1088\nmax_bucket_reso = 1000", "above max_bucket_reso 1000"),
        ("resolution = 192\nmin_bucket_reso = 300", "below min_bucket_reso 300"),
        ("min_bucket_reso = 640\nmax_bucket_reso = 512", "min_bucket_reso 640 is above max_bucket_reso 512"),
    ],
)
def test_bucket_limits_that_do_not_fit_when_rounded_are_refused(limits: str, message: str, home: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(bucketed(limits))


def files(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")


SUBSET = '[[datasets.subsets]]\nimage_dir = "{}"\n'
FOUR = "[[datasets]]\n" + "".join(map(SUBSET.format, ("images", "none", "empty", "zero"))) + "num_repeats = 0\n"


def test_folders_that_kohyas_scripts_pass_over_are_left_out_of_kohyas_files(home: Path) -> None:
    files("empty/notes.md", "zero/a.png")
    Path("data.toml").write_text(FOUR)
    Path("kohya.toml").write_text('dataset_config = "data.toml"\n')
    found = flags.resolve_all([*MODEL, "--config_file", "kohya.toml"], "network")
    assert [s.image_dir for s in found.datasets[0].subsets] == ["images"]
    left = [n for n in found.notices if "left out, as in kohya's scripts" in n]
    assert [n.rpartition(": ")[2] for n in left] == ["does not exist", "no images are in it", "num_repeats is 0"]


def test_folders_that_cannot_act_are_refused_in_our_own_files(home: Path) -> None:
    files("empty/notes.md", "zero/a.png")
    with pytest.raises(UserError) as e:
        read(FOUR)
    assert [m.partition(": ")[2] for m in e.value.messages if "none" in m or "num_repeats" in m] == [
        f"image_dir: folder none does not exist (looked for in {home})",
        "num_repeats: expected 1 or more, found 0",
    ]


def test_a_kohya_file_of_which_no_folder_is_left_is_refused(home: Path) -> None:
    Path("data.toml").write_text("[[datasets]]\n" + SUBSET.format("none"))
    Path("kohya.toml").write_text('dataset_config = "data.toml"\n')
    with pytest.raises(
        UserError,
        match=r"kohya\.toml:1: dataset_config: no folder of images is left to train on:\n  none: left out.*does not exist",
    ):
        flags.resolve_all([*MODEL, "--config_file", "kohya.toml"], "network")


def test_the_same_folder_is_taken_once_in_a_dataset(home: Path) -> None:
    twice = (
        "[[datasets]]\nresolution = 64\n" + SUBSET.format("images") + "num_repeats = 3\n" + SUBSET.format("./images/")
    )
    Path("data.toml").write_text(twice + twice.replace("64", "96"))
    found = flags.resolve_all(BASE, "network")
    assert [[s.num_repeats for s in d.subsets] for d in found.datasets] == [[3], [3]]
    assert [n for n in found.notices if "stands twice in one dataset, and is taken once" in n]


def test_the_same_folder_may_be_learnt_and_preserved(home: Path) -> None:
    kept = "custom_attributes.diff_output_preservation = true\n"
    text = "[[datasets]]\n" + SUBSET.format("images") + 2 * (SUBSET.format("images") + kept)
    assert [subset.preserved for subset in read(text)[0].subsets] == [False, True]
    Path("data.toml").write_text("[[datasets]]\n" + SUBSET.format("images") + kept)
    assert any(n.startswith("nothing is to be learnt: all folders") for n in flags.resolve_all(BASE, "network").notices)


def test_preservation_without_weight_is_refused(home: Path) -> None:
    Path("data.toml").write_text("[[datasets]]\n" + SUBSET.format("images"))
    with pytest.raises(UserError, match="--prior_preservation_class: would have no effect: prior_loss_weight 0 leaves"):
        flags.resolve_all([*BASE, "--prior_preservation_class=thing", "--prior_loss_weight=0"], "network")


def test_a_strength_of_no_adapter_is_told(home: Path) -> None:
    Path("data.toml").write_text("[[datasets]]\nnetwork_multiplier = -1.0\n" + SUBSET.format("images"))
    said = [[n for n in flags.resolve_all(BASE, m).notices if "network_multiplier" in n] for m in ("full", "network")]
    assert (
        said[0] == ["dataset 1: network_multiplier: no effect: no adapter is trained, whose strength it is"]
        and not said[1]
    )


def test_regularisation_alone_is_refused_with_the_cure(home: Path) -> None:
    files("reg/a.png")
    text = "[[datasets]]\n" + SUBSET.format("images") + "[[datasets]]\n" + SUBSET.format("reg") + "is_reg = true\n"
    with pytest.raises(
        UserError, match=r"dataset 2: all of its folders hold regularisation.*put them into the \[\[datasets\]\] of"
    ):
        read(text)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('caption_extension = ""', "caption_extension: expected the ending of caption files, such as .txt, found ''"),
        ('caption_extension = "a/b"', "caption_extension: expected the ending of caption files"),
        ('caption_extension = "."', "caption_extension: expected the ending of caption files"),
        ('caption_separator = ""', "caption_separator: expected at least one character"),
        ("num_repeats = 1000000000000000000000", "num_repeats: expected a number of at most 9223372036854775807"),
        ("batch_size = 9223372036854775808", "batch_size: expected a number of at most"),
        ("resolution = 1000000", "resolution: expected between 1 and 16384, found 1000000"),
        ("max_bucket_reso = 1000000000000", "max_bucket_reso: expected between 1 and 16384"),
        ("bucket_reso_steps = 100000", "bucket_reso_steps: expected between 8 and 16384"),
    ],
)
def test_settings_that_no_dataset_can_have_are_refused_with_their_line(setting: str, message: str, home: Path) -> None:
    with pytest.raises(UserError) as e:
        read("[[datasets]]\n" + setting + "\n" + SUBSET.format("images"))
    assert f"data.toml:2: {message}" in str(e.value)


@pytest.mark.parametrize("extension", ["", ".", "/txt"])
def test_a_caption_extension_that_is_none_is_refused_on_the_command_line(extension: str, home: Path) -> None:
    with pytest.raises(UserError, match="--caption_extension: expected the ending of caption files"):
        flags.resolve_all([*BASE, "--caption_extension", extension], "network")


@pytest.mark.parametrize("name", ["x" * 5000, "x/" * 2500, "a\0b", "~nobody-of-this-name/x"])
def test_a_path_that_cannot_be_is_told_with_its_line(name: str, home: Path) -> None:
    with pytest.raises(UserError) as e:
        read(json.dumps({"datasets": [{"subsets": [{"image_dir": name}]}]}), name="data.json")
    [message] = e.value.messages
    assert message.startswith("data.json: datasets.0.subsets.0: image_dir: folder ") and len(message) < 700


def test_text_that_is_no_unicode_is_refused_where_it_would_be_read(home: Path) -> None:
    with pytest.raises(UserError, match="class_tokens: expected text in UTF-8"):
        read('{"datasets": [{"subsets": [{"image_dir": "images", "class_tokens": "\\ud800"}]}]}', name="data.json")
    with pytest.raises(UserError, match="--caption_prefix: expected text in UTF-8"):
        flags.resolve_all([*BASE, "--caption_prefix", "\udcff"], "network")


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are text here")
def test_a_folder_whose_class_tokens_are_no_text_is_told(home: Path) -> None:
    os.makedirs(b"train/3_caf\xe9")
    with pytest.raises(UserError, match=r"3_caf\\xe9: its name says .*expected text in UTF-8; rename it"):
        flags.resolve_all([*MODEL, "--train_data_dir", "train"], "network")


def test_what_is_written_of_a_name_that_is_no_text_can_be_saved_and_read(home: Path) -> None:
    made = DatasetConfig(subsets=(SubsetConfig(image_dir="caf\udce9", caption_suffix="\x7f"),))
    Path("out.toml").write_text(datasets.write([made]), encoding="utf-8")
    assert toml.read("out.toml")[0]["datasets"][0]["subsets"][0]["image_dir"] == "caf\\xe9"


@pytest.mark.parametrize(
    "flag",
    [
        "validate_every_n_steps=5",
        "validate_every_n_epochs=2",
        "max_validation_steps=3",
        "save_best",
        "validation_seed=3",
    ],
)
def test_what_needs_held_out_images_is_refused_without_them(flag: str, home: Path) -> None:
    text = Path("data.toml").read_text()
    with pytest.raises(UserError, match=rf"--{flag.split('=')[0]}: would have no effect: no images are held out"):
        read(text, f"--{flag}")
    assert read(text, f"--{flag}", "--validation_split=0.5")[0].subsets[0].validation_split == 0.5
    assert read(f"{text}validation_split = 1\n", f"--{flag}")[0].subsets[0].validation_split == 1.0
