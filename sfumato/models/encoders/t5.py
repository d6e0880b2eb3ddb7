"""The encoder of T5 v1.1 (T5-XXL) and byT5 (byT5-small): transformers' class under the names that files use."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn

from sfumato.adapters import AdapterPlan
from sfumato.config import FamilyOptions
from sfumato.formats.names import KeyMap, rule
from sfumato.models.components import Component, matching
from sfumato.models.key_formats import KeyFormat
from sfumato.models.layers import Shapes, WideLinear, count_layers
from sfumato.tensors.meta import without_values

EMBEDDING, TWIN, BARE_TWIN = "shared.weight", "encoder.embed_tokens.weight", "embed_tokens.weight"
"""One tensor under several names: transformers ties them, and files hold the first, both or, rarely, the second alone;
the third is the second where the encoder stands without its prefix."""
_FIRST = "encoder.block.0.layer."
_BARE = "block.0.layer.0.SelfAttention.q.weight"
_UNUSED = matching(r"(decoder|lm_head|dec)\..*|output\.weight|logit_scale|spiece_model")
_ATTENTION, _MLP = ("*.SelfAttention.?",), ("*.DenseReluDense.w*",)
T5_TARGETS = {
    "linear": (*_ATTENTION, *_MLP),
    "attention": _ATTENTION,
    "mlp": _MLP,
    "T5Attention": _ATTENTION,
    "T5DenseGatedActDense": _MLP,
}
"""For `Family.targets`: sets of layers that adapters go on, "linear" by default."""


class T5Encoder(nn.Module):
    """Token ids (b, n) -> states (b, n, d)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import T5EncoderModel

        model = T5EncoderModel(config)
        self.config = config
        self.shared: nn.Embedding = model.shared
        self.encoder = model.encoder
        del self.encoder.embed_tokens  # the same as `shared`, which is looked up here
        for block in self.layers:
            feed = cast(Any, block).layer[1].DenseReluDense
            # What it gives passes fp16's range.
            feed.wo = WideLinear(feed.wo.in_features, feed.wo.out_features, bias=False)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` (b, n): 0 or False for what no token attends to; None: all attend to all."""
        x = self.shared(ids)
        attn_mask = None if mask is None else self._whole(mask.bool(), x.dtype)
        states: Tensor = self.encoder(inputs_embeds=x, attention_mask=attn_mask).last_hidden_state
        return states

    def _whole(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """mask (b, n) -> (b, 1, n, n) as transformers' attention takes it: of a smaller one it reads from the device
        whether it could be left out."""
        whole = mask[:, None, None].expand(-1, -1, mask.shape[1], -1)
        if self.config._attn_implementation == "sdpa":
            return whole
        return torch.zeros(whole.shape, dtype=dtype, device=mask.device).masked_fill(~whole, torch.finfo(dtype).min)

    @property
    def embedding(self) -> nn.Embedding:
        """Where tokens are looked up."""
        return self.shared

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer's blocks, in forward order."""
        blocks: nn.ModuleList = self.encoder.block
        return blocks


def t5_net(shapes: Shapes) -> T5Encoder:
    """An encoder without values (on the meta device) for tensors of these names and shapes. Errors: `KeyError` for a
    missing tensor."""
    from transformers import T5Config

    vocabulary, width = shapes[EMBEDDING]
    # The biases of block 0 are used in all blocks, one column per head.
    buckets, heads = shapes[f"{_FIRST}0.SelfAttention.relative_attention_bias.weight"]
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=shapes[f"{_FIRST}0.SelfAttention.q.weight"][0] // heads,
        d_ff=shapes[f"{_FIRST}1.DenseReluDense.wi_0.weight"][0],
        num_layers=count_layers(shapes, r"encoder\.block\.(\d+)\."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,  # it would use the global generator
        tie_word_embeddings=False,
    )
    with without_values():
        return T5Encoder(config)


# --- files ---

_LAYERS = {
    "layer.0.layer_norm": "attn_norm",
    **{f"layer.0.SelfAttention.{n}": f"attn_{n}" for n in "qkvo"},
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.1.layer_norm": "ffn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
}
LLAMA_CPP = KeyMap(
    rule("shared", "token_embd"),
    rule("encoder.final_layer_norm", "enc.output_norm"),
    *(rule(f"encoder.block.{{i}}.{ours}", f"enc.blk.{{i}}.{theirs}") for ours, theirs in _LAYERS.items()),
)
"""native: a `T5Encoder`. foreign: llama.cpp's names, which GGUF files have."""


def t5_component(prefixes: tuple[str, ...], folder: str) -> Component:
    """T5-XXL's encoder, which comes in a file of its own or in a bundle."""
    return _component("t5xxl", prefixes, folder, "t5xxl")


def byt5_component(prefixes: tuple[str, ...], folder: str, flag: str = "byt5") -> Component:
    """byT5-small's encoder (arXiv:2105.13626), as trained for glyphs (Glyph-ByT5, arXiv:2403.09622), or plain."""
    return _component("byt5", (*prefixes, "module.text_tower.encoder."), folder, flag)


def _component(name: str, prefixes: tuple[str, ...], folder: str, flag: str) -> Component:
    return Component(
        name=name,
        title=f"the text encoder {name}",
        prefixes=(*prefixes, ""),
        folder=folder,
        flag=flag,
        net=lambda shapes, config: t5_net(shapes),
        key_format=t5_format,
        bundled=False,
        unused_keys=lambda names: {*t5_idle(names), *_UNUSED(names)},
        tied_keys={TWIN: EMBEDDING, BARE_TWIN: EMBEDDING},
    )


def t5_format(names: Collection[str]) -> KeyFormat | None:
    """How a file names this encoder; None: it holds none."""
    if "enc.output_norm.weight" in names:
        return KeyFormat("llama.cpp", LLAMA_CPP)
    return KeyFormat("hf", t5_keys(names)) if _embedding(names) else None


def _embedding(names: Collection[str]) -> str | None:
    """The name of the embedding that is read."""
    return next((name for name in (EMBEDDING, TWIN, BARE_TWIN) if name in names), None)


def t5_keys(names: Collection[str]) -> KeyMap:
    """native: a `T5Encoder`. foreign: transformers' T5EncoderModel, or its encoder without `encoder.`, in a file with
    these names, but for those of `t5_idle`."""
    parts = [rule(f"encoder.{part}", part) for part in ("block", "final_layer_norm")]
    embedding = rule(EMBEDDING, _embedding(names) or EMBEDDING)
    return KeyMap(embedding, *(parts if _BARE in names else [rule("encoder")]))


def t5_idle(names: Collection[str]) -> list[str]:
    """Of the names in a file, the embedding's other copies."""
    return [name for name in (TWIN, BARE_TWIN) if name in names and name != _embedding(names)]


def trains_t5(options: FamilyOptions, plan: AdapterPlan | None) -> bool:
    """For `Family.trainable`: whether the options, or the network_args of a plan of adapters, ask for T5."""
    return any(getattr(asking, "train_t5xxl", False) for asking in (options, plan and plan.family))
