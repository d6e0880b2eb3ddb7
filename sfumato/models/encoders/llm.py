"""Decoder-only language models as text encoders (Gemma-2, Qwen3, the language half of Qwen2.5-VL): transformers' layers
under the names that files use."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.formats.names import Change, KeyMap, rule
from sfumato.models.components import Component, Config, matching
from sfumato.models.detection import LANGUAGE_MODELS
from sfumato.models.key_formats import NATIVE, KeyFormat
from sfumato.models.layers import Shapes, WideLinear, count_layers, in_fp16
from sfumato.tensors.meta import without_values

_PARTS = ("embed_tokens", "layers", "norm")
_PREFIXES = ("", "model.", "model.language_model.", "language_model.", "language_model.model.")
"""What stands before these in files, by the release of transformers and the program that wrote them."""
_UNUSED = matching(
    r"(language_model\.)?lm_head\..*|(model\.)?visual\..*|(.*\.)?rotary_emb\.inv_freq"
    r"|output\.weight|logit_scale|spiece_model|tokenizer_json"
)
_ATTENTION, _MLP = ("*.self_attn.?_proj",), ("*.mlp.*_proj",)
LLM_TARGETS = {
    "linear": (*_ATTENTION, *_MLP),
    "attention": _ATTENTION,
    "mlp": _MLP,
    "ia3": ("*.self_attn.[kv]_proj", "*.mlp.down_proj"),
    # transformers' classes, which sd-scripts and LyCORIS' presets name.
    **dict.fromkeys(("Gemma2Attention", "Gemma2SdpaAttention", "Qwen3Attention", "Qwen3SdpaAttention"), _ATTENTION),
    **dict.fromkeys(("Gemma2MLP", "Qwen3MLP"), _MLP),
}
"""For `Family.targets`: sets of layers that adapters go on, "linear" by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What the tensors of a language model do not say of it."""

    name: str
    """The component's, and in `LANGUAGE_MODELS`."""
    module: str
    """In `transformers.models`."""
    classes: str
    """How the names of its classes begin."""
    head_dim: int
    """Channels of an attention head."""
    theta: float
    """Base of the rotary positions."""
    facts: Mapping[str, Any]
    """Further values of its config."""
    scaled: bool = False
    """Whether embeddings are multiplied by the square root of their width."""
    attention: str = "sdpa"
    hub: str = ""
    """What stands before its names in folders."""
    tokenizer: str = "Qwen2Tokenizer"
    """transformers' class."""

    def class_named(self, what: str) -> Any:
        """One of transformers' classes: "Config", "DecoderLayer", "RMSNorm"."""
        from importlib import import_module

        file = "configuration" if what == "Config" else "modeling"
        module = import_module(f"transformers.models.{self.module}.{file}_{self.module}")
        return getattr(module, self.classes + what)


_QWEN = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}
GEMMA2 = Recipe(
    name="gemma2",
    module="gemma2",
    classes="Gemma2",
    head_dim=256,
    theta=1e4,
    # Every other layer looks back 4,096 tokens at most; captions are shorter, so that no mask is made for it.
    facts={
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
    },
    scaled=True,
    attention="eager",  # sdpa has no soft-capping
    tokenizer="GemmaTokenizer",
)
"""Gemma-2-2B (arXiv:2408.00118)."""
QWEN3 = Recipe(name="qwen3", module="qwen3", classes="Qwen3", head_dim=128, theta=1e6, facts=_QWEN)
"""Qwen3-0.6B (arXiv:2505.09388)."""
QWEN25VL = Recipe(name="qwen25vl", module="qwen2", classes="Qwen2", head_dim=128, theta=1e6, facts=_QWEN, hub="model.")
"""Qwen2.5-VL-7B (arXiv:2502.13923). Without images its positions in time, height and width are one, as in Qwen2.5."""


