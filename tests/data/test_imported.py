"""Files of sd-scripts beside images: which are taken, whatever the net."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import LATENTS, dataset, encode, noise, plan, subset

from sfumato.data import augment
from sfumato.data.cache import CachedLatents, cache_latents
from sfumato.data.imported import arrays, distance
from sfumato.data.plan import Plan
from sfumato.data.store import FileIndex, TensorStore
from sfumato.data.strategies import KohyaLatents

STRATEGY = replace(LATENTS, kohya=KohyaLatents(suffixes=("_sd.npz", "_sdxl.npz"), plain=True))
COUNT = 8


@pytest.fixture
def planned(tmp_path: Path) -> Plan:
    for i in range(COUNT):
        noise((64, 64), i, "RGBA").save(tmp_path / f"{i}.png")
    return plan(dataset(subset(tmp_path, alpha_mask=True)))


def write(of: Plan, ending: str, places: Sequence[int] = range(COUNT), **more: Any) -> list[Path]:
    """Latents as sd-scripts keeps them, with this ending behind the stem."""
    paths = []
    for item in (of.items[i] for i in places):
        options = of.subset(item)
        pixels = augment.load(item.image, options, item.placement, item.placement.centre, stride=8)["pixels"]
        paths.append(item.image.path.with_name(item.image.path.stem + ending))
        np.savez(paths[-1], **{"latents": encode(pixels[None])[0].numpy(), "original_size": np.array([64, 64]), **more})
    return paths


def cached(of: Plan) -> CachedLatents:
    return cache_latents(of, TensorStore(), FileIndex(), encode, "vae", STRATEGY)


@pytest.mark.parametrize("ending", ["_0064x0064_sd.npz", "_0064x0064_sdxl.npz", ".npz"])
def test_each_name_is_found_and_masks_come_from_the_images(planned: Plan, ending: str) -> None:
    own = cached(planned)
    write(planned, ending)
    made = cached(planned)
    assert (own.imported, made.imported, made.encoded) == (0, COUNT - 4, 4)
    for place in range(COUNT):
        a, b = (each.latents(planned, place, flip=False) for each in (own, made))
        assert a.keys() == {"latents", "mask"} and all(torch.allclose(a[name], b[name], atol=1e-2) for name in a)


def test_single_files_that_do_not_fit_are_encoded(planned: Plan) -> None:
    """Those that are compared (the first, the last and two between) are sound; each other one is wrong in its way."""
    [gone, broken, late, sized] = write(planned, ".npz", [1, 3, 5, 6])
    write(planned, ".npz", [0, 2, 4, 7])
    gone.write_bytes(b"")
    broken.write_bytes(pickle.dumps("a file that would be executed"))
    os.utime(planned.items[5].image.path, ns=(2**62, 2**62))
    write(planned, ".npz", [6], original_size=np.array([128, 64]))
    made = cached(planned)
    assert late.exists() and sized.exists() and (made.imported, made.encoded, made.refused) == (0, COUNT, "")
    write(planned, ".npz", [1])
    assert cached(planned).imported == 1


def test_latents_of_another_vae_or_crop_or_shape_are_refused_together(planned: Plan) -> None:
    for change, why in (
        (lambda x: x.flip(0), "off what this run's net gives"),
        (lambda x: x.roll(1, 2), "off what this run's net gives"),
        (lambda x: x * 0.18215, "82% off what this run's net gives"),
        (lambda x: x[:, 1:], "do not fit in shape or content"),
    ):
        for path in write(planned, ".npz"):
            found = arrays(path)
            np.savez(path, **{**found, "latents": change(found["latents"]).numpy()})
        made = cached(planned)
        assert (made.imported, made.encoded) == (0, COUNT) and why in made.refused, made.refused
        assert f"{COUNT} files of sd-scripts are not used: they" in str(made)


def test_few_files_are_not_worth_comparing(planned: Plan) -> None:
    write(planned, ".npz", range(4))
    assert str(cached(planned)) == f"0 found, {COUNT} encoded ({COUNT} new)"


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "executed"),))

    np.savez(tmp_path / "a.npz", latents=np.array([Bomb()], dtype=object))
    assert arrays(tmp_path / "a.npz") == {} and not (tmp_path / "executed").exists()


def test_a_file_that_makes_sizes_up_or_is_encrypted_gives_nothing(tmp_path: Path) -> None:
    for header in ("'shape': (1000000000000,)", f"'shape': (1{'0' * 30},)", "(" * 400):
        text = f"{{'descr': '<f4', 'fortran_order': False, {header}}}".encode()
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
            file.writestr("latents.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
        assert arrays(tmp_path / "a.npz") == {}
    np.savez(tmp_path / "a.npz", latents=np.zeros(1))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + flags] |= 1
    (tmp_path / "a.npz").write_bytes(content)
    assert arrays(tmp_path / "a.npz") == {}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_is_not_waited_for(planned: Plan) -> None:
    for path in write(planned, ".npz"):
        path.unlink()
        os.mkfifo(path)
    assert str(cached(planned)) == f"0 found, {COUNT} encoded ({COUNT} new)"


def test_states_are_compared_token_by_token() -> None:
    """A first token of large norm, which all captions share, hides nothing."""
    own = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    own[0] *= 1000
    other = own.clone()
    other[5:] = other[5:].flip(1)
    assert float((own - other).norm() / own.norm()) < 0.01 < 0.3 < distance({"a": own}, {"a": other})
    assert distance({"a": own}, {"a": own[1:]}) == distance({"a": own}, {"b": own}) == float("inf")
    assert distance({"a": torch.arange(3)}, {"a": torch.arange(3) + 1}) == float("inf")
