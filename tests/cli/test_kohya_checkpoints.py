"""kohya's tools for checkpoints and caches under their old names: the same flags, and what they do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tinies import flux, sd3, sdxl

from sfumato.cli import kohya_cache, kohya_checkpoints
from sfumato.formats.files import load, read_header, save

ROOT = Path(__file__).parents[2]
LAUNCHERS = {path.stem: path for path in (ROOT / "scripts" / "tools").glob("*.py")}


def test_every_tool_has_a_launcher() -> None:
    ours = {**kohya_checkpoints.TOOLS, **kohya_cache.KEPT}
    for name in ours:
        text = LAUNCHERS[name].read_text()
        assert re.search(rf'run\("{name}", sys\.argv\[1:\]\)', text)


def test_a_launcher_runs_by_its_path(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {"ss_tag": json.dumps({"x": 1}), "note": "hi"})
    command = [sys.executable, LAUNCHERS["show_metadata"], "--model", tmp_path / "a.safetensors"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == {"ss_tag": {"x": 1}, "note": "hi"}


def test_merge_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = sdxl.write(tmp_path).model, tmp_path / "out.safetensors"
    save(tmp_path / "b.safetensors", {n: t + 1 if t.is_floating_point() else t for n, t in load(path).items()})
    words = ["--models", str(path), str(tmp_path / "b.safetensors"), "--output", str(out), "--ratios", "0.25", "0.75"]
    assert kohya_checkpoints.run("merge_models", [*words, "--saving_precision", "fp16", "--unet_only"]) == 0
    first, merged = load(path), load(out)
    name = "model.diffusion_model.out.2.weight"
    torch.testing.assert_close(merged[name], (first[name] + 0.75).half())
    other = next(n for n in merged if n.startswith("conditioner") and n.endswith("weight"))
    assert torch.equal(merged[other], first[other].half())
    assert kohya_checkpoints.run("merge_models", words[:-1]) == 2
    assert "--ratios: 1 for 2 models" in capsys.readouterr().err


def test_merge_sd3_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apart, out = sd3.write("3.5_medium", tmp_path), tmp_path / "one.safetensors"
    parts = [word for name, path in apart.options.items() for word in (f"--{name}", path)]
    words = ["--dit", str(apart.model), *parts, "--output", str(out), "--save_precision", "fp16", "--device", "cpu"]
    assert kohya_checkpoints.run("merge_sd3_safetensors", words) == 0
    wanted = {n for n in sd3.single_file("3.5_medium", *sd3.parts("3.5_medium")) if "logit_scale" not in n}
    assert load(out).keys() == wanted
    assert "--device: accepted, no effect" in capsys.readouterr().err


def test_convert_diffusers20_original_sd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder, out = sdxl.write(tmp_path).model, str(tmp_path / "folder"), tmp_path / "out.safetensors"
    assert kohya_checkpoints.run("convert_diffusers20_original_sd", ["--v1", str(path), folder]) == 0
    assert "--v1: accepted, no effect" in capsys.readouterr().err
    words = ["--fp16", "--metadata", '{"modelspec.author": "me"}', "--epoch", "3", folder, str(out)]
    assert kohya_checkpoints.run("convert_diffusers20_original_sd", words) == 0
    header = read_header(out)
    assert header.metadata["modelspec.author"] == "me"
    assert {i.dtype for n, i in header.tensors.items() if "diffusion_model" in n} == {"F16"}
    assert kohya_checkpoints.run("convert_diffusers20_original_sd", ["--fp16", "--bf16", folder, str(out)]) == 2
    assert "contradict" in capsys.readouterr().err


def test_convert_diffusers_to_flux(tmp_path: Path) -> None:
    files, folder = flux.write(True, tmp_path), tmp_path / "folder"
    flux.pipeline().save_pretrained(folder)
    words = ["--diffusers_path", str(folder), "--save_to", str(tmp_path / "out.safetensors"), "--mem_eff_load_save"]
    assert kohya_checkpoints.run("convert_diffusers_to_flux", words) == 0
    first, out = load(files.model), load(tmp_path / "out.safetensors")
    assert first.keys() == out.keys() and all(torch.equal(t, out[n]) for n, t in first.items())


@pytest.mark.parametrize("script", list(kohya_cache.KEPT))
def test_caches(script: str, model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    words = f"""--pretrained_model_name_or_path {model} --train_data_dir {images.parent} --resolution 64
        --caption_extension .txt --cache_dir {cache} --skip_existing --output_dir {tmp_path} --output_name x""".split()
    images.rename(images.parent / "1_images")
    assert kohya_cache.run(script, words) == 0, capsys.readouterr().err
    said = capsys.readouterr().err
    assert "--skip_existing: accepted, no effect" in said
    kept = list(cache.rglob("*.safetensors"))
    assert len(kept) == 5
    latents = {name for p in kept for name in read_header(p).tensors if name.startswith("latents")}
    assert bool(latents) == (script == "cache_latents")
    assert kohya_cache.run(script, [*words, "--flux"]) == 2
    assert "--flux: the base model is of the family sd" in capsys.readouterr().err
