"""What is found in folders: every file is used or listed, and nothing in them is changed."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import dataset, folder, latents, noise, plan, subset
from PIL import Image

from sfumato.data import caption_files, sources
from sfumato.data import scan as module
from sfumato.data.scan import Scan, scan
from sfumato.data.store import FileIndex, TensorStore
from sfumato.errors import UserError


def look(path: Path, index: FileIndex | None = None, **options: object) -> Scan:
    return scan(dataset(subset(path, **options)), index or FileIndex())


def test_images_come_in_the_order_of_their_names_with_sizes_and_captions(tmp_path: Path) -> None:
    found = look(folder(tmp_path))
    assert [p.name for p in found.images] == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert [(p.width, p.height) for p in found.images][1:3] == [(96, 64), (64, 100)]
    assert found.images[2].captions == ("thing 2, red, green, blue",)
    assert found.notes == []


def test_captions_fall_back_to_class_tokens_then_to_nothing_with_a_note(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "1.txt").unlink()
    assert look(tmp_path, class_tokens="sks dog").images[1].captions == ("sks dog",)
    found = look(tmp_path)
    assert found.images[1].captions == ("",)
    assert "1 images have neither" in found.notes[0]
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
    assert [p.captions for p in found.images[:3]] == [("café, b",), ("one", "two"), ("",)]
    assert "several lines" in found.notes[-1]
    assert len(look(tmp_path, enable_wildcard=True).notes) == len(found.notes) - 1


def test_subfolders_only_when_asked_and_other_files_are_named(tmp_path: Path) -> None:
    folder(tmp_path)
    folder(tmp_path / "more", [(64, 64)])
    (tmp_path / "._0.png").write_bytes(b"a Mac was here")
    (tmp_path / "big.psd").write_bytes(b"8BPS")
    found = look(tmp_path)
    assert len(found.images) == 5
    assert found.notes == [f"{tmp_path}: not images, left alone: 1 .psd"]
    assert [p.name for p in look(tmp_path, recursive=True).images][-1] == "more/0.png"


def test_all_missing_and_empty_folders_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder(tmp_path / "deep" / "er")
    with pytest.raises(UserError) as caught:
        scan(dataset(subset(tmp_path / "none"), subset(tmp_path / "empty"), subset(tmp_path / "deep")), FileIndex())
    assert len(caught.value.messages) == 3
    assert "does not exist" in caught.value.messages[0]
    assert "no images" in caught.value.messages[1]
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
    message = str(caught.value)
    assert "6 images cannot be used" in message
    assert "skip_unreadable" in message
    for name, reason in [("1.png", "damaged"), ("5.jpg", "empty"), ("6.png", "not UTF-8")]:
        assert all(any(f"{d}/{name}: " in line and reason in line for line in message.splitlines()) for d in "ab"), (
            message
        )


def test_used_and_skipped_are_all_that_was_found(tmp_path: Path) -> None:
    spoil(folder(tmp_path))
    made = plan(dataset(subset(tmp_path)), skip_unreadable=True)
    assert len(made.items) == 4
    assert len(made.skipped) == 3
    found = {p for p in tmp_path.iterdir() if p.suffix in (".png", ".jpg")}
    assert {i.image.path for i in made.items} | {s.path for s in made.skipped} == found
    assert all(s.reason for s in made.skipped)


def test_sizes_are_those_of_upright_images(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise((80, 40), 3).save(tmp_path / "turned.jpg", exif=exif)
    [turned] = look(tmp_path).images
    assert (turned.width, turned.height) == (40, 80) and turned.digest


def test_a_second_look_opens_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "p")
    index = FileIndex(tmp_path / "cache")
    first = look(tmp_path / "p", index)
    opened: list[Path] = []
    examine = module._examine
    monkeypatch.setattr(module, "_examine", lambda path: (opened.append(path), examine(path))[1])
    assert look(tmp_path / "p", FileIndex(tmp_path / "cache")).images == first.images
    assert opened == []
    noise((64, 64), 77).save(tmp_path / "p" / "0.png")
    assert look(tmp_path / "p", index).images[0].digest != first.images[0].digest
    assert opened == [tmp_path / "p" / "0.png"]


def test_a_replaced_image_is_noticed_though_size_and_mtime_are_the_same(tmp_path: Path) -> None:
    for i in (1, 2):
        noise((8, 8), i).save(tmp_path / f"{i}.bmp")
    index = FileIndex()
    before = look(tmp_path, index).images[0]
    old = (tmp_path / "1.bmp").stat()
    os.replace(tmp_path / "2.bmp", tmp_path / "1.bmp")
    os.utime(tmp_path / "1.bmp", ns=(old.st_atime_ns, old.st_mtime_ns))
    assert look(tmp_path, index).images[0].digest != before.digest


def test_masks_are_found_by_name_and_must_have_the_shape_of_their_image(tmp_path: Path) -> None:
    folder(tmp_path / "p")
    masks = folder(tmp_path / "m", [(32, 32), (48, 32), (64, 64), (70, 64)])
    found = look(tmp_path / "p", conditioning_data_dir=str(masks))
    assert [p.mask_path for p in found.images] == [masks / "0.png", masks / "1.png", masks / "3.png"]
    assert "not the shape" in found.skipped[0].reason
    assert "no mask image" in found.skipped[1].reason


def test_images_cannot_have_no_repeats(tmp_path: Path) -> None:
    folder(tmp_path / "a")
    with pytest.raises(UserError, match="num_repeats: expected 1 or more, found 0"):
        plan(dataset(subset(tmp_path / "a", num_repeats=0)))


def test_pipes_are_reported_and_never_opened(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    folder(tmp_path / "p")
    (tmp_path / "p" / "1.txt").unlink()
    os.mkfifo(tmp_path / "p" / "1.txt")
    os.mkfifo(tmp_path / "p" / "9.png")
    found = look(tmp_path / "p")  # opening a pipe would wait for ever
    assert {s.path.name: s.reason for s in found.skipped} == {
        "9.png": "is a pipe, not a file",
        "1.png": f"its caption {tmp_path / 'p' / '1.txt'} is a pipe, not a file",
    }
    masks = folder(tmp_path / "m")
    (masks / "0.png").unlink()
    os.mkfifo(masks / "0.png")
    assert "no mask image" in look(tmp_path / "p", conditioning_data_dir=str(masks)).skipped[1].reason


def test_links_to_nothing_and_captions_that_are_folders_are_reported(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "0.txt").unlink()
    (tmp_path / "0.txt").mkdir()
    try:
        (tmp_path / "7.png").symlink_to(tmp_path / "gone.png")
    except OSError:
        pytest.skip("this user may not make links")
    reasons = {s.path.name: s.reason for s in look(tmp_path).skipped}
    assert reasons["7.png"] == "is a link to nothing" and "is a folder, not a file" in reasons["0.png"]


def test_what_may_not_be_read_is_reported_by_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "a")
    locked = folder(tmp_path / "a" / "locked")

    def refuse(error: PermissionError, of: str) -> Callable[..., Any]:
        real = getattr(os, of)
        return lambda path=".", *rest, **more: (
            (_ for _ in ()).throw(error) if str(path) == error.filename else real(path, *rest, **more)
        )

    denied = "Permission denied"
    monkeypatch.setattr(os, "scandir", refuse(PermissionError(errno.EACCES, denied, str(locked)), "scandir"))
    found = look(tmp_path / "a", recursive=True)
    assert [(s.path, s.reason) for s in found.skipped] == [(locked, "cannot be read: Permission denied")]
    with pytest.raises(UserError, match="locked: cannot be read: Permission denied"):
        look(locked)
    monkeypatch.undo()
    monkeypatch.setattr(
        os, "stat", refuse(PermissionError(errno.EACCES, denied, str(tmp_path / "a" / "2.png")), "stat")
    )
    [skipped] = look(tmp_path / "a").skipped
    assert (skipped.path.name, skipped.reason) == ("2.png", "cannot be read: Permission denied")


def test_an_image_that_goes_away_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path)
    gone = tmp_path / "2.png"
    real = module.listing
    monkeypatch.setattr(sources, "listing", lambda *args, **options: (real(*args, **options), gone.unlink())[0])
    assert [s.path for s in look(tmp_path).skipped] == [gone]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are text here")
def test_names_that_are_not_text_are_read_planned_and_remembered(tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"caf\xe9")
    folder(root)
    os.rename(root / "0.png", os.fsencode(root) + b"/x\xff.png")
    index = FileIndex(tmp_path / "cache")
    made = plan(dataset(subset(root)), index=index)
    assert [i.image.digest for i in plan(dataset(subset(root)), index=FileIndex(tmp_path / "cache")).items] == [
        i.image.digest for i in made.items
    ]
    assert len({item.key(0, 0, 0) for item in made.items}) == 5 and len(made.digest()) == 32
    assert "1 images have neither" in made.notes[0]
    assert latents(made, TensorStore(tmp_path / "cache"), index).encoded == 5


def test_a_folder_of_5000_characters_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="image_dir"):
        look(tmp_path / ("x" * 5000))
    with pytest.raises(UserError, match="image_dir"):
        look(tmp_path / "a\0b")


def test_captions_without_text_are_listed_as_missing_ones_are(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "0.txt").write_bytes(b"")
    (tmp_path / "1.txt").write_bytes("\ufeff \n\t\n".encode())
    found = look(tmp_path)
    assert [p.captions for p in found.images[:2]] == [("",), ("",)]
    assert found.notes == [
        f"{tmp_path}: 2 caption files have no text, and their images train with an empty caption (0.png, 1.png)"
    ]


def test_a_caption_serves_images_whose_names_say_where_the_face_is(tmp_path: Path) -> None:
    for name in ("a_1_2_3_4", "b_c_1_2_3_4", "d_1_2_3", "e_1_2_3_4"):
        noise((64, 64), 1).save(tmp_path / f"{name}.png")
    for name in ("a", "b_c", "d", "e", "e_1_2_3_4"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert [p.captions[0] for p in look(tmp_path).images] == ["a", "b_c", "", "e_1_2_3_4"]


@pytest.mark.skipif(sys.platform == "win32", reason="paths are short here")
def test_a_name_too_long_for_a_caption_has_none(tmp_path: Path) -> None:
    noise((64, 64), 1).save(tmp_path / f"{'x' * 245}.png")
    assert look(tmp_path, caption_extension=".a_long_ending").images[0].captions == ("",)


def test_a_caption_of_megabytes_is_reported(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "0.txt").write_bytes(b"word, " * 200_000)
    assert "bytes long" in look(tmp_path).skipped[0].reason


def test_a_second_look_reads_no_caption_that_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path)
    (tmp_path / "3.txt").unlink()
    read: list[str] = []
    lines = caption_files._lines
    monkeypatch.setattr(
        caption_files, "_lines", lambda file, status: (read.append(Path(file).name), lines(file, status))[1]
    )
    monkeypatch.setattr(caption_files, "SETTLED", 0)
    index = FileIndex(tmp_path / "cache")

    def found() -> tuple[list[str], list[str]]:
        read.clear()
        return [p.captions[0] for p in look(tmp_path, index).images], read

    texts, _ = found()
    assert found() == (texts, [])
    old = (tmp_path / "1.txt").stat()
    (tmp_path / "other").write_text(texts[1].upper() + "\n")  # of the same size
    os.replace(tmp_path / "other", tmp_path / "1.txt")
    os.utime(tmp_path / "1.txt", ns=(old.st_atime_ns, old.st_mtime_ns))
    (tmp_path / "2.txt").unlink()
    (tmp_path / "3.txt").write_text("new")
    assert found() == ([texts[0], texts[1].upper(), "", "new", texts[4]], ["1.txt", "3.txt"])
    index.write("caption", {str(tmp_path / "0.txt"): [1, 2], str(tmp_path / "4.txt"): "damaged"})
    assert found() == ([texts[0], texts[1].upper(), "", "new", texts[4]], ["0.txt", "4.txt"])
    monkeypatch.setattr(caption_files, "SETTLED", 3600 * 10**9)
    (tmp_path / "0.txt").write_text("written just now")
    assert [found()[1], found()[1]] == [["0.txt"], ["0.txt"]]
