"""Metadata files: what they say of images, found where they lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from folders import dataset, folder, noise, plan, subset, texts

from sfumato.config import SubsetConfig
from sfumato.data.metadata import Record, read
from sfumato.data.scan import Scan, scan
from sfumato.data.store import FileIndex, TensorStore
from sfumato.errors import UserError


def written(path: Path, content: Any) -> Path:
    """A metadata file: JSON of an object, JSONL of a list."""
    lines = [json.dumps(row) for row in content] if isinstance(content, list) else [json.dumps(content, indent=1)]
    path.write_text("\n".join(lines) + "\n")
    return path


def look(file: Path, image_dir: Path | str = "", **options: Any) -> Scan:
    made = SubsetConfig(image_dir=str(image_dir), metadata_file=str(file), **options)
    return scan(dataset(made), FileIndex())


def captions(found: Scan) -> dict[str, tuple[str, ...]]:
    return {image.path.name: image.captions for image in found.images}


def test_captions_and_tags_are_joined_as_sd_scripts_joins_them(tmp_path: Path) -> None:
    """Rows of sd-scripts' `FineTuningDataset`, read off its source: caption, separator without a space, tags."""
    options = SubsetConfig()
    assert Record("a cat", "cat, white").lines(options) == ("a cat,cat, white",)
    assert Record("a cat", "cat").lines(SubsetConfig(caption_separator="; ")) == ("a cat; cat",)
    assert Record("a cat").lines(options) == Record("a cat", "").lines(options) == ("a cat",)
    assert Record(None, "cat, white").lines(options) == ("cat, white",)
    assert Record("one\n\ntwo", "a\nb").lines(options) == ("one,a,b", "two,a,b")
    assert Record("", "").lines(options) == ("",) and Record().lines(options) is None


def test_keys_are_absolute_or_relative_with_or_without_an_ending(tmp_path: Path) -> None:
    root, far = folder(tmp_path / "images"), folder(tmp_path / "far", [(64, 64)], seed=9)
    (root / "sub").mkdir()
    noise((64, 64), 7).save(root / "sub" / "deep.v2.png")
    file = written(
        tmp_path / "meta.json",
        {
            "0.png": {"caption": "zero"},
            "1": {"tags": "one"},
            "sub\\deep.v2": {"caption": "deep", "image_size": [64, 64]},
            str(far / "0.png"): {"caption": "far"},
            "2.png": {},
        },
    )
    found = look(file, root, class_tokens="thing")
    assert {image.name: image.captions for image in found.images} == {
        "0.png": ("zero",), "1.png": ("one",), "sub/deep.v2.png": ("deep",), "2.png": ("thing",),
        (far / "0.png").as_posix(): ("far",),
    }  # fmt: skip
    assert [skip.path.name for skip in found.skipped] == ["3.png", "4.png"]
    assert not any(skip.unreadable for skip in found.skipped)
    [note] = found.notes
    assert "2 images of the folder are not named in it and are left out (3.png, 4.png)" in note


