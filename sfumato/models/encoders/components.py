"""The nets that families share, as components of a model: CLIP's text encoders, T5 and the KL autoencoders."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import nn

from sfumato.errors import UserError
from sfumato.models.autoencoders import DIFFUSERS_MARK, EARLY, EARLY_MARK, LDM_MARK, SD_SCALE, kl_net, vae_keys
from sfumato.models.components import NATIVE, Component, Config, KeyFormat, matching
from sfumato.models.encoders.clip import CLIP_BARE, OPEN_CLIP, clip_net, heads
from sfumato.models.encoders.t5 import EMBEDDING, TWIN, t5_idle, t5_keys, t5_net
from sfumato.models.layers import Shapes

CLIP_TARGETS = {"linear": ("*.self_attn.*_proj", "*.mlp.fc?")}
"""For `Family.targets`: the layers of a CLIP text encoder that adapters go on."""
T5_TARGETS = {"linear": ("*.SelfAttention.?", "*.DenseReluDense.w*")}
"""The same for T5."""
_T5_IDLE = matching(r"(decoder|lm_head)\..*|logit_scale|spiece_model")
_CLIP_IDLE = (
    r"(text_model\.)?embeddings\.position_ids|logit_scale|(vision_model|visual_projection|visual)\..*|attn_mask"
)


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

    `activation`: what is used where no config says it. `openclip`: whether single files spell it as OpenCLIP does.
    `projected`: whether its text projection is used; else it is kept as it is. `bundled`: whether new single files hold
    it. `unused_keys`: further names of no net.
    """
    unused = matching(_CLIP_IDLE if projected else _CLIP_IDLE + r"|text_projection(\.weight)?")

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
        single=(lambda names: KeyFormat("openclip", OPEN_CLIP, inverse=True) if openclip else NATIVE)
        if bundled
        else None,
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


def t5_component(prefixes: tuple[str, ...], folder: str) -> Component:
    """T5-XXL's encoder, which comes in a file of its own or in a bundle."""
    return Component(
        name="t5xxl",
        title="the text encoder t5xxl",
        prefixes=(*prefixes, ""),
        folder=folder,
        flag="t5xxl",
        net=lambda shapes, config: t5_net(shapes),
        key_format=lambda names: KeyFormat("hf", t5_keys(names)) if EMBEDDING in names or TWIN in names else None,
        single=None,
        unused_keys=lambda names: {*t5_idle(names), *_T5_IDLE(names)},
        tied_keys={TWIN: EMBEDDING},
    )


def vae_component(
    prefixes: tuple[str, ...],
    scale: float = SD_SCALE,
    shift: float | None = None,
    *,
    channels: int = 4,
    bundled: bool = True,
) -> Component:
    """A KL autoencoder. `scale`, `shift`: what is used where no config says it. `channels`: of its latents."""

    def scaling(config: Config) -> tuple[float, float]:
        return float(config.get("scaling_factor", scale)), float(config.get("shift_factor", shift) or 0.0)

    def net(shapes: Shapes, config: Config) -> nn.Module:
        if (found := shapes["decoder.conv_in.weight"][1]) != channels:
            raise UserError(
                f"vae: its latents have {found} channels, those of this model {channels}: it is another model's VAE"
            )
        made: nn.Module = kl_net(shapes, float(config.get("scaling_factor", scale)), config.get("shift_factor", shift))
        return made

    def unused_keys(names: Collection[str]) -> Collection[str]:
        """A VAE's own checkpoint also holds the loss that it was trained with, and an average of the weights."""
        return [
            name for name in names if not name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
        ]

    return Component(
        name="vae",
        title="the VAE",
        prefixes=(*prefixes, ""),
        folder="vae",
        flag="vae",
        net=net,
        key_format=vae_key_format,
        single=(lambda names: KeyFormat("ldm", vae_keys(names))) if bundled else None,
        unused_keys=unused_keys,
        scaling=scaling,
    )


def vae_key_format(names: Collection[str]) -> KeyFormat | None:
    """How a file names a KL autoencoder: as LDM does, as diffusers does, or as diffusers did in 2022."""
    if LDM_MARK in names:
        return KeyFormat("ldm", vae_keys(names))
    if DIFFUSERS_MARK not in names:
        return None
    return KeyFormat("diffusers 2022", EARLY) if EARLY_MARK in names else NATIVE
