"""What is planned is what is done: counts, buckets, batches and steps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from folders import dataset, folder, noise, plan, subset

from sfumato.config import DatasetConfig, SubsetConfig
from sfumato.data.plan import Plan
from sfumato.errors import UserError


def samples(of: Plan, epoch: int = 0, seed: int = 1) -> Counter[str]:
    return Counter(str(of.items[ref.item].image.path) for batch in of.batches(epoch, seed) for ref in batch)


def test_every_image_comes_as_often_as_it_is_repeated(tmp_path: Path) -> None:
    made = plan(dataset(subset(folder(tmp_path / "a"), num_repeats=3), subset(folder(tmp_path / "b", [(64, 64)]))))
    assert samples(made) == {str(i.image.path): 3 if i.image.subset == 0 else 1 for i in made.items}


def test_batches_are_of_one_bucket_and_one_dataset_and_of_its_size(tmp_path: Path) -> None:
    root = folder(tmp_path, [(64, 64)] * 5 + [(96, 64)] * 3)
    made = plan(dataset(subset(root), batch_size=3), dataset(subset(root), resolution=(96, 96), batch_size=2))
    sizes = []
    for batch in made.batches(0, 1):
        items = [made.items[ref.item] for ref in batch]
        assert len({(i.dataset, i.placement.bucket) for i in items}) == 1
        sizes.append((items[0].dataset, len(batch)))
    assert sorted(sizes) == [(0, 2), (0, 3), (0, 3), (1, 1), (1, 1), (1, 2), (1, 2), (1, 2)]
    assert len(sizes) == made.batches_per_epoch


def test_the_order_follows_from_seed_and_epoch(tmp_path: Path) -> None:
    made = plan(dataset(subset(folder(tmp_path, [(64, 64)] * 12))))
    again = plan(dataset(subset(tmp_path)))
    assert made.batches(3, 5) == again.batches(3, 5)
    assert made.batches(3, 5) != made.batches(4, 5)
    assert made.batches(3, 5) != made.batches(3, 6)
    assert samples(made, 3, 5) == samples(made, 4, 6)
    company = [{frozenset(ref.item for ref in batch) for batch in made.batches(epoch, 5)} for epoch in (3, 4)]
    assert company[0] != company[1]  # other images together, not only another order


def sd_scripts(train: int, repeats: list[int]) -> list[int]:
    """How sd-scripts registers regularisation images: one after another, then one more of each, until there are enough."""
    count, registered, first = 0, [0] * len(repeats), True
    while count < train:
        for i, n in enumerate(repeats):
            registered[i] += n if first else 1
            count += n if first else 1
            if count >= train:
                break
        first = False
    return registered


@pytest.mark.parametrize(
    ("train", "count", "repeats"), [(5, 2, 1), (5, 3, 1), (5, 3, 2), (5, 4, 2), (3, 5, 1), (12, 5, 1)]
)
def test_regularisation_images_come_as_often_as_training_images(
    tmp_path: Path, train: int, count: int, repeats: int
) -> None:
    folder(tmp_path / "t", [(64, 64)] * train)
    folder(tmp_path / "r", [(64, 64)] * count, seed=90)
    made = plan(dataset(subset(tmp_path / "t"), subset(tmp_path / "r", is_reg=True, num_repeats=repeats)))
    expected = sd_scripts(train, [repeats] * count)
    assert [i.repeats for i in made.items if i.image.is_reg] == [n for n in expected if n]
    assert len(made.skipped) == expected.count(0)
    assert len(made.items) + len(made.skipped) == train + count
    assert made.notes or expected == [repeats] * count


def test_regularisation_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset 1: all of its folders hold regularisation images.*leave is_reg out"):
        plan(dataset(subset(folder(tmp_path), is_reg=True)))


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"resolution": (60, 60), "enable_bucket": False}])
def test_options_that_cannot_act_are_refused(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(UserError, match="dataset 1"):
        plan(dataset(subset(folder(tmp_path)), **options))


def test_all_wrong_options_are_reported_at_once(tmp_path: Path) -> None:
    root = folder(tmp_path)
    with pytest.raises(UserError) as caught:
        plan(
            dataset(subset(root, face_crop_aug_range=(2.0, 1.0)), batch_size=0),
            dataset(subset(root, alpha_mask=True, conditioning_data_dir="x")),
        )
    assert len(caught.value.messages) == 3


def test_no_dataset_is_refused() -> None:
    with pytest.raises(UserError, match="train_data_dir"):
        plan(DatasetConfig())


def test_images_without_a_bucket_are_listed(tmp_path: Path) -> None:
    folder(tmp_path, [(64, 64), (8, 64)])
    with pytest.raises(UserError, match=r"1\.png: 8x64.*bucket_reso_steps"):
        plan(dataset(subset(tmp_path), bucket_no_upscale=True))


def test_small_images_stay_out_of_the_datasets_that_say_so(tmp_path: Path) -> None:
    """The same folder at two resolutions, as sd-scripts documents it."""
    root = folder(tmp_path, [(64, 64), (96, 64), (65, 63)])
    made = plan(
        dataset(subset(root)), dataset(subset(root), resolution=(96, 96), skip_image_resolution=(64, 64), batch_size=1)
    )
    assert [(item.dataset, item.image.name) for item in made.items] == [
        (0, "0.png"), (0, "1.png"), (0, "2.png"), (1, "1.png"),
    ]  # fmt: skip
    assert [(skip.dataset, skip.path.name, skip.unreadable) for skip in made.skipped] == [
        (1, "0.png", False), (1, "2.png", False),
    ]  # fmt: skip
    assert any("2 images are left out, of no more pixels than" in n and "(0.png, 2.png)" in n for n in made.notes)


def test_the_digest_changes_when_the_batches_do(tmp_path: Path) -> None:
    root = folder(tmp_path)
    same = plan(dataset(subset(root))).digest()
    (root / "0.txt").write_text("another caption")
    assert plan(dataset(subset(root))).digest() == same
    for other in (
        dataset(subset(root), batch_size=3),
        dataset(subset(root, num_repeats=2)),
        dataset(subset(root), resolution=(80, 80)),
    ):
        assert plan(other).digest() != same


def test_regularisation_is_alone_where_no_training_image_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="regularisation"):
        plan(dataset(subset(tmp_path / "t"), subset(folder(tmp_path / "r"), is_reg=True)), skip_unreadable=True)


def test_an_epoch_of_more_samples_than_can_be_shuffled_is_refused_at_once(tmp_path: Path) -> None:
    folder(tmp_path, [(64, 64)] * 2)
    with pytest.raises(UserError, match=r"20,000,000 samples an epoch.*lower num_repeats \(dataset_repeats\)"):
        plan(dataset(subset(tmp_path, num_repeats=10_000_000)))
    assert plan(dataset(subset(tmp_path), batch_size=10**18)).batches_per_epoch == 1


def test_an_image_that_would_be_too_large_to_hold_is_reported_with_its_size(tmp_path: Path) -> None:
    noise((2, 20_000), 1).save(tmp_path / "thread.png")
    with pytest.raises(UserError, match=r"thread\.png: 2x20000 would be 512x5120000 before it is cut to 512x512"):
        plan(DatasetConfig(subsets=(subset(tmp_path),)))


def test_a_folder_of_several_datasets_is_reported_once(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a"), folder(tmp_path / "a" / "b")
    (a / "0.txt").unlink()
    (b / "1.png").write_bytes(b"")
    data = (dataset(subset(a), subset(b)), dataset(subset(a), subset(b), resolution=(96, 96)))
    made = plan(*data, skip_unreadable=True)
    assert [len(items) for items in made.folders().values()] == [5, 4] * 2
    assert [(skip.dataset, skip.subset) for skip in made.skipped] == [(0, 1), (1, 1)]
    assert len(made.notes) == 1 and "0.png" in made.notes[0]
    with pytest.raises(UserError) as error:
        plan(*data)
    assert str(error.value).count("1.png") == 1


def test_the_name_of_an_image_is_its_path_inside_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "a" / "sub", [(64, 64)])
    folder(tmp_path / "a", [(64, 64)])
    monkeypatch.chdir(tmp_path / "a")
    for place in (".", "../a", str(tmp_path / "a"), f"{tmp_path / 'a'}/"):
        made = plan(dataset(SubsetConfig(image_dir=place, recursive=True)))
        assert [item.image.name for item in made.items] == ["0.png", "sub/0.png"]
