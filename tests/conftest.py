"""Puts this folder on the path, so that every test can `import tiny`; fixtures that tests of several folders use."""

# ruff: noqa: E402
from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

# The collector would walk through all that is imported, again and again while it grows; as in `cli/main.py: train`.
gc.set_threshold(50_000, 20, 20)
# transformers reads each tensor of a tiny model in a thread of its own otherwise.
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")

import pytest
import torch
from run_fixtures import images, model, train
from tinies.headers import table

from sfumato.formats import files, metadata

__all__ = ["images", "keys", "model", "train"]

# Two test processes share two cores; and one thread adds numbers in the same order each time.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not walk through these million objects again in every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered of files is not the user's, whose memory would fill with files that are gone; and no test cuts
    the power, so gigabytes of files that live for a second need not reach the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "MEMO", tmp_path_factory.mktemp("memo") / "hashes.json")
        patch.setattr(files, "_sync", lambda path: None)
        patch.setattr(files, "sync_all", lambda: None)
        yield


@pytest.fixture(scope="session")
def keys() -> Callable[[str], dict[str, tuple[int, ...]]]:
    """Name of a real file -> {tensor name: shape}."""
    return table
