"""HunyuanImage-2.1's files: what they say of the model, the distilled one as ComfyUI's bundle, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tinies import hunyuan_image
from tinies.cases import Files
from torch import Tensor

from sfumato.config import LossConfig, NoiseConfig
from sfumato.errors import UserError
from sfumato.families.detect import detect_file
from sfumato.formats.files import load, save
from sfumato.models import loading
from sfumato.models.base import Models
from sfumato.sampling.sample import sample_latents

BASE, DISTILLED = hunyuan_image.CASES[0], hunyuan_image.DISTILLED_CASE


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return BASE.write(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return DISTILLED.write(tmp_path_factory.mktemp("distilled"))


@pytest.fixture(scope="module")
def distilled(bundle: Files) -> Models:
    return DISTILLED.models(bundle)


def test_what_the_files_say_completes_the_options(files: Files, distilled: Models) -> None:
    base: Any = BASE.models(files).options
    options: Any = distilled.options
    assert (base.variant, base.double_blocks, base.single_blocks, base.guidance_scale) == ("base", 2, 3, None)
    assert (options.variant, options.guidance_scale) == ("distilled", 1.0)
    with pytest.raises(UserError, match=r"guidance_scale: .* is the base model, which takes no guidance"):
        BASE.models(files, options={"guidance_scale": 2.0})


def test_another_text_encoder_is_refused(files: Files, tmp_path: Path) -> None:
    wide = {n: torch.zeros([80 if s == 72 else s for s in t.shape]) for n, t in hunyuan_image.parts()["byt5"].items()}
    save(tmp_path / "byt5.safetensors", wide, {})
    with pytest.raises(
        UserError, match="byt5: its states are 80 wide, the transformer takes 72: it is another model's"
    ):
        BASE.models(replace(files, options={**files.options, "byt5": str(tmp_path / "byt5.safetensors")}))


def test_half_of_a_qwen_makes_no_folder(files: Files, tmp_path: Path) -> None:
    half = {n: t for n, t in load(Path(files.options["text_encoder"])).items() if not n.startswith("visual.")}
    save(tmp_path / "half.safetensors", half, {})
    told = {**files.options, "text_encoder": str(tmp_path / "half.safetensors")}
    models = BASE.models(replace(files, options=told))
    with pytest.raises(UserError, match=r"half\.safetensors holds the language half of Qwen2.5-VL alone"):
        loading.save(models, tmp_path / "out", layout="diffusers", dtype=None, metadata={})
    assert not (tmp_path / "out").exists()


def test_the_distilled_models_latents_are_the_pipelines(distilled: Models) -> None:
    """Each step is told where it goes."""
    noise = torch.randn(1, 64, 2, 3, generator=torch.Generator().manual_seed(3))
    process = distilled.process(NoiseConfig(), LossConfig())
    (ours,) = sample_latents(distilled, [DISTILLED.prompt], process=process, sampler="euler", noise=noise)
    with torch.no_grad():
        wanted = DISTILLED.drawn(DISTILLED.pipeline(), DISTILLED.prompt, noise.clone())
    torch.testing.assert_close(ours, wanted, atol=1e-3, rtol=1e-3)
    assert (ours - noise[0]).abs().mean() > 0.05


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name, t in a.items() if t.dtype != b[name].dtype or not torch.equal(t, b[name])]


def test_a_bundle_of_comfyuis_names_comes_back_bit_for_bit(bundle: Files, distilled: Models, tmp_path: Path) -> None:
    """Qwen2.5-VL's other half and its head as well."""
    assert detect_file(bundle.model).parts == ("denoiser", "text_encoder", "vae")
    loading.save(distilled, tmp_path / "again.safetensors", layout="single_file", dtype=None, metadata={})
    assert_same(load(bundle.model), load(tmp_path / "again.safetensors"))


def test_a_bundle_becomes_a_folder_that_guides_by_the_model_alone(distilled: Models, tmp_path: Path) -> None:
    loading.save(distilled, tmp_path / "new", layout="diffusers", dtype=None, metadata={})
    index, config = (
        json.loads((tmp_path / "new" / n).read_text()) for n in ("model_index.json", "transformer/config.json")
    )
    assert not [name for name in index if "guider" in name]
    assert (config["guidance_embeds"], config["use_meanflow"]) == (True, True)
    theirs = DISTILLED.pipeline().transformer.state_dict()
    assert_same(load(tmp_path / "new" / "transformer" / "diffusion_pytorch_model.safetensors"), theirs)
