"""Results to the Hugging Face hub beside the training, and a run's state from there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

from sfumato.config import Config, HubConfig
from sfumato.errors import UserError
from sfumato.train.mishaps import Mishaps
from sfumato.train.progress import console

TRIES, PAUSE = 3, 2.0
"""How often an upload is tried, and the seconds after the first time, doubled after each further one."""
PATIENCE = 600.0
"""Seconds that the end of a run waits for its uploads."""
_KINDS = ("model", "dataset", "space")


def check(config: HubConfig) -> None:
    """Errors: `UserError` if something is to be uploaded and nobody is logged in."""
    if config.huggingface_repo_id and not _token():
        raise UserError(
            f"huggingface_repo_id {config.huggingface_repo_id}: nobody is logged in to the hub: set the variable "
            "HF_TOKEN or run `hf auth login`, or leave it out"
        )


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


class Uploads:
    """Files and folders on their way to a repository, one after another in a thread of its own. Nothing that happens
    there ends a run: it is reported once, and at the end what was not uploaded."""

    def __init__(self, config: HubConfig) -> None:
        self.config, self.mishaps = config, Mishaps()
        self.waiting: list[Path] = []
        self.failed: list[Path] = []
        self.done = 0
        self._queue: Queue[Path | None] = Queue()
        # A daemon: an upload that hangs does not keep the process.
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)

    def put(self, path: Path) -> None:
        """Upload a file or folder when its turn comes. One that has been removed by then, as save_last_n_steps and the
        like do, is not."""
        self.waiting.append(path)
        self._queue.put(path)

    def __enter__(self) -> Uploads:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what is on its way, `PATIENCE` seconds at most, and say what was not uploaded."""
        self._queue.put(None)
        if self.waiting:
            console.print(f"uploading to {self.config.huggingface_repo_id} ...")
        self._thread.join(PATIENCE)
        if self.done:
            console.print(f"{self.done} uploaded to {self.config.huggingface_repo_id}")
        kind = self.config.huggingface_repo_type
        for path in [*self.failed, *self.waiting]:
            by_hand = f"hf upload {self.config.huggingface_repo_id} {path} {self._name(path)}"
            by_hand += "" if kind == "model" else f" --repo-type {kind}"
            console.print(f"{path}: not uploaded to {self.config.huggingface_repo_id}; later: `{by_hand}`")

    def _work(self) -> None:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()  # they would be drawn over the training's
        while (path := self._queue.get()) is not None:
            if path.exists() and not self._uploaded(path):
                self.failed.append(path)
            self.waiting.remove(path)

    def _uploaded(self, path: Path) -> bool:
        """Whether it could be uploaded, after some tries."""
        for attempt in range(TRIES):
            try:
                self._upload(path)
            except Exception as error:  # the hub's client has dozens of kinds, and none may end a run
                if not path.exists():
                    return True
                if attempt + 1 == TRIES:
                    self.mishaps.report(f"not uploaded to {self.config.huggingface_repo_id}", _without_secrets(error))
                else:
                    time.sleep(PAUSE * 2**attempt)
            else:
                self.done += 1
                return True
        return False

    def _upload(self, path: Path) -> None:
        from huggingface_hub import HfApi

        api, c = HfApi(), self.config
        where: dict[str, Any] = {"repo_id": c.huggingface_repo_id, "repo_type": c.huggingface_repo_type}
        if not api.repo_exists(**where):
            api.create_repo(**where, private=c.huggingface_repo_visibility != "public", exist_ok=True)
        if path.is_dir():
            api.upload_folder(**where, folder_path=path, path_in_repo=self._name(path))
        else:
            api.upload_file(**where, path_or_fileobj=path, path_in_repo=self._name(path))

    def _name(self, path: Path) -> str:
        """Where it goes in the repository."""
        return "/".join(filter(None, [(self.config.huggingface_path_in_repo or "").strip("/"), path.name]))


def uploads(config: HubConfig, *, main: bool) -> Uploads | None:
    """Of the first process of a run, if anything is to be uploaded."""
    return Uploads(config) if config.huggingface_repo_id and main else None


def uploading(uploads: Uploads | None, save: Callable[..., None], *, state: bool = False) -> Callable[..., None]:
    """(path, ...): save, then upload what was saved. `state`: that is a state of the run."""
    if uploads is None or (state and not uploads.config.save_state_to_huggingface):
        return save

    def act(path: Path, *more: Any) -> None:
        save(path, *more)
        uploads.put(path)

    return act


def _without_secrets(error: Exception) -> Exception:
    """An error whose message does not hold the token, which a client might put into it."""
    token, text = _token(), str(error)
    return type("HubError", (Exception,), {})(text.replace(token, "***")) if token and token in text else error


def with_state(config: Config) -> Config:
    """The config with a folder in place of the state on the hub that `resume` names, downloaded. Errors: `UserError` if
    it cannot be had."""
    name = config.output.resume
    if not config.hub.resume_from_huggingface or name is None:
        return config
    path, revision, kind, *more = [*name.split(":"), "", ""]
    owner, repo, *folders = [*filter(None, path.split("/")), "", ""]
    if not repo or any(more) or kind not in ("", *_KINDS):
        raise UserError(
            f"resume {name}: with resume_from_huggingface, expected owner/name/folder of a state on the hub, and "
            f"behind it :revision or :revision:type where they are needed, the type one of {', '.join(_KINDS)}"
        )
    folder = _download(name, f"{owner}/{repo}", "/".join(filter(None, folders)), revision or None, kind or None)
    output, here = replace(config.output, resume=str(folder)), replace(config.hub, resume_from_huggingface=False)
    return replace(config, output=output, hub=here)


def _download(name: str, repo: str, folder: str, revision: str | None, kind: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        top = snapshot_download(
            repo, repo_type=kind, revision=revision, allow_patterns=[f"{folder}/*"] if folder else None
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(_without_secrets(error)).strip().partition("\n")[0]
        raise UserError(f"resume {name}: the hub has no such state or cannot be reached ({reason})") from error
    if not (Path(top) / folder).is_dir():
        raise UserError(f"resume {name}: {repo} has no folder {folder!r} on the hub")
    return Path(top) / folder