class DecoderLM(nn.Module):
    """Token ids (b, n) -> states (b, n, d)."""

    def __init__(self, config: Any, recipe: Recipe) -> None:
        super().__init__()
        self.config, self.recipe = config, recipe
        layer, norm = recipe.class_named("DecoderLayer"), recipe.class_named("RMSNorm")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = norm(config.hidden_size, config.rms_norm_eps)
        for part in [part for part in self.layers.modules() if isinstance(part, nn.Linear)]:
            part.__class__ = WideLinear  # it has no state of its own

    def forward(self, ids: Tensor, mask: Tensor | None = None, hidden: int = -2) -> Tensor:
        """The states that transformers calls `hidden_states[hidden]`: after that many layers; the last (-1) through the
        final norm. Layers that follow are not run.

        `mask` (b, n): 0 or False for padding, which no token attends to; None: there is none. What is padded is given
        states all the same. These models are never computed in fp16, the range of which their states pass: where the
        weights are in fp16, or autocast is to fp16, it is done in fp32, and states are fp32. Errors: `IndexError` for a
        state that there is not.
        """
        used = range(len(self.layers) + 1)[hidden]
        weight = self.embed_tokens.weight
        fp16 = in_fp16(weight.device, weight.dtype)
        with torch.autocast(ids.device.type, enabled=False) if fp16 else nullcontext():
            states: Tensor = self.embed_tokens(ids)
            if self.recipe.scaled:
                # Rounded to the format of the weights, as in training.
                states = states * float(torch.tensor(math.sqrt(weight.shape[1])).to(weight.dtype))
            states = states.float() if fp16 else states
            rope = rotary(ids.shape[1], self.config.head_dim, self.recipe.theta, states)
            attn_mask = self._attn_mask(ids, mask, states.dtype)
            for layer in islice(self.layers, used):
                states = layer(states, position_embeddings=rope, attention_mask=attn_mask)
            return self.norm(states) if used == len(self.layers) else states

    @property
    def embedding(self) -> nn.Embedding:
        """Where tokens are looked up."""
        return self.embed_tokens

    def _attn_mask(self, ids: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(1 or b, 1, n, n): which keys a query looks at, or what is added to its scores."""
        looks = causal(ids.shape[1], ids.device, mask)
        if self.recipe.attention == "sdpa":
            return looks
        return torch.zeros_like(looks, dtype=dtype).masked_fill(~looks, torch.finfo(dtype).min)


def causal(n: int, device: torch.device, mask: Tensor | None) -> Tensor:
    """(1 or b, 1, n, n), True where a query looks at a key: its own and earlier ones, but for padding. A query that
    would look at nothing, in padding before the text, looks at itself; else there would be no number."""
    looks = torch.ones(n, n, dtype=torch.bool, device=device).tril()[None, None]
    if mask is None:
        return looks
    looks = looks & mask.to(device, torch.bool)[:, None, None]
    return looks | (~looks.any(-1, keepdim=True) & torch.eye(n, dtype=torch.bool, device=device))


def rotary(n: int, channels: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (1, n, channels) of the angles of n positions, for halves that are turned against each other
    (arXiv:2104.09864); in the format of `like`, computed in fp32."""
    rates = 1.0 / theta ** (torch.arange(0, channels, 2, dtype=torch.float32, device=like.device) / channels)
    angles = torch.arange(n, dtype=torch.float32, device=like.device)[:, None] * rates
    angles = torch.cat([angles, angles], -1)[None]
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def llm_net(shapes: Shapes, recipe: Recipe, config: Config | None = None, folder: str = "") -> DecoderLM:
    """A net without values (on the meta device) for tensors of these names and shapes. Errors: `KeyError` for a missing
    tensor, `UserError` for a config of another net."""
    vocabulary, width = shapes["embed_tokens.weight"]
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["layers.0.mlp.up_proj.weight"][0],
        "num_hidden_layers": count_layers(shapes, r"layers\.(\d+)\."),
        "num_attention_heads": shapes["layers.0.self_attn.q_proj.weight"][0] // recipe.head_dim,
        "num_key_value_heads": shapes["layers.0.self_attn.k_proj.weight"][0] // recipe.head_dim,
    }
    own = {**sizes, "head_dim": recipe.head_dim, **recipe.facts}
    _check_config(config or {}, {**own, "rope_theta": recipe.theta}, folder)
    rope = {"rope_type": "default", "rope_theta": recipe.theta}
    made = recipe.class_named("Config")(**own, rope_parameters=rope, attn_implementation=recipe.attention)
    with without_values():
        return DecoderLM(made, recipe)


