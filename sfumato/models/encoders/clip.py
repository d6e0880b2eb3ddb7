"""CLIP's text models: transformers' classes under the names that files use.

transformers renames the parts of its classes between releases; here a module's path is what stands in
the file (`text_model.encoder.layers.0.mlp.fc1`), and adapters are named by it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.formats.names import TRANSPOSE, KeyMap, rule
from sfumato.models.components import Component, Config, matching
from sfumato.models.key_formats import NATIVE, KeyFormat
from sfumato.models.layers import Shapes, count_layers
from sfumato.tensors.meta import without_values

HEAD_WIDTH = 64
"""Channels of an attention head in every published CLIP text model."""
VOCABULARY = 49408
"""CLIP's tokens; the last marks the end of a caption. Embeddings that users train may follow it."""

_ATTENTION, _MLP = ("*.self_attn.*_proj",), ("*.mlp.fc?",)
CLIP_TARGETS = {
    "linear": (*_ATTENTION, *_MLP),
    "attention": _ATTENTION,
    "mlp": _MLP,
    "ia3": ("*.self_attn.[kv]_proj", "*.mlp.fc2"),
    # transformers' classes, which LyCORIS' presets name.
    "CLIPAttention": _ATTENTION,
    "CLIPSdpaAttention": _ATTENTION,
    "CLIPMLP": _MLP,
}
"""For `Family.targets`: sets of layers that adapters go on, "linear" by default."""
_UNUSED = r"(text_model\.)?embeddings\.position_ids|logit_scale|(vision_model|visual_projection|visual)\..*|attn_mask"

LAYERS = r"text_model\.encoder\.layers\.(\d+)\."
"""Pattern of the tensors of a layer, the number of which is its group."""

_PARTS = ("embeddings", "encoder", "final_layer_norm")

CLIP_BARE = KeyMap(*(rule(f"text_model.{part}", part) for part in _PARTS), rule("text_projection"))
"""native: a `ClipText`, named as in single files and most folders. foreign: the same without `text_model.`, as in early
single files."""

_LAYER, _BLOCK = "text_model.encoder.layers.{i}", "transformer.resblocks.{i}"
_QKV = ("q_proj", "k_proj", "v_proj")
OPEN_CLIP = KeyMap(
    rule("token_embedding", "text_model.embeddings.token_embedding"),
    rule("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    rule("ln_final", "text_model.final_layer_norm"),
    rule("text_projection", "text_projection.weight", change=TRANSPOSE),
    rule(f"{_BLOCK}.ln_1", f"{_LAYER}.layer_norm1"),
    rule(f"{_BLOCK}.ln_2", f"{_LAYER}.layer_norm2"),
    rule(f"{_BLOCK}.mlp.c_fc", f"{_LAYER}.mlp.fc1"),
    rule(f"{_BLOCK}.mlp.c_proj", f"{_LAYER}.mlp.fc2"),
    rule(f"{_BLOCK}.attn.out_proj", f"{_LAYER}.self_attn.out_proj"),
    rule(f"{_BLOCK}.attn.in_proj_weight", *(f"{_LAYER}.self_attn.{p}.weight" for p in _QKV)),
    rule(f"{_BLOCK}.attn.in_proj_bias", *(f"{_LAYER}.self_attn.{p}.bias" for p in _QKV)),
)
"""native: OpenCLIP's names, with q, k and v in one tensor and the projection as x @ p. foreign: a `ClipText`."""


class ClipOutput(NamedTuple):
    """Of b captions of n tokens."""

    states: Tensor
    """(b, n, d) after the layer asked for."""
    normed: Tensor
    """(b, n, d) `states` through the final norm."""
    pooled: Tensor
    """(b, d) after the last layer and the final norm, at the first end mark."""
    projected: Tensor
    """(b, p) `pooled` through the text projection; `pooled` itself where there is none."""


class ClipText(nn.Module):
    """Token ids (b, n) -> `ClipOutput`."""

    def __init__(self, config: Any, *, projected: bool = False) -> None:
        super().__init__()
        from transformers import CLIPTextModel

        self.config = config
        model = CLIPTextModel(config)
        self.text_model = getattr(model, "text_model", model)
        # A count of the positions, which no file holds: it is made in `forward`, where it cannot be without values.
        del self.text_model.embeddings.position_ids
        self.text_projection = (
            nn.Linear(config.hidden_size, config.projection_dim, bias=False) if projected else nn.Identity()
        )

    def forward(self, ids: Tensor, skip: int = 1) -> ClipOutput:
        """States after the `skip`-th layer from the end (1: the last), and what is pooled of the last; the mask is
        causal."""
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        out = self.text_model(input_ids=ids, position_ids=positions, output_hidden_states=True)
        states = out.hidden_states[-skip]
        return ClipOutput(
            states,
            self.text_model.final_layer_norm(states),
            out.pooler_output,
            self.text_projection(out.pooler_output),
        )

    @property
    def embedding(self) -> nn.Embedding:
        """Where tokens are looked up."""
        layer: nn.Embedding = self.text_model.embeddings.token_embedding
        return layer

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer's layers, in forward order."""
        layers: nn.ModuleList = self.text_model.encoder.layers
        return layers


def clip_net(shapes: Shapes, activation: str) -> ClipText:
    """A text model without values (on the meta device) for tensors of these names (with `text_model.`) and shapes.

    activation: "quick_gelu" (OpenAI's CLIP) or "gelu" (OpenCLIP). Errors: `KeyError` for a missing tensor.
    """
    from transformers import CLIPTextConfig

    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    projection = shapes.get("text_projection.weight")
    end = min(vocabulary, VOCABULARY) - 1
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=count_layers(shapes, LAYERS),
        num_attention_heads=heads(width),
        max_position_embeddings=shapes["text_model.embeddings.position_embedding.weight"][0],
        hidden_act=activation,
        projection_dim=projection[0] if projection else width,
        bos_token_id=end - 1,
        eos_token_id=end,
    )
    with without_values():
        return ClipText(config, projected=projection is not None)


