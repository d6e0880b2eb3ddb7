"""`show` on the headers of real files at full size (the weights are holes in the file), and on tiny folders."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from tinies import headers

from sfumato.errors import UserError
from sfumato.families.detect import detect_file
from sfumato.formats import files
from sfumato.formats.clients import Loaded, together
from sfumato.tools import show

Shapes = dict[str, tuple[int, ...]]


def file_of(
    path: Path, shapes: Shapes, metadata: dict[str, str] | None = None, dtypes: dict[str, str] | None = None
) -> Path:
    """A safetensors file whose weights take no room on the disk, in F16 but for those named in 8 bits."""
    at, header = 0, {"__metadata__": metadata or {}}
    for name, shape in shapes.items():
        kind = (dtypes or {}).get(name, "F16")
        size = math.prod(shape) * (2 if kind == "F16" else 1)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at := at + size]}
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
        ("lumina2.transformer", "checkpoint", "lumina2", None, "native"),
        ("anima.transformer", "checkpoint", "anima", None, "native"),
        ("adapter.anima.lora", "adapter", "anima", None, "kohya"),
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


def test_what_is_the_same_of_several_programs_is_said_once() -> None:
    each = [Loaded(client=name, loaded=loaded, layers=3) for name, loaded in (("A", 3), ("B", 0), ("C", 3))]
    assert together(each) == ["A, C: 3 of 3 layers", "B: none of 3 layers"]


def test_unknown_files_say_what_they_seem_to_be(tmp_path: Path) -> None:
    facts = show.describe(file_of(tmp_path / "a.safetensors", headers.esrgan(old=False)))
    assert "upscaler" in facts["seems"]
    assert "upscaler" in show.text(facts)
    other = show.describe(file_of(tmp_path / "b.safetensors", {"hello": (2, 2)}))
    assert "'hello'" in other["seems"]
    word = show.describe(file_of(tmp_path / "c.safetensors", {"emb_params": (4, 128)}))
    assert "embedding (textual inversion)" in word["seems"]


@pytest.mark.parametrize(
    ("table", "kind", "said"),
    [
        (headers.ip_adapter, "ip_adapter", "an IP-Adapter"),
        (lambda: headers.esrgan(old=True), "upscaler", "an upscaler"),
        (lambda: headers.esrgan(old=False), "upscaler", "an upscaler"),
        (headers.clip_vision, "clip_vision", "CLIP vision"),
        (lambda: headers.clip_vision(1024, 24), "clip_vision", "CLIP vision"),
        (lambda: headers.clip_vision(openclip=True), "clip_vision", "CLIP vision"),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, table: Callable[[], Shapes], kind: str, said: str) -> None:
    path = file_of(tmp_path / "a.safetensors", table())
    facts = show.describe(path)
    assert facts["kind"] == kind and facts["family"] is None
    assert said in show.text(facts) and "unknown" not in show.text(facts)
    with pytest.raises(UserError, match=said):
        detect_file(path)


def test_a_hypernetwork(tmp_path: Path) -> None:
    """As AUTOMATIC1111 saves it: for each width two nets, beside what it was made of."""
    nets = {
        n: tuple({f"linear.{i}.{k}": torch.zeros(1) for i in (0, 1) for k in ("weight", "bias")} for _ in "kv")
        for n in (320, 768)
    }
    torch.save({**nets, "step": 100, "name": "x", "layer_structure": [1, 2, 1]}, tmp_path / "a.pt")
    facts = show.describe(tmp_path / "a.pt")
    assert facts["kind"] == "hypernetwork" and facts["tensors"] == 16
    assert "a hypernetwork" in show.text(facts)


@pytest.mark.parametrize(
    ("shapes", "dtype", "form"),
    [
        (lambda: headers.scaled(headers.transformer("flux_dev")) | {"scaled_fp8": (2,)}, "F8_E4M3", "fp8 scaled"),
        (lambda: headers.scaled(headers.transformer("flux_dev"), "weight_scale"), "F8_E4M3", "fp8 scaled"),
        (lambda: headers.nf4(headers.transformer("flux_dev")), "U8", "nf4 of bitsandbytes"),
        (lambda: headers.scaled(headers.transformer("chroma"), "weight_scale"), "I8", "as ComfyUI writes them"),
    ],
)
def test_quantised_weights(tmp_path: Path, shapes: Callable[[], Shapes], dtype: str, form: str) -> None:
    table = shapes()
    narrow = {name for name in table if len(table[name]) == 2}
    facts = show.describe(file_of(tmp_path / "a.safetensors", table, dtypes=dict.fromkeys(narrow, dtype)))
    assert form in facts["quantised"]
    assert form in show.text(facts)
    if "fp8" in form or "ComfyUI" in form:
        assert (facts["kind"], facts["family"]) == ("checkpoint", "chroma" if dtype == "I8" else "flux")


def test_gguf(tmp_path: Path) -> None:
    """A header as llama.cpp's writer makes it: city96's files have the names of the checkpoint."""
    table, path = headers.transformer("flux_schnell"), tmp_path / "flux1-schnell-Q4_K_S.gguf"
    path.write_bytes(gguf_header(table))
    os.truncate(path, 1 << 27)  # what its largest tensor takes, without a number in it
    facts = show.describe(path)
    assert facts["quantised"] == "GGUF Q4_K" and facts["tensors"] == len(table)
    assert (facts["kind"], facts["family"], facts["variant"]) == ("checkpoint", "flux", "schnell")
    assert facts["metadata"] == {"general.architecture": "flux", "general.file_type": "14"}
    assert facts["parameters"] == sum(map(math.prod, table.values()))
    path.write_bytes(gguf_header(table)[:5000])
    with pytest.raises(UserError, match="damaged or truncated GGUF"):
        show.describe(path)


def gguf_header(table: Shapes) -> bytes:
    """Tensors in Q4_K where they have rows of 256 numbers, else in F32 (struct by the format's own page)."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    out = b"GGUF" + struct.pack("<IQQ", 3, len(table), 3)
    out += text("general.architecture") + struct.pack("<I", 8) + text("flux")
    out += text("general.file_type") + struct.pack("<II", 4, 14)
    out += text("a.list") + struct.pack("<IIQ", 9, 8, 2) + text("x") + text("yz")
    for name, shape in table.items():
        out += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        out += struct.pack("<IQ", 12 if len(shape) == 2 and shape[1] % 256 == 0 else 0, 0)
    return out


@pytest.mark.parametrize(
    ("name", "kinds", "ranks"),
    [
        ("adapter.sdxl.loha", {"LoHa": 794}, {4: 794}),
        ("adapter.sdxl.lokr", {"LoKr": 794}, None),
        ("adapter.sdxl.oft", {"OFT": None}, None),
        ("adapter.sd1.locon", {"LoRA": None}, None),
    ],
)
def test_the_kind_and_the_ranks_of_adapters(
    tmp_path: Path, keys: Callable[[str], Shapes], name: str, kinds: dict[str, int | None], ranks: dict[int, int] | None
) -> None:
    metadata = {"ss_network_module": "lycoris.kohya", "ss_network_args": "{}"}
    facts = show.describe(file_of(tmp_path / "a.safetensors", keys(name), metadata))
    assert facts["kinds"].keys() == kinds.keys() and facts["made_by"] == "LyCORIS in kohya's scripts"
    assert f"{next(iter(kinds))} made by LyCORIS" in show.text(facts)
    layers = {n.rpartition(".")[0] for n in keys(name) if n.endswith((".alpha", "oft_blocks"))}
    assert sum(facts["kinds"].values()) == len(layers)
    assert not ranks or facts["ranks"].keys() == ranks.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_alphas_and_dora(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {}
    for i, (rank, alpha) in enumerate(((4, 2.0), (8, 0.5), (8, 0.5))):
        base = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn{i}_to_q"
        tensors |= {
            f"{base}.lora_down.weight": torch.zeros(rank, 320),
            f"{base}.lora_up.weight": torch.zeros(320, rank),
        }
        tensors[f"{base}.alpha"] = torch.tensor(alpha, dtype=dtype)
    tensors[f"{base}.dora_scale"] = torch.ones(320, 1)
    files.save(tmp_path / "a.safetensors", tensors, {"modelspec.implementation": "sfumato 1.0"})
    facts = show.describe(tmp_path / "a.safetensors")
    assert facts["kinds"] == {"LoRA": 2, "LoRA with DoRA": 1} and facts["ranks"] == {4: 1, 8: 2}
    assert facts["alphas"] == {0.5: 2, 2.0: 1} and facts["made_by"] == "sfumato"
    assert "2 layers of alpha 0.5" in show.text(facts)


def test_kinds_are_those_that_lycoris_writes(tmp_path: Path) -> None:
    """Each kind's own file, made by LyCORIS, is called by its name."""
    made = {
        "LoHa": functional_names("loha", lora_dim=4),
        "LoKr": functional_names("lokr", lora_dim=4, factor=4),
        "BOFT": functional_names("boft", lora_dim=4),
        "OFT": functional_names("diag-oft", lora_dim=4),
        "(IA)3": functional_names("ia3"),
        "full difference": functional_names("full"),
    }
    for kind, tensors in made.items():
        files.save(tmp_path / "a.safetensors", tensors, {"ss_base_model_version": "sd_v1"})
        facts = show.describe(tmp_path / "a.safetensors")
        assert kind in facts["kinds"], (kind, list(tensors), facts["kinds"])


def functional_names(algo: str, **how: int) -> dict[str, torch.Tensor]:
    """The state of LyCORIS' network of this algorithm on one layer, under the name of one of SD 1.x."""
    from lycoris import LycorisNetwork, create_lycoris

    net = torch.nn.Sequential(torch.nn.Linear(16, 16))
    LycorisNetwork.apply_preset({"target_name": ["0"], "target_module": ["Linear"]})
    network = create_lycoris(net, 1.0, linear_alpha=1, algo=algo, linear_dim=how.pop("lora_dim", 4), **how)
    network.apply_to()
    path = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    return {f"{path}.{name.partition('.')[2]}": t.detach().clone() for name, t in network.state_dict().items()}


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
