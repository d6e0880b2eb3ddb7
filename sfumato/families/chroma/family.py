"""The record of Chroma: where its nets stand in files, and how they are run and adapted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import cast

from torch import Tensor, nn

from sfumato.adapters import AdapterPlan
from sfumato.config import FamilyOptions
from sfumato.data.batch import Cond
from sfumato.errors import UserError
from sfumato.families.chroma.control import CONTROL
from sfumato.families.chroma.facts import MARK, Completed, Options
from sfumato.families.chroma.names import TARGETS, chroma_keys
from sfumato.families.chroma.net import Chroma
from sfumato.families.chroma.strategies import OUTPUTS, ChromaEncode, ChromaTokenize
from sfumato.families.flux.facts import T5XXL, VAE
from sfumato.families.flux.family import (
    PASSTHROUGH,
    SCHEDULE,
    adapter_dialects,
    check_patches,
    counts,
    process,
)
from sfumato.families.flux.net import PATCH, blocks, transformer_config
from sfumato.families.flux.network_args import target_layer
from sfumato.families.flux.strategies import LATENTS
from sfumato.formats.dialect import Dialect
from sfumato.models.autoencoders import FLUX_SCALE, FLUX_SHIFT, vae_component
from sfumato.models.base import Family, Models, NewFolder, TokenizerSpec
from sfumato.models.components import Checkpoint, Config, check_config, denoiser
from sfumato.models.detection import PREFIX
from sfumato.models.encoders.t5 import T5_TARGETS, t5_component
from sfumato.models.encoders.tokenizers import t5_home, t5_vocabulary
from sfumato.models.layers import Shapes
from sfumato.models.new_folder import flow_folder
from sfumato.tensors.flow import flux_mu, schedule

# --- files ---


def transformer(shapes: Shapes, config: Config) -> Chroma:
    """A net without values for tensors of these shapes. Errors: `UserError` for models that are not of latents
    alone."""
    if "img_in_patch.weight" in shapes:
        raise UserError("the transformer takes pixels, not latents (Chroma1 Radiance), which is not supported yet")
    check_patches(shapes["img_in.weight"][1])
    net = Chroma.of(shapes)
    check_config(config, {"patch_size": 1, "axes_dims_rope": list(net.axes)})
    return net


COMPONENTS = (
    denoiser(
        transformer,
        chroma_keys,
        prefixes=("", PREFIX),
        native=f"{MARK}.in_proj.weight",
        diffusers="x_embedder.weight",
    ),
    t5_component((T5XXL,), "text_encoder"),
    vae_component((VAE,), FLUX_SCALE, FLUX_SHIFT, channels=LATENTS.channels, bundled=False),
)


def complete(options: FamilyOptions, source: Checkpoint) -> tuple[Completed, Checkpoint]:
    """The number of blocks, from the file."""
    values = {**asdict(Options.of(options)), "model_type": "chroma", **counts(source.components["denoiser"].shapes())}
    return Completed(**values), source


def new_folder(models: Models) -> NewFolder | None:
    """What `ChromaPipeline.from_pretrained` reads besides weights."""
    net = cast(Chroma, models.denoiser)
    made = net.distilled_guidance_layer
    transformer = {
        **transformer_config(net, "ChromaTransformer2DModel"),
        "approximator_num_channels": made.in_proj.in_features,
        "approximator_hidden_dim": made.in_proj.out_features,
        "approximator_layers": len(made.layers),
    }
    return flow_folder(models, "ChromaPipeline", transformer, SCHEDULE)


# --- running ---


def tokenize(models: Models) -> ChromaTokenize:
    """Captions -> tokens."""
    return ChromaTokenize(models.tokenizers["t5xxl"], Completed.of(models.options).t5xxl_max_token_length)


def predict(net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The velocity."""
    prediction: Tensor = net(x, t / 1000, cond["t5"], cond.get("t5_mask"))
    return prediction


def sigmas(models: Models, steps: int, latent_pixels: int, shift: float | None) -> Tensor:
    """As FLUX.1 dev, the larger the image, the longer with noise."""
    return schedule(steps, mu=flux_mu(latent_pixels // PATCH**2))


# --- training ---


def dialects(models: Models) -> Mapping[str, Dialect]:
    """Adapter names of a model with this transformer.

    Loaders number the text encoders that a model has, so T5 is Chroma's first; sd-scripts writes it as FLUX.1's third.
    """
    keys = chroma_keys({name: tuple(t.shape) for name, t in models.denoiser.state_dict().items()})
    theirs = adapter_dialects(keys)
    kohya = {"denoiser": "lora_unet_", "t5xxl": "lora_te1_"}
    return theirs | {"kohya": replace(theirs["kohya"], prefix=kohya)}


def trainable(options: FamilyOptions, plan: AdapterPlan | None) -> frozenset[str]:
    """T5 gets adapters only where that is asked for; of a whole model it is trained where text encoders are."""
    return frozenset({"t5xxl"} if plan is None or plan.family.train_t5xxl else ())


def rate(options: FamilyOptions, component: str, path: str) -> float | None:
    """The net that makes the modulations stays as it is, as in the training of the published models."""
    return 0 if component == "denoiser" and path.startswith(f"{MARK}.") else None


FAMILY = Family(
    name="chroma",
    title="Chroma",
    components=COMPONENTS,
    passthrough_keys=PASSTHROUGH,
    complete=complete,
    tokenizer_specs={"t5xxl": TokenizerSpec(folder="tokenizer", make=t5_vocabulary, home=t5_home)},
    new_folder=new_folder,
    tokenize=tokenize,
    encode=lambda models: ChromaEncode(),
    latents=LATENTS,
    outputs=lambda models: OUTPUTS,
    process=process,
    caption=lambda shapes: {"t5": (128, shapes["txt_in.weight"][1])},
    predict=predict,
    sigmas=sigmas,
    blocks=blocks,
    dialects=dialects,
    targets={"denoiser": TARGETS, "t5xxl": T5_TARGETS},
    target_layer=target_layer,
    trainable=trainable,
    rate=rate,
    encoder_lr_order=("t5xxl",),
    control=CONTROL,
)
