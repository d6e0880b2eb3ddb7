"""FLUX.1's files known by their names and shapes, and those of its neighbours left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import FluxControlNetModel
from flux_checks import adapters, dialects, state
from sparse import sparse
from tinies import encoders, flux

from sfumato.adapters import files as adapter_files
from sfumato.families.detect import detect_file, identify
from sfumato.families.flux.facts import CLIP_L, SIGNATURE, T5XXL, VAE, Completed, Options, architecture
from sfumato.families.flux.family import FAMILY
from sfumato.families.flux.names import flux_keys
from sfumato.families.flux.net import Flux
from sfumato.formats.names import add_prefix
from sfumato.models.detection import PREFIX
from sfumato.models.loading import load
from sfumato.models.meta_init import shapes

Keys = Callable[[str], dict[str, tuple[int, ...]]]


@pytest.mark.parametrize("version", ["dev", "schnell"])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_transformer_alone(keys: Keys, tmp_path: Path, version: str, prefix: str) -> None:
    path = sparse(tmp_path / "model.safetensors", add_prefix(keys(f"flux_{version}.transformer"), prefix))  # type: ignore[arg-type]
    found = detect_file(path)
    assert (found.family, found.kind, found.variant, found.dialect, found.parts) == (
        "flux",
        "checkpoint",
        version,
        "bfl",
        ("denoiser",),
    )


def test_a_bundle(keys: Keys, tmp_path: Path) -> None:
    tables = {PREFIX: "flux_dev.transformer", CLIP_L: "clip_l.hf", T5XXL: "t5xxl.hf", VAE: "flux.vae"}
    table = {prefix + name: shape for prefix, held in tables.items() for name, shape in keys(held).items()}
    found = detect_file(sparse(tmp_path / "model.safetensors", table))
    assert (found.family, found.variant, found.parts) == ("flux", "dev", ("denoiser", "text_encoder", "vae"))


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("shard", ["10GB", "300KB"])
def test_a_folder(tmp_path: Path, guidance: bool, shard: str) -> None:
    flux.pipeline(guidance=guidance).save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == (shard == "300KB")
    found = detect_file(tmp_path)
    assert (found.family, found.dialect, found.variant) == ("flux", "diffusers", "dev" if guidance else "schnell")


def test_the_parts_that_come_alone(keys: Keys) -> None:
    vae, t5 = identify(keys("flux.vae")), identify(keys("t5xxl.hf"))
    assert vae is not None and (vae.family, vae.kind, vae.dialect) == ("flux", "vae", "ldm")
    theirs = SIGNATURE.detect(shapes(encoders.vae16().state_dict()))
    assert theirs is not None and (theirs.kind, theirs.dialect) == ("vae", "diffusers")
    assert t5 is not None and (t5.family, t5.kind) == ("flux", "text_encoder")
    clip = identify(keys("clip_l.hf"))
    assert clip is not None and clip.kind == "text_encoder"


@pytest.mark.parametrize("spelling", ["kohya", "comfy", "peft"])
def test_an_adapter(keys: Keys, spelling: str) -> None:
    table = keys("flux_dev.transformer")
    written = adapter_files.write(dialects(flux_keys(table))[spelling], state(adapters(Flux.of(table))))
    found = SIGNATURE.detect(shapes(written))
    assert found is not None
    assert (found.family, found.kind, found.dialect) == ("flux", "adapter", spelling)


def test_adapters_of_sd_scripts(keys: Keys) -> None:
    table = keys("adapter.flux.lora")
    for names in (
        table,
        {n: s for n, s in table.items() if n.startswith("lora_te3_")},
        {n: s for n, s in table.items() if "single" in n},
    ):
        found = identify(names)
        assert found is not None and (found.family, found.kind, found.dialect) == ("flux", "adapter", "kohya")


def test_controlnets(keys: Keys) -> None:
    with_hint = SIGNATURE.detect(keys("flux.controlnet"))
    assert with_hint is not None and (with_hint.kind, with_hint.variant) == ("controlnet", "dev")
    theirs = FluxControlNetModel(
        num_layers=1,
        num_single_layers=0,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    found = SIGNATURE.detect(shapes(theirs.state_dict()))
    assert found is not None and (found.kind, found.dialect) == ("controlnet", "diffusers")


@pytest.mark.parametrize(
    "name",
    [
        *(
            "chroma.transformer",
            "hunyuan_image.transformer",
            "adapter.hunyuan_image.lora",
            "sd3_medium.transformer",
            "sd3.5_large.transformer",
        ),
        *(
            "adapter.sd3_medium.lora",
            "adapter.sdxl.lora",
            "adapter.sd1.lora",
            "sd1.single_file",
            "sdxl.single_file",
            "lumina2.transformer",
        ),
        *("anima.transformer", "adapter.anima.lora", "adapter.lumina2.lora", "clip_l.hf", "clip_g.hf"),
    ],
)
def test_files_of_other_families_are_left_alone(keys: Keys, name: str) -> None:
    assert SIGNATURE.detect(keys(name)) is None


def test_bundles_of_other_families_are_left_alone(keys: Keys) -> None:
    """They hold the same VAE and T5."""
    others = {f"{VAE}{n}": s for n, s in keys("flux.vae").items()} | {
        f"{T5XXL}{n}": s for n, s in keys("t5xxl.hf").items()
    }
    for name in ("lumina2.transformer", "chroma.transformer", "sd3_medium.transformer"):
        assert SIGNATURE.detect({**{PREFIX + n: s for n, s in keys(name).items()}, **others}) is None
    assert SIGNATURE.detect(others) is not None


def test_names_in_metadata(tmp_path: Path) -> None:
    assert architecture(Options()) == "flux-1-dev"
    for guidance, name in ((True, "flux-1-dev"), (False, "flux-1-schnell")):
        files = flux.write(guidance, tmp_path / name)
        models = load(FAMILY, str(files.model), Options(**files.options), vae=files.vae)
        assert isinstance(models.options, Completed)
        assert architecture(models.options) == name
