"""The same batches whatever reads them, and all that belongs together stays together."""

from __future__ import annotations

import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from dataclasses import replace as replaced
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from folders import LATENTS, dataset, encode, folder, latents, noise, plan, subset, texts, tokenize
from PIL import Image
from torch import Tensor
from torch.nn import functional

from sfumato.data.batch import Batch
from sfumato.data.loader import Loader
from sfumato.data.plan import Plan
from sfumato.data.store import FileIndex, TensorStore
from sfumato.errors import UserError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("images"), [(64, 64)] * 5 + [(96, 70)] * 3)


MOVING = {
    "flip_aug": True,
    "random_crop": True,
    "color_aug": True,
    "shuffle_caption": True,
    "caption_dropout_rate": 0.2,
    "num_repeats": 2,
}


def moving(images: Path, **options: Any) -> Plan:
    return plan(dataset(subset(images, **MOVING), **options))


def loader(of: Plan, **options: Any) -> Loader:
    return Loader(plan=of, seed=7, tokenize=tokenize, **options)


def read(of: Loader, epoch: int = 0, start_step: int = 0) -> list[Batch]:
    return [batch for step in of.epoch(epoch, start_step) for batch in step.batches]


def equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a == b


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        equal(getattr(x, f.name), getattr(y, f.name)) for x, y in zip(a, b, strict=True) for f in fields(Batch)
    )


def test_workers_change_nothing(images: Path) -> None:
    of = moving(images)
    none, two = loader(of), loader(of, workers=2, persistent=True)
    for epoch in range(2):
        assert same(read(none, epoch), read(two, epoch))


def test_workers_change_nothing_with_latents_on_disk(images: Path, tmp_path: Path) -> None:
    of = plan(dataset(subset(images, flip_aug=True)))
    kept = latents(of, TensorStore(tmp_path), FileIndex())
    assert same(read(loader(of, latents=kept)), read(loader(of, latents=kept, workers=2)))


def test_epochs_differ_and_come_again(images: Path) -> None:
    of = moving(images)
    first = read(loader(of))
    assert same(first, read(loader(of)))
    assert not same(first, read(loader(of), 1))


def test_an_epoch_can_be_entered_in_the_middle(images: Path) -> None:
    of = moving(images)
    assert same(read(loader(of), 1)[3:], read(loader(of), 1, 3))


