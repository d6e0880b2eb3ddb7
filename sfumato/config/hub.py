"""Whether results go to the Hugging Face hub, and whether a run goes on from a state there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from sfumato.config.rules import Must, Needs, Record

_UPLOADED = Needs("huggingface_repo_id")
_STATES = Needs("save_state", "save_state_on_train_end")
RepoId = Annotated[str, Must(re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*").fullmatch, "a repository of the hub, owner/name")]


@dataclass(frozen=True, kw_only=True)
class HubConfig(Record):
    """Uploads go on beside the training and never end it. Who uploads is known from the variable HF_TOKEN or from `hf
    auth login`: a token stands in no setting and no file."""

    huggingface_repo_id: RepoId | None = None
    """Upload every result to this repository of the hub, `owner/name`; it is made where it is missing."""
    huggingface_repo_type: Annotated[Literal["model", "dataset", "space"], _UPLOADED] = "model"
    """What kind of repository it is."""
    huggingface_path_in_repo: Annotated[
        str | None, _UPLOADED, Must(lambda path: ".." not in path.split("/"), "a folder in the repository, without ..")
    ] = None
    """Folder in the repository; default: its top."""
    huggingface_repo_visibility: Annotated[Literal["private", "public"], _UPLOADED] = "private"
    """Who sees a repository that is made."""
    save_state_to_huggingface: Annotated[bool, _UPLOADED, _STATES] = False
    """Upload the states of the run as well."""
    resume_from_huggingface: Annotated[bool, Needs("resume")] = False
    """resume names a state on the hub, `owner/name/folder`, with `:revision` and `:revision:type` behind it where they
    are needed."""
