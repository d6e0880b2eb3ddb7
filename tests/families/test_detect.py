"""What a file is, from its names and shapes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from sparse import sparse
from tinies.cases import modules
from tinies.headers import (
    ENCODER,
    FIRST,
    LANGUAGE,
    LATER,
    SMALL,
    T5,
    UNKNOWN,
    VAE,
    Headers,
    Table,
    below,
    foreign,
    lora,
    only,
    scaled,
    sd,
    table,
    transformer,
    under,
)

from sfumato import families
from sfumato.errors import UserError
from sfumato.families.detect import Detected, control_net, detect_file, identify
from sfumato.families.sd.facts import Options, architecture, base_model_version
from sfumato.formats.files import save
from sfumato.models.saving import by_folder

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
        ({"IN01": (4, 768), "MID": (4, 768)}, "embedding"),
        ({"clip_l": (4, 768), "clip_g": (4, 1280)}, "embedding"),
        ({"clip_l": (4, 768), "clip_g": (4, 1280), "t5xxl": (4, 4096)}, "embedding"),
        ({"clip_l": (4, 768), "t5xxl": (4, 4096)}, "embedding"),
        ({"qwen3_06b": (4, 1024)}, "embedding"),
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


def of_diffusers(name: str, **sizes: int) -> dict[str, tuple[int, ...]]:
    """The tensors of diffusers' net of this name."""
    with torch.device("meta"):
        net = getattr(diffusers, name)(**sizes)
    return {name: tuple(t.shape) for name, t in net.state_dict().items()}


FUTURE: Headers = {
    f"{model} {kind}": (
        lambda make=make, name=name, sizes=sizes: make(of_diffusers(name, **sizes)),
        "",
        f"of {model}, {LATER}",
    )
    for model, name, sizes in (
        ("Qwen-Image", "QwenImageTransformer2DModel", {"num_layers": 1}),
        ("FLUX.2", "Flux2Transformer2DModel", {"num_layers": 1, "num_single_layers": 1}),
        ("Z-Image", "ZImageTransformer2DModel", {"n_layers": 1}),
    )
    for kind, make in (
        ("net", lambda net: net),
        ("lora", lambda net: lora("diffusion_model.", net, r".*(blocks|layers)\.0\.|.*modulation")),
    )
}
"""Models that are known by name and not trained yet."""

HEADERS: Headers = {
    # Parts alone
    "vae of sd": (lambda: below(FIRST, sd(1)), "sd vae ", VAE),
    "vae of sd with prefix": (lambda: only(FIRST, sd(1)), "sd vae ", VAE),
    "vae of flux": (lambda: table("flux.vae"), "(flux|sd3) vae ", VAE),
    "vae of flux with prefix": (lambda: under("vae.", table("flux.vae")), "(flux|sd3) vae ", VAE),
    "vae of sd3": (lambda: table("sd3.vae"), "(flux|sd3) vae ", VAE),
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
    # Neither
    "no model": (lambda: {"fc.weight": (10, 10), "fc.bias": (10,)}, "", UNKNOWN),
    "a language model": (
        lambda: {"model.layers.0.self_attn.q_proj.weight": (64, 64), "lm_head.weight": (99, 64)},
        "",
        LANGUAGE,
    ),
    "an image classifier": (lambda: {"layer1.0.conv1.weight": (64, 64, 3, 3), "bn1.running_mean": (64,)}, "", UNKNOWN),
    "nothing": (dict, "", "is an empty file, without a tensor"),
}
HEADERS |= FUTURE
HEADERS |= {name: row for module in modules() for name, row in module.HEADERS.items()}


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


CLAIMED: dict[str, tuple[Callable[[], Table], str, str]] = {
    "chroma lora": (lambda: table("adapter.chroma.lora"), "chroma/lora", "chroma adapter "),
    "flux lora of the first layers": (
        lambda: lora("transformer.", foreign("flux", transformer("flux_dev")), r"^transformer_blocks\.\d\."),
        "flux-1-schnell/lora",
        "flux adapter schnell",
    ),
    "sd3.5 lora without the second attention": (
        lambda: lora("diffusion_model.", transformer("sd3.5_medium"), r"x_block\.attn\."),
        "stable-diffusion-3.5-medium/lora",
        "sd3 adapter 3.5-medium",
    ),
    "sdxl lora of the first blocks": (
        lambda: {"lora_unet_down_blocks_1_resnets_0_conv1.lora_down.weight": (4, 320, 3, 3)},
        "stable-diffusion-xl-v1-base/lora",
        "sdxl adapter ",
    ),
    # What contradicts the tensors is not believed.
    "flux lora called chroma": (
        lambda: lora("diffusion_model.", transformer("flux_dev")),
        "chroma/lora",
        "flux adapter .*",
    ),
    "chroma lora called flux": (
        lambda: {"diffusion_model.distilled_guidance_layer.in_proj.lora_A.weight": (4, 64)},
        "flux-1-dev/lora",
        "chroma adapter ",
    ),
    "sd1 lora called sdxl": (lambda: table("adapter.sd1.lora"), "sdxl_base_v1-0", "sd adapter v1"),
    "sdxl lora called sd1": (lambda: table("adapter.sdxl.lora"), "stable-diffusion-v1/lora", "sdxl adapter "),
    "sd1 called sdxl": (lambda: sd(1), "stable-diffusion-xl-v1-base", "sd checkpoint v1"),
    "an image classifier called flux": (lambda: {"layer1.0.conv1.weight": (64, 64, 3, 3)}, "flux-1-dev", ""),
    "of a model that nobody knows": (lambda: table("adapter.flux.lora"), "hidream-i1/lora", "flux adapter .*"),
}
"""Tensors, what the metadata call them, what they are known as."""


