"""CLIP's text models and tokenizer against transformers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from sfumato.errors import UserError
from sfumato.families.encoders import CLIP_BARE, OPEN_CLIP, clip_text
from sfumato.families.tokenizers import clip_tokenizer, is_stock


@pytest.mark.parametrize(("v2", "activation"), [(False, "quick_gelu"), (True, "gelu")])
@pytest.mark.parametrize("skip", [1, 2, 3])
def test_states_equal_transformers(v2: bool, activation: str, skip: int) -> None:
    theirs = tiny.parts(v2=v2).text
    ours = clip_text(tiny.text_states(theirs), activation)
    ids = torch.randint(0, 700, (2, 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        said = theirs(ids, output_hidden_states=True)
        norm = dict(theirs.named_modules()).get("final_layer_norm") or theirs.text_model.final_layer_norm
        torch.testing.assert_close(ours(ids, skip), norm(said.hidden_states[-skip]), atol=1e-5, rtol=1e-5)
        if skip == 1:
            torch.testing.assert_close(ours(ids), said.last_hidden_state, atol=1e-5, rtol=1e-5)


def test_paths_are_the_names_in_files() -> None:
    net = clip_text(tiny.text_states(tiny.parts(v2=False).text), "quick_gelu")
    assert isinstance(net.get_submodule("text_model.encoder.layers.0.mlp.fc1"), nn.Linear)
    assert list(net.state_dict()) == list(tiny.text_states(tiny.parts(v2=False).text))


def test_open_clip_layout_equals_torch_multihead_attention() -> None:
    """The fused projection is torch's own, which OpenCLIP is built of."""
    net = clip_text(tiny.text_states(tiny.parts(v2=True).text), "gelu")
    layer = net.layers[1].self_attn
    names = OPEN_CLIP.to_native(net.state_dict())
    prefix = "transformer.resblocks.1.attn."
    fused = nn.MultiheadAttention(tiny.WIDTH, 1, batch_first=True)
    fused.load_state_dict({name.removeprefix(prefix): t for name, t in names.items() if name.startswith(prefix)})
    x = torch.randn(2, 5, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], fused.eval()(x, x, x, need_weights=False)[0], atol=1e-5, rtol=1e-5)
    back = OPEN_CLIP.to_foreign(names)
    assert back.keys() == net.state_dict().keys()
    assert all(torch.equal(back[name], t) for name, t in net.state_dict().items())


def test_early_files_without_text_model() -> None:
    tensors = tiny.text_states(tiny.parts(v2=False).text)
    bare = {name.removeprefix("text_model."): t for name, t in tensors.items()}
    assert CLIP_BARE.to_native(bare).keys() == tensors.keys()


def test_missing_tensors_are_named() -> None:
    tensors = tiny.text_states(tiny.parts(v2=False).text)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.fc2\.bias"):
        clip_text({name: t for name, t in tensors.items() if name != "text_model.encoder.layers.1.mlp.fc2.bias"}, "gelu")
    with pytest.raises(UserError, match="position_embedding"):
        clip_text({name: t for name, t in tensors.items() if "position_embedding" not in name}, "gelu")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        # As OpenAI's own tokenizer says (the first from CLIP's README notebook).
        ("a diagram", [320, 22697]),
        ("Hello   World!", [3306, 1002, 256]),
        ("", []),
    ],
)
def test_the_vocabulary_in_the_box_is_clips(text: str, ids: list[int]) -> None:
    tokenizer = clip_tokenizer()
    assert tokenizer(text).input_ids == [49406, *ids, 49407]
    assert len(tokenizer) == 49408
    assert is_stock(tokenizer)


def test_a_tokenizer_folder(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path)
    tokenizer = clip_tokenizer(tmp_path)
    assert tokenizer.get_vocab() == tiny.vocabulary()
    assert not is_stock(tokenizer)
    with pytest.raises(UserError, match=r"vocab\.json"):
        clip_tokenizer(tmp_path / "nowhere")
