"""What is wrong with the settings of words is told before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.cli import flags
from sfumato.errors import UserError


def test_mistakes_of_embeddings_are_told(home: Path) -> None:
    base = ["--pretrained_model_name_or_path=base.safetensors", "--dataset_config=data.toml"]
    for line, message in (
        ("", "token_string: `train embedding` learns a word: name it (--token_string sks)"),
        ("--token_string hoge --cache_text_encoder_outputs", "cannot be kept while a word of theirs is learnt"),
        ("--token_string two,words", "--token_string: expected one word without blanks"),
        ("--token_string hoge --network_dim 4", "--network_dim: would have no effect: only `train network`"),
        ("--init_word cat --token_string hoge --use_object_template --use_style_template", "use_style_template says"),
    ):
        with pytest.raises(UserError) as e:
            flags.resolve_all([*base, *line.split()], "embedding")
        assert message in str(e.value)
    with pytest.raises(UserError) as e:
        flags.resolve_all([*base, "--token_string=two,words"], "embedding")
    assert "name it" not in str(e.value)  # one mistake, one message
