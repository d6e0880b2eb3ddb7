"""`sfumato verify`, and kohya's scripts for adapters, as command lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sfumato.cli.kohya_tools import run
from sfumato.cli.main import main
from sfumato.formats.files import load, save

QKV, LINEAR1 = "lora_unet_double_blocks_3_img_attn_qkv", "lora_unet_single_blocks_4_linear1"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """Two fused layers of FLUX.1, at their real sizes."""
    g, sizes = torch.Generator().manual_seed(0), {QKV: 3 * 3072, LINEAR1: 7 * 3072}
    tensors = {}
    for name, rows in sizes.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, 3072, generator=g)
        tensors[f"{name}.lora_up.weight"] = torch.randn(rows, 2, generator=g)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save(tmp_path / "lora.safetensors", tensors, {})
    return tmp_path / "lora.safetensors"


def test_kohyas_converter_of_flux_and_verify(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, back = lora.with_name("other.safetensors"), lora.with_name("back.safetensors")
    args = ["--src", "sd-scripts", "--dst", "ai-toolkit", "--src_path", str(lora), "--dst_path", str(other)]
    assert run("convert_flux_lora", args) == 0
    assert "accepted, no effect" in capsys.readouterr().err
    assert "transformer.single_transformer_blocks.4.proj_mlp.lora_B.weight" in load(other)
    args = ["--src", "ai-toolkit", "--dst", "sd-scripts", "--src_path", str(other), "--dst_path", str(back)]
    assert run("convert_flux_lora", args) == 0
    capsys.readouterr()
    assert main(["verify", str(lora), str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "exact"
    assert main(["verify", str(back), str(other)]) == 0
    assert capsys.readouterr().out == "exact: 2 compared, 0 differ\n"
    tensors = load(lora)
    del tensors[f"{QKV}.alpha"]
    save(other, tensors, {})
    assert main(["verify", str(lora), str(other)]) == 1
    assert "denoiser.double_blocks.3.img_attn.qkv: differs by 0.5 of its norm" in capsys.readouterr().out
    assert main(["verify", str(lora), str(lora.with_name("none.safetensors"))]) == 2


def test_names_for_comfyui_and_back(lora: Path) -> None:
    """Of every family; kohya has a script for each of two."""
    comfy, back = lora.with_name("comfy.safetensors"), lora.with_name("back.safetensors")
    assert run("convert_hunyuan_image_lora_to_comfy", [str(lora), str(comfy)]) == 0
    assert "diffusion_model.double_blocks.3.img_attn.qkv.lora_A.weight" in load(comfy)
    assert run("convert_anima_lora_to_comfy", ["--reverse", str(comfy), str(back)]) == 0
    one, other = load(lora), load(back)
    assert one.keys() == other.keys()
    assert all(torch.equal(t, other[name]) for name, t in one.items())


def test_models_that_are_not_supported_yet_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"diffusion_model.layers.{i}.attention.to_q.lora_{half}.weight" for i in range(9) for half in "AB"]
    save(tmp_path / "a.safetensors", {name: torch.zeros(4, 4) for name in names}, {})
    assert run("convert_anima_lora_to_comfy", [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]) == 2
    assert capsys.readouterr().err.endswith("is of Z-Image, which is not supported yet\n")
    assert not (tmp_path / "b.safetensors").exists()


def test_weights_are_listed(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check_lora_weights", [str(lora)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "number of tensors: 6, shown: 4"
    down = load(lora)[f"{QKV}.lora_down.weight"].abs()
    assert f"{QKV}.lora_down.weight,(2-3072),{down.mean():.6g},{down.min():.6g}" in lines
    assert run("check_lora_weights", ["-s", str(lora)]) == 0
    assert f"{QKV}.alpha,(),1,1" in capsys.readouterr().out
