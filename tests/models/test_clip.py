"""CLIP's text models and tokenizer against transformers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import tiny
import torch
from tinies import encoders
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.models.encoders.clip import CLIP_BARE, OPEN_CLIP, clip_net
from sfumato.models.encoders.tokenizers import EOS, clip_tokenizer, is_stock
from sfumato.models.meta_init import fill, shapes

Keys = Callable[[str], dict[str, tuple[int, ...]]]
CAPTIONS = ["a cat on a mat", "", "red " * 80]
KINDS = {
    "clip_l": (encoders.clip_l, "quick_gelu"),
    "clip_l_projected": (encoders.clip_l_projected, "quick_gelu"),
    "clip_g": (encoders.clip_g, "gelu"),
}


def tokens(kind: str) -> Tensor:
    """Captions that are short, empty and too long; CLIP-L's are padded with end marks, bigG's with the token 0."""
    tokenizer = encoders.clip_tokenizer(g=kind == "clip_g")
    found: Tensor = tokenizer(
        CAPTIONS, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    ).input_ids
    ends = (found == tokenizer.eos_token_id).sum(1).tolist()
    assert (ends == [1, 1, 1]) is (kind == "clip_g")
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [1, 2, 3])
def test_states_and_what_is_pooled_equal_transformers(kind: str, skip: int) -> None:
    make, activation = KINDS[kind]
    theirs: Any = make()
    ours, ids = nets.clip(tiny.text_states(theirs), activation, projected=kind != "clip_l"), tokens(kind)
    with torch.no_grad():
        said, got = theirs(ids, output_hidden_states=True), ours(ids, skip)
        pooled = said.pooler_output if kind == "clip_l" else theirs.text_model(ids).pooler_output
    torch.testing.assert_close(got.states, said.hidden_states[-skip], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.pooled, pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.projected, pooled if kind == "clip_l" else said.text_embeds, atol=1e-5, rtol=1e-5)
    assert torch.equal(got.normed, ours.text_model.final_layer_norm(got.states))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_pooled_stands_at_the_first_end_mark(kind: str) -> None:
    """The mask is causal: nothing that follows the first end mark changes what is pooled, and the word before it does."""
    make, activation = KINDS[kind]
    net, ids = nets.clip(tiny.text_states(make()), activation, projected=kind != "clip_l"), tokens(kind)[:1]
    end = ids[0].tolist().index(net.config.eos_token_id)
    after, before = ids.clone(), ids.clone()
    after[0, end + 1 :] = 7
    before[0, end - 1] = 7
    with torch.no_grad():
        pooled = net(ids).pooled
        torch.testing.assert_close(pooled[0], net(ids).normed[0, end])
        torch.testing.assert_close(net(after).pooled, pooled)
        assert not torch.allclose(net(before).pooled, pooled, atol=1e-3)


def test_embeddings_added_to_the_vocabulary_do_not_move_the_end_mark(keys: Keys) -> None:
    table = keys("clip_l.hf")
    name = "text_model.embeddings.token_embedding.weight"
    assert clip_net({**table, name: (49408 + 5, 768)}, "quick_gelu").config.eos_token_id == 49407
    assert clip_net(table, "quick_gelu").config.eos_token_id == 49407


@pytest.mark.parametrize(
    ("name", "layers", "heads", "projected"), [("clip_l.hf", 12, 12, False), ("clip_g.hf", 32, 20, True)]
)
def test_every_tensor_of_a_real_file_has_its_place(
    keys: Keys, name: str, layers: int, heads: int, projected: bool
) -> None:
    table = keys(name)
    net = clip_net(table, "gelu")
    assert shapes(net.state_dict()) == table
    assert (len(net.layers), net.config.num_attention_heads) == (layers, heads)
    assert isinstance(net.text_projection, nn.Linear) is projected


def test_bigg_of_a_single_file_is_the_one_in_transformers_names(keys: Keys) -> None:
    prefix = "conditioner.embedders.1.model."
    held = {
        name.removeprefix(prefix): shape for name, shape in keys("sdxl.single_file").items() if name.startswith(prefix)
    }
    del held["logit_scale"]
    tensors = OPEN_CLIP.to_foreign({name: torch.empty(shape, device="meta") for name, shape in held.items()})
    assert shapes(tensors) == keys("clip_g.hf")
    assert shapes(OPEN_CLIP.to_native(tensors)) == held


def test_the_projection_of_open_clip_is_multiplied_from_the_right() -> None:
    net, ids = nets.clip(tiny.text_states(encoders.clip_g()), "gelu", projected=True), tokens("clip_g")
    native = OPEN_CLIP.to_native(net.state_dict())
    with torch.no_grad():
        got = net(ids)
        torch.testing.assert_close(got.pooled @ native["text_projection"], got.projected)
    back = OPEN_CLIP.to_foreign(native)
    assert back.keys() == net.state_dict().keys()
    assert all(torch.equal(back[name], t) for name, t in net.state_dict().items())


def test_a_projection_to_another_width() -> None:
    tensors = {**tiny.text_states(encoders.clip_l()), "text_projection.weight": torch.ones(5, encoders.L_WIDTH)}
    net = nets.clip(tensors, projected=True)
    with torch.no_grad():
        assert net(tokens("clip_l")).projected.shape == (3, 5)
    assert (net.config.projection_dim, nets.clip(tiny.text_states(encoders.clip_l())).config.projection_dim) == (5, 64)


def test_a_net_is_built_without_values_and_filled_later() -> None:
    """One tensor after another: nothing is needed that is in no file."""
    tensors = tiny.text_states(encoders.clip_g())
    net = clip_net(shapes(tensors), "gelu")
    assert all(t.is_meta for t in net.parameters())
    assert not list(net.buffers())
    for name, t in tensors.items():
        net.load_state_dict({name: t}, strict=False, assign=True)
    with torch.no_grad():
        torch.testing.assert_close(net(tokens("clip_g")).projected, encoders.clip_g()(tokens("clip_g")).text_embeds)
    with pytest.raises(UserError, match=r"lacks the tensor 'text_projection\.weight'"):
        fill(
            clip_net(shapes(tensors), "gelu"),
            {k: t for k, t in tensors.items() if k != "text_projection.weight"},
            "the file",
        )


@pytest.mark.parametrize(("v2", "activation"), [(False, "quick_gelu"), (True, "gelu")])
@pytest.mark.parametrize("skip", [1, 2, 3])
def test_states_equal_transformers(v2: bool, activation: str, skip: int) -> None:
    theirs = tiny.parts(v2=v2).text
    ours = nets.clip(tiny.text_states(theirs), activation)
    ids = torch.randint(0, 700, (2, 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        said = theirs(ids, output_hidden_states=True)
        norm = dict(theirs.named_modules()).get("final_layer_norm") or theirs.text_model.final_layer_norm
        torch.testing.assert_close(ours(ids, skip).normed, norm(said.hidden_states[-skip]), atol=1e-5, rtol=1e-5)
        if skip == 1:
            torch.testing.assert_close(ours(ids).normed, said.last_hidden_state, atol=1e-5, rtol=1e-5)


def test_paths_are_the_names_in_files() -> None:
    net = nets.clip(tiny.text_states(tiny.parts(v2=False).text))
    assert isinstance(net.get_submodule("text_model.encoder.layers.0.mlp.fc1"), nn.Linear)
    assert list(net.state_dict()) == list(tiny.text_states(tiny.parts(v2=False).text))


def test_open_clip_layout_equals_torch_multihead_attention() -> None:
    """The fused projection is torch's own, which OpenCLIP is built of."""
    net = nets.clip(tiny.text_states(tiny.parts(v2=True).text), "gelu")
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
    found = nets.clip(bare).state_dict()
    assert all(torch.equal(found[name], t) for name, t in tensors.items())


