"""Language models as text encoders, and byT5, against transformers'."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import gguf
import nets
import pytest
import torch
from tinies import llms
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from sfumato.errors import UserError
from sfumato.families.flux.facts import FACTS
from sfumato.formats.files import save
from sfumato.memory.checkpoint import checkpoint_blocks
from sfumato.models.components import Component, open_component
from sfumato.models.detection import language_model, t5
from sfumato.models.encoders.llm import (
    GEMMA2,
    LLM_TARGETS,
    QWEN3,
    QWEN25VL,
    DecoderLM,
    gemma2_component,
    llm_net,
    qwen3_component,
    qwen25vl_component,
)
from sfumato.models.encoders.t5 import BARE_TWIN, EMBEDDING, TWIN, byt5_component, t5_idle, t5_keys, t5_net
from sfumato.models.meta_init import shapes

Keys = Callable[[str], dict[str, tuple[int, ...]]]
CAPTIONS = ["a red cat on the mat", "a", "a girl and a dog\n"]
BUNDLE = "text_encoders.some.transformer."
COMPONENTS: dict[str, Component] = {
    "gemma2": gemma2_component((BUNDLE,), "text_encoder"),
    "qwen3": qwen3_component((BUNDLE,), "text_encoder"),
    "qwen25vl": qwen25vl_component((BUNDLE,), "text_encoder"),
}
THEIRS = {"gemma2": llms.gemma2, "qwen3": llms.qwen3, "qwen25vl": llms.qwen25vl}
RECIPES = {"gemma2": GEMMA2, "qwen3": QWEN3, "qwen25vl": QWEN25VL}
every = pytest.mark.parametrize("name", COMPONENTS)


def tokens(name: str, captions: list[str] = CAPTIONS) -> tuple[Tensor, Tensor]:
    tokenizer = llms.gemma_tokenizer() if name == "gemma2" else llms.qwen_tokenizer()
    made = tokenizer(captions, padding=True, return_tensors="pt")
    return made.input_ids, made.attention_mask


def tensors(name: str) -> dict[str, Tensor]:
    return dict(THEIRS[name]().state_dict())


def built(name: str, given: dict[str, Tensor] | None = None) -> Any:
    return nets.built(COMPONENTS[name], given or tensors(name))


@pytest.fixture(scope="module")
def ours() -> dict[str, DecoderLM]:
    return {name: built(name) for name in COMPONENTS}


@torch.no_grad()
def hidden_states(name: str, theirs: Any = None) -> tuple[Tensor, ...]:
    ids, mask = tokens(name)
    said = (theirs or THEIRS[name]())(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    states: tuple[Tensor, ...] = said.hidden_states
    return states


def off(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max())


# --- what it says ---


@every
def test_states_equal_transformers(ours: dict[str, DecoderLM], name: str) -> None:
    ids, mask = tokens(name)
    wanted = hidden_states(name)
    with torch.no_grad():
        for hidden in (-1, -2, -3, 0, 2):
            torch.testing.assert_close(ours[name](ids, mask, hidden), wanted[hidden], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours[name](ids, mask), wanted[-2], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(wanted[-2], wanted[-3], atol=1e-2)
    with pytest.raises(IndexError):
        ours[name](ids, mask, 5)


@every
def test_captions_together_equal_each_alone_and_padding_changes_nothing(ours: dict[str, DecoderLM], name: str) -> None:
    ids, mask = tokens(name)
    other = torch.where(mask.bool(), ids, 7)
    with torch.no_grad():
        together, changed = ours[name](ids, mask), ours[name](other, mask.bool())
        for caption, row, again in zip(CAPTIONS, together, changed, strict=True):
            (alone,) = ours[name](tokens(name, [caption])[0])
            torch.testing.assert_close(row[: len(alone)], alone, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(again[: len(alone)], alone, atol=1e-5, rtol=1e-5)


@every
def test_padding_alone_and_padding_before_a_text_give_numbers(ours: dict[str, DecoderLM], name: str) -> None:
    ids, mask = tokens(name)
    mask = torch.stack([torch.zeros_like(mask[0]), mask[0], torch.cat([torch.zeros(2), torch.ones(len(mask[2]) - 2)])])
    with torch.no_grad():
        got = ours[name](ids, mask, -1)
        alone = ours[name](ids[2:, 2:], None, -1)
    assert got.isfinite().all()
    # Only distances count among rotary positions.
    torch.testing.assert_close(got[2:, 2:], alone, atol=1e-4, rtol=1e-4)


@every
def test_layers_after_the_one_used_get_no_gradient(name: str) -> None:
    net = built(name).requires_grad_()
    ids, mask = tokens(name)
    net(ids, mask, -3).square().sum().backward()
    reached = [any(p.grad is not None for p in layer.parameters()) for layer in net.layers]
    assert reached == [True, True, False, False]
    assert net.norm.weight.grad is None and net.embed_tokens.weight.grad.abs().sum() > 0


@every
def test_gradients_are_the_same_with_checkpointing(ours: dict[str, DecoderLM], name: str) -> None:
    ids, mask = tokens(name)
    net = ours[name]
    weights = [net.get_parameter(f"layers.{i}.self_attn.k_proj.weight").requires_grad_() for i in (0, 2)]
    plain = torch.autograd.grad(net(ids, mask).square().sum(), weights)
    handle = checkpoint_blocks(net.layers)
    again = torch.autograd.grad(net(ids, mask).square().sum(), weights)
    handle.remove()
    net.requires_grad_(False)
    assert all(g.abs().sum() > 0 for g in plain)
    torch.testing.assert_close(again, plain)


# --- number formats ---


@every
def test_bf16(ours: dict[str, DecoderLM], name: str) -> None:
    ids, mask = tokens(name)
    half = built(name, {k: t.bfloat16() for k, t in tensors(name).items()})
    with torch.no_grad():
        got, wanted = half(ids, mask), ours[name](ids, mask)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = ours[name](ids, mask)
    assert got.dtype == torch.bfloat16 and mixed.dtype == torch.float32
    assert got.isfinite().all() and off(got, wanted) < 0.03
    assert 0 < off(mixed, wanted) < 0.03


@every
def test_fp16_holds_what_passes_its_range(name: str) -> None:
    """Feed-forward layers with sums beyond fp16's largest number, which transformers' class cannot hold."""
    ids, mask = tokens(name)
    last = {"gemma2": "post_feedforward_layernorm.weight"}.get(name, "mlp.down_proj.weight")
    grown = {"mlp.up_proj.weight": 1e4, last: 3e5 if name == "gemma2" else 1e4}
    large = {k: t * next((by for end, by in grown.items() if k.endswith(end)), 1) for k, t in tensors(name).items()}
    net, theirs = built(name, large), type(THEIRS[name]())(THEIRS[name]().config).eval()
    theirs.load_state_dict(large)
    with torch.no_grad():
        wanted = net(ids, mask)
        assert wanted.abs().max() > torch.finfo(torch.float16).max
        with torch.autocast("cpu", torch.float16):
            torch.testing.assert_close(net(ids, mask), wanted)
            assert not off(hidden_states(name, theirs)[-2], wanted) < 0.1
        got = net.half()(ids, mask)
        assert got.dtype == torch.float32
        assert off(got, wanted) < 0.01
        assert not off(hidden_states(name, theirs.half())[-2], wanted) < 0.1


# --- files ---


@pytest.mark.parametrize(
    ("table", "name", "layers", "heads", "rows"),
    [
        ("gemma2_2b.hf", "gemma2", 26, (8, 4), 9216),
        ("qwen3_06b.hf", "qwen3", 28, (16, 8), 3072),
        ("qwen2_5_vl_7b.hf", "qwen25vl", 28, (28, 4), 18944),
    ],
)
def test_every_tensor_of_a_real_file_has_its_place(
    keys: Keys, table: str, name: str, layers: int, heads: tuple[int, int], rows: int
) -> None:
    found, part = keys(table), COMPONENTS[name]
    unused = set(part.unused_keys(found))
    assert all(each.startswith(("visual.", "lm_head.")) for each in unused)
    used = {k: shape for k, shape in found.items() if k not in unused}
    key_format = part.key_format(used)
    assert key_format is not None
    native = key_format.shapes(used)
    net = llm_net(native, RECIPES[name])
    assert shapes(net.state_dict()) == native
    assert not list(net.buffers()) and all(t.is_meta for t in net.parameters())
    back = key_format.write({k: torch.empty(shape, device="meta") for k, shape in native.items()})
    assert {k: tuple(t.shape) for k, t in back.items()} == used
    config: Any = net.config
    assert len(net.layers) == layers
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (*heads, rows)


@pytest.mark.parametrize(
    "prefix", ["", "model.", "language_model.", "model.language_model.", BUNDLE, f"{BUNDLE}model."]
)
def test_names_of_every_kind_of_file_are_read(ours: dict[str, DecoderLM], prefix: str) -> None:
    language = {k.removeprefix("model.language_model."): t for k, t in tensors("qwen25vl").items() if "language" in k}
    beside = {"lm_head.weight", "model.visual.patch_embed.proj.weight", "visual.merger.ln_q.weight", "logit_scale"}
    within = BUNDLE if prefix.startswith(BUNDLE) else ""
    rest = {within + name: torch.zeros(1) for name in beside}
    found = built("qwen25vl", {**rest, **{prefix + k: t for k, t in language.items()}}).state_dict()
    assert found.keys() == ours["qwen25vl"].state_dict().keys()
    assert all(torch.equal(t, language[k]) for k, t in found.items())


def test_scaled_fp8_is_read() -> None:
    given = {f"model.{k}": t for k, t in tensors("qwen3").items()}
    name = "model.layers.1.mlp.up_proj.weight"
    fp8 = {
        name: (given[name] * 100).to(torch.float8_e4m3fn),
        name.replace("weight", "scale_weight"): torch.tensor(0.01),
    }
    net = built("qwen3", {**given, **fp8, "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)})
    assert off(net.get_parameter(name.removeprefix("model.")), given[name]) < 0.04


@every
def test_another_language_model_is_not_taken_for_it(name: str) -> None:
    for other in set(COMPONENTS) - {name}:
        with pytest.raises(UserError, match=f"does not hold the text encoder {name}"):
            built(name, tensors(other))


def test_missing_and_strange_tensors_are_named() -> None:
    given = tensors("gemma2")
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.up_proj\.weight"):
        built("gemma2", {k: t for k, t in given.items() if k != "layers.2.mlp.up_proj.weight"})
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_norm\.weight"):
        built("gemma2", {**given, "layers.0.self_attn.q_norm.weight": torch.zeros(256)})
    with pytest.raises(UserError, match=r"no rule names the tensor 'mystery\.weight'"):
        built("qwen3", {f"model.{k}": t for k, t in tensors("qwen3").items()} | {"mystery.weight": torch.zeros(1)})


@every
def test_a_folder_that_transformers_wrote_is_read_and_its_config_checked(name: str, tmp_path: Path) -> None:
    THEIRS[name]().save_pretrained(tmp_path)
    ids, mask = tokens(name)
    net = open_component(COMPONENTS[name], str(tmp_path)).build()
    with torch.no_grad():
        torch.testing.assert_close(net(ids, mask), hidden_states(name)[-2], atol=1e-5, rtol=1e-5)
    config = tmp_path / "config.json"
    text = config.read_text()
    assert "rms_norm_eps" in text
    config.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05').replace('"default"', '"yarn"'))
    with pytest.raises(
        UserError, match=r"text_encoder/config\.json: rms_norm_eps is 1e-05; 1e-06 was expected"
    ) as told:
        open_component(COMPONENTS[name], str(tmp_path)).build()
    assert any("rope_type is 'yarn'" in message for message in told.value.messages)


PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma2": {
        "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "head_dim": 256,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256000, "rope_theta": 10000.0,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-06,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256,
    },
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128,
        "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936, "rope_theta": 1000000,
        "rope_scaling": None, "hidden_act": "silu", "rms_norm_eps": 1e-06,
    },
    "qwen25vl": {
        "model_type": "qwen2_5_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "hidden_act": "silu", "rms_norm_eps": 1e-06,
        "vision_config": {"depth": 32, "hidden_size": 1280, "num_heads": 16},
    },
}  # fmt: skip
"""What stands in the config.json of the models on the hub, as far as it concerns the net."""


@pytest.mark.parametrize(("table", "name"), [("gemma2_2b.hf", "gemma2"), ("qwen3_06b.hf", "qwen3"), ("qwen2_5_vl_7b.hf", "qwen25vl")])  # fmt: skip
def test_published_configs_are_those_of_our_nets(keys: Keys, table: str, name: str) -> None:
    shapes = {k.removeprefix("model."): shape for k, shape in keys(table).items() if "visual" not in k}
    net = llm_net(shapes, RECIPES[name], PUBLISHED[name], "text_encoder")
    assert net.config.rope_parameters["rope_theta"] == PUBLISHED[name]["rope_theta"]
    with pytest.raises(UserError, match=r"config\.json: rope_theta is 500000\.0; "):
        llm_net(shapes, RECIPES[name], {**PUBLISHED[name], "rope_theta": 5e5}, "text_encoder")


def test_a_folder_that_we_write_is_read_by_transformers(ours: dict[str, DecoderLM], tmp_path: Path) -> None:
    llms.qwen25vl().config.save_pretrained(tmp_path)
    native = ours["qwen25vl"].state_dict()
    eyes = {k: t for k, t in tensors("qwen25vl").items() if "visual" in k}
    written = COMPONENTS["qwen25vl"].diffusers(shapes(native)).write({**native})
    save(tmp_path / "model.safetensors", {**written, **eyes, "lm_head.weight": tensors("qwen25vl")["lm_head.weight"]}, {"format": "pt"})  # fmt: skip
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(hidden_states("qwen25vl", theirs)[-2], hidden_states("qwen25vl")[-2])


@every
def test_bundles_are_written_as_comfyui_names_them(ours: dict[str, DecoderLM], name: str) -> None:
    written = COMPONENTS[name].single({}).write({**ours[name].state_dict()})
    assert "model.layers.0.self_attn.q_proj.weight" in written and len(written) == len(ours[name].state_dict())


@pytest.mark.parametrize(("table", "name"), [("lumina2", "gemma2"), ("anima", "qwen3")])
def test_adapters_go_where_sd_scripts_puts_them(keys: Keys, table: str, name: str) -> None:
    real = {"gemma2": "gemma2_2b.hf", "qwen3": "qwen3_06b.hf"}[name]
    net = llm_net(keys(real), RECIPES[name])
    linear = {k for k, m in net.named_modules() if isinstance(m, nn.Linear)}
    hit = {k for k in linear if any(fnmatchcase(k, pattern) for pattern in LLM_TARGETS["linear"])}
    named = {k.split(".")[0] for k in keys(f"adapter.{table}.lora") if k.startswith("lora_te_")}
    assert {"lora_te_" + k.replace(".", "_") for k in hit} == named
    assert hit == linear


def test_each_family_can_know_its_own_encoder(keys: Keys) -> None:
    tables = {
        n: keys(n) for n in ("gemma2_2b.hf", "qwen3_06b.hf", "qwen2_5_vl_7b.hf", "byt5_small_glyph.hf", "t5xxl.hf")
    }
    known = [
        (language_model("gemma2", 2304), "GEMMA2"),
        (language_model("qwen3", 1024), "QWEN3"),
        (language_model("qwen25vl", 3584), "QWEN2VL"),
        (t5(1472), "T5ENCODER"),
        (t5(4096), "T5ENCODER"),
    ]
    llama_cpp = {name: in_llama_cpp(tables[name], arch) for name, (_, arch) in zip(tables, known, strict=True)}
    for ((single, theirs), _), (name, table) in zip(known, tables.items(), strict=True):
        assert [other for other in tables if single.fits(tables[other])] == [name]
        assert single.fits({f"text_encoders.x.transformer.{k}": shape for k, shape in table.items()})
        assert [other for other in tables if theirs.fits(llama_cpp[other])] == [name]
    assert FACTS.signature.detect(tables["t5xxl.hf"]) and not FACTS.signature.detect(tables["byt5_small_glyph.hf"])
    byt5 = {k.removeprefix("encoder."): s for k, s in tables["byt5_small_glyph.hf"].items()}
    assert known[3][0][0].fits(byt5)


def in_llama_cpp(table: dict[str, tuple[int, ...]], arch: str) -> dict[str, tuple[int, ...]]:
    """The names that the package `gguf` gives to transformers'."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], 64)
    prefixes = ("", "model.")
    return {
        found: shape
        for key, shape in table.items()
        for prefix in prefixes
        if (found := names.get_name(prefix + key, try_suffixes=(".weight", ".bias")))
    }


