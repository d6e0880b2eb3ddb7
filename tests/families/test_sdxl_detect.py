"""Stable Diffusion XL's files known by names and shapes, and those of others left alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from tinies import encoders, sdxl

from sfumato.errors import UserError
from sfumato.families.detect import Detected, detect_file, identify
from sfumato.families.sd import facts as sd
from sfumato.families.sdxl import facts
from sfumato.families.sdxl.facts import Options, architecture, base_model_version
from sfumato.families.sdxl.names import CLIP_G, unet_keys
from sfumato.formats.files import save
from sfumato.formats.names import add_prefix
from sfumato.models.detection import PREFIX
from sfumato.models.meta_init import shapes

Shapes = Mapping[str, tuple[int, ...]]
Keys = Callable[[str], dict[str, tuple[int, ...]]]


def below(table: Shapes, prefix: str) -> Shapes:
    return {name.removeprefix(prefix): shape for name, shape in table.items() if name.startswith(prefix)}


def foreign(table: Shapes) -> Shapes:
    return shapes(
        unet_keys(table).to_foreign({name: torch.empty(shape, device="meta") for name, shape in table.items()})
    )


@pytest.mark.parametrize(
    ("name", "kind", "dialect"),
    [
        ("sdxl.single_file", "checkpoint", "ldm"),
        ("sdxl.unet", "checkpoint", "native"),
        ("adapter.sdxl.lora", "adapter", "kohya"),
        ("adapter.sdxl.locon", "adapter", "kohya"),
        ("adapter.sdxl.loha", "adapter", "kohya"),
        ("adapter.sdxl.lokr", "adapter", "kohya"),
        ("adapter.sdxl.oft", "adapter", "kohya"),
        ("sdxl.controlnet", "controlnet", "diffusers"),
        ("sdxl.lllite", "controlnet", "lllite"),
    ],
)
def test_files_of_the_family(keys: Keys, name: str, kind: str, dialect: str) -> None:
    found = identify(keys(name))
    assert found is not None
    assert (found.family, found.kind, found.dialect, found.refused) == ("sdxl", kind, dialect, "")


def test_parts_of_a_single_file(keys: Keys) -> None:
    table = keys("sdxl.single_file")
    whole = facts.SIGNATURE.detect(table)
    assert whole is not None and whole.parts == ("denoiser", "text_encoder", "vae") and whole.prediction is None
    bare = facts.SIGNATURE.detect({name: shape for name, shape in table.items() if name.startswith(PREFIX)})
    assert bare is not None and (bare.dialect, bare.parts) == ("ldm", ("denoiser",))
    marked = facts.SIGNATURE.detect({**table, "v_pred": (0,)})
    assert marked is not None and marked.prediction == "v"


def test_a_unet_in_the_names_of_diffusers(keys: Keys) -> None:
    found = identify(foreign(keys("sdxl.unet")))
    assert found is not None and (found.family, found.kind, found.dialect) == ("sdxl", "checkpoint", "diffusers")


def test_bigg_alone(keys: Keys) -> None:
    """Other families use it as well, so `identify` may name one of them."""
    for table, dialect in ((below(keys("sdxl.single_file"), CLIP_G), "openclip"), (keys("clip_g.hf"), "hf")):
        assert facts.SIGNATURE.detect(table) == Detected(family="sdxl", kind="text_encoder", dialect=dialect)
        found = identify(table)
        assert found is not None and found.kind == "text_encoder"
        assert facts.SIGNATURE.detect({**table, f"{PREFIX}mystery.weight": (1,)}) is None


ATTENTION = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"
DEEP = "down_blocks.1.attentions.0.transformer_blocks.1"


@pytest.mark.parametrize(
    ("table", "kind", "dialect"),
    [
        ({f"diffusion_model.{ATTENTION}.lora_A.weight": (4, 2048)}, "adapter", "comfy"),
        ({f"lora_unet_{ATTENTION.replace('.', '_')}.lora_down.weight": (4, 2048)}, "adapter", "kohya"),
        ({f"lora_unet_{DEEP.replace('.', '_')}_attn1_to_q.lora_down.weight": (4, 640)}, "adapter", "kohya"),
        ({f"unet.{DEEP}.attn1.to_q.lora_A.weight": (4, 640)}, "adapter", "peft"),
        ({f"{DEEP}.attn1.to_q.lora.down.weight": (4, 640)}, "adapter", "peft"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 1280)}, "adapter", "kohya"),
        ({"text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": (4, 1280)}, "adapter", "peft"),
        (
            {"text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": (4, 1280)},
            "adapter",
            "comfy",
        ),
        ({"zero_convs.0.0.weight": (320, 320, 1, 1), f"{ATTENTION}.weight": (640, 2048)}, "controlnet", "ldm"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "embedding", "kohya"),
    ],
)
def test_smaller_files(table: Shapes, kind: str, dialect: str) -> None:
    assert sd.SIGNATURE.detect(table) is None
    assert facts.SIGNATURE.detect(table) == Detected(family="sdxl", kind=kind, dialect=dialect)  # type: ignore[arg-type]


def every_table() -> list[str]:
    return sorted(
        path.name.removesuffix(".json.gz") for path in (Path(__file__).parents[1] / "fixtures" / "keys").iterdir()
    )


@pytest.mark.parametrize("name", [name for name in every_table() if not re.search(r"sdxl|clip_g", name)])
def test_files_of_others_are_left_alone(keys: Keys, name: str) -> None:
    assert facts.SIGNATURE.detect(keys(name)) is None


@pytest.mark.parametrize("name", [name for name in every_table() if "sdxl" in name])
def test_stable_diffusion_leaves_them_alone(keys: Keys, name: str) -> None:
    assert sd.SIGNATURE.detect(keys(name)) is None


def test_a_model_of_2x_that_is_told_of_images_is_none(keys: Keys) -> None:
    """unCLIP has a label as well."""
    table = {**keys("sd2.single_file"), f"{PREFIX}label_emb.0.0.weight": (1280, 2048)}
    assert facts.SIGNATURE.detect(table) is None


# --- the refiner ---


def refiner() -> dict[str, torch.Tensor]:
    """Its U-Net and its one text encoder, bigG, which stands where the base model has CLIP-L."""
    tensors = sdxl.unet(refiner=True).state_dict()
    native = {name: t.clone() for name, t in unet_keys(tensors).to_native(tensors).items()}
    return {**add_prefix(native, PREFIX), "conditioner.embedders.0.model.text_projection": torch.eye(encoders.G_WIDTH)}


def test_the_refiner_is_called_by_its_name(tmp_path: Path) -> None:
    tensors = refiner()
    save(tmp_path / "refiner.safetensors", tensors, {})
    pipe = sdxl.pipeline()
    folder = tmp_path / "folder"
    pipe.save_pretrained(folder)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLImg2ImgPipeline"}')
    sdxl.unet(refiner=True).save_pretrained(folder / "unet")
    for path in (tmp_path / "refiner.safetensors", folder):
        with pytest.raises(UserError) as error:
            detect_file(path)
        assert str(error.value) == (
            f"pretrained_model_name_or_path: {path} is the refiner of Stable Diffusion XL; what is trained is the base model"
        )
    found = identify(shapes(tensors))
    assert found is not None and (found.family, found.kind, found.variant) == ("sdxl", "checkpoint", "refiner")


def test_the_refiner_of_full_size() -> None:
    table = {
        "input_blocks.0.0.weight": (384, 4, 3, 3),
        "label_emb.0.0.weight": (1536, 2560),
        "input_blocks.4.1.transformer_blocks.3.attn2.to_k.weight": (768, 1280),
    }
    found = identify(table)
    assert found is not None and (found.family, found.variant) == ("sdxl", "refiner")


def test_names_in_metadata() -> None:
    for options in (Options(), Options(v_parameterization=True)):
        assert (architecture(options), base_model_version(options)) == ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")
