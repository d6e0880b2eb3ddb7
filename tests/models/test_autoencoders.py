"""VAEs through their name tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nets
import pytest
import tiny
import torch
from diffusers import FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline
from tinies import encoders
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats.files import save
from sfumato.formats.names import add_prefix
from sfumato.models.autoencoders import kl_net, scaled, scaling_of, unscale, vae_component, vae_keys
from sfumato.models.components import open_component
from sfumato.models.meta_init import shapes

Keys = Callable[[str], dict[str, tuple[int, ...]]]
FLUX, SD3 = (0.3611, 0.1159), (1.5305, 0.0609)
SIXTEEN = vae_component(("first_stage_model.", "vae."), *SD3, channels=16)


def scaling(vae: Any) -> tuple[float, float]:
    return vae.config.scaling_factor, vae.config.shift_factor


def ldm16() -> dict[str, Tensor]:
    tensors = encoders.vae16().state_dict()
    return vae_keys(tensors).to_foreign(tensors)


def test_a_vae_of_16_channels_says_what_diffusers_does() -> None:
    theirs = encoders.vae16()
    ours = nets.vae(ldm16(), *FLUX, channels=16)
    assert "quant_conv.weight" not in ours.state_dict()
    x, z = torch.rand(1, 3, 32, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.ones(1, 16, 4, 2)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.encode(x).latent_dist.mode(), theirs.encode(x).latent_dist.mode(), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(ours.decode(z).sample, theirs.decode(z).sample, atol=1e-5, rtol=1e-5)
    assert (ours.config.latent_channels, ours.config.scaling_factor, ours.config.shift_factor) == (16, *FLUX)


@pytest.mark.parametrize("name", ["flux.vae", "sd3.vae"])
def test_every_tensor_of_a_real_vae_has_its_place(keys: Keys, name: str) -> None:
    table = keys(name)
    native = vae_keys(table).to_native({k: torch.empty(shape, device="meta") for k, shape in table.items()})
    net = kl_net(shapes(native), *FLUX)
    assert shapes(native) == shapes(net.state_dict())
    assert all(t.is_meta for t in net.parameters()) and not list(net.buffers())
    assert shapes(vae_keys(native).to_foreign(net.state_dict())) == table
    assert net.config.block_out_channels == (128, 256, 512, 512)


@pytest.mark.parametrize(("pipeline", "factors"), [(FluxImg2ImgPipeline, FLUX), (StableDiffusion3Img2ImgPipeline, SD3)])
def test_latents_are_scaled_as_pipelines_do(
    pipeline: Any, factors: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = nets.vae(encoders.vae16().state_dict(), *factors, channels=16)
    x = torch.rand(1, 3, 32, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    draw: Callable[[], torch.Generator] = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    with torch.no_grad():
        raw = vae.encode(x).latent_dist.sample(draw())
        if pipeline is FluxImg2ImgPipeline:
            wanted = pipeline._encode_vae_image(SimpleNamespace(vae=vae), x, draw())
        else:
            held = SimpleNamespace(vae=vae, scheduler=SimpleNamespace(scale_noise=lambda latents, *_: latents))
            wanted = pipeline.prepare_latents(held, x, torch.zeros(1), 1, 1, torch.float32, torch.device("cpu"), draw())
    torch.testing.assert_close(scaled(raw, scaling_of(vae)), wanted)
    torch.testing.assert_close(unscale(vae, wanted), raw)
    assert not torch.allclose(wanted, raw * factors[0], atol=1e-3)


def test_a_vae_without_a_shift() -> None:
    vae, x = nets.vae(tiny.parts(v2=False).vae.state_dict()), torch.ones(1, 4, 2, 2)
    assert vae.config.shift_factor is None
    assert scaled(x, scaling_of(vae)).unique().item() == pytest.approx(0.18215)
    assert unscale(vae, x).unique().item() == pytest.approx(1 / 0.18215)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_a_vae_is_read_from_any_file_that_holds_one(tmp_path: Path, prefix: str) -> None:
    held = add_prefix(ldm16(), prefix)
    others = (
        {"loss.logvar": torch.zeros(1), "model.diffusion_model.encoder.weight": torch.zeros(1)}
        if prefix
        else {"loss.logvar": torch.zeros(1)}
    )
    save(tmp_path / "file.safetensors", {**held, **others, f"{prefix}model_ema.decay": torch.zeros(1)}, {})
    found = open_component(SIXTEEN, str(tmp_path / "file.safetensors")).build()
    theirs = encoders.vae16().state_dict()
    assert found.state_dict().keys() == theirs.keys()
    assert all(torch.equal(found.get_parameter(name), t) for name, t in theirs.items())
    assert scaling(found) == SD3


def test_a_folder_says_how_its_latents_are_scaled(tmp_path: Path) -> None:
    encoders.vae16().save_pretrained(tmp_path / "pipeline" / "vae")
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        found = open_component(SIXTEEN, str(folder)).build()
        assert scaling(found) == FLUX
        assert shapes(found.state_dict()) == shapes(encoders.vae16().state_dict())


def test_a_file_without_a_vae_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path / "other.safetensors", {"a.weight": torch.zeros(1)}, {})
    with pytest.raises(
        UserError, match=r"vae: .*other\.safetensors does not hold the VAE \(its tensors: 1, 'a\.weight'"
    ):
        open_component(SIXTEEN, str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="ae: no such file"):
        open_component(replace(SIXTEEN, flag="ae"), str(tmp_path / "nothing.safetensors"))


def test_a_vae_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match="16 channels, those of this model 4"):
        nets.vae(ldm16())


def test_a_vae_in_ldm_names_says_what_diffusers_does() -> None:
    theirs = tiny.parts(v2=False).vae
    ldm = vae_keys(theirs.state_dict()).to_foreign(theirs.state_dict())
    assert ldm["encoder.mid.attn_1.q.weight"].ndim == 4
    ours = nets.vae(ldm)
    x, z = torch.rand(1, 3, 32, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.ones(1, 4, 4, 2)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.encode(x).latent_dist.mode(), theirs.encode(x).latent_dist.mode(), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(ours.decode(z).sample, theirs.decode(z).sample, atol=1e-5, rtol=1e-5)
    back = vae_keys(ldm).to_native(ldm)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], t) for name, t in theirs.state_dict().items())


def test_early_diffusers_names() -> None:
    tensors = tiny.parts(v2=False).vae.state_dict()
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, t in tensors.items():
        for new, old in early.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = t
    assert renamed.keys() != tensors.keys()
    ours = nets.vae(renamed).state_dict()
    assert all(torch.equal(ours[name], t) for name, t in tensors.items())


def test_what_is_no_vae_is_refused() -> None:
    with pytest.raises(UserError, match="does not hold the VAE"):
        nets.vae({"a": torch.zeros(1)})
    tensors = dict(tiny.parts(v2=False).vae.state_dict())
    del tensors["decoder.conv_in.weight"]
    with pytest.raises(UserError, match=r"decoder\.conv_in\.weight"):
        nets.vae(tensors)
