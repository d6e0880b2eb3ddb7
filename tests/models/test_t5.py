"""T5's encoder and tokenizer against transformers'."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import nets
import pytest
import torch
from tinies import encoders
from torch import Tensor
from transformers import T5EncoderModel
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

from sfumato.errors import UserError
from sfumato.memory.checkpoint import checkpoint_blocks
from sfumato.models.encoders.t5 import EMBEDDING, TWIN, T5Encoder, t5_idle, t5_keys, t5_net
from sfumato.models.encoders.tokenizers import fingerprint, is_stock, t5_home, t5_tokenizer, t5_vocabulary
from sfumato.models.meta_init import shapes

Keys = Callable[[str], dict[str, tuple[int, ...]]]
CAPTIONS = ["a photo of a red cat on the mat", "", "dog"]


def tokens(captions: list[str]) -> tuple[Tensor, Tensor]:
    made = encoders.t5_tokenizer()(captions, padding=True, return_tensors="pt")
    return made.input_ids, made.attention_mask


def tensors() -> dict[str, Tensor]:
    return dict(encoders.t5().state_dict())


@pytest.fixture(scope="module")
def net() -> T5Encoder:
    return nets.t5(tensors())


def off(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max())


# --- the encoder ---


@pytest.mark.parametrize("masked", [False, True])
def test_states_equal_transformers(net: T5Encoder, masked: bool) -> None:
    ids, mask = tokens(CAPTIONS)
    given = mask if masked else None
    with torch.no_grad():
        wanted = encoders.t5()(ids, attention_mask=given).last_hidden_state
        torch.testing.assert_close(net(ids, given), wanted, atol=1e-5, rtol=1e-5)
        if masked:
            torch.testing.assert_close(net(ids, mask.bool()), wanted, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(net(ids)[1], wanted[1], atol=1e-2)


def test_prompts_of_different_lengths_together_equal_each_alone(net: T5Encoder) -> None:
    ids, mask = tokens(CAPTIONS)
    with torch.no_grad():
        together = net(ids, mask)
        for caption, row in zip(CAPTIONS, together, strict=True):
            (alone,) = net(tokens([caption])[0])
            torch.testing.assert_close(row[: len(alone)], alone, atol=1e-5, rtol=1e-5)


def test_sizes_are_read_off_the_shapes_and_nothing_is_needed_that_is_in_no_file() -> None:
    given = {name: t for name, t in tensors().items() if name != TWIN}
    empty = t5_net(shapes(given))
    theirs = encoders.t5().config
    for size in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets"):
        assert getattr(empty.config, size) == getattr(theirs, size)
    assert all(t.is_meta for t in empty.parameters())
    assert not list(empty.buffers())
    for name, t in given.items():
        empty.load_state_dict({name: t}, strict=False, assign=True)
    ids, _ = tokens(CAPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(empty.eval()(ids), encoders.t5()(ids).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_every_tensor_of_the_real_file_has_its_place(keys: Keys) -> None:
    table = keys("t5xxl.hf")
    assert t5_idle(table) == [TWIN]
    native = t5_keys(table).to_native({k: torch.empty(shape, device="meta") for k, shape in table.items() if k != TWIN})
    net = t5_net(shapes(native))
    assert {**shapes(net.state_dict()), TWIN: table[EMBEDDING]} == table
    config = net.config
    assert (len(net.layers), config.num_heads, config.d_kv, config.d_ff) == (24, 64, 64, 10240)


@pytest.mark.parametrize("held", [(EMBEDDING,), (TWIN,), (EMBEDDING, TWIN)])
def test_the_embedding_stands_under_either_name_or_both(net: T5Encoder, held: tuple[str, ...]) -> None:
    given = {name: t for name, t in tensors().items() if name not in (EMBEDDING, TWIN) or name in held}
    found = nets.t5(given).state_dict()
    assert found.keys() == net.state_dict().keys()
    assert torch.equal(found[EMBEDDING], tensors()[EMBEDDING])


def test_missing_and_strange_tensors_are_named() -> None:
    given = tensors()
    first = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    with pytest.raises(UserError, match=r"wi_0\.weight"):
        nets.t5({name: t for name, t in given.items() if name != first})
    with pytest.raises(UserError, match=r"block\.2\.layer\.0\.SelfAttention\.o\.weight"):
        nets.t5({name: t for name, t in given.items() if name != "encoder.block.2.layer.0.SelfAttention.o.weight"})
    with pytest.raises(UserError, match=r"encoder\.block\.2\.layer\.2\.strange"):
        nets.t5({**given, "encoder.block.2.layer.2.strange.weight": torch.zeros(1)})
    with pytest.raises(
        UserError, match=r"model\.safetensors \(the text encoder t5xxl\): no rule names the tensor 'mystery\.weight'"
    ):
        nets.t5({**given, "mystery.weight": torch.zeros(1)})


def test_the_rest_of_a_whole_t5_is_left_in_the_file(net: T5Encoder) -> None:
    rest = ("decoder.final_layer_norm.weight", "lm_head.weight", "logit_scale", "spiece_model")
    found = nets.t5({**tensors(), **{name: torch.zeros(1) for name in rest}}).state_dict()
    assert found.keys() == net.state_dict().keys()


def test_gradients_are_the_same_with_checkpointing(net: T5Encoder) -> None:
    ids, mask = tokens(CAPTIONS)
    weights = [
        net.get_parameter("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        net.get_parameter("encoder.block.1.layer.1.DenseReluDense.wo.weight"),
    ]
    for weight in weights:
        weight.requires_grad_()
    plain = torch.autograd.grad(net(ids, mask).square().sum(), weights)
    handle = checkpoint_blocks(net.layers)
    again = torch.autograd.grad(net(ids, mask).square().sum(), weights)
    handle.remove()
    net.requires_grad_(False)
    assert all(g.abs().sum() > 0 for g in plain)
    torch.testing.assert_close(again, plain)


# --- number formats ---


def test_bf16(net: T5Encoder) -> None:
    ids, mask = tokens(CAPTIONS)
    half = nets.t5({name: t.bfloat16() for name, t in tensors().items()})
    with torch.no_grad():
        got, wanted = half(ids, mask), net(ids, mask)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = net(ids, mask)
    assert got.dtype == torch.bfloat16
    assert got.isfinite().all() and off(got, wanted) < 0.03
    assert 0 < off(mixed, wanted) < 0.03


def test_fp16_holds_what_its_feed_forward_says() -> None:
    """Weights like T5-XXL's: sums of the feed-forward beyond fp16's largest number, which transformers' class cannot hold."""
    ids, mask = tokens(CAPTIONS)
    large = {name: t * 1e5 if name.endswith(".wo.weight") else t for name, t in tensors().items()}
    theirs = T5EncoderModel(encoders.t5().config).eval()
    theirs.load_state_dict(large)
    ours = nets.t5(large)
    with torch.no_grad():
        wanted = theirs(ids, attention_mask=mask).last_hidden_state
        assert (
            theirs.encoder(ids, output_hidden_states=True).hidden_states[1].abs().max() > torch.finfo(torch.float16).max
        )
        with torch.autocast("cpu", torch.float16):
            assert off(ours(ids, mask), wanted) < 0.01
            assert not off(theirs(ids, attention_mask=mask).last_hidden_state, wanted) < 0.1
        got = ours.half()(ids, mask)
        assert got.dtype == torch.float16
        assert off(got, wanted) < 0.01
        assert not off(theirs.half()(ids, attention_mask=mask).last_hidden_state, wanted) < 0.1


