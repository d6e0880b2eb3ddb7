"""What is written into a result besides its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sfumato.config.rules import File, Only, Record


@dataclass(frozen=True, kw_only=True)
class MetadataConfig(Record):
    """What a result says of itself."""

    no_metadata: bool = False
    """Write only the metadata that loaders need."""
    training_comment: str | None = None
    """Free text kept in the metadata."""
    metadata_title: str | None = None
    """modelspec: title; default: output_name."""
    metadata_author: str | None = None
    """modelspec: author."""
    metadata_description: str | None = None
    """modelspec: description."""
    metadata_license: str | None = None
    """modelspec: licence."""
    metadata_tags: str | None = None
    """modelspec: tags, separated by commas."""
    metadata_usage_hint: str | None = None
    """modelspec: how to use the file."""
    metadata_trigger_phrase: str | None = None
    """modelspec: the phrase that calls the trained thing."""
    metadata_thumbnail: File = None
    """modelspec: a small picture of what the file makes: an image file, which is written as it is, or a data URL."""
    metadata_merged_from: str | None = None
    """modelspec: names of the models that the base model was merged from, separated by commas."""
    metadata_preprocessor: Annotated[
        str | None, Only("controlnet", "lllite", why="only what makes images follow others has a preprocessor")
    ] = None
    """modelspec: what makes the images to follow, such as `canny` or `depth`."""
    metadata_is_negative_embedding: Annotated[
        bool, Only("embedding", why="only an embedding can be a negative one")
    ] = False
    """modelspec: the embedding belongs into negative prompts."""