@pytest.mark.parametrize("projected", [False, True])
def test_a_projection_that_is_not_used_is_left_in_the_file(projected: bool) -> None:
    tensors = tiny.text_states(encoders.clip_l_projected())
    used = set(tensors) if projected else set(tensors) - {"text_projection.weight"}
    assert set(nets.clip(tensors, projected=projected).state_dict()) == used


def test_missing_tensors_are_named() -> None:
    tensors = tiny.text_states(tiny.parts(v2=False).text)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.fc2\.bias"):
        nets.clip({name: t for name, t in tensors.items() if name != "text_model.encoder.layers.1.mlp.fc2.bias"})
    with pytest.raises(UserError, match="position_embedding"):
        nets.clip({name: t for name, t in tensors.items() if "position_embedding" not in name})


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        # As OpenAI's own tokenizer says (the first from CLIP's README notebook).
        ("a diagram", [320, 22697]),
        ("Hello   World!", [3306, 1002, 256]),
        ("", []),
    ],
)
@pytest.mark.parametrize("pad", ["!", EOS])
def test_the_vocabulary_in_the_box_is_clips(text: str, ids: list[int], pad: str) -> None:
    """A "!" in a caption stays a token of its own where captions are padded with token 0, which is spelled so as well."""
    tokenizer = clip_tokenizer(pad=pad)
    assert tokenizer(text).input_ids == [49406, *ids, 49407]
    assert tokenizer("a", padding="max_length", max_length=4).input_ids[3] == (0 if pad == "!" else 49407)
    assert len(tokenizer) == 49408
    assert is_stock(tokenizer)


def test_a_tokenizer_folder(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path)
    tokenizer = clip_tokenizer(tmp_path)
    assert tokenizer.get_vocab() == tiny.vocabulary()
    assert not is_stock(tokenizer)
    with pytest.raises(UserError, match=r"vocab\.json"):
        clip_tokenizer(tmp_path / "nowhere")