@pytest.mark.parametrize("link", [False, True])
def test_a_whole_name_is_of_the_folder_however_that_is_spelt(
    link: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(tmp_path / "images", [(64, 64)] * 3)
    if link:
        (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path / "meta.json", {"0.png": {}, str(root / "0"): {}, str(root / "1.png"): {}})
    found = look(file, Path("link" if link else "images"))
    assert [image.name for image in found.images] == ["0.png", "1.png"]
    assert [(skip.path.name, "names it twice" in skip.reason) for skip in found.skipped] == [
        ("0.png", True),
        ("2.png", False),
    ]


def test_jsonl_has_an_object_in_each_line(tmp_path: Path) -> None:
    root = folder(tmp_path, [(64, 64), (96, 64)])
    rows = [
        {"image_path": str(root / "0.png"), "caption": "a", "tags": "b", "image_size": [64, 64]},
        {"image_path": str(root / "1"), "tags": "c", "width": 10, "height": 20},
    ]
    found = look(written(tmp_path / "meta.JSONL", rows))
    assert captions(found) == {"0.png": ("a,b",), "1.png": ("c",)}
    assert found.notes == [
        f"{tmp_path}/meta.JSONL: 1 images are not of the size that it says (1.png): the files' own sizes count"
    ]


def test_lines_and_wildcards_are_chosen_with_the_tags_behind(tmp_path: Path) -> None:
    root = folder(tmp_path, [(64, 64)])
    file = written(tmp_path / "meta.json", {"0": {"caption": "a {red|blue} cat\nits twin", "tags": "cat"}})
    one = plan(dataset(subset(root, metadata_file=str(file), enable_wildcard=True)))
    store = TensorStore()
    cached = texts(one, store, FileIndex())
    assert set(cached.keys) == {"a red cat,cat", "a blue cat,cat", "its twin,cat"}
    assert "several lines" in look(file, root).notes[0] and not look(file, root, enable_wildcard=True).notes


def test_what_changes_in_the_file_is_encoded_again_and_nothing_else(tmp_path: Path) -> None:
    root, store, index = folder(tmp_path / "a"), TensorStore(tmp_path / "c"), FileIndex(tmp_path / "c")
    content = {str(i): {"caption": f"thing {i}", "tags": "red"} for i in range(5)}
    file = written(tmp_path / "meta.json", content)

    def cached() -> str:
        return str(texts(plan(dataset(subset(root, metadata_file=str(file))), index=index), store, index))

    assert cached() == "0 found, 5 encoded (5 new)"
    assert cached() == "5 found, 0 encoded"
    written(file, content | {"3": {"caption": "thing 3", "tags": "blue"}})
    assert cached() == "4 found, 1 encoded (1 caption changed)"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.json", "[1]", "expected an object"),
        ("m.json", "{}", "names no image"),
        ("m.json", '{"a": {"caption": 1}, "b": "x"}', "'a': caption: expected text, found 1"),
        ("m.json", '{"a": {"image_size": [1.5, 2]}}', "image_size: expected [width, height]"),
        ("m.json", '{"a": {"caption": "\\ud800"}}', "'a': caption: expected text, found half of a character"),
        ("m.json", '{"a": {"caption": "x"}, "a": {}}', "m.json: is not JSON: 'a' stands twice"),
        ("m.json", '{"a": ', "m.json:1: is not JSON"),
        ("m.jsonl", '{"image_path": "a"}\n{"image_path": 1}', "m.jsonl:2: expected an object with"),
        ("m.jsonl", '{"image_path": "a"}\n{"image_path": "a"}', "m.jsonl:2: 'a' stands there twice"),
        ("m.jsonl", '{"image_path": "a"}\n[', "m.jsonl:2: is not JSON"),
    ],
)
def test_a_file_that_says_nothing_usable_is_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        read(str(tmp_path / name))
    assert message in str(caught.value)


def test_images_that_are_not_there_are_listed_at_once(tmp_path: Path) -> None:
    root = folder(tmp_path, [(64, 64)])
    noise((64, 64), 1).save(root / "0.jpg")
    noise((64, 64), 1).save(root / "1.png")
    file = written(tmp_path / "meta.json", {key: {"caption": "x"} for key in ("0", "gone", "1", "1.png", "a\0/0")})
    with pytest.raises(UserError) as caught:
        plan(dataset(subset(root, metadata_file=str(file))))
    text = str(caught.value)
    assert "4 images cannot be used" in text and f"gone: is named in {file}, and there is no such image" in text
    assert "means several images by this: 0.jpg, 0.png" in text and "names it twice" in text
    with pytest.raises(UserError, match=r"meta.json: names images relative to a folder \('0' ...\): set"):
        plan(dataset(SubsetConfig(metadata_file=str(file))))
