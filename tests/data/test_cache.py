"""Exactly what changed is encoded again, with the reason; a killed run goes on where it was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import LATENTS, dataset, encode, folder, latents, noise, plan, subset, texts
from PIL import Image
from torch import Tensor

from sfumato.data.cache import CachedEntries, CachedLatents, CachedText
from sfumato.data.store import FileIndex, Keys, TensorStore, key
from sfumato.errors import UserError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return folder(tmp_path / "p")


def run(images: Path, cache: Path, vae: str = "vae", stride: int = 8, **options: Any) -> CachedLatents:
    """A whole start: a new index and store over the same folder."""
    of_dataset = {k: options.pop(k) for k in ("resolution",) if k in options}
    index = FileIndex(cache)
    return latents(
        plan(dataset(subset(images, **options), **of_dataset), index=index, stride=stride),
        TensorStore(cache),
        index,
        vae,
    )


def run_texts(
    images: Path, cache: Path, encoder: str = "clip", settings: dict[str, object] | None = None, **options: Any
) -> CachedText:
    index = FileIndex(cache)
    return texts(
        plan(dataset(subset(images, **options)), index=index),
        TensorStore(cache),
        index,
        encoder,
        **(settings or {"clip_skip": 1}),
    )


def counts(cached: CachedEntries) -> tuple[int, int, dict[str, int]]:
    return cached.found, cached.encoded, cached.reasons


def test_an_unchanged_second_start_encodes_nothing(images: Path, cache: Path) -> None:
    assert counts(run(images, cache)) == (0, 5, {"new": 5})
    assert counts(run(images, cache)) == (5, 0, {})
    assert str(run(images, cache)) == "5 found, 0 encoded"


def replace_image(images: Path) -> dict[str, Any]:
    noise((64, 64), 321).save(images / "4.png")
    return {}


def add_image(images: Path) -> dict[str, Any]:
    noise((64, 64), 322).save(images / "9.png")
    (images / "9.txt").write_text("a new one")
    return {}


def touch(images: Path) -> dict[str, Any]:
    os.utime(images / "0.png", (1, 1))
    return {}


def edit_caption(images: Path) -> dict[str, Any]:
    (images / "3.txt").write_text("something else")
    return {}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (replace_image, (4, 1, {"picture changed": 1})),
        (add_image, (5, 1, {"new": 1})),
        (touch, (5, 0, {})),
        (edit_caption, (5, 0, {})),
        (lambda _: {"vae": "another"}, (0, 5, {"VAE changed": 5})),
        (lambda _: {"flip_aug": True}, (0, 5, {"flip_aug False -> True": 5})),
        (lambda _: {"resize_interpolation": "bicubic"}, (0, 5, {"resize_interpolation None -> bicubic": 5})),
        (lambda _: {"num_repeats": 7}, (5, 0, {})),
    ],
)
def test_exactly_the_latents_concerned(
    images: Path, cache: Path, change: Callable[[Path], dict[str, Any]], expected: tuple[int, int, dict[str, int]]
) -> None:
    run(images, cache)
    options = change(images)
    assert counts(run(images, cache, **options)) == expected
    assert run(images, cache, **options).encoded == 0


@pytest.mark.parametrize("value", ["", "a", "caf\xe9, \u732b", 'say "\\"', "\0", "\udcff", "\n"])
def test_keys_made_at_once_are_those_of_their_parts(value: str) -> None:
    others = {"version": 2, "VAE": "a", "bucket": [1, 2], "setting caption": None}
    assert Keys("caption", lambda: others).of(value) == key({**others, "caption": value})


def test_what_an_image_last_depended_on_is_known_after_runs_to_and_fro(images: Path, cache: Path) -> None:
    other = folder(images.parent / "other", seed=9)
    for flip, where in ((False, images), (True, images), (False, other), (False, images), (False, images)):
        run(where, cache, flip_aug=flip)
    assert run(images, cache, vae="another").reasons == {"VAE changed": 5}


def test_another_resolution_keeps_the_first(images: Path, cache: Path) -> None:
    run(images, cache)
    again = run(images, cache, resolution=(96, 96))
    assert (again.found, again.encoded) == (0, 5)
    assert all(reason.startswith("bucket ") for reason in again.reasons)
    assert again.reasons["bucket 64x64 -> 96x96"] >= 2
    assert run(images, cache).encoded == 0


def test_the_changed_image_is_named(images: Path, cache: Path) -> None:
    run(images, cache)
    replace_image(images)
    assert run(images, cache).changed == ((str(images / "4.png"), "picture changed"),)


def test_a_lost_entry_is_made_again(images: Path, cache: Path) -> None:
    first = run(images, cache)
    first.store.path(first.keys[2]).unlink()
    assert counts(run(images, cache)) == (4, 1, {"its entry is gone": 1})


@pytest.mark.parametrize("kind", [run, run_texts])
def test_bad_entries_are_made_anew_and_reported(images: Path, cache: Path, kind: Callable[..., CachedEntries]) -> None:
    first = kind(images, cache)
    names = list(first.keys.values())
    sound = {name: first.store.get(name) for name in names}
    paths = [first.store.path(name) for name in names]
    flipped = bytearray(paths[0].read_bytes())
    flipped[-3] ^= 16
    paths[0].write_bytes(flipped)
    paths[1].write_bytes(paths[2].read_bytes())
    first.store.put(names[3], {name: t * float("nan") for name, t in (sound[names[3]] or {}).items()})
    first.store.put(names[4], {"latents": torch.zeros(3, 1, 1)})
    again = kind(images, cache)
    mismatch = "its entry is of another shape" if kind is run else "its entry holds other fields"
    reasons = {"its entry is damaged": 1, "its entry is that of another": 1, "its entry is not finite": 1, mismatch: 1}
    assert counts(again) == (1, 4, reasons)
    assert all(reason in str(again) for reason in reasons)
    for name, entry in sound.items():
        now = again.store.get(name) or {}
        assert entry is not None and now.keys() == entry.keys() and all(torch.equal(now[k], entry[k]) for k in entry)
    assert counts(kind(images, cache)) == (5, 0, {})


@pytest.mark.parametrize("kind", [run, run_texts])
def test_an_entry_of_another_dtype_is_made_anew(images: Path, cache: Path, kind: Callable[..., CachedEntries]) -> None:
    first = kind(images, cache)
    name = next(iter(first.keys.values()))
    first.store.put(name, {field: t.float() for field, t in (first.store.get(name) or {}).items()})
    assert counts(kind(images, cache)) == (4, 1, {"its entry is of another dtype": 1})


def test_a_image_replaced_before_it_is_encoded_is_not_kept_as_the_old_one(images: Path) -> None:
    of = plan(dataset(subset(images)))
    replace_image(images)
    with pytest.raises(UserError, match=r"4\.png.*changed"):
        latents(of, TensorStore(), FileIndex())


def test_images_of_the_same_bytes_share_an_entry(images: Path, cache: Path) -> None:
    (images / "copy.png").write_bytes((images / "0.png").read_bytes())
    cached = run(images, cache)
    assert cached.encoded == 5
    assert cached.keys[5] == cached.keys[0]


def test_latents_are_what_the_vae_says_of_the_cut_image(tmp_path: Path) -> None:
    folder(tmp_path / "p", [(64, 64)])
    cached = run(tmp_path / "p", tmp_path / "cache", flip_aug=True)
    entry = cached.store.get(cached.keys[0]) or {}
    with Image.open(tmp_path / "p" / "0.png") as image:
        pixels = (
            torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.float32).view(64, 64, 3).permute(2, 0, 1)
            / 127.5
            - 1
        )
    assert torch.equal(entry["latents"], encode(pixels[None])[0].half())
    assert torch.equal(entry["latents_flipped"], encode(pixels[None].flip(3))[0].half())
    assert entry["latents"].dtype == LATENTS.dtype


def test_vae_batches_do_not_change_what_is_kept(images: Path, tmp_path: Path) -> None:
    of = plan(dataset(subset(images, flip_aug=True)))
    one, three = (latents(of, TensorStore(), FileIndex(), batch_size=n) for n in (1, 3))
    assert one.keys == three.keys
    for name in one.keys.values():
        a, b = one.store.get(name) or {}, three.store.get(name) or {}
        assert a.keys() == b.keys() == {"latents", "latents_flipped"}
        assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-3) for k in a)


def test_masks_are_kept_with_the_latents_and_are_part_of_the_key(tmp_path: Path, cache: Path) -> None:
    images = folder(tmp_path / "p", [(64, 64)] * 2)
    (tmp_path / "m").mkdir()
    half = Image.new("L", (64, 64), 0)
    half.paste(255, (0, 0, 32, 64))
    for i in range(2):
        half.save(tmp_path / "m" / f"{i}.png")
    cached = run(images, cache, conditioning_data_dir=str(tmp_path / "m"))
    mask = (cached.store.get(cached.keys[0]) or {})["mask"]
    assert torch.equal(mask, torch.cat([torch.ones(1, 8, 4), torch.zeros(1, 8, 4)], dim=2))
    half.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "m" / "1.png")
    assert counts(run(images, cache, conditioning_data_dir=str(tmp_path / "m"))) == (1, 1, {"mask changed": 1})


def test_alpha_is_the_mask_and_hides_nothing(tmp_path: Path) -> None:
    image = noise((64, 64), 5).convert("RGBA")
    image.putalpha(Image.new("L", (64, 64), 51))
    (tmp_path / "p").mkdir()
    image.save(tmp_path / "p" / "a.png")
    cached = run(tmp_path / "p", tmp_path / "cache", alpha_mask=True)
    entry = cached.store.get(cached.keys[0]) or {}
    assert torch.allclose(entry["mask"], torch.full((1, 8, 8), 0.2))
    image.convert("RGB").save(tmp_path / "p" / "a.png")
    opaque = run(tmp_path / "p", tmp_path / "cache", alpha_mask=True)
    entry_of_opaque = opaque.store.get(opaque.keys[0]) or {}
    assert torch.equal(entry["latents"], entry_of_opaque["latents"])
    assert torch.equal(entry_of_opaque["mask"], torch.ones(1, 8, 8))


def test_latents_that_are_not_finite_name_the_image_and_the_flag(images: Path) -> None:
    def broken(pixels: Tensor) -> Tensor:
        return encode(pixels) * float("nan")

    with pytest.raises(UserError, match=r"0\.png.*--no_half_vae"):
        latents(plan(dataset(subset(images))), TensorStore(), FileIndex(), encode=broken)


@pytest.mark.parametrize("option", ["random_crop", "color_aug"])
def test_options_that_change_the_image_each_time_are_refused(images: Path, option: str) -> None:
    with pytest.raises(UserError, match=option):
        latents(plan(dataset(subset(images, **{option: True}))), TensorStore(), FileIndex())


def test_texts_unchanged_changed_and_shared(images: Path, cache: Path) -> None:
    assert counts(run_texts(images, cache)) == (0, 5, {"new": 5})
    assert counts(run_texts(images, cache)) == (5, 0, {})
    edit_caption(images)
    assert counts(run_texts(images, cache)) == (4, 1, {"caption changed": 1})
    replace_image(images)
    assert counts(run_texts(images, cache)) == (5, 0, {})
    (images / "0.txt").write_text("something else")
    assert counts(run_texts(images, cache)) == (4, 0, {})


def test_texts_follow_the_encoder_and_its_settings(images: Path, cache: Path) -> None:
    run_texts(images, cache)
    assert counts(run_texts(images, cache, settings={"clip_skip": 2})) == (0, 5, {"setting clip_skip 1 -> 2": 5})
    assert counts(run_texts(images, cache, encoder="other", settings={"clip_skip": 2})) == (
        0,
        5,
        {"text encoder changed": 5},
    )
    assert run_texts(images, cache).encoded == 0


def test_dropout_adds_the_empty_caption_alone(images: Path, cache: Path) -> None:
    run_texts(images, cache)
    assert counts(run_texts(images, cache, caption_dropout_rate=0.1)) == (5, 1, {"new": 1})


def test_only_the_named_fields_are_kept(images: Path, cache: Path) -> None:
    cached = run_texts(images, cache)
    entry = cached.store.get(next(iter(cached.keys.values()))) or {}
    assert entry.keys() == {"hidden"}
    assert entry["hidden"].dtype == torch.float16


def test_captions_without_end_are_refused_by_option(images: Path, cache: Path) -> None:
    with pytest.raises(UserError, match="shuffle_caption, caption_tag_dropout_rate"):
        run_texts(images, cache, shuffle_caption=True, caption_tag_dropout_rate=0.1)


KILLED = """
import os, signal, sys
from pathlib import Path
from folders import dataset, encode, latents, plan, subset
from sfumato.data.store import FileIndex, TensorStore

images, cache, calls = Path(sys.argv[1]), Path(sys.argv[2]), []

def dying(pixels):
    calls.append(1)
    if len(calls) == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(pixels)

index = FileIndex(cache)
latents(plan(dataset(subset(images)), index=index), TensorStore(cache), index, encode=dying)
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, cache: Path) -> None:
    images = folder(tmp_path / "p", [(64, 64)] * 60)
    here = Path(__file__).parent.parent
    path = os.pathsep.join([str(here), str(here.parent)])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(images), str(cache)], env=os.environ | {"PYTHONPATH": path}, check=False
    )
    assert killed.returncode == -9
    whole = [p for p in cache.rglob("*.safetensors") if not p.name.startswith(".")]
    again = run(images, cache)
    assert 30 <= len(whole) < 40
    assert (again.found, again.encoded) == (len(whole), 60 - len(whole))
    assert all(again.store.get(name) for name in again.keys.values())


def test_the_folder_of_the_images_is_not_touched(images: Path, cache: Path) -> None:
    def state() -> dict[Path, tuple[bytes, int]]:
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in images.rglob("*")}

    before = state()
    run(images, cache, flip_aug=True)
    run_texts(images, cache)
    assert state() == before
