"""Stable Diffusion 3's files known by their names and shapes, and those of its neighbours left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import SD3ControlNetModel
from sparse import sparse
from test_sd3_files import bundled
from test_sd3_names import VERSIONS, adapters, each_dialect, each_version, meta, state
from tinies import sd3
from torch import device

from sfumato.adapters import files as adapter_files
from sfumato.families.detect import detect_file, identify
from sfumato.families.sd3.facts import SIGNATURE, Completed, Options, Version, architecture, base_model_version
from sfumato.families.sd3.names import dialects, transformer_keys
from sfumato.families.sd3.net import MMDiT
from sfumato.formats.names import add_prefix
from sfumato.models.detection import PREFIX
from sfumato.models.meta_init import shapes

Keys = Callable[[str], dict[str, tuple[int, ...]]]


def variant(version: str) -> str:
    """Our name of a version for that of its tables."""
    return version.removeprefix("sd3_").removeprefix("sd").replace("_", "-")


@each_version
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_transformer_alone(keys: Keys, tmp_path: Path, version: str, prefix: str) -> None:
    path = sparse(tmp_path / "model.safetensors", add_prefix(keys(f"{version}.transformer"), prefix))  # type: ignore[arg-type]
    found = detect_file(path)
    assert (found.family, found.kind, found.dialect, found.parts) == ("sd3", "checkpoint", "native", ("denoiser",))
    assert found.variant == variant(version)


@each_version
def test_a_bundle(keys: Keys, tmp_path: Path, version: str) -> None:
    """With T5, which other families hold as well, and without any encoder."""
    table = bundled(keys, version)
    found = detect_file(sparse(tmp_path / "all.safetensors", table))
    assert (found.family, found.variant, found.parts) == ("sd3", variant(version), ("denoiser", "text_encoder", "vae"))
    few = {name: shape for name, shape in table.items() if not name.startswith("text_encoders.")}
    assert detect_file(sparse(tmp_path / "few.safetensors", few)).parts == ("denoiser", "vae")
    clips = {name: shape for name, shape in table.items() if "t5xxl" not in name}
    assert detect_file(sparse(tmp_path / "clips.safetensors", clips)).parts == ("denoiser", "text_encoder", "vae")


@each_version
def test_a_transformer_in_diffusers_names(keys: Keys, tmp_path: Path, version: str) -> None:
    table = keys(f"{version}.transformer")
    foreign = {name: tuple(t.shape) for name, t in transformer_keys(table).to_foreign(meta(table)).items()}
    found = detect_file(sparse(tmp_path / "model.safetensors", foreign))
    assert (found.family, found.dialect, found.variant) == ("sd3", "diffusers", variant(version))


@pytest.mark.parametrize("kind", sd3.KINDS)
@pytest.mark.parametrize("shard", ["10GB", "300KB"])
def test_a_folder(tmp_path: Path, kind: sd3.Kind, shard: str) -> None:
    sd3.pipeline(kind).save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == (shard == "300KB")
    found = detect_file(tmp_path)
    assert (found.family, found.dialect, found.variant) == ("sd3", "diffusers", kind.replace("_", "-"))


@each_version
@each_dialect
def test_an_adapter(keys: Keys, version: str, spelling: str) -> None:
    """3 medium and 3.5 medium differ in the second attention alone."""
    table = keys(f"{version}.transformer")
    written = shapes(adapter_files.write(dialects(table)[spelling], state(adapters(MMDiT.of(table)))))
    found = identify(written)
    assert found is not None
    assert (found.family, found.kind, found.dialect) == ("sd3", "adapter", spelling)
    assert found.variant == ("" if version == "sd3_medium" else variant(version))


def test_sd_scripts_adapter(keys: Keys) -> None:
    found = identify(keys("adapter.sd3_medium.lora"))
    assert found is not None
    assert (found.family, found.kind, found.dialect) == ("sd3", "adapter", "kohya")


def test_a_controlnet() -> None:
    with device("meta"):
        net = SD3ControlNetModel(num_layers=2, num_attention_heads=2, caption_projection_dim=128)
    found = identify(shapes(net.state_dict()))
    assert found is not None and (found.family, found.kind) == ("sd3", "controlnet")


@pytest.mark.parametrize("table", ["sd3.vae", "clip_l.hf", "clip_g.hf", "t5xxl.hf"])
def test_parts_alone_are_no_base_models(keys: Keys, table: str) -> None:
    found = identify(keys(table))
    assert found is not None and found.kind == ("vae" if table == "sd3.vae" else "text_encoder")


@pytest.mark.parametrize(
    "table",
    [
        *("sd1.single_file", "sd2.single_file", "sdxl.single_file", "flux_dev.transformer", "flux_schnell.transformer"),
        *("chroma.transformer", "lumina2.transformer", "hunyuan_image.transformer", "anima.transformer"),
        *("adapter.sd1.lora", "adapter.sdxl.lora", "adapter.flux.lora", "adapter.chroma.lora", "adapter.lumina2.lora"),
        *("adapter.hunyuan_image.lora", "adapter.anima.lora"),
    ],
)
def test_other_families_are_left_alone(keys: Keys, table: str) -> None:
    assert SIGNATURE.detect(keys(table)) is None


def test_an_adapter_of_another_transformer_in_diffusers_names_is_left_alone() -> None:
    """FLUX and others have such layers as well, of 3072 channels."""
    layers = ("attn.to_q", "attn.add_q_proj", "ff.net.0.proj")
    assert (
        SIGNATURE.detect({f"transformer.transformer_blocks.0.{layer}.lora_A.weight": (4, 3072) for layer in layers})
        is None
    )


def test_names_in_metadata(keys: Keys) -> None:
    expected: dict[Version, tuple[str, str]] = {
        "medium": ("stable-diffusion-3-medium", "sd3_m"),
        "3.5-medium": ("stable-diffusion-3.5-medium", "sd3.5_m"),
        "3.5-large": ("stable-diffusion-3.5-large", "sd3.5_l"),
    }
    for version, names in expected.items():
        o = Completed(version=version, blocks=24, has_t5=True)
        assert (architecture(o), base_model_version(o)) == names
    assert architecture(Options()) == "stable-diffusion-3-medium"
    assert {variant(version) for version in VERSIONS} == set(expected)
