"""`show` on the headers of real files at full size (the weights are holes in the file), and on tiny folders."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoencoderKL

from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.tools import show

Shapes = dict[str, tuple[int, ...]]


def file_of(path: Path, shapes: Shapes, metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file in F16 whose weights take no room on the disk."""
    at, header = 0, {"__metadata__": metadata or {}}
    for name, shape in shapes.items():
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at := at + 2 * math.prod(shape)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + at)
    return path


@pytest.mark.parametrize(
    ("name", "kind", "family", "variant", "dialect"),
    [
        ("sd1.single_file", "checkpoint", "sd", "v1", "ldm"),
        ("sd2.single_file", "checkpoint", "sd", "v2", "ldm"),
        ("sd1.unet.diffusers", "checkpoint", "sd", "v1", "diffusers"),
        ("adapter.sd1.lora", "adapter", "sd", "v1", "kohya"),
        ("adapter.sd1.locon", "adapter", "sd", "v1", "kohya"),
        ("clip_l.hf", "text_encoder", "sd", "v1", "hf"),
        ("lumina2.transformer", "unknown", None, None, None),
        ("anima.transformer", "unknown", None, None, None),
        ("adapter.anima.lora", "unknown", None, None, None),
    ],
)
def test_real_files(
    tmp_path: Path, keys: Callable[[str], Shapes], name: str, kind: str, family: str, variant: str, dialect: str
) -> None:
    shapes = keys(name)
    facts = show.describe(file_of(tmp_path / "a.safetensors", shapes, {"ss_seed": "1"}))
    assert [facts[key] for key in ("kind", "family", "variant", "dialect")] == [kind, family, variant, dialect]
    assert facts["tensors"] == len(shapes)
    assert facts["parameters"] == sum(map(math.prod, shapes.values()))
    assert facts["dtypes"] == {"F16": len(shapes)}
    assert facts["metadata"] == {"ss_seed": "1"}
    assert json.loads(json.dumps(facts))["kind"] == kind
    assert show.text(facts).startswith(f"{tmp_path / 'a.safetensors'}: {kind.replace('_', ' ')}")


def test_the_parts_of_a_checkpoint_and_the_ranks_of_an_adapter(tmp_path: Path, keys: Callable[[str], Shapes]) -> None:
    whole = show.describe(file_of(tmp_path / "a.safetensors", keys("sd1.single_file")))
    assert whole["parts"] == ["denoiser", "text_encoder", "vae"]
    lora = keys("adapter.sd1.lora")
    facts = show.describe(file_of(tmp_path / "b.safetensors", lora))
    assert facts["ranks"] == {4: sum(name.endswith("lora_down.weight") for name in lora)}
    assert "layers of rank 4" in show.text(facts)


def test_what_other_programs_load_of_an_adapter(tmp_path: Path, keys: Callable[[str], Shapes]) -> None:
    facts = show.describe(file_of(tmp_path / "a.safetensors", keys("adapter.sd3_medium.lora")))
    found = {each["client"]: each["loaded"] for each in facts["loads_in"]}
    assert found["ComfyUI"] == len(keys("adapter.sd3_medium.lora")) // 3
    assert found["diffusers"] == 0
    assert "loads in diffusers: none of" in show.text(facts)
    assert "convert it with --to peft" in show.text(facts)
    assert show.describe(file_of(tmp_path / "b.safetensors", keys("sd1.single_file")))["loads_in"] == []


def test_unknown_files_say_what_they_seem_to_be(tmp_path: Path, keys: Callable[[str], Shapes]) -> None:
    facts = show.describe(file_of(tmp_path / "a.safetensors", keys("lumina2.transformer")))
    assert "Lumina" in facts["seems"]
    assert "Lumina" in show.text(facts)
    other = show.describe(file_of(tmp_path / "b.safetensors", {"hello": (2, 2)}))
    assert "'hello'" in other["seems"]


def test_long_metadata_is_cut_for_readers_only(tmp_path: Path) -> None:
    facts = show.describe(file_of(tmp_path / "a.safetensors", {"hello": (2,)}, {"ss_tag_frequency": "x" * 5000}))
    assert len(facts["metadata"]["ss_tag_frequency"]) == 5000
    assert "5,000 characters" in show.text(facts)
    assert len(show.text(facts)) < 1000


def test_a_diffusers_folder(tmp_path: Path) -> None:
    folder = tiny.tiny_sd1_diffusers(tmp_path / "model")
    facts = show.describe(folder)
    p = tiny.parts(v2=False)
    states = [m.state_dict() for m in (p.unet, p.vae, p.text)]
    assert [facts[k] for k in ("kind", "family", "variant", "dialect")] == ["checkpoint", "sd", "v1", "diffusers"]
    assert facts["parts"] == ["denoiser", "text_encoder", "vae"]
    assert facts["parameters"] == sum(t.numel() for state in states for t in state.values() if t.is_floating_point())
    assert show.describe(folder / "vae")["kind"] == "vae"
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "WanPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    strange = show.describe(folder)
    assert strange["kind"] == "unknown"
    assert "WanPipeline" in strange["seems"]


def test_pickles_are_shown_too(tmp_path: Path) -> None:
    vae: AutoencoderKL = tiny.parts(v2=False).vae
    torch.save({"state_dict": vae.state_dict()}, tmp_path / "vae.ckpt")
    facts = show.describe(tmp_path / "vae.ckpt")
    assert facts["kind"] == "vae"
    assert facts["dtypes"] == {"F32": len(vae.state_dict())}
    torch.save({"string_to_param": {"*": torch.zeros(3, 768)}, "name": "x"}, tmp_path / "embedding.pt")
    assert show.describe(tmp_path / "embedding.pt")["kind"] == "embedding"


def test_what_cannot_be_shown(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        show.describe(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="no weights in it"):
        show.describe(tmp_path)
    files.save(tmp_path / "a.safetensors", {"a": torch.ones(100)})
    os.truncate(tmp_path / "a.safetensors", 200)
    with pytest.raises(UserError, match="truncated"):
        show.describe(tmp_path / "a.safetensors")


def test_showing_needs_no_torch(tmp_path: Path, keys: Callable[[str], Shapes]) -> None:
    path = file_of(tmp_path / "a.safetensors", keys("adapter.sd1.lora"))
    code = (
        "import sys; from sfumato.tools.show import describe; describe(sys.argv[1]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == 0


def test_metadata_tell_models_apart_whose_adapters_have_the_same_names(tmp_path: Path) -> None:
    tensors = {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": torch.zeros(4, 8)}
    for name, metadata in (("flux", {}), ("chroma", {"modelspec.architecture": "chroma/lora"})):
        path = tmp_path / f"{name}.safetensors"
        files.save(path, tensors, metadata)
        assert (show.describe(path)["family"], show.describe(path)["kind"]) == (name, "adapter")
