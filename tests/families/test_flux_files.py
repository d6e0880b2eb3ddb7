"""FLUX.1's files, in and out: the transformer alone, bundles, folders, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tinies import encoders, flux
from torch import Tensor

from sfumato.config import LossConfig, NoiseConfig, Settings
from sfumato.errors import UserError
from sfumato.families.detect import detect_file
from sfumato.families.flux.facts import CLIP_L, FACTS, Options
from sfumato.families.flux.family import FAMILY, SHIFT
from sfumato.formats.files import load, save
from sfumato.formats.names import add_prefix
from sfumato.models import loading
from sfumato.models.base import Models
from sfumato.models.detection import PREFIX
from sfumato.tensors.flow import Flow
from sfumato.tensors.random import SampleRandom


def opened(files: Any, model: Path | None = None, dtype: Any = None, **options: Any) -> Models:
    return loading.load(
        FAMILY,
        str(model or files.model),
        Options(**{**files.options, **options}),
        vae=files.vae,
        dtype=dtype,
        detect=detect_file,
    )


def written(models: Models, path: Path, **more: Any) -> dict[str, Tensor]:
    loading.save(models, path, layout="single_file", dtype=None, metadata={}, **more)
    return load(path)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name, t in a.items() if t.dtype != b[name].dtype or not torch.equal(t, b[name])]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return flux.write(True, tmp_path_factory.mktemp("dev"))


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_file_keeps_its_prefix_and_holds_the_transformer_alone(files: Any, tmp_path: Path, prefix: str) -> None:
    tensors = add_prefix(flux.parts()["transformer"], prefix)
    path = files.model.with_name(f"{'with' if prefix else 'without'}.safetensors")
    save(path, tensors, {})
    assert_same(tensors, written(opened(files, path), tmp_path / "again.safetensors"))


@pytest.mark.parametrize("shard", ["10GB", "300KB"])
def test_a_folder_becomes_a_bare_file(tmp_path: Path, shard: str) -> None:
    flux.pipeline().save_pretrained(tmp_path / "folder", max_shard_size=shard)
    models = loading.load(FAMILY, str(tmp_path / "folder"), Options())
    assert_same(flux.parts()["transformer"], written(models, tmp_path / "single.safetensors"))


def test_names_of_diffusers_in_a_single_file(files: Any, tmp_path: Path) -> None:
    path = files.model.with_name("theirs.safetensors")
    save(path, dict(flux.transformer().state_dict()), {})
    models = opened(files, path)
    assert_same(dict(models.denoiser.state_dict()), flux.parts()["transformer"])
    assert_same(load(path), written(models, tmp_path / "again.safetensors"))


def test_a_bundle_keeps_all_that_it_held(tmp_path: Path) -> None:
    files = flux.write(False, tmp_path)
    models = opened(files)
    assert_same(load(files.model), written(models, tmp_path / "out" / "again.safetensors"))
    with torch.no_grad():
        models.encoders["clip_l"].get_parameter("text_model.final_layer_norm.weight").add_(1)
    out = written(models, tmp_path / "out" / "trained.safetensors", trained=("denoiser", "clip_l"))
    name = f"{CLIP_L}text_model.final_layer_norm.weight"
    torch.testing.assert_close(out[name], load(files.model)[name] + 1)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == [
        "again.safetensors",
        "trained.safetensors",
    ]


def test_a_file_given_beside_a_bundle_takes_the_place_of_its_part(tmp_path: Path) -> None:
    files = flux.write(False, tmp_path)
    other = {name: t + 1 if t.is_floating_point() else t for name, t in flux.parts()["clip_l"].items()}
    save(tmp_path / "other.safetensors", other, {})
    models = opened(files, clip_l=str(tmp_path / "other.safetensors"))
    assert_same(dict(models.encoders["clip_l"].state_dict()), other)
    assert_same({k: t for k, t in written(models, tmp_path / "again.safetensors").items() if k.startswith(f"{CLIP_L}text_model.")}, add_prefix(other, CLIP_L))  # fmt: skip


def test_what_is_missing_is_told_at_once_with_its_flag(files: Any) -> None:
    with pytest.raises(UserError) as error:
        loading.load(FAMILY, str(files.model), Options())
    assert [message.rpartition(" ")[2] for message in error.value.messages] == ["--clip_l", "--t5xxl", "--vae"]


def test_plain_fp8_is_read(files: Any) -> None:
    tensors = {name: t.to(torch.float8_e4m3fn) for name, t in flux.parts()["transformer"].items()}
    path = files.model.with_name("fp8.safetensors")
    save(path, tensors, {})
    models = opened(files, path, dtype=torch.bfloat16)
    assert {p.dtype for p in models.denoiser.parameters()} == {torch.bfloat16}
    assert_same(dict(models.denoiser.state_dict()), {name: t.bfloat16() for name, t in tensors.items()})


def test_scaled_fp8_is_refused_by_name(files: Any) -> None:
    path = files.model.with_name("scaled.safetensors")
    save(path, {**flux.parts()["transformer"], "scaled_fp8": torch.zeros(2)}, {})
    with pytest.raises(UserError, match="scaled_fp8"):
        opened(files, path)


@pytest.mark.parametrize("channels", [128, 384])
def test_models_for_control_and_filling_are_refused(files: Any, channels: int) -> None:
    tensors = flux.parts()["transformer"]
    path = files.model.with_name("fill.safetensors")
    save(path, {**tensors, "img_in.weight": torch.zeros(len(tensors["img_in.weight"]), channels)}, {})
    with pytest.raises(
        UserError, match=f"is a FLUX.1 model that takes {channels} channels a patch.* Fill, Depth or Canny"
    ) as error:
        opened(files, path)
    assert len(error.value.messages) == 1


def test_a_pruned_model_has_the_blocks_of_its_file(files: Any, tmp_path: Path) -> None:
    tensors = {
        n: t
        for n, t in flux.parts()["transformer"].items()
        if not n.startswith(("double_blocks.1.", "single_blocks.2."))
    }
    path = files.model.with_name("pruned.safetensors")
    save(path, tensors, {})
    models = opened(files, path)
    assert (models.options.double_blocks, models.options.single_blocks) == (1, 2)
    assert_same(tensors, written(models, tmp_path / "again.safetensors"))


def test_a_config_that_asks_for_another_net_is_refused(tmp_path: Path) -> None:
    flux.pipeline().save_pretrained(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "axes_dims_rope": [8, 12, 12], "patch_size": 2}))
    with pytest.raises(UserError) as error:
        loading.load(FAMILY, str(tmp_path), Options())
    assert len(error.value.messages) == 2
    assert "axes_dims_rope is [8, 12, 12]; [4, 14, 14] was expected" in str(error.value)


def test_another_models_vae_is_refused(tmp_path: Path, files: Any) -> None:
    vae = flux.parts()["vae"]
    wrong = {**vae, "decoder.conv_in.weight": vae["decoder.conv_in.weight"][:, :4].clone()}
    save(tmp_path / "vae.safetensors", wrong, {})
    with pytest.raises(UserError, match="vae: its latents have 4 channels, those of this model 16"):
        loading.load(FAMILY, str(files.model), Options(**files.options), vae=str(tmp_path / "vae.safetensors"))


def test_text_encoders_of_other_widths_are_refused(files: Any, tmp_path: Path) -> None:
    """Files of the encoders are many, and easily taken for one another."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    config = {
        "vocab_size": len(encoders.clip_tokenizer()),
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    clip = CLIPTextModel(CLIPTextConfig(hidden_size=128, projection_dim=128, **config))
    t5 = T5EncoderModel(
        T5Config(
            d_model=32,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            vocab_size=len(encoders.t5_tokenizer()),
            feed_forward_proj="gated-gelu",
        )
    )
    save(tmp_path / "clip.safetensors", tiny.text_states(clip), {})
    save(
        tmp_path / "t5.safetensors",
        {n: t for n, t in t5.state_dict().items() if n != "encoder.embed_tokens.weight"},
        {},
    )
    with pytest.raises(UserError) as error:
        opened(files, clip_l=str(tmp_path / "clip.safetensors"), t5xxl=str(tmp_path / "t5.safetensors"))
    assert [m.split(",")[0] for m in error.value.messages] == [
        "clip_l: its states are 128 wide",
        "t5xxl: its states are 32 wide",
    ]