def heads(width: int) -> int:
    """Attention heads of a text model of this width."""
    return max(1, width // HEAD_WIDTH)


# --- files ---


def clip_component(
    name: str,
    prefixes: tuple[str, ...],
    folder: str,
    activation: str,
    *,
    flag: str = "",
    openclip: bool = False,
    projected: bool = False,
    bundled: bool = True,
    unused_keys: Callable[[Collection[str]], Collection[str]] | None = None,
) -> Component:
    """A CLIP text encoder.

    `activation`: what is used without a config. `openclip`: whether single files have OpenCLIP's names.
    `projected`: whether its text projection is used; else it is copied on save. `bundled`: whether new single files
    hold it. `unused_keys`: further names of no net.
    """
    unused = matching(_UNUSED if projected else _UNUSED + r"|text_projection(\.weight)?")

    def net(shapes: Shapes, config: Config) -> nn.Module:
        width = int(config.get("hidden_size", 512))  # transformers leaves its own defaults out of the file
        if config.get("num_attention_heads", heads(width)) != heads(width):
            raise UserError(
                f"{folder}/config.json: {config['num_attention_heads']} attention heads; for this width only "
                f"{heads(width)} is supported"
            )
        return clip_net(shapes, str(config.get("hidden_act", "quick_gelu")) if config else activation)

    return Component(
        name=name,
        title=f"the text encoder {name}",
        prefixes=(*prefixes, ""),
        folder=folder,
        flag=flag,
        net=net,
        key_format=clip_key_format,
        single=lambda names: KeyFormat("openclip", OPEN_CLIP, inverse=True) if openclip else NATIVE,
        bundled=bundled,
        unused_keys=lambda names: {*unused(names), *(unused_keys(names) if unused_keys else ())},
    )


def clip_key_format(names: Collection[str]) -> KeyFormat | None:
    """How a file names a CLIP text encoder: as transformers does, the same without `text_model.`, or as OpenCLIP
    does."""
    if "text_model.embeddings.token_embedding.weight" in names:
        return NATIVE
    if "embeddings.token_embedding.weight" in names:
        return KeyFormat("bare", CLIP_BARE)
    return KeyFormat("openclip", OPEN_CLIP, inverse=True) if "token_embedding.weight" in names else None