# --- byT5 ---


BYT5 = byt5_component((BUNDLE,), "text_encoder_2")


@pytest.fixture(scope="module")
def glyphs() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask, and what transformers says."""
    made = llms.byt5_tokenizer()(['Text "Hi 你". ', "", "<color-3>x"], padding=True, return_tensors="pt")
    with torch.no_grad():
        return made.input_ids, made.attention_mask, llms.byt5()(**made).last_hidden_state


@pytest.mark.parametrize("embedding", [EMBEDDING, TWIN])
@pytest.mark.parametrize("prefix", ["", BUNDLE, "module.text_tower.encoder."])
@pytest.mark.parametrize("bare", [False, True])
def test_byt5_is_read_under_every_name(
    glyphs: tuple[Tensor, Tensor, Tensor], prefix: str, bare: bool, embedding: str
) -> None:
    ids, mask, wanted = glyphs
    given = {k: t for k, t in llms.byt5().state_dict().items() if k not in (EMBEDDING, TWIN) or k == embedding}
    start = "encoder." if bare else ""
    net = nets.built(BYT5, {prefix + k.removeprefix(start): t for k, t in given.items()})
    with torch.no_grad():
        torch.testing.assert_close(net(ids, mask), wanted, atol=1e-5, rtol=1e-5)


def test_every_tensor_of_the_glyph_encoder_has_its_place(keys: Keys) -> None:
    table = keys("byt5_small_glyph.hf")
    bare = {k.removeprefix("encoder."): s for k, s in table.items()} | {BARE_TWIN: table[EMBEDDING]}
    assert (t5_idle(table), t5_idle(bare)) == ([], [BARE_TWIN])
    for names in (table, {k: s for k, s in bare.items() if k != BARE_TWIN}):
        keymap = t5_keys(names)
        native = keymap.to_native({k: torch.empty(shape, device="meta") for k, shape in names.items()})
        assert shapes(t5_net(shapes(native)).state_dict()) == shapes(native) == table
        assert shapes(keymap.to_foreign(native)) == names
    assert table[EMBEDDING][0] == len(llms.byt5_tokenizer())
