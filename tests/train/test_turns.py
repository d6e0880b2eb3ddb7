"""Nets take turns in memory while caches are filled and prompts are encoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import prepared
import pytest
from torch import nn

from sfumato.models.base import Models
from sfumato.models.components import ComponentWeights
from sfumato.train import pipeline, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = prepared.folder(tmp_path_factory.mktemp("run"))
    (where / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1\n")
    return where


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The components in the order in which they are read."""
    found: list[str] = []

    def put(
        self: ComponentWeights, *args: Any, real: Callable[..., nn.Module] = ComponentWeights.put_into
    ) -> nn.Module:
        found.append(self.component.name)
        return real(self, *args)

    monkeypatch.setattr(ComponentWeights, "put_into", put)
    return found


def there(models: Models) -> set[str]:
    """The nets that have values."""
    return {name for name, net in models.made().items() if not next(net.parameters()).is_meta}


@pytest.mark.parametrize("sampled", [False, True])
def test_a_run(folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch, sampled: bool) -> None:
    seen: dict[str, set[str]] = {}

    def watch(name: str) -> None:
        real: Callable[..., Any] = getattr(run, name)

        def call(*args: Any) -> Any:
            result = real(*args)
            seen[name] = there(next(arg for arg in args if isinstance(arg, Models)))
            return result

        monkeypatch.setattr(run, name, call)

    watch("fill_caches")
    watch("encode_prompts")
    samples = {"sample_prompts": str(folder / "prompts.txt"), "sample_every_n_steps": 9} if sampled else {}
    a_run = prepared.prepare(folder, cache_latents=True, cache_text_encoder_outputs=True, **samples)
    assert seen == {name: {"clip_l"} for name in ("fill_caches", "encode_prompts")[: 1 + sampled]}
    assert there(a_run.trainable.models) == {"denoiser", *(["vae"] if sampled else [])}
    assert reads == ["vae", "clip_l", "denoiser", *(["vae"] if sampled else [])]


def test_sampling(folder: Path, tmp_path: Path, reads: list[str]) -> None:
    config = prepared.options(folder, sample_prompts=str(folder / "prompts.txt"), output_dir=str(tmp_path))
    (path,) = pipeline.main(config)
    assert path.is_file() and reads[0] == "clip_l" and sorted(reads) == ["clip_l", "denoiser", "vae"]


def test_caching_reads_no_denoiser(folder: Path, tmp_path: Path, reads: list[str]) -> None:
    disk = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True, "cache_dir": str(tmp_path)}
    config = prepared.options(folder, cache_latents=True, cache_text_encoder_outputs=True, **disk)
    run.cache(config, prepared.data(folder))
    assert reads == ["vae", "clip_l"]
