"""What is found in folders: every file is used or listed, and nothing in them is changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from folders import dataset, folder, noise, plan, subset
from PIL import Image

from sfumato.data import scan as module
from sfumato.data.scan import Scan, scan
from sfumato.data.store import Index
from sfumato.errors import UserError


def look(path: Path, index: Index | None = None, bodies: bool = True, **options: object) -> Scan:
    return scan(dataset(subset(path, **options)), index or Index(), bodies=bodies)


def test_pictures_come_in_the_order_of_their_names_with_sizes_and_captions(tmp_path: Path) -> None:
    found = look(folder(tmp_path))
    assert [p.name for p in found.pictures] == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert [(p.width, p.height) for p in found.pictures][1:3] == [(96, 64), (64, 100)]
    assert found.pictures[2].captions == ("thing 2, red, green, blue",)
    assert found.notes == []


def test_captions_fall_back_to_class_tokens_then_to_nothing_with_a_note(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "1.txt").unlink()
    assert look(tmp_path, class_tokens="sks dog").pictures[1].captions == ("sks dog",)
    found = look(tmp_path)
    assert found.pictures[1].captions == ("",)
    assert "1 pictures have neither" in found.notes[0]
    assert "1.png" in found.notes[0]


def test_a_forgotten_caption_extension_is_pointed_out(tmp_path: Path) -> None:
    [note] = look(folder(tmp_path), caption_extension=".caption").notes
    assert "there are .txt files: set caption_extension" in note


def test_caption_files_of_any_make(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "0.txt").write_bytes("\ufeffcafé, b\r\n".encode())
    (tmp_path / "1.txt").write_text("\n one \n\n two\n")
    (tmp_path / "2.txt").write_text("")
    found = look(tmp_path)
    assert [p.captions for p in found.pictures[:3]] == [("café, b",), ("one", "two"), ("",)]
    assert "several lines" in found.notes[0]
    assert look(tmp_path, enable_wildcard=True).notes == []


def test_subfolders_only_when_asked_and_other_files_are_named(tmp_path: Path) -> None:
    folder(tmp_path)
    folder(tmp_path / "more", [(64, 64)])
    (tmp_path / "._0.png").write_bytes(b"a Mac was here")
    (tmp_path / "big.psd").write_bytes(b"8BPS")
    found = look(tmp_path)
    assert len(found.pictures) == 5
    assert found.notes == [f"{tmp_path}: not pictures, left alone: 1 .psd"]
    assert [p.name for p in look(tmp_path, recursive=True).pictures][-1] == "more/0.png"


def test_all_missing_and_empty_folders_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder(tmp_path / "deep" / "er")
    with pytest.raises(UserError) as caught:
        scan(dataset(subset(tmp_path / "none"), subset(tmp_path / "empty"), subset(tmp_path / "deep")), Index())
    assert len(caught.value.messages) == 3
    assert "no such folder" in caught.value.messages[0]
    assert "no pictures" in caught.value.messages[1]
    assert "recursive" in caught.value.messages[2]


def spoil(root: Path) -> None:
    """Three files that cannot be used, of seven."""
    (root / "1.png").write_bytes((root / "1.png").read_bytes()[:500])
    (root / "5.jpg").write_bytes(b"")
    noise((64, 64), 9).save(root / "6.png")
    (root / "6.txt").write_bytes(b"caf\xe9")


def test_all_unreadable_files_of_all_datasets_are_listed_at_once(tmp_path: Path) -> None:
    spoil(folder(tmp_path / "a"))
    spoil(folder(tmp_path / "b"))
    with pytest.raises(UserError) as caught:
        plan(dataset(subset(tmp_path / "a")), dataset(subset(tmp_path / "b")))
    said = str(caught.value)
    assert "6 pictures cannot be used" in said
    assert "skip_unreadable" in said
    for name, reason in [("1.png", "damaged"), ("5.jpg", "empty"), ("6.png", "not UTF-8")]:
        assert all(any(f"{d}/{name}: " in line and reason in line for line in said.splitlines()) for d in "ab"), said


def test_used_and_skipped_are_all_that_was_found(tmp_path: Path) -> None:
    spoil(folder(tmp_path))
    made = plan(dataset(subset(tmp_path)), skip_unreadable=True)
    assert len(made.items) == 4
    assert len(made.skipped) == 3
    found = {p for p in tmp_path.iterdir() if p.suffix in (".png", ".jpg")}
    assert {i.picture.path for i in made.items} | {s.path for s in made.skipped} == found
    assert all(s.reason for s in made.skipped)


def test_headers_alone_give_the_same_pictures(tmp_path: Path) -> None:
    folder(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise((80, 40), 3).save(tmp_path / "turned.jpg", exif=exif)
    whole, headers = look(tmp_path).pictures, look(tmp_path, bodies=False).pictures
    assert [(p.name, p.width, p.height) for p in whole] == [(p.name, p.width, p.height) for p in headers]
    assert (whole[-1].width, whole[-1].height) == (40, 80)
    assert [p.digest for p in headers] == [""] * 6
    assert len({p.digest for p in whole}) == 6


def test_a_second_look_opens_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "p")
    index = Index(tmp_path / "cache")
    first = look(tmp_path / "p", index)
    opened: list[Path] = []
    examine = module._examine
    monkeypatch.setattr(module, "_examine", lambda path, bodies: (opened.append(path), examine(path, bodies))[1])
    assert look(tmp_path / "p", Index(tmp_path / "cache")).pictures == first.pictures
    assert opened == []
    noise((64, 64), 77).save(tmp_path / "p" / "0.png")
    assert look(tmp_path / "p", index).pictures[0].digest != first.pictures[0].digest
    assert opened == [tmp_path / "p" / "0.png"]


def test_a_replaced_picture_is_seen_though_size_and_mtime_are_the_same(tmp_path: Path) -> None:
    for i in (1, 2):
        noise((8, 8), i).save(tmp_path / f"{i}.bmp")
    index = Index()
    before = look(tmp_path, index).pictures[0]
    old = (tmp_path / "1.bmp").stat()
    os.replace(tmp_path / "2.bmp", tmp_path / "1.bmp")
    os.utime(tmp_path / "1.bmp", ns=(old.st_atime_ns, old.st_mtime_ns))
    assert look(tmp_path, index).pictures[0].digest != before.digest


def test_masks_are_found_by_name_and_must_have_the_shape_of_their_picture(tmp_path: Path) -> None:
    folder(tmp_path / "p")
    masks = folder(tmp_path / "m", [(32, 32), (48, 32), (64, 64), (70, 64)])
    found = look(tmp_path / "p", conditioning_data_dir=str(masks))
    assert [p.mask_path for p in found.pictures] == [masks / "0.png", masks / "1.png", masks / "3.png"]
    assert "not the shape" in found.skipped[0].reason
    assert "no mask picture" in found.skipped[1].reason


def test_pictures_of_no_repeats_are_listed(tmp_path: Path) -> None:
    folder(tmp_path / "a")
    folder(tmp_path / "b", [(64, 64)])
    made = plan(dataset(subset(tmp_path / "a", num_repeats=0), subset(tmp_path / "b")))
    assert len(made.items) == 1
    assert {s.reason for s in made.skipped} == {"num_repeats is 0"}
