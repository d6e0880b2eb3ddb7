"""The same run gives the same bytes, however its images are read and whether or not it was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training import Train

from sfumato.adapters import lora
from sfumato.adapters.starts import start_factors
from sfumato.formats.files import load
from sfumato.train import loop

DROPS = ("rank_dropout=0.2", "module_dropout=0.2")


def assert_same(a: Path, b: Path) -> None:
    one, two = load(a), load(b)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "encoded in the step"])
def test_the_same_run_twice(train: Train, cached: bool) -> None:
    options: dict[str, Any] = {"cache_latents": cached, "network_dropout": 0.1, "max_train_steps": 2}
    assert_same(train("a", **options) / "out.safetensors", train("b", **options) / "out.safetensors")


def test_another_seed_gives_another_result(train: Train) -> None:
    a, b = (load(train(name, seed=seed, max_train_steps=1) / "out.safetensors") for name, seed in (("a", 1), ("b", 2)))
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_workers_do_not_matter(train: Train) -> None:
    settings = {"subset": {"shuffle_caption": True, "flip_aug": True, "random_crop": True}}
    a, b = train("a", max_data_loader_n_workers=0, **settings), train("b", max_data_loader_n_workers=2, **settings)
    assert_same(a / "out.safetensors", b / "out.safetensors")


@pytest.mark.parametrize("method", ["network", "full"])
def test_resuming_equals_going_on(train: Train, method: str) -> None:
    """8 steps = 3 + 2 + 3, across epochs of 3 steps, with everything random switched on."""
    settings: dict[str, Any] = {
        "method": method,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "ema_decay": 0.9,
        "noise_offset": 0.1,
        "subset": {"shuffle_caption": True, "flip_aug": True, "caption_dropout_rate": 0.3},
    }
    if method == "network":
        settings["network_args"] = DROPS
    whole = train("whole", max_train_steps=8, **settings)
    stop_after(train, 3, **settings)
    stop_after(train, 5, resume="auto", **settings)
    train("parts", max_train_steps=8, resume="auto", **settings)
    assert_same(whole / "out.safetensors", whole.parent / "parts" / "out.safetensors")


FEWER = {"quantize": "int8", "int8_matmul": True, "quantize_text_encoders": "nf4"}


@pytest.mark.parametrize(
    ("args", "more"),
    [(("init=pissa",), {}), (("ggpo_sigma=0.03", "ggpo_beta=0.01"), {}), (("dora_wd=True",), FEWER)],
)
def test_resuming_with_what_an_adapter_keeps(
    train: Train, monkeypatch: pytest.MonkeyPatch, args: tuple[str], more: dict[str, Any]
) -> None:
    """2 + 2 steps. A state holds the start, for on another machine it comes out with other bits; and GGPO's norms. What
    the weights below are kept in comes out the same again."""
    settings: dict[str, Any] = {"network_args": args, "ema_decay": 0.5, **more}
    whole = train("whole", max_train_steps=4, **settings)
    stop_after(train, 2, **settings)
    monkeypatch.setattr(lora, "start_factors", lambda *args: tuple(t + 2**-18 for t in start_factors(*args)))
    train("parts", max_train_steps=4, resume="auto", **settings)
    assert_same(whole / "out.safetensors", whole.parent / "parts" / "out.safetensors")


def stop_after(train: Train, step: int, **settings: Any) -> None:
    """Train into "parts" and press Ctrl+C in the given step."""
    old = loop._optimizer_step

    def pressing(a_run: loop.Run, *args: Any) -> Any:
        import signal

        if a_run.step + 1 == step:
            signal.raise_signal(signal.SIGINT)
        return old(a_run, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_optimizer_step", pressing)
        folder = train("parts", max_train_steps=8, **settings)
    assert (folder / f"out-step{step:08d}.safetensors").exists()
    assert (folder / f"out-step{step:08d}-state").is_dir()
    assert not (folder / "out.safetensors").exists()


def test_how_batches_are_cut_does_not_matter(train: Train) -> None:
    """One batch of 4 and two accumulated ones of 2 give the same step, up to rounding: every sample weighs the same."""
    settings: dict[str, Any] = {"subset": {"num_repeats": 2}, "cache_latents": True}
    a = load(train("a", gradient_accumulation_steps=5, max_train_steps=2, **settings) / "out.safetensors")
    b = load(train("b", gradient_accumulation_steps=5, max_train_epochs=2, **settings) / "out.safetensors")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_an_incomplete_last_group_is_a_step(train: Train) -> None:
    """5 images in batches of 2, two accumulated: 3 batches make 2 steps an epoch."""
    folder = train("a", gradient_accumulation_steps=2, max_train_epochs=2)
    assert len((folder / "out.jsonl").read_text().splitlines()) == 4
