"""Results on their way to the hub, and a state from there, against a hub that is a folder."""

from __future__ import annotations

import inspect
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file
from training import Train, config

from sfumato.config import Config, HubConfig, OutputConfig
from sfumato.errors import UserError
from sfumato.train import check, hub, resume

TOKEN = "hf_verysecret"


def as_there(method: Callable[..., Any]) -> Callable[..., Any]:
    """Takes what the real method takes."""
    signature = inspect.signature(getattr(HfApi, method.__name__))

    @wraps(method)
    def call(self: object, **given: Any) -> Any:
        signature.bind(self, **given)
        return method(self, **given)

    return call


class FakeHub:
    """What `HfApi` does, in a folder."""

    root: ClassVar[Path]
    private: ClassVar[dict[str, bool]]
    failing: ClassVar[list[Exception | None]]
    """Raised one after another by uploads; None: it goes well."""
    hanging: ClassVar[threading.Event | None]

    @as_there
    def repo_exists(self, repo_id: str, repo_type: str) -> bool:
        return repo_id in self.private

    @as_there
    def create_repo(self, repo_id: str, repo_type: str, private: bool, exist_ok: bool) -> None:
        self.private[repo_id] = private

    @as_there
    def upload_file(self, path_or_fileobj: Path, path_in_repo: str, repo_id: str, repo_type: str) -> None:
        shutil.copy(path_or_fileobj, self._at(repo_type, repo_id, path_in_repo))

    @as_there
    def upload_folder(self, folder_path: Path, path_in_repo: str, repo_id: str, repo_type: str) -> None:
        shutil.copytree(folder_path, self._at(repo_type, repo_id, path_in_repo))

    def _at(self, *names: str) -> Path:
        if self.hanging:
            self.hanging.wait()
        if self.failing and (error := self.failing.pop(0)):
            raise error
        path = self.root.joinpath(*names)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's folder."""
    FakeHub.root, FakeHub.private, FakeHub.failing, FakeHub.hanging = tmp_path / "hub", {}, [], None

    def snapshot(repo: str, repo_type: str | None, revision: str | None, allow_patterns: list[str] | None) -> str:
        if not (at := tmp_path / "hub" / (repo_type or "model") / repo).is_dir():
            raise OSError(f"404 for {repo} with Bearer {TOKEN}")
        return str(at)

    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    monkeypatch.setattr(hub, "PAUSE", 0.0)
    return tmp_path / "hub"


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_a_run_uploads_its_results_and_goes_on_from_its_state_on_the_hub(
    train: Train, tmp_path: Path, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(
        "a", max_train_steps=4, save_every_n_steps=2, save_state=True, save_state_to_huggingface=True,
        huggingface_repo_id="me/thing", huggingface_path_in_repo="/runs/",
    )  # fmt: skip
    top = there / "model" / "me" / "thing" / "runs"
    results = {"out.safetensors", "out-step00000002.safetensors"}
    assert {p.name for p in top.iterdir()} == {*results, "out-state", "out-step00000002-state"}
    assert all((top / name).read_bytes() == (first / name).read_bytes() for name in results)
    assert FakeHub.private == {"me/thing": True} and "4 uploaded to me/thing" in capsys.readouterr().err
    state = {"resume": "me/thing/runs/out-step00000002-state", "resume_from_huggingface": True}
    one, other = (load_file(f / "out.safetensors") for f in (first, train("b", max_train_steps=4, **state)))
    assert all(one[key].equal(other[key]) for key in one)
    text = "".join(p.read_text(errors="ignore") for p in tmp_path.rglob("*") if p.is_file())
    assert TOKEN not in text


def test_an_upload_that_fails_is_tried_again_and_then_told_once(
    tmp_path: Path, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name)
    FakeHub.failing = [*[ConnectionError("away")] * (hub.TRIES - 1), None, *[OSError(f"bad {TOKEN}")] * hub.TRIES * 2]
    settings = HubConfig(huggingface_repo_id="me/thing", huggingface_repo_visibility="public")
    with hub.Uploads(settings) as uploads:
        for name in ("a", "gone", "b", "c"):
            uploads.put(tmp_path / name)
    said = capsys.readouterr().err.replace("\n", " ")
    assert files(there) == {"model/me/thing/a"} and FakeHub.private == {"me/thing": False}
    assert said.count("not uploaded to me/thing: bad ***; training goes on") == 1 and TOKEN not in said
    assert f"`hf upload me/thing {tmp_path}/b b`" in said and "/c c`" in said and "gone" not in said


def test_an_upload_that_hangs_keeps_no_run(
    tmp_path: Path, there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "PATIENCE", 0.05)
    FakeHub.hanging = threading.Event()
    (tmp_path / "a").write_text("a")
    with hub.Uploads(HubConfig(huggingface_repo_id="me/thing")) as uploads:
        uploads.put(tmp_path / "a")
    FakeHub.hanging.set()
    assert "not uploaded to me/thing; later: `hf upload" in capsys.readouterr().err.replace("\n", " ")


def test_who_is_not_logged_in_is_told_before_the_first_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    settings = config(
        pretrained_model_name_or_path=str(model), output_dir=str(tmp_path), huggingface_repo_id="me/thing"
    )
    with pytest.raises(UserError, match="nobody is logged in to the hub: set the variable HF_TOKEN or run `hf auth lo"):
        check.check(settings, "network", ())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("me", "expected owner/name/folder of a state"),
        ("me/thing/a:main:models", "the type one of model, dataset, space"),
        ("me/thing/a:main:model:x", "expected owner/name/folder"),
        ("me/none/a", r"the hub has no such state or cannot be reached \(404 for me/none with Bearer \*\*\*\)"),
        ("me/thing/b:main:dataset", "me/thing has no folder 'b'"),
    ],
)
def test_a_state_that_the_hub_does_not_have_is_told(name: str, message: str, there: Path) -> None:
    (there / "dataset" / "me" / "thing" / "a").mkdir(parents=True)
    settings = Config(output=OutputConfig(resume=name), hub=HubConfig(resume_from_huggingface=True))
    with pytest.raises(UserError, match=f"resume {name}: .*{message}"):
        resume.resolve_auto(settings)
    known = replace(settings, output=OutputConfig(resume="me/thing/a:main:dataset"))
    assert resume.resolve_auto(known).output.resume == str(there / "dataset" / "me" / "thing" / "a")


def test_results_stay_in_their_repository() -> None:
    with pytest.raises(UserError, match="huggingface_path_in_repo: expected a folder in the repository, without"):
        HubConfig(huggingface_repo_id="me/it", huggingface_path_in_repo="../other")
