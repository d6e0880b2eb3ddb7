"""Where a model is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from sfumato.errors import UserError
from sfumato.families import sources
from sfumato.formats.files import save


def test_what_is_here_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert sources.local("some/model", "vae") == Path("some/model")


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    assert sources.local("someone/some-model.v1", "vae") == tmp_path
    assert asked == ["someone/some-model.v1"]


def test_a_hub_that_does_not_answer_is_told_with_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match=r"vae: 'someone/model' .*no connection"):
        sources.local("someone/model", "vae")
    with pytest.raises(UserError, match=r"vae: no such file or folder: 'a/b/c\.safetensors'"):
        sources.local("a/b/c.safetensors", "vae")


def test_weights_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights"):
        sources.weights(tmp_path)
    save(tmp_path / "model-00001-of-00002.safetensors", {"a": torch.zeros(1)}, {})
    save(tmp_path / "model-00002-of-00002.safetensors", {"b": torch.ones(1)}, {})
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert {name: t.item() for name, t in sources.weights(tmp_path).items()} == {"a": 0.0, "b": 1.0}
    save(tmp_path / "model.fp16.safetensors", {"half": torch.zeros(1)}, {})
    assert list(sources.weights(tmp_path)) == ["half"]
    save(tmp_path / "model.safetensors", {"whole": torch.zeros(1)}, {})
    assert list(sources.weights(tmp_path)) == ["whole"]
