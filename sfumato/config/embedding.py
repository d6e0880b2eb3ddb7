"""New words of the text encoders: textual inversion, alone or beside an adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from sfumato.config.rules import Count, Excludes, File, Must, Needs, Only, PathTo, Rate, Record

_LEARNT = Only("embedding", "network", why="only `train embedding` and `train network` learn words")
_WORD = Needs("token_string")
_WORD_ALONE = Must(
    re.compile(r"[^\s.,:;|/\\(){}\[\]\"]+").fullmatch,
    'one word without blanks and without . , : ; | / \\ " and brackets, which mean something in captions and files',
)


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(Record):
    """New words of the text encoders (textual inversion, arXiv:2208.01618)."""

    token_string: Annotated[str | None, _WORD_ALONE, _LEARNT] = None
    """The word to learn, as it stands in captions and prompts. With `train network` it is learnt beside the adapter
    and kept in its file (pivotal tuning)."""
    init_word: Annotated[str | None, _LEARNT, _WORD] = None
    """Start from what these words mean; default: from the table's average, and a little chance."""
    num_vectors_per_token: Annotated[Count, _LEARNT, _WORD] = 1
    """Vectors of the word; each takes the place of a token in a caption."""
    weights: Annotated[File, _LEARNT, _WORD] = None
    """Start from this embedding file."""
    use_object_template: Annotated[
        bool, _LEARNT, _WORD, Excludes("use_style_template", why="use_style_template says what captions are")
    ] = False
    """Train on sentences such as "a photo of a WORD", one by chance each time, in place of the captions."""
    use_style_template: Annotated[bool, _LEARNT, _WORD] = False
    """Train on sentences such as "a painting in the style of WORD", one by chance each time, in place of the
    captions."""
    xti: Annotated[bool, Only("embedding", why="only `train embedding` has it"), _WORD] = False
    """Learn other vectors for each block of the U-Net that attends to the text (extended textual inversion,
    arXiv:2303.09522): Stable Diffusion 1.x and 2.x alone."""
    embedding_lr: Annotated[Rate | None, _LEARNT, _WORD] = None
    """Learning rate of the word; default: learning_rate."""
    textual_inversion_embeddings: Annotated[tuple[str, ...], PathTo("file")] = ()
    """Embedding files whose words act in prompts, and in captions; a word is called as its file, without the
    ending."""
