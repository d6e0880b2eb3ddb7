"""`sfumato convert` on the command line: what goes where, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tinies import sdxl

from sfumato import families
from sfumato.cli.checkpoint_tools import part_flags
from sfumato.cli.main import main
from sfumato.formats.files import load, save


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl.write(tmp_path_factory.mktemp("model")).model


def adapter(path: Path) -> Path:
    name = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
    save(path, {f"{name}.lora_down.weight": torch.zeros(2, 2048), f"{name}.lora_up.weight": torch.zeros(640, 2)})
    return path


def test_a_checkpoint_is_converted(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(model), str(tmp_path / "folder"), "--dtype", "fp16", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["family"], facts["to"]) == ("sdxl", "diffusers")
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "a.safetensors"), "--to", "single"]) == 0
    first, again = load(model), load(tmp_path / "a.safetensors")
    assert all(torch.equal(t, first[name].half()) for name, t in again.items() if "model.diffusion_model" in name)


def test_checkpoints_are_merged(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "b.safetensors", {n: 3 * t for n, t in load(model).items() if not n.startswith("first_stage")})
    words = ["merge", "--models", str(model), str(tmp_path / "b.safetensors"), "--ratios", "0.5", "0.25"]
    assert main([*words, "--out", str(tmp_path / "out.safetensors"), "--dtype", "bf16"]) == 0
    said, name = " ".join(capsys.readouterr().err.split()), "model.diffusion_model.out.2.weight"
    assert "tensors are not in all of them" in said and "add up to 0.75" in said
    first, out = load(model)[name], load(tmp_path / "out.safetensors")[name]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), 1.25 * first, atol=1e-3, rtol=1e-2)
    assert main([*words, "--out", str(model)]) == 2
    assert main(["merge", "--adapters", str(model), "--out", str(tmp_path / "x"), "--device", "cpu"]) == 2
    assert "--device: is for --models" in capsys.readouterr().err


def test_flags_are_those_of_the_families() -> None:
    parts = {part.flag for name in families.names() for part in families.family(name).components if part.flag}
    assert set(part_flags()) == parts


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rank", "4"], "--rank: is for adapters"),
        (["--to", "kohya"], "--to kohya"),
        (["--dtype", "int4"], "--dtype"),
        (["--clip_g", "x.safetensors"], "--clip_g: Stable Diffusion XL has no such part"),
    ],
)
def test_what_a_checkpoint_has_no_use_for_is_refused(
    given: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(model), str(tmp_path / "out"), *given]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_adapter_goes_to_the_other_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = adapter(tmp_path / "a.safetensors")
    assert main(["convert", str(path), str(tmp_path / "b.safetensors"), "--bundle"]) == 2
    assert "--bundle: is for whole checkpoints" in capsys.readouterr().err
    assert main(["convert", str(path), str(tmp_path / "b.safetensors")]) == 2
    assert "--to: say in whose names" in capsys.readouterr().err
    assert main(["convert", str(path), str(tmp_path / "b.safetensors"), "--to", "comfy"]) == 0
    assert any(name.startswith("diffusion_model.") for name in load(tmp_path / "b.safetensors"))
