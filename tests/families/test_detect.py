"""What a file is, from its names and shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from sfumato.errors import UserError
from sfumato.families.detect import Detected, detect_file, identify, unknown
from sfumato.families.sd.facts import Options, architecture, base_model_version
from sfumato.formats.files import save

Keys = Callable[[str], dict[str, tuple[int, ...]]]


@pytest.mark.parametrize(
    ("name", "kind", "variant", "dialect"),
    [
        ("sd1.single_file", "checkpoint", "v1", "ldm"),
        ("sd2.single_file", "checkpoint", "v2", "ldm"),
        ("sd1.unet.diffusers", "checkpoint", "v1", "diffusers"),
        ("sd2.unet.diffusers", "checkpoint", "v2", "diffusers"),
        ("adapter.sd1.lora", "adapter", "v1", "kohya"),
        ("adapter.sd1.locon", "adapter", "v1", "kohya"),
        ("clip_l.hf", "text_encoder", "v1", "hf"),
    ],
)
def test_files_of_the_family(keys: Keys, name: str, kind: str, variant: str, dialect: str) -> None:
    found = identify(keys(name))
    assert found is not None
    assert (found.family, found.kind, found.variant, found.dialect) == ("sd", kind, variant, dialect)


def test_parts_of_a_single_file(keys: Keys) -> None:
    table = keys("sd1.single_file")

    def below(prefix: str, *, cut: bool = True) -> Detected | None:
        return identify({name.removeprefix(prefix) if cut else name: shape for name, shape in table.items() if name.startswith(prefix)})

    vae, prefixed, unet = below("first_stage_model."), below("first_stage_model.", cut=False), below("model.diffusion_model.")
    assert vae is not None and prefixed is not None and unet is not None
    assert (vae.kind, prefixed.kind) == ("vae", "vae")
    assert (unet.kind, unet.dialect, unet.parts) == ("checkpoint", "native", ("denoiser",))


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        ({"emb_params": (4, 768)}, "embedding"),
        ({"string_to_param.*": (4, 1024)}, "embedding"),
        ({"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 768)}, "adapter"),
        ({"diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 768)}, "adapter"),
        ({"zero_convs.0.0.weight": (320, 320, 1, 1), "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768)}, "controlnet"),
        ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "conv_in.weight": (320, 4, 3, 3)}, "controlnet"),
    ],
)
def test_smaller_files(shapes: dict[str, tuple[int, ...]], kind: str) -> None:
    found = identify(shapes)
    assert found is not None
    assert found.kind == kind


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("lumina2.transformer", "Lumina Image 2.0"),
        ("adapter.lumina2.lora", "Lumina Image 2.0"),
        ("hunyuan_image.transformer", "HunyuanImage 2.1"),
        ("adapter.hunyuan_image.lora", "HunyuanImage 2.1"),
        ("anima.transformer", "Anima"),
        ("adapter.anima.lora", "Anima"),
    ],
)
def test_other_models_are_called_by_name(keys: Keys, name: str, model: str) -> None:
    assert identify(keys(name)) is None
    assert model in unknown(keys(name))


def test_a_base_model(tmp_path: Path) -> None:
    assert detect_file(tiny.tiny_sd1(tmp_path / "1")).variant == "v1"
    assert detect_file(tiny.tiny_sd2(tmp_path / "2")).variant == "v2"
    folder = detect_file(tiny.tiny_sd1_diffusers(tmp_path / "3"))
    assert (folder.variant, folder.parts) == ("v1", ("denoiser", "text_encoder", "vae"))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 64, 1, 1)}, "an adapter"),
        ({"emb_params": (1, 768)}, "embedding"),
        ({"encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3), "decoder.conv_in.weight": (8, 4, 3, 3)}, "a VAE"),
        ({"cap_embedder.0.weight": (1,)}, "Lumina Image 2.0, which is not supported yet"),
        ({"input_blocks.0.0.weight": (8, 4, 3, 3), "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 8)}, "no text_encoder"),
        ({"fc.weight": (2, 2)}, "no model that sfumato knows"),
    ],
)
def test_what_is_no_base_model_is_told_in_one_line(tmp_path: Path, tensors: dict[str, tuple[int, ...]], said: str) -> None:
    save(tmp_path / "file.safetensors", {name: torch.zeros(shape) for name, shape in tensors.items()}, {})
    with pytest.raises(UserError, match=said) as error:
        detect_file(tmp_path / "file.safetensors")
    assert len(str(error.value).splitlines()) == 1
    assert str(error.value).startswith("pretrained_model_name_or_path: ")


def test_folders_that_are_none_of_ours(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model_index\.json"):
        detect_file(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="FluxPipeline"):
        detect_file(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        detect_file(tmp_path / "nothing.safetensors")


def test_names_in_metadata() -> None:
    assert architecture(Options(v2=False)) == "stable-diffusion-v1"
    assert architecture(Options(v2=True, v_parameterization=True)) == "stable-diffusion-v2-768-v"
    assert (base_model_version(Options()), base_model_version(Options(v2=True, v_parameterization=True))) == ("sd_v1", "sd_v2_v")


def test_detection_imports_no_torch() -> None:
    code = "import sys; from sfumato.families.detect import identify; identify({'emb_params': (1, 768)}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
