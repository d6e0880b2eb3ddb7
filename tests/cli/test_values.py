from __future__ import annotations

from typing import Any

import pytest

from sfumato.cli import options, values

GOOD = [
    ("resolution", "512", True, (512, 512)),
    ("resolution", "512,768", True, (512, 768)),
    ("resolution", "512, 768", False, (512, 768)),
    ("resolution", [512, 768], False, (512, 768)),
    ("resolution", 512, False, (512, 512)),
    ("text_encoder_lr", ["1e-5", "2e-5"], True, (1e-5, 2e-5)),
    ("text_encoder_lr", 1e-5, False, (1e-5,)),
    ("text_encoder_lr", [], False, ()),
    ("block_lr", ["1e-5,2e-5, 0"], True, (1e-5, 2e-5, 0.0)),
    ("block_lr", "1e-5,2e-5", False, (1e-5, 2e-5)),
    ("optimizer_args", ["weight_decay=0.01", "betas=0.9,0.99"], True, ("weight_decay=0.01", "betas=0.9,0.99")),
    ("network_args", "conv_dim=4", False, ("conv_dim=4",)),
    ("lr_warmup_steps", "10%", True, "10%"),
    ("lr_warmup_steps", "10%", False, "10%"),
    ("lr_warmup_steps", "100", True, 100),
    ("lr_warmup_steps", 0.1, False, 0.1),
    ("max_token_length", "150", True, 150),
    ("learning_rate", "1e-4", True, 1e-4),
    ("learning_rate", 1, False, 1.0),
    ("cache_latents", "false", True, False),
    ("cache_latents", True, True, True),
    ("v2", True, False, True),
    ("save_precision", "", False, None),
    ("vae", "", True, None),
    ("class_tokens", "7", True, "7"),
]
BAD = [
    ("resolution", "512,768,1", True, "one whole number or two"),
    ("resolution", "a,b", False, "one whole number or two"),
    ("resolution", 51.5, False, "one whole number or two"),
    ("lr_warmup_steps", "x", True, "percentage"),
    ("lr_warmup_steps", True, False, "percentage"),
    ("max_token_length", 151, False, "one of 75, 150, 225"),
    ("learning_rate", "1e-4", False, "a number, found the text '1e-4'"),
    ("learning_rate", float("nan"), False, "a number"),
    ("learning_rate", "inf", True, "a number"),
    ("max_train_steps", True, False, "a whole number, found true"),
    ("max_train_steps", "8.5", True, "a whole number"),
    ("seed", "", True, "found nothing"),
    ("loss_type", "hubber", True, "did you mean 'huber'?"),
    ("cache_latents", 1, False, "true or false"),
    ("cache_latents", "maybe", True, "true or false"),
    ("optimizer_args", [1], False, "a list, each text"),
    ("block_lr", "1e-5,x", True, "a list, each a number, found the text '1e-5,x'"),
    ("class_tokens", 7, False, "text, found the number 7"),
]


@pytest.mark.parametrize(("name", "written", "text", "value"), GOOD)
def test_what_a_user_writes_is_read(name: str, written: Any, text: bool, value: Any) -> None:
    found = values.convert(options.known()[name].kind, written, text=text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("name", "written", "text", "message"), BAD)
def test_what_is_wrong_is_said_in_words(name: str, written: Any, text: bool, message: str) -> None:
    with pytest.raises(ValueError) as e:
        values.convert(options.known()[name].kind, written, text=text)
    assert message in str(e.value)