def test_plain_fp8_is_held_in_bf16() -> None:
    given = {name: t.to(torch.float8_e4m3fn) for name, t in tensors().items()}
    net = nets.t5(given)
    assert {t.dtype for t in net.state_dict().values()} == {torch.bfloat16}
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    assert torch.equal(net.get_parameter(name).float(), given[name].float())
    ids, mask = tokens(CAPTIONS)
    with torch.no_grad():
        assert off(net(ids, mask), encoders.t5()(ids, attention_mask=mask).last_hidden_state) < 0.2


# --- the tokenizer ---


def test_a_tokenizer_is_saved_and_read(tmp_path: Path) -> None:
    theirs = encoders.t5_tokenizer()
    theirs.save_pretrained(tmp_path)
    ours = t5_tokenizer(tmp_path)
    assert fingerprint(ours) == fingerprint(theirs)
    assert ours(CAPTIONS).input_ids == theirs(CAPTIONS).input_ids
    (row,) = ours(["a cat"], padding="max_length", max_length=5, truncation=True).input_ids
    assert row == [*ours.convert_tokens_to_ids(["▁a", "▁cat", "</s>"]), 0, 0]
    assert ours.pad_token_id == 0


def test_a_sentencepiece_file_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """The file is written by SentencePiece's own classes; transformers' reader of it needs a library more."""
    model = sentencepiece.ModelProto()
    model.trainer_spec.unk_id, model.trainer_spec.vocab_size = 2, 300
    model.normalizer_spec.name = "nmt_nfkc"
    model.normalizer_spec.precompiled_charsmap = struct.pack("<I", 1024) + bytes(1024)
    theirs = encoders.t5_tokenizer()
    for token, score in theirs._vocab_scores:
        model.pieces.add(piece=token, score=score, type=3 if token in ("<pad>", "</s>") else 1)
    (tmp_path / "spiece.model").write_bytes(model.SerializeToString())
    ours = t5_tokenizer(tmp_path)
    assert ours(CAPTIONS).input_ids == theirs(CAPTIONS).input_ids
    assert {token: i for token, i in ours.get_vocab().items() if i < len(theirs)} == theirs.get_vocab()
    assert ours.convert_tokens_to_ids(["<extra_id_99>", "<extra_id_0>"]) == [len(theirs), len(theirs) + 99]
    assert len(ours) == len(theirs) + 100
    assert "Precompiled" in str(ours.backend_tokenizer.normalizer)
    (tmp_path / "spiece.model").write_bytes(model.SerializeToString()[:-700])
    with pytest.raises(UserError, match="truncated"):
        t5_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content", ["{}", "no json", '{"model": {"type": "Unigram", "vocab": []}, "added_tokens": []}']
)
def test_a_broken_tokenizer_is_told(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match=r"spiece\.model"):
        t5_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="cannot be read as T5's"):
        t5_tokenizer(tmp_path)


def test_its_vocabulary_comes_with_us(tmp_path: Path) -> None:
    """Ids of the T5 paper's example and of prompts, as published checkpoints have them; saved as transformers does, it is the same."""
    ours = t5_vocabulary(None)
    assert len(ours) == 32100 and is_stock(ours) and not is_stock(encoders.t5_tokenizer())
    assert ours("translate English to German: Hello world").input_ids == [13959, 1566, 12, 2968, 10, 8774, 296, 1]
    assert ours("a photo of a cat").input_ids == [3, 9, 1202, 13, 3, 9, 1712, 1]
    assert ours("ﬁ Ⅳ ½ “x” 中文 🎨").input_ids == ours("fi IV 1⁄2 “x” 中文 🎨").input_ids
    assert ours.convert_tokens_to_ids(["<extra_id_99>", "<extra_id_0>"]) == [32000, 32099]
    assert t5_home().joinpath("LICENSE.txt").is_file()
    ours.save_pretrained(tmp_path)
    assert fingerprint(t5_vocabulary(tmp_path)) == fingerprint(ours)
