"""What a file is, from its names and shapes."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from sparse import sparse

from sfumato import families
from sfumato.errors import UserError
from sfumato.families.detect import Detected, detect_file, identify
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
        return identify(
            {
                name.removeprefix(prefix) if cut else name: shape
                for name, shape in table.items()
                if name.startswith(prefix)
            }
        )

    vae, prefixed, unet = (
        below("first_stage_model."),
        below("first_stage_model.", cut=False),
        below("model.diffusion_model."),
    )
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
        (
            {
                "zero_convs.0.0.weight": (320, 320, 1, 1),
                "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
            },
            "controlnet",
        ),
        ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "conv_in.weight": (320, 4, 3, 3)}, "controlnet"),
    ],
)
def test_smaller_files(shapes: dict[str, tuple[int, ...]], kind: str) -> None:
    found = identify(shapes)
    assert found is not None
    assert found.kind == kind


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
        (
            {
                "input_blocks.0.0.weight": (8, 4, 3, 3),
                "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 8),
            },
            "no text_encoder",
        ),
        ({"fc.weight": (2, 2)}, "no model that sfumato knows"),
    ],
)
def test_what_is_no_base_model_is_told_in_one_line(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], said: str
) -> None:
    save(tmp_path / "file.safetensors", {name: torch.zeros(shape) for name, shape in tensors.items()}, {})
    with pytest.raises(UserError, match=said) as error:
        detect_file(tmp_path / "file.safetensors")
    assert len(str(error.value).splitlines()) == 1
    assert str(error.value).startswith("pretrained_model_name_or_path: ")


def test_folders_that_are_none_of_ours(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model_index\.json"):
        detect_file(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with pytest.raises(UserError, match="WanPipeline"):
        detect_file(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        detect_file(tmp_path / "nothing.safetensors")


def test_names_in_metadata() -> None:
    assert architecture(Options(v2=False)) == "stable-diffusion-v1"
    assert architecture(Options(v2=True, v_parameterization=True)) == "stable-diffusion-v2-768-v"
    assert (base_model_version(Options()), base_model_version(Options(v2=True, v_parameterization=True))) == (
        "sd_v1",
        "sd_v2_v",
    )


def test_detection_imports_no_torch() -> None:
    code = "import sys; from sfumato.families.detect import identify; identify({'emb_params': (1, 768)}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- headers of real files, and what is said of them ---

Table = dict[str, tuple[int, ...]]


@cache
def table(name: str) -> Table:
    path = Path(__file__).parents[1] / "fixtures" / "keys" / f"{name}.json.gz"
    return {k: tuple(v) for k, v in json.loads(gzip.decompress(path.read_bytes())).items()}


def under(prefix: str, tensors: Table) -> Table:
    return {prefix + name: shape for name, shape in tensors.items()}


def below(prefix: str, tensors: Table) -> Table:
    return {name[len(prefix) :]: shape for name, shape in tensors.items() if name.startswith(prefix)}


def only(prefix: str, tensors: Table) -> Table:
    """With the prefix left on."""
    return under(prefix, below(prefix, tensors))


NET, FIRST, TE = "model.diffusion_model.", "first_stage_model.", "text_encoders."
T5 = "encoder.block.0.layer.0.SelfAttention.q"


def sd(version: int) -> Table:
    return table(f"sd{version}.single_file")


def transformer(name: str) -> Table:
    return table(f"{name}.transformer")


def text(*names: str) -> Table:
    """Text encoders as bundles hold them."""
    files = {"clip_l": "clip_l.hf", "clip_g": "clip_g.hf", "t5xxl": "t5xxl.hf"}
    return {k: shape for name in names for k, shape in under(f"{TE}{name}.transformer.", table(files[name])).items()}


def sd3(name: str, *encoders: str) -> Table:
    """As Stability publishes it: with the VAE, and with or without the text encoders."""
    return under(NET, transformer(name)) | under(FIRST, table("sd3.vae")) | text(*encoders)


def comfy(name: str) -> Table:
    """FLUX and Chroma as ComfyUI saves a checkpoint."""
    return under(NET, transformer(name)) | under("vae.", table("flux.vae")) | text("clip_l", "t5xxl")


def foreign(family: str, native: Table) -> Table:
    """The denoiser's tensors as a diffusers folder names them; the names are proven against diffusers' classes elsewhere."""
    part = next(part for part in families.family(family).components if part.name == "denoiser")
    found = part.diffusers(native).write({name: torch.empty(shape, device="meta") for name, shape in native.items()})
    return {name: tuple(t.shape) for name, t in found.items()}


def lora(prefix: str, weights: Table, only: str = "") -> Table:
    """An adapter of rank 4 for every matrix of the blocks, as ComfyUI and PEFT name it."""
    made: Table = {}
    for name, shape in weights.items():
        if name.endswith(".weight") and len(shape) == 2 and "block" in name and re.search(only, name):
            path = prefix + name.removesuffix(".weight")
            made |= {f"{path}.lora_A.weight": (4, shape[1]), f"{path}.lora_B.weight": (shape[0], 4)}
    return made


def scaled(tensors: Table, mark: str = "scale_weight") -> Table:
    """Weights in fewer bits with a scale beside each."""
    return tensors | {name.removesuffix("weight") + mark: () for name, shape in tensors.items() if len(shape) == 2}


def without(pattern: str, tensors: Table) -> Table:
    return {name: shape for name, shape in tensors.items() if not re.fullmatch(pattern, name)}


WHOLE = "denoiser, text_encoder, vae"
NO_TEXT = "holds no text_encoder"
ADAPTER, VAE, ENCODER, CONTROL = "is an adapter", "is a VAE", "is a text encoder", "is a ControlNet"
SMALL, LATER, UNKNOWN = "its weights are quantised", "which is not supported yet", "no model that sfumato knows"
OTHER_ADAPTER, OTHER_VAE, LANGUAGE = (
    "for a model that its names do not tell",
    "is a VAE of a model that is not",
    "is a language model",
)

HEADERS: dict[str, tuple[Callable[[], Table], str, str]] = {
    # Stable Diffusion 1.x and 2.x
    "sd1": (lambda: sd(1), "sd checkpoint v1", WHOLE),
    "sd2": (lambda: sd(2), "sd checkpoint v2", WHOLE),
    "sd1 without vae": (lambda: without(f"{FIRST}.*", sd(1)), "sd checkpoint v1", "denoiser, text_encoder"),
    "sd1 unet with prefix": (lambda: only(NET, sd(1)), "sd checkpoint v1", NO_TEXT),
    "sd2 unet bare": (lambda: below(NET, sd(2)), "sd checkpoint v2", NO_TEXT),
    "sd1 unet of diffusers": (lambda: table("sd1.unet.diffusers"), "sd checkpoint v1", NO_TEXT),
    "sd1 lora": (lambda: table("adapter.sd1.lora"), "sd adapter v1", ADAPTER),
    "sd1 locon": (lambda: table("adapter.sd1.locon"), "sd adapter v1", ADAPTER),
    "sd1 lora of comfy": (lambda: lora("diffusion_model.", below(NET, sd(1))), "sd adapter v1|sd adapter ", ADAPTER),
    "sd2 lora of peft": (lambda: lora("unet.", table("sd2.unet.diffusers")), "sd adapter v2", ADAPTER),
    "sd1 controlnet": (
        lambda: (
            under("control_model.", without("out.*", below(NET, sd(1))))
            | {"control_model.zero_convs.0.0.weight": (320, 320, 1, 1)}
        ),
        "sd controlnet v1",
        CONTROL,
    ),
    "sd embedding": (lambda: {"emb_params": (4, 768)}, "sd embedding v1", "is a textual inversion embedding"),
    # Stable Diffusion XL
    "sdxl": (lambda: table("sdxl.single_file"), "sdxl checkpoint ", WHOLE),
    "sdxl unet with prefix": (lambda: only(NET, table("sdxl.single_file")), "sdxl checkpoint ", NO_TEXT),
    "sdxl unet bare": (lambda: table("sdxl.unet"), "sdxl checkpoint ", NO_TEXT),
    "sdxl unet of diffusers": (lambda: foreign("sdxl", table("sdxl.unet")), "sdxl checkpoint ", NO_TEXT),
    "sdxl lora": (lambda: table("adapter.sdxl.lora"), "sdxl adapter ", ADAPTER),
    "sdxl locon": (lambda: table("adapter.sdxl.locon"), "sdxl adapter ", ADAPTER),
    "sdxl loha": (lambda: table("adapter.sdxl.loha"), "sdxl adapter ", ADAPTER),
    "sdxl lokr": (lambda: table("adapter.sdxl.lokr"), "sdxl adapter ", ADAPTER),
    "sdxl oft": (lambda: table("adapter.sdxl.oft"), "sdxl adapter ", ADAPTER),
    "sdxl lora of comfy": (lambda: lora("diffusion_model.", table("sdxl.unet")), "sdxl adapter ", ADAPTER),
    "sdxl lora of peft": (lambda: lora("unet.", foreign("sdxl", table("sdxl.unet"))), "sdxl adapter ", ADAPTER),
    "sdxl lora of a text encoder": (
        lambda: {k: v for k, v in table("adapter.sdxl.lora").items() if k.startswith("lora_te2_")},
        "sdxl adapter ",
        ADAPTER,
    ),
    "sdxl controlnet": (lambda: table("sdxl.controlnet"), "sdxl controlnet ", CONTROL),
    "sdxl lllite": (lambda: table("sdxl.lllite"), "sdxl controlnet ", CONTROL),
    "sdxl embedding": (
        lambda: {"clip_l": (4, 768), "clip_g": (4, 1280)},
        "sdxl embedding ",
        "is a textual inversion embedding",
    ),
    # Stable Diffusion 3 and 3.5
    "sd3 medium": (lambda: sd3("sd3_medium"), "sd3 checkpoint medium", "denoiser, vae"),
    "sd3 medium with text encoders": (
        lambda: sd3("sd3_medium", "clip_l", "clip_g", "t5xxl"),
        "sd3 checkpoint medium",
        WHOLE,
    ),
    "sd3.5 medium": (lambda: sd3("sd3.5_medium"), "sd3 checkpoint 3.5-medium", "denoiser, vae"),
    "sd3.5 large with clips": (lambda: sd3("sd3.5_large", "clip_l", "clip_g"), "sd3 checkpoint 3.5-large", WHOLE),
    "sd3.5 medium bare": (lambda: transformer("sd3.5_medium"), "sd3 checkpoint 3.5-medium", "denoiser"),
    "sd3.5 large with prefix": (lambda: under(NET, transformer("sd3.5_large")), "sd3 checkpoint 3.5-large", "denoiser"),
    "sd3 medium of diffusers": (lambda: foreign("sd3", transformer("sd3_medium")), "sd3 checkpoint medium", "denoiser"),
    "sd3.5 medium of diffusers": (
        lambda: foreign("sd3", transformer("sd3.5_medium")),
        "sd3 checkpoint 3.5-medium",
        "denoiser",
    ),
    "sd3 lora": (lambda: table("adapter.sd3_medium.lora"), "sd3 adapter ", ADAPTER),
    "sd3.5 lora of comfy": (
        lambda: lora("diffusion_model.", transformer("sd3.5_medium")),
        "sd3 adapter 3.5-medium",
        ADAPTER,
    ),
    "sd3.5 lora of peft": (
        lambda: lora("transformer.", foreign("sd3", transformer("sd3.5_large"))),
        "sd3 adapter 3.5-large",
        ADAPTER,
    ),
    # FLUX.1
    "flux dev": (lambda: transformer("flux_dev"), "flux checkpoint dev", "denoiser"),
    "flux schnell": (lambda: transformer("flux_schnell"), "flux checkpoint schnell", "denoiser"),
    "flux dev with prefix": (lambda: under(NET, transformer("flux_dev")), "flux checkpoint dev", "denoiser"),
    "flux dev with all": (lambda: comfy("flux_dev"), "flux checkpoint dev", WHOLE),
    "flux schnell with all": (lambda: comfy("flux_schnell"), "flux checkpoint schnell", WHOLE),
    "flux dev of diffusers": (lambda: foreign("flux", transformer("flux_dev")), "flux checkpoint dev", "denoiser"),
    "flux dev in scaled fp8": (lambda: scaled(transformer("flux_dev")) | {"scaled_fp8": (2,)}, "", SMALL),
    "flux dev in nf4": (lambda: scaled(comfy("flux_dev"), "weight.absmax"), "", SMALL),
    "flux for filling": (
        lambda: transformer("flux_dev") | {"img_in.weight": (3072, 384)},
        "flux checkpoint dev",
        LATER,
    ),
    "flux lora": (lambda: table("adapter.flux.lora"), "flux adapter .*", ADAPTER),
    "flux lora of comfy": (lambda: lora("diffusion_model.", transformer("flux_dev")), "flux adapter .*", ADAPTER),
    "flux lora of peft": (
        lambda: lora("transformer.", foreign("flux", transformer("flux_dev"))),
        "flux adapter .*",
        ADAPTER,
    ),
    # Qwen-Image has layers of these names and sizes as well.
    "flux lora of the first layers": (
        lambda: lora("transformer.", foreign("flux", transformer("flux_dev")), r"^transformer_blocks\.\d\."),
        "",
        OTHER_ADAPTER,
    ),
    "flux controlnet": (lambda: table("flux.controlnet"), "flux controlnet .*", CONTROL),
    # Chroma
    "chroma": (lambda: transformer("chroma"), "chroma checkpoint ", "denoiser"),
    "chroma with prefix": (lambda: under(NET, transformer("chroma")), "chroma checkpoint ", "denoiser"),
    "chroma with all": (lambda: comfy("chroma"), "chroma checkpoint ", WHOLE),
    "chroma of diffusers": (lambda: foreign("chroma", transformer("chroma")), "chroma checkpoint ", "denoiser"),
    "chroma in scaled fp8": (lambda: scaled(transformer("chroma"), "weight_scale"), "", SMALL),
    # An adapter that leaves the modulations alone is the same for FLUX.1 and Chroma.
    "chroma lora": (lambda: table("adapter.chroma.lora"), "(flux|chroma) adapter .*", ADAPTER),
    "chroma lora of comfy": (
        lambda: lora("diffusion_model.", transformer("chroma")),
        "(flux|chroma) adapter .*",
        ADAPTER,
    ),
    "chroma lora of peft": (
        lambda: lora("transformer.", foreign("chroma", transformer("chroma"))),
        "(flux|chroma) adapter .*",
        ADAPTER,
    ),
    # Models that are not supported yet
    "lumina2": (lambda: transformer("lumina2"), "", f"of Lumina Image 2.0, {LATER}"),
    "lumina2 with prefix": (lambda: under(NET, transformer("lumina2")), "", f"of Lumina Image 2.0, {LATER}"),
    "lumina2 lora": (lambda: table("adapter.lumina2.lora"), "", f"of Lumina Image 2.0, {LATER}"),
    "hunyuan_image": (lambda: transformer("hunyuan_image"), "", f"of HunyuanImage 2.1, {LATER}"),
    "hunyuan_image lora": (lambda: table("adapter.hunyuan_image.lora"), "", f"of HunyuanImage 2.1, {LATER}"),
    "anima": (lambda: under("net.", transformer("anima")), "", f"of Anima, {LATER}"),
    "anima bare": (lambda: transformer("anima"), "", f"of Anima, {LATER}"),
    "anima lora": (lambda: table("adapter.anima.lora"), "", f"of Anima, {LATER}"),
    # Parts alone
    "vae of sd": (lambda: below(FIRST, sd(1)), "sd vae ", VAE),
    "vae of sd with prefix": (lambda: only(FIRST, sd(1)), "sd vae ", VAE),
    "vae of flux": (lambda: table("flux.vae"), "(flux|sd3) vae ", VAE),
    "vae of flux with prefix": (lambda: under("vae.", table("flux.vae")), "(flux|sd3) vae ", VAE),
    "vae of sd3": (lambda: table("sd3.vae"), "(flux|sd3) vae ", VAE),
    "vae of hunyuan_image": (lambda: table("hunyuan_image.vae"), "", OTHER_VAE),
    "vae of qwen_image": (lambda: table("qwen_image.vae.diffusers"), "", OTHER_VAE),
    "clip_l": (lambda: table("clip_l.hf"), "sd text_encoder v1", ENCODER),
    "clip_h of open clip": (lambda: below("cond_stage_model.model.", sd(2)), "sd text_encoder v2", ENCODER),
    "clip_g": (lambda: table("clip_g.hf"), "sdxl text_encoder ", ENCODER),
    "clip_g of open clip": (
        lambda: below("conditioner.embedders.1.model.", table("sdxl.single_file")),
        "sdxl text_encoder ",
        ENCODER,
    ),
    "t5xxl": (lambda: table("t5xxl.hf"), "flux text_encoder ", ENCODER),
    "t5xxl in scaled fp8": (lambda: scaled(table("t5xxl.hf")) | {"scaled_fp8": (0,)}, "", SMALL),
    "t5xxl in nf4": (lambda: table("t5xxl.hf") | {f"{T5}.weight.quant_state.bitsandbytes__nf4": (90,)}, "", SMALL),
    "qwen3": (lambda: table("qwen3_06b.hf"), "", LANGUAGE),
    "gemma2": (lambda: table("gemma2_2b.hf"), "", LANGUAGE),
    # Neither
    "no model": (lambda: {"fc.weight": (10, 10), "fc.bias": (10,)}, "", UNKNOWN),
    "a language model": (
        lambda: {"model.layers.0.self_attn.q_proj.weight": (64, 64), "lm_head.weight": (99, 64)},
        "",
        LANGUAGE,
    ),
    "an image classifier": (lambda: {"layer1.0.conv1.weight": (64, 64, 3, 3), "bn1.running_mean": (64,)}, "", UNKNOWN),
    "nothing": (dict, "", UNKNOWN),
}
"""What the file is: its tensors, what it is known as ("family kind variant", a pattern; empty: no family knows it), and what is said when it
is given as the base model: the parts that are found, or the refusal."""


def called(found: Detected | None) -> str:
    return f"{found.family} {found.kind} {found.variant}" if found else ""


FP8 = ("sd1", "sdxl", "sd3.5 large with clips", "flux dev", "flux schnell with all", "chroma", "t5xxl")
"""Of the headers, those that are also tried in plain fp8, which is read like any other format."""


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "F16") for name in HEADERS), *((name, "F8_E4M3") for name in FP8)]
)
def test_headers(tmp_path: Path, name: str, dtype: str) -> None:
    make, known, said = HEADERS[name]
    shapes = make()
    path = sparse(tmp_path / "file.safetensors", shapes, dtype)
    if said != SMALL:
        assert re.fullmatch(known, called(identify(shapes)))
    if said.startswith("denoiser"):
        assert ", ".join(detect_file(path).parts) == said
        return
    with pytest.raises(UserError) as error:
        detect_file(path)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"pretrained_model_name_or_path: {path}") and said in line


def test_the_table_of_headers_is_long_enough() -> None:
    assert len(HEADERS) >= 30
    assert {known.split()[0] for _, known, _ in HEADERS.values() if known and "|" not in known} == set(families.names())


def test_gguf_is_told_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "flux1-dev-Q8_0.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(
        UserError, match=r"pretrained_model_name_or_path: .*flux1-dev-Q8_0\.gguf: weights quantised to GGUF"
    ):
        detect_file(path)


FOLDERS: dict[str, tuple[str, str, Callable[[], Table], str]] = {
    "sd1": ("StableDiffusionPipeline", "unet", lambda: table("sd1.unet.diffusers"), "sd checkpoint v1"),
    "sd2": ("StableDiffusionPipeline", "unet", lambda: table("sd2.unet.diffusers"), "sd checkpoint v2"),
    "sdxl": ("StableDiffusionXLPipeline", "unet", lambda: foreign("sdxl", table("sdxl.unet")), "sdxl checkpoint "),
    "sd3 medium": (
        "StableDiffusion3Pipeline",
        "transformer",
        lambda: foreign("sd3", transformer("sd3_medium")),
        "sd3 checkpoint medium",
    ),
    "sd3.5 medium": (
        "StableDiffusion3Pipeline",
        "transformer",
        lambda: foreign("sd3", transformer("sd3.5_medium")),
        "sd3 checkpoint 3.5-medium",
    ),
    "sd3.5 large": (
        "StableDiffusion3Pipeline",
        "transformer",
        lambda: foreign("sd3", transformer("sd3.5_large")),
        "sd3 checkpoint 3.5-large",
    ),
    "flux dev": (
        "FluxPipeline",
        "transformer",
        lambda: foreign("flux", transformer("flux_dev")),
        "flux checkpoint dev",
    ),
    "flux schnell": (
        "FluxPipeline",
        "transformer",
        lambda: foreign("flux", transformer("flux_schnell")),
        "flux checkpoint schnell",
    ),
    "chroma": ("ChromaPipeline", "transformer", lambda: foreign("chroma", transformer("chroma")), "chroma checkpoint "),
}
"""Diffusers folders: the pipeline's class, the denoiser's folder, its tensors, what it is known as."""


def pipeline(folder: Path, name: str, shards: int) -> Path:
    cls, inner, make, _ = FOLDERS[name]
    tensors = list(make().items())
    (folder / inner).mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": cls}))
    places: dict[str, str] = {}
    for i in range(shards):
        file = (
            f"diffusion_pytorch_model-0000{i + 1}-of-0000{shards}.safetensors"
            if shards > 1
            else "diffusion_pytorch_model.safetensors"
        )
        held = dict(tensors[i::shards])
        sparse(folder / inner / file, held)
        places |= dict.fromkeys(held, file)
    if shards > 1:
        (folder / inner / "diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps({"weight_map": places})
        )
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_diffusers(tmp_path: Path, name: str, shards: int) -> None:
    found = detect_file(pipeline(tmp_path / "model", name, shards))
    assert called(found) == FOLDERS[name][3]
    assert found.parts == ("denoiser", "text_encoder", "vae")


def test_a_folder_with_quantised_weights(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "model", "flux dev", 1)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    sparse(file, FOLDERS["flux dev"][2]() | {"transformer_blocks.0.attn.to_q.weight.absmax": (9,)})
    with pytest.raises(
        UserError,
        match=r"diffusion_pytorch_model\.safetensors: its weights are quantised \(it has the tensor 'transformer_blocks",
    ):
        detect_file(folder)


@pytest.mark.parametrize("cls", ["Lumina2Pipeline", "HunyuanImagePipeline", "StableCascadeCombinedPipeline"])
def test_folders_of_other_pipelines(tmp_path: Path, cls: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": cls}))
    with pytest.raises(UserError) as error:
        detect_file(tmp_path)
    assert (
        str(error.value)
        == f"pretrained_model_name_or_path: the folder {tmp_path} holds a {cls}, which is not supported yet"
    )
