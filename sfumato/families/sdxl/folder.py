"""diffusers folders of Stable Diffusion XL: what is required of their configs, and the configs of new ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sfumato.errors import UserError
from sfumato.families.sd import folder as sd
from sfumato.families.sd.names import Layout
from sfumato.families.sdxl.facts import SIZE_WIDTH, Options
from sfumato.models import locate
from sfumato.models.base import Models, NewFolder
from sfumato.models.components import Checkpoint, Config
from sfumato.models.layers import Shapes
from sfumato.models.new_folder import index, text_config, vae_config
from sfumato.tensors.noise import DDPM

UNET_FACTS: dict[str, Any] = {
    **{name: value for name, value in sd.UNET_FACTS.items() if name != "transformer_layers_per_block"},
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": SIZE_WIDTH,
}
"""Values of a config, if it has them, of the net that is ours."""
SAMPLE_SIZE = 128
"""Latent pixels a side of the images that the base model is made for."""
PREDICTIONS = ("epsilon", "v_prediction")


def check_unet(config: Config, shapes: Shapes) -> None:
    """Errors: `UserError` for each thing in which a U-Net's config asks for another net than these native shapes
    make."""
    sd.check_unet(config, _plain(shapes), UNET_FACTS)


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """The config of diffusers' UNet2DConditionModel for a net with these native tensors."""
    return {**sd.unet_config(_plain(shapes), SAMPLE_SIZE, UNET_FACTS), **_own_config(shapes)}


def half_config(shapes: Shapes) -> dict[str, Any]:
    """What diffusers' configs of a U-Net and of a ControlNet have in common."""
    return {**sd.half_config(_plain(shapes), UNET_FACTS), **_own_config(shapes)}


def _own_config(shapes: Shapes) -> dict[str, Any]:
    return {
        "transformer_layers_per_block": transformer_layers(shapes),
        "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
    }


def transformer_layers(shapes: Shapes) -> list[int]:
    """Transformer blocks in each place of a level, the outermost level first; diffusers reverses them for the way
    up."""
    layout = Layout.of(shapes)
    firsts = [1 + level * (layout.layers + 1) for level in range(len(layout.attention))]
    blocks = [re.compile(rf"input_blocks\.{first}\.1\.transformer_blocks\.(\d+)\.") for first in firsts]
    return [max(1, len({m[1] for name in shapes if (m := block.match(name))})) for block in blocks]


def _plain(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes without the label's, as those of a U-Net of Stable Diffusion 2.x."""
    return {name: shape for name, shape in shapes.items() if not name.startswith("label_emb.")}


def scheduler(source: Checkpoint) -> Mapping[str, Any]:
    """The noise schedule of a folder; empty for single files. Errors: `UserError` if it is of another process than
    ours."""
    path = source.path / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return {}
    config = locate.read_json(path)
    kind, prediction = str(config.get("_class_name")), config.get("prediction_type", PREDICTIONS[0])
    if kind.startswith("EDM") or prediction not in PREDICTIONS:
        raise UserError(
            f"{path}: a {kind} with prediction_type {prediction!r}: only models of DDPM that predict noise or v can be "
            "trained"
        )
    return config


def new_folder(models: Models) -> NewFolder:
    """What `StableDiffusionXLPipeline.from_pretrained` reads besides weights; the source folder's own schedule is
    kept."""
    source = models.source
    shapes = {n: tuple(t.shape) for n, t in models.denoiser.state_dict().items()}
    configs = {
        "denoiser": unet_config(shapes),
        "clip_l": text_config(models.encoders["clip_l"]),
        "clip_g": text_config(models.encoders["clip_g"], "CLIPTextModelWithProjection"),
    }
    if models.vaes is not None:
        configs["vae"] = vae_config(models.vae)
    prediction = PREDICTIONS[1 if Options.of(models.options).v_parameterization else 0]
    schedule = dict(scheduler(source)) or _schedule()
    if zero_snr(models):
        schedule["rescale_betas_zero_snr"] = True
    return NewFolder(
        index=_index(source, str(schedule["_class_name"]), vae=models.vaes is not None),
        configs=configs,
        scheduler={**schedule, "prediction_type": prediction},
    )


def zero_snr(models: Models) -> bool:
    """Whether the model's last timestep is pure noise: its files say so, or it is trained so."""
    source, noise = models.source, models.noise
    said = "ztsnr" in source.passthrough or bool(scheduler(source).get("rescale_betas_zero_snr"))
    trained = noise is not None and noise.zero_terminal_snr
    return Options.of(models.options).v_parameterization and (said or trained)


def _schedule() -> dict[str, Any]:
    """The published one."""
    return {"_class_name": "EulerDiscreteScheduler", **DDPM().scheduler_config(), "timestep_spacing": "leading"}


def _index(source: Checkpoint, schedule: str, *, vae: bool) -> dict[str, Any]:
    """model_index.json"""
    present = {
        "scheduler": ("diffusers", schedule),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
    }
    absent = {"feature_extractor", "image_encoder"}
    if vae:
        present["vae"] = ("diffusers", "AutoencoderKL")
    else:
        absent.add("vae")
    old = source.path / "model_index.json"
    zeros = locate.read_json(old).get("force_zeros_for_empty_prompt", True) if old.is_file() else True
    return {**index("StableDiffusionXLPipeline", present, absent), "force_zeros_for_empty_prompt": zeros}
