"""Lumina Image 2.0's files, in and out: apart, in bundles, in folders, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse import sparse
from tinies import lumina2
from tinies.cases import Files
from tinies.llms import qwen_tokenizer
from torch import Tensor

from sfumato.config import LossConfig, NoiseConfig, Settings
from sfumato.errors import UserError
from sfumato.families.detect import detect_file
from sfumato.families.lumina2.facts import FACTS, Options
from sfumato.families.lumina2.family import FAMILY
from sfumato.families.lumina2.names import UNUSED
from sfumato.formats.files import load, save
from sfumato.formats.names import add_prefix
from sfumato.models import loading
from sfumato.models.base import Models
from sfumato.models.components import open_model
from sfumato.models.detection import PREFIX
from sfumato.models.meta_init import check, shapes
from sfumato.models.saving import single_file
from sfumato.tensors.flow import Flow

SCALED_FP8 = torch.float8_e4m3fn


def opened(files: Files, model: Path | None = None, *, vae: str | None = None, **options: Any) -> Models:
    told = Options(**{**files.options, **options})
    return loading.load(
        FAMILY,
        str(model or files.model),
        told,
        vae=vae or files.vae,
        tokenizer=str(files.model.parent),
        detect=detect_file,
    )


def written(models: Models, path: Path, **more: Any) -> dict[str, Tensor]:
    loading.save(models, path, layout="single_file", dtype=None, metadata={}, **more)
    return load(path)


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name, t in a.items() if t.dtype != b[name].dtype or not torch.equal(t, b[name])]


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Transformer, Gemma and VAE in files of their own."""
    return lumina2.write(tmp_path_factory.mktemp("apart"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """All in one file."""
    return lumina2.write(tmp_path_factory.mktemp("bundle"), bundled=True)


# --- in and out ---


def test_a_transformer_keeps_its_prefix_and_the_norm_that_nothing_applies(apart: Files, tmp_path: Path) -> None:
    tensors = add_prefix(lumina2.parts()["transformer"], PREFIX)
    assert PREFIX + UNUSED in tensors
    save(tmp_path / "alone.safetensors", tensors, {})
    assert_same(tensors, written(opened(apart, tmp_path / "alone.safetensors"), tmp_path / "again.safetensors"))


def test_a_transformer_in_diffusers_names_comes_back_in_them(apart: Files, tmp_path: Path) -> None:
    tensors = lumina2.transformer().state_dict()
    save(tmp_path / "alone.safetensors", tensors, {})
    models = opened(apart, tmp_path / "alone.safetensors")
    assert_same(models.denoiser.state_dict(), {k: t for k, t in lumina2.parts()["transformer"].items() if k != UNUSED})
    assert_same(tensors, written(models, tmp_path / "again.safetensors"))


def test_a_folder_becomes_a_file_of_the_transformer(tmp_path: Path) -> None:
    lumina2.pipeline().save_pretrained(tmp_path / "folder")
    models = loading.load(FAMILY, str(tmp_path / "folder"), Options())
    assert_same(lumina2.parts()["transformer"], written(models, tmp_path / "single.safetensors"))


def test_a_trained_gemma_is_written_beside_the_file_or_into_its_bundle(
    apart: Files, bundle: Files, tmp_path: Path
) -> None:
    name, old = "layers.0.mlp.up_proj.weight", lumina2.parts()["gemma2"]
    models = opened(apart)
    models.encoders["gemma2"].get_parameter(name).data += 1
    assert_same(load(apart.model), written(models, tmp_path / "out.safetensors", trained={"denoiser", "gemma2"}))
    assert_same(load(tmp_path / "out_gemma2.safetensors"), {**old, name: old[name] + 1})
    models = opened(bundle)
    models.encoders["gemma2"].get_parameter(name).data += 1
    held, out = load(bundle.model), written(models, tmp_path / "whole.safetensors", trained={"gemma2"})
    assert {k for k, t in held.items() if not torch.equal(t, out[k])} == {lumina2.GEMMA + name}


def test_a_gemma_is_not_written_beside_the_tokenizer_of_another_model(bundle: Files, tmp_path: Path) -> None:
    """Which Gemma's class may not even read."""
    qwen_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="tokenizer: another model's tokenizer stands where this model's must"):
        written(opened(bundle), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_gemma_of_its_own_goes_before_that_of_a_bundle(bundle: Files, tmp_path: Path) -> None:
    """Named as transformers does, or as others."""
    other = {name: t + 1 for name, t in lumina2.parts()["gemma2"].items()}
    save(tmp_path / "gemma.safetensors", add_prefix(other, "model."), {})
    models = opened(bundle, gemma2=str(tmp_path / "gemma.safetensors"))
    assert_same(models.encoders["gemma2"].state_dict(), other)
    out = written(models, tmp_path / "out.safetensors")
    assert_same(out, {**load(bundle.model), **add_prefix(other, lumina2.GEMMA)})


def test_a_transformer_in_scaled_fp8_is_read_as_what_it_holds(apart: Files, tmp_path: Path) -> None:
    tensors = dict(lumina2.parts()["transformer"])
    name = "layers.1.feed_forward.w1.weight"
    weight = (tensors[name] / 0.25).to(SCALED_FP8)
    small = {**tensors, name: weight, name.replace("weight", "scale_weight"): torch.tensor(0.25)}
    save(tmp_path / "fp8.safetensors", {**small, "scaled_fp8": torch.zeros(0, dtype=SCALED_FP8)}, {})
    found = opened(apart, tmp_path / "fp8.safetensors").denoiser.get_parameter(name)
    torch.testing.assert_close(found.float(), weight.float() * 0.25, atol=1e-6, rtol=1e-6)


def test_latents_are_scaled_as_flux_does(apart: Files) -> None:
    config: Any = opened(apart).vae.config
    assert (config.scaling_factor, config.shift_factor) == (0.3611, 0.1159)


def test_the_recipe(apart: Files) -> None:
    plain, asked = opened(apart), opened(apart, discrete_flow_shift=1.5)
    flows = [models.process(NoiseConfig(), LossConfig()) for models in (plain, asked)]
    assert flows[0] == Flow(timestep_sampling="shift", shift=6.0)
    assert flows[1] == Flow(timestep_sampling="shift", discrete_flow_shift=1.5, shift=6.0)
    nextdit = opened(apart, timestep_sampling="nextdit_shift").process(NoiseConfig(), LossConfig())
    assert isinstance(nextdit, Flow) and nextdit.timestep_sampling == "nextdit_shift"
    with pytest.raises(UserError, match="noise_offset: a flow is sampled from plain noise"):
        FACTS.check(Settings(noise_offset=0.05, family=Options()))


# --- what is refused ---


def test_missing_parts_are_named_with_their_settings(apart: Files) -> None:
    with pytest.raises(UserError) as told:
        loading.load(FAMILY, str(apart.model), Options())
    assert [message.rpartition(" with ")[2] for message in told.value.messages] == ["--gemma2", "--vae"]


def test_a_gemma_of_another_width_is_refused(apart: Files, tmp_path: Path) -> None:
    narrow = {
        name: t[..., :32] if (t.shape[-1] == lumina2.CONTEXT and t.ndim == 1) or name.startswith("embed") else t
        for name, t in lumina2.parts()["gemma2"].items()
    }
    save(tmp_path / "gemma.safetensors", narrow, {})
    with pytest.raises(UserError, match="gemma2: its states are 32 wide, the transformer takes 48"):
        opened(apart, gemma2=str(tmp_path / "gemma.safetensors"))
    with pytest.raises(UserError, match=r"gemma2: .*ae\.safetensors does not hold the text encoder gemma2"):
        opened(apart, gemma2=str(apart.vae))


def test_models_that_take_more_than_an_image_are_refused(apart: Files, tmp_path: Path) -> None:
    tensors = lumina2.parts()["transformer"]
    save(tmp_path / "edit.safetensors", {**tensors, "x_embedder.weight": tensors["x_embedder.weight"].repeat(1, 2)}, {})
    with pytest.raises(UserError, match="takes 128 channels a patch, not 64"):
        opened(apart, tmp_path / "edit.safetensors")


@pytest.mark.parametrize(
    ("setting", "other"),
    [('"norm_eps": 1e-05', '"norm_eps": 1e-06'), ('"patch_size": 2', '"patch_size": 1')],
)
def test_a_folder_of_another_net_is_refused(tmp_path: Path, setting: str, other: str) -> None:
    lumina2.pipeline().save_pretrained(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    assert setting in config.read_text()
    config.write_text(config.read_text().replace(setting, other))
    with pytest.raises(
        UserError, match=rf"transformer .the transformer.: config\.json: {setting.split(chr(34))[1]} is"
    ):
        loading.load(FAMILY, str(tmp_path), Options())


# --- files of full size ---


def test_every_tensor_of_a_bundle_is_claimed_and_written_again(tmp_path: Path) -> None:
    held = lumina2.whole()
    source = open_model(
        sparse(tmp_path / "model.safetensors", held),
        FAMILY.components,
        FAMILY.title,
        given={},
        passthrough_keys=FAMILY.passthrough_keys,
    )
    _, source = FAMILY.complete(Options(), source)
    nets = {}
    for name, weights in source.components.items():
        nets[name] = weights.component.net(weights.shapes(), {})
        check(nets[name], weights.shapes(), name)
    kept = {name: torch.empty(held[name], device="meta") for name in source.passthrough}
    assert set(kept) == {PREFIX + UNUSED, *(name for name in held if name.endswith(("logit_scale", "spiece_model")))}
    out = single_file(replace(source, passthrough=kept), {name: net.state_dict() for name, net in nets.items()})
    assert shapes(out) == held