def samples(batches: list[Batch]) -> Counter[tuple[object, ...]]:
    """Every sample that weighs something, by all that it is."""
    found: Counter[tuple[object, ...]] = Counter()
    for batch in batches:
        assert batch.pixels is not None
        for i, key in enumerate(batch.keys):
            if batch.weight[i]:
                found[
                    key,
                    batch.captions[i],
                    tuple(batch.sizes[i].tolist()),
                    float(batch.weight[i]),
                    batch.pixels[i].sum().item(),
                ] += 1
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_the_samples_of_one(images: Path, world: int) -> None:
    of = moving(images)
    alone = read(loader(of))
    shared = [read(loader(of, rank=rank, world=world)) for rank in range(world)]
    assert {len(batches) for batches in shared} == {-(-of.batches_per_epoch // world)}
    assert samples([batch for batches in shared for batch in batches]) == samples(alone)
    assert alone[1].keys == shared[1][0].keys


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_steps_are_the_batches_of_an_epoch_in_whole_groups(images: Path, accumulation: int, world: int) -> None:
    of = moving(images)
    planned, group = of.batches(1, 7), accumulation * world
    processes = [loader(of, accumulation=accumulation, rank=rank, world=world).epoch(1) for rank in range(world)]
    steps = list(zip(*processes, strict=True))
    assert len(steps) == -(-len(planned) // group)
    for number, step in enumerate(steps):
        read = [list(process.batches) for process in step]
        assert {len(batches) for batches in read} == {process.count for process in step}
        cut = planned[number * group : (number + 1) * group]
        assert {process.samples for process in step} == {sum(map(len, cut))}
        in_turn = [batch for turn in zip(*read, strict=True) for batch in turn]
        assert [batch.keys for batch in in_turn[: len(cut)]] == [[ref.key for ref in refs] for refs in cut]
        assert not any(batch.weight.any() for batch in in_turn[len(cut) :])


def test_a_sample_does_not_depend_on_how_batches_are_cut(images: Path) -> None:
    three = samples(read(loader(moving(images, batch_size=3))))
    assert samples(read(loader(moving(images, batch_size=1)))) == three


def test_no_global_generator_is_touched(images: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state(), random.getstate(), str(np.random.get_state())
    of = moving(images)
    for workers in (0, 2):
        read(loader(of, workers=workers))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1:] == (random.getstate(), str(np.random.get_state()))


def test_a_batch_of_pixels_says_what_it_is(images: Path) -> None:
    of = plan(dataset(subset(images), batch_size=3, network_multiplier=0.5))
    for batch in read(loader(of)):
        assert batch.pixels is not None
        assert batch.latents is None
        assert batch.cond is None
        assert batch.mask is None
        assert batch.pixels.dtype == torch.float32
        assert batch.pixels.abs().max() <= 1
        height, width = batch.pixels.shape[2:]
        assert batch.sizes[:, 4:].tolist() == [[height, width]] * len(batch)
        assert batch.multiplier.tolist() == [0.5] * len(batch)
        assert batch.weight.tolist() == [1.0] * len(batch)
        assert equal(batch.tokens, tokenize(batch.captions))


def gradient(tmp_path: Path) -> Path:
    """An image of 96x64 whose red is the column and whose alpha is the column too."""
    tmp_path.mkdir(exist_ok=True)
    columns = np.tile(np.arange(96, dtype=np.uint8), (64, 1))
    Image.fromarray(np.dstack([columns] * 4)).save(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize("cached", [False, True])
def test_flip_and_crop_take_image_mask_and_sizes_along(tmp_path: Path, cached: bool) -> None:
    root = gradient(tmp_path)
    options: dict[str, Any] = {"flip_aug": True, "alpha_mask": True, "num_repeats": 24, "random_crop": not cached}
    of = plan(dataset(subset(root, **options), enable_bucket=False, batch_size=24))
    kept = latents(of, TensorStore(), FileIndex()) if cached else None
    [batch] = read(loader(of, latents=kept))
    assert batch.mask is not None
    read_images = batch.latents if cached else encode(batch.pixels) if batch.pixels is not None else None
    assert read_images is not None
    turned = 0
    for i in range(24):
        red = ((read_images[i, 0] + 1) * 127.5).round()
        assert torch.allclose((read_images[i, :1] + 1) / 2, batch.mask[i], atol=2e-3)
        columns = [float(c) for c in red[0]]
        mirrored = columns[0] > columns[-1]
        turned += mirrored
        left = int(batch.sizes[i, 3])
        # The first column is `left` in the image, or counted from its right edge when mirrored.
        first = 95 - left - 3.5 if mirrored else left + 3.5
        assert abs(columns[0] - first) <= 1
        assert batch.sizes[i].tolist() == [64, 96, 0, left, 64, 64]
    assert 4 < turned < 20
    assert cached or len({int(s) for s in batch.sizes[:, 3]}) > 5


@pytest.mark.parametrize("cached", [False, True])
def test_images_to_follow_are_cut_as_their_images_are_also_beside_cached_latents(tmp_path: Path, cached: bool) -> None:
    root = gradient(tmp_path / "images")
    shutil.copytree(root, tmp_path / "follow")
    options = {"flip_aug": True, "random_crop": not cached, "num_repeats": 8, "alpha_mask": True}
    folders = subset(root, conditioning_data_dir=str(tmp_path / "follow"), **options)
    of = plan(dataset(folders, enable_bucket=False, batch_size=8), control=True)
    kept = latents(of, TensorStore(), FileIndex()) if cached else None
    [batch] = read(loader(of, latents=kept))
    assert batch.mask is not None and batch.control is not None
    assert batch.control.shape == (8, 3, 64, 64) and batch.control.min() >= 0
    read_images = batch.latents if cached else encode(batch.pixels) if batch.pixels is not None else None
    assert read_images is not None
    # Their green is as the image's, but on black, where the alpha (the column) hides the image.
    columns = (read_images[:, 1] + 1) / 2
    assert torch.allclose(functional.avg_pool2d(batch.control, 8)[:, 1], columns**2, atol=0.02)
    assert len({float(c[0, 0]) for c in columns}) > 1


def test_images_that_have_none_to_follow_are_all_named_at_once(tmp_path: Path) -> None:
    folder(tmp_path / "p")
    pair = folder(tmp_path / "c", [(64, 64), (90, 64)])
    with pytest.raises(UserError, match=r"4 images cannot be used") as caught:
        plan(dataset(subset(tmp_path / "p", conditioning_data_dir=str(pair))), control=True)
    assert str(caught.value).count("no image to follow of this name") == 3
    assert "its image to follow" in str(caught.value) and "not the shape" in str(caught.value)
    with pytest.raises(UserError, match="conditioning_data_dir is missing"):
        plan(dataset(subset(tmp_path / "p")), control=True)


def test_of_several_images_to_follow_the_one_of_the_whole_name_is_followed(tmp_path: Path) -> None:
    folder(tmp_path / "p", [(64, 64)])
    pair = folder(tmp_path / "c", [(64, 64)])
    (pair / "0.png").rename(pair / "0.jpg")
    for other in ("0.png", "0.webp"):
        (pair / other).write_bytes((pair / "0.jpg").read_bytes())
    of = dataset(subset(tmp_path / "p", conditioning_data_dir=str(pair)))
    assert plan(of, control=True).items[0].image.control_path == pair / "0.png"
    (pair / "0.png").unlink()
    with pytest.raises(UserError, match=r"several images go with one: 0\.png \(0\.jpg, 0\.webp\); leave one"):
        plan(of, control=True)


def test_an_image_that_is_gone_leaves_zeros_to_follow(tmp_path: Path) -> None:
    root, pair = folder(tmp_path / "p", [(64, 64)] * 3), folder(tmp_path / "c", [(64, 64)] * 3)
    of = plan(dataset(subset(root, conditioning_data_dir=str(pair)), batch_size=3), control=True)
    truncate(pair / "1.png")
    [batch] = read(loader(of, notice=lambda line: None))
    assert batch.control is not None and sorted(batch.weight.tolist()) == [0, 1, 1]
    assert not batch.control[batch.weight == 0].any()


def test_images_without_a_mask_count_everywhere(tmp_path: Path) -> None:
    folder(tmp_path / "a", [(64, 64)])
    noise((64, 64), 9, "RGBA").save(tmp_path / "a" / "0.png")
    folder(tmp_path / "b", [(64, 64)])
    of = plan(dataset(subset(tmp_path / "a", alpha_mask=True), subset(tmp_path / "b")))
    [batch] = read(loader(of))
    assert batch.mask is not None
    whole = [bool((m == 1).all()) for m in batch.mask]
    assert sorted(whole) == [False, True]
    assert batch.mask.shape == (2, 1, 8, 8)


def test_regularisation_images_weigh_as_set(tmp_path: Path) -> None:
    of = plan(dataset(subset(folder(tmp_path / "a")), subset(folder(tmp_path / "b"), is_reg=True, class_tokens="dog")))
    batches = read(loader(of, prior_loss_weight=0.25))
    assert Counter(w for b in batches for w in b.weight.tolist()) == {1.0: 5, 0.25: 5}


def test_stored_texts_are_handed_out_by_caption(images: Path) -> None:
    of = plan(dataset(subset(images, caption_dropout_rate=0.5)))
    cached = Loader(
        plan=of, seed=1, latents=latents(of, TensorStore(), FileIndex()), texts=texts(of, TensorStore(), FileIndex())
    )
    batches = read(cached)
    assert "" in [c for b in batches for c in b.captions]
    for batch in batches:
        assert batch.tokens is None
        assert batch.latents is not None
        assert batch.latents.dtype == torch.float32
        assert batch.latents.shape[1] == LATENTS.channels
        assert equal(
            batch.cond, {"hidden": tokenize(batch.captions)["ids"].half()}
        )  # the step widens it, on the device


def test_token_warmup_follows_the_optimizer_step(images: Path) -> None:
    of = plan(dataset(subset(images, token_warmup_step=0.5), batch_size=1))
    batches = [read(loader(of, accumulation=2, steps=8), e) for e in range(2)]
    shown = [len(b.captions[0].split(", ")) for epoch in batches for b in epoch]
    assert shown == [1, 1, 1, 1, 2, 2, 3, 3] + [4] * 8

    def long(epoch: int, start_step: int = 0) -> list[int]:
        batches = read(loader(of, accumulation=2, steps=16), epoch, start_step)
        return [len(b.captions[0].split(", ")) for b in batches]

    assert long(0) + long(1) == [1] * 6 + [2] * 6 + [3] * 4, "over an epoch's end"
    assert long(1, start_step=2) == long(1)[4:], "and taken up within one"


def test_a_share_of_an_unknown_run_is_refused(images: Path) -> None:
    with pytest.raises(UserError, match="token_warmup_step"):
        loader(plan(dataset(subset(images, token_warmup_step=0.5))))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def replace(path: Path) -> None:
    noise((64, 100), 77).save(path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("change", "reason"),
    [(Path.unlink, "does not exist"), (replace, "changed"), (truncate, "changed")],
    ids=["deleted", "replaced", "truncated"],
)
def test_an_image_lost_while_training_is_reported_once_and_weighs_nothing(
    tmp_path: Path, change: Callable[[Path], None], reason: str, workers: int
) -> None:
    of = plan(dataset(subset(folder(tmp_path), num_repeats=2)))
    before = samples(read(loader(of)) + read(loader(of), 1))
    change(tmp_path / "3.png")
    notices: list[str] = []
    training = loader(of, workers=workers, notice=notices.append)
    batches = read(training) + read(training, 1)
    [line] = notices
    assert "3.png" in line and reason in line and "goes on without it" in line
    left = samples(batches)
    assert set(left) < set(before)  # all others are what they were, bit for bit
    assert len(before) - len(left) == 4
    assert {caption for (_, caption, *_) in set(before) - set(left)} == {"thing 3, red, green, blue"}
    assert all(bool(b.pixels.isfinite().all()) for b in batches if b.pixels is not None)


def test_a_mask_replaced_while_training_costs_its_image(tmp_path: Path) -> None:
    folder(tmp_path / "p", [(64, 64)] * 3)
    (tmp_path / "m").mkdir()
    for i in range(3):
        Image.new("L", (64, 64), 100).save(tmp_path / "m" / f"{i}.png")
    of = plan(dataset(subset(tmp_path / "p", conditioning_data_dir=str(tmp_path / "m")), batch_size=3))
    Image.new("L", (64, 64), 200).save(tmp_path / "m" / "1.png")
    notices: list[str] = []
    [batch] = read(loader(of, notice=notices.append))
    assert len(notices) == 1 and str(tmp_path / "m" / "1.png") in notices[0]
    assert sorted(batch.weight.tolist()) == [0.0, 1.0, 1.0]
    assert batch.mask is not None and batch.mask.shape == (3, 1, 8, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_are_all_gone_end_the_run_plainly(tmp_path: Path, workers: int) -> None:
    of = plan(dataset(subset(folder(tmp_path, [(64, 64)] * 20))))
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match=r"png.*does not exist.*15 images before it.*folders still there") as caught:
        read(loader(of, workers=workers))
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("how", ["gone", "damaged", "another shape"])
def test_an_entry_lost_while_training_is_reported_and_weighs_nothing(images: Path, tmp_path: Path, how: str) -> None:
    of, index = plan(dataset(subset(images))), FileIndex()
    kept = latents(of, TensorStore(tmp_path), index)
    path = kept.store.path(kept.keys[0])
    if how == "gone":
        path.unlink()
    elif how == "damaged":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    else:
        kept.store.put(kept.keys[0], {"latents": torch.ones(3, 4, 4)})
    notices: list[str] = []
    batches = read(loader(of, latents=kept, notice=notices.append))
    [line] = notices
    assert "0.png" in line and how in line and "made anew at the next start" in line
    assert sorted(w for b in batches for w in b.weight.tolist()) == [0.0] + [1.0] * 7
    assert latents(of, TensorStore(tmp_path), index).encoded == 1


def test_text_outputs_lost_while_training_end_it_plainly(images: Path, tmp_path: Path) -> None:
    of = plan(dataset(subset(images)))
    kept = texts(of, TensorStore(tmp_path), FileIndex())
    kept.store.path(kept.keys["thing 3, red, green, blue"]).write_bytes(b"")
    with pytest.raises(UserError, match=r"thing 3.*damaged.*made anew at the next start"):
        read(loader(of, texts=kept))


def test_the_next_epoch_is_read_ahead_as_well(images: Path) -> None:
    drawn: list[list[int]] = []
    of = loader(moving(images), draw=lambda sizes, keys: drawn.append(list(keys)) or {})
    planned = [[ref.key for ref in refs] for epoch in range(2) for refs in of.plan.batches(epoch, 7)]
    first, before = read(of), threading.active_count()
    wait = Event()
    while len(drawn) < len(first) + 2:
        assert before > 1 and not wait.wait(0.01)
    assert drawn == planned[: len(first) + 2]
    assert [batch.keys for batch in read(of, 1)] == planned[len(first) :]
    of.close()
    assert threading.active_count() < before


def test_a_packed_batch_is_the_same_and_lies_in_one_run_of_bytes(images: Path) -> None:
    of = plan(dataset(subset(images)))
    kept = {"latents": latents(of, TensorStore(), FileIndex()), "texts": texts(of, TensorStore(), FileIndex())}

    def draw(sizes: Tensor, keys: Sequence[int]) -> dict[str, Tensor]:
        return {"t": sizes[:, 0] + 1, "gone": torch.tensor(keys) % 2 == 0}

    plain = read(loader(of, draw=draw, **kept))
    packed = read(loader(of, draw=draw, pack=partial(Batch.pack, pinned=False), **kept))
    for batch in (*packed, *(batch.to("cpu") for batch in packed)):
        assert batch.packed is not None and batch.cond is not None and batch.latents is not None
        inside = (batch.latents, batch.sizes, batch.weight, *batch.cond.values(), *batch.drawn.values())
        assert {t.untyped_storage().data_ptr() for t in inside} == {batch.packed.untyped_storage().data_ptr()}
    assert same(plain, [replaced(batch, packed=None) for batch in packed])


def test_several_datasets_in_one_run(images: Path) -> None:
    of = plan(
        dataset(subset(images)), dataset(subset(images), resolution=(96, 96), batch_size=3, network_multiplier=-1.0)
    )
    batches = read(loader(of))
    assert Counter(m for b in batches for m in b.multiplier.tolist()) == {1.0: 8, -1.0: 8}
    assert len({key for b in batches for key in b.keys}) == 16
    for batch in batches:
        assert len(batch) <= (3 if batch.multiplier[0] < 0 else 2)


def test_every_second_epoch_is_empty_counted_from_one(images: Path) -> None:
    of = plan(dataset(subset(images, caption_dropout_every_n_epochs=2)))
    empty = [{caption == "" for b in read(loader(of), epoch) for caption in b.captions} for epoch in range(4)]
    assert empty == [{False}, {True}, {False}, {True}]