def _check_config(config: Config, own: Mapping[str, Any], folder: str) -> None:
    """Errors: `UserError` for each thing that a config.json has otherwise than the net."""
    text = {**config, **config.get("text_config", {})}
    text |= text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = text.get("rope_type", text.get("type"))
    wrong = [(k, text[k], v) for k, v in own.items() if text.get(k, v) != v]
    wrong += [("rope_type", kind, "default")] if kind not in (None, "default", "mrope") else []
    if wrong:
        raise UserError(*(f"{folder}/config.json: {k} is {found!r}; {v!r} was expected" for k, found, v in wrong))


# --- files ---


def gemma2_component(prefixes: tuple[str, ...], folder: str, flag: str = "gemma2") -> Component:
    """Gemma-2-2B, which comes in a file of its own or in a bundle."""
    return _component(GEMMA2, prefixes, folder, flag)


def qwen3_component(prefixes: tuple[str, ...], folder: str, flag: str = "qwen3") -> Component:
    """Qwen3-0.6B, which comes in a file of its own or in a bundle."""
    return _component(QWEN3, prefixes, folder, flag)


def qwen25vl_component(prefixes: tuple[str, ...], folder: str, flag: str = "text_encoder") -> Component:
    """The language half of Qwen2.5-VL-7B; the other half, and the head, stay in the file, and go with it into a
    diffusers folder, in the names of the hub's."""
    return replace(
        _component(QWEN25VL, prefixes, folder, flag),
        carried_keys={
            r"(model\.)?(visual\..*)": r"\2",
            r"(language_model\.)?(lm_head\..*)": r"\2",
            r"output(\.weight)": r"lm_head\1",
        },
    )


def _component(recipe: Recipe, prefixes: tuple[str, ...], folder: str, flag: str) -> Component:
    return Component(
        name=recipe.name,
        title=f"the text encoder {recipe.name}",
        prefixes=(*prefixes, ""),
        folder=folder,
        flag=flag,
        net=lambda shapes, config: llm_net(shapes, recipe, config, folder),
        key_format=lambda names: llm_format(names, recipe),
        single=lambda names: _below("model."),  # as ComfyUI writes bundles
        bundled=False,
        diffusers=lambda names: _below(recipe.hub),
        unused_keys=_UNUSED,
    )


def llm_format(names: Collection[str], recipe: Recipe) -> KeyFormat | None:
    """How a file names this model; None: it holds another, or none."""
    mark, table = f"layers.0.{LANGUAGE_MODELS[recipe.name]}", llama_cpp(recipe)
    needed = [table.match(f"{r.native.replace('{i}', '0')}.weight", native=True).foreign()[0] for r in table.rules]
    if all(name in names for name in (*table.match(mark, native=True).foreign(), *needed)):
        return KeyFormat("llama.cpp", table)
    return next((_below(p) for p in _PREFIXES if f"{p}layers.0.{LANGUAGE_MODELS[recipe.name]}" in names), None)


_PLUS_ONE = Change(lambda t: t - 1, lambda t: t + 1, computes=True)
"""llama.cpp's files of Gemma have the factor of a norm, of which the net has what it differs from 1 by."""


def llama_cpp(recipe: Recipe) -> KeyMap:
    """native: a `DecoderLM`. foreign: llama.cpp's names, which GGUF files have."""
    gemma = recipe.module == "gemma2"
    norms = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    if gemma:
        norms |= {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm"}
        norms |= {"post_feedforward_layernorm": "post_ffw_norm"}
    if recipe.module == "qwen3":
        norms |= {f"self_attn.{n}_norm": f"attn_{n}_norm" for n in "qk"}
    linears = {f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"} | {"self_attn.o_proj": "attn_output"}
    linears |= {f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")}
    change = _PLUS_ONE if gemma else None
    return KeyMap(
        rule("embed_tokens", "token_embd"),
        rule("norm", "output_norm", change=change),
        *(rule(f"layers.{{i}}.{ours}", f"blk.{{i}}.{theirs}", change=change) for ours, theirs in norms.items()),
        *(rule(f"layers.{{i}}.{ours}", f"blk.{{i}}.{theirs}") for ours, theirs in linears.items()),
    )


def _below(prefix: str) -> KeyFormat:
    """The net's names after a prefix."""
    return KeyFormat("hf", KeyMap(*(rule(part, prefix + part) for part in _PARTS))) if prefix else NATIVE