@pytest.mark.parametrize("key", ["modelspec.architecture", "ss_base_model_version"])
@pytest.mark.parametrize("name", CLAIMED)
def test_metadata_decide_where_names_leave_it_open(name: str, key: str) -> None:
    make, claim, known = CLAIMED[name]
    assert re.fullmatch(known, called(identify(make(), {key: claim})))


def test_the_architecture_is_believed_before_the_version_of_the_base_model() -> None:
    """kohya's scripts call Chroma's base model by FLUX.1's name."""
    metadata = {"modelspec.architecture": "chroma/lora", "ss_base_model_version": "flux1"}
    assert called(identify(table("adapter.chroma.lora"), metadata)) == "chroma adapter "


def test_the_table_of_headers_is_long_enough() -> None:
    assert len(HEADERS) >= 30
    assert {known.split()[0] for _, known, _ in HEADERS.values() if known and "|" not in known} == set(families.names())


def test_gguf_is_told_by_its_names_and_a_damaged_one_as_such(tmp_path: Path) -> None:
    path = tmp_path / "flux1-dev-Q8_0.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 60)
    with pytest.raises(UserError, match=r"flux1-dev-Q8_0\.gguf: a damaged or truncated GGUF file"):
        detect_file(path)


FOLDERS = {name: (module.CASES[0].family, *row) for module in modules() for name, row in module.FOLDERS.items()}
"""Name -> the family, the denoiser's tensors, what the folder is known as."""


def pipeline(folder: Path, name: str, shards: int) -> Path:
    family, make, _ = FOLDERS[name]
    cls = families.facts(family).pipelines[0]
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": cls}))
    part = next(part for part in families.family(family).components if part.name == "denoiser")
    for inner, held in by_folder(part, make()).items():
        write_shards(folder / inner, held, shards)
    return folder


def write_shards(folder: Path, tensors: Table, shards: int) -> None:
    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    for i in range(shards):
        file = (
            f"diffusion_pytorch_model-0000{i + 1}-of-0000{shards}.safetensors"
            if shards > 1
            else "diffusion_pytorch_model.safetensors"
        )
        held = dict(list(tensors.items())[i::shards])
        sparse(folder / file, held)
        places |= dict.fromkeys(held, file)
    if shards > 1:
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_diffusers(tmp_path: Path, name: str, shards: int) -> None:
    found = detect_file(pipeline(tmp_path / "model", name, shards))
    assert called(found) == FOLDERS[name][2]
    assert found.parts == ("denoiser", "text_encoder", "vae")


def test_a_folder_with_quantised_weights(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "model", "flux dev", 1)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    sparse(file, FOLDERS["flux dev"][1]() | {"transformer_blocks.0.attn.to_q.weight.absmax": (9,)})
    with pytest.raises(
        UserError,
        match=r"diffusion_pytorch_model\.safetensors: its weights are quantised \(it has the tensor 'transformer_blocks",
    ):
        detect_file(folder)


@pytest.mark.parametrize("cls", ["WanPipeline", "StableCascadeCombinedPipeline"])
def test_folders_of_other_pipelines(tmp_path: Path, cls: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": cls}))
    with pytest.raises(UserError) as error:
        detect_file(tmp_path)
    assert (
        str(error.value)
        == f"pretrained_model_name_or_path: the folder {tmp_path} holds a {cls}, which is not supported yet"
    )


def test_what_is_read_in_place_of_a_control_net_is_named(tmp_path: Path) -> None:
    flux, lite = (sparse(tmp_path / name, table(name)) for name in ("flux.controlnet", "sdxl.lllite"))
    told = {
        (flux, "sdxl", False): "is a ControlNet of FLUX.1, not a ControlNet of Stable Diffusion XL",
        (lite, "sdxl", False): "is a ControlNet-LLLite of Stable Diffusion XL, not a ControlNet of",
        (lite, "anima", True): "is a ControlNet-LLLite of Stable Diffusion XL, not a ControlNet of Anima",
        # What is wrong with one of this model is said by who reads it.
        (flux, "flux", False): "^no such tensor$",
        (lite, "sdxl", True): "^no such tensor$",
        (tmp_path / "nothing", "sdxl", True): "^no such tensor$",
    }
    for (path, family, small), message in told.items():
        with pytest.raises(UserError, match=message), control_net(str(path), family, lite=small):
            raise UserError("no such tensor")