def test_a_tokenizer_folder_may_be_t5s_own(files: Any, tmp_path: Path) -> None:
    folder = files.model.parent / "tokenizer_2"
    for given in (folder, folder.parent):
        models = loading.load(FAMILY, str(files.model), Options(**files.options), vae=files.vae, tokenizer=str(given))
        assert models.tokenizers["t5xxl"].get_vocab() == encoders.t5_tokenizer().get_vocab()
        assert models.tokenizers["clip_l"].get_vocab() == encoders.clip_tokenizer().get_vocab()


def test_the_vae_of_a_file_is_scaled_as_published(files: Any) -> None:
    config: Any = opened(files).vae.config
    assert (config.scaling_factor, config.shift_factor, config.latent_channels) == (0.3611, 0.1159, 16)


def test_a_tokenizer_of_more_tokens_than_the_encoder_is_refused(tmp_path: Path) -> None:
    files = flux.write(True, tmp_path)
    tokenizer = encoders.t5_tokenizer()
    larger = type(tokenizer)(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{i}", -1.0) for i in range(200))], extra_ids=0
    )
    larger.save_pretrained(tmp_path / "tokenizer_2")
    with pytest.raises(UserError, match="the text encoder t5xxl only"):
        opened(files)


# --- what goes by the version ---


def test_what_is_completed_by_the_file(files: Any, tmp_path: Path) -> None:
    dev, schnell = opened(files).options, opened(flux.write(False, tmp_path)).options
    assert (dev.guided, dev.guidance_scale, dev.t5xxl_max_token_length) == (True, 1.0, 512)
    assert (schnell.guided, schnell.guidance_scale, schnell.t5xxl_max_token_length) == (False, None, 256)
    told = opened(files, guidance_scale=3.5, t5xxl_max_token_length=128).options
    assert (told.guidance_scale, told.t5xxl_max_token_length, told.model_type) == (3.5, 128, "flux")


def test_schnell_is_told_no_guidance(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"guidance_scale: .* is FLUX\.1 schnell, which takes no guidance; leave it out"
    ):
        opened(flux.write(False, tmp_path), guidance_scale=1.0)


def test_the_defaults_train_as_the_recipe_says(files: Any) -> None:
    process = opened(files).process(NoiseConfig(), LossConfig())
    assert isinstance(process, Flow)
    assert (process.timestep_sampling, process.model_prediction_type, process.shift) == ("shift", "raw", SHIFT)
    rng = SampleRandom(range(4000))
    sigma = process.sigmas(rng, 16, 16)
    # The median of a normal number's sigmoid is 1/2, which the shift moves to 3.1582 / 4.1582.
    assert sigma.median().item() == pytest.approx(SHIFT / (1 + SHIFT), abs=0.02)
    assert sigma.dtype == torch.float32


def test_what_flow_has_no_use_for_is_refused() -> None:
    with pytest.raises(UserError, match="noise_offset"):
        FACTS.check(Settings(noise_offset=0.05, family=Options()))
