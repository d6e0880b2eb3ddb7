"""The VAE of 64 channels and the video VAE: names of their files, what they say, how their latents are scaled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nets
import pytest
import torch
from diffusers import QwenImageImg2ImgPipeline
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.modular_pipelines import PipelineState
from diffusers.modular_pipelines.anima.decoders import AnimaVaeDecoderStep
from diffusers.modular_pipelines.anima.encoders import encode_vae_image
from tinies import encoders, headers, vaes
from torch import Tensor

from sfumato import families
from sfumato.data.strategies import LatentsCachingStrategy
from sfumato.errors import UserError
from sfumato.formats.files import save
from sfumato.formats.names import KeyMap, add_prefix
from sfumato.models import detection
from sfumato.models.autoencoders import scaled, scaling_of, unscale, vae_keys
from sfumato.models.base import Models
from sfumato.models.components import Component, open_component
from sfumato.models.hunyuan_vae import hunyuan_vae_component, hunyuan_vae_keys
from sfumato.models.meta_init import shapes
from sfumato.models.qwen_vae import qwen_vae_component, qwen_vae_keys

Keys = Callable[[str], dict[str, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A VAE: its tiny one, its component, its table of names, its latents."""

    tiny: Callable[[], Any]
    original: Callable[[], dict[str, Tensor]]
    part: Component
    keys: Callable[[Mapping[str, Any]], KeyMap]
    latents: LatentsCachingStrategy

    def mean(self, vae: Any, pixels: Tensor) -> Tensor:
        """As diffusers' pipelines call it."""
        x = pixels[:, :, None] if self.latents.frames else pixels
        return vae.encode(x).latent_dist.mode().squeeze(2)  # type: ignore[no-any-return]


PREFIXES = ("vae.", "first_stage_model.")
HUNYUAN = Kind(
    tiny=vaes.hunyuan_vae,
    original=vaes.hunyuan_vae_original,
    part=hunyuan_vae_component(PREFIXES),
    keys=hunyuan_vae_keys,
    latents=LatentsCachingStrategy(channels=64, stride=32),
)
QWEN = Kind(
    tiny=vaes.qwen_vae,
    original=vaes.qwen_vae_original,
    part=qwen_vae_component(PREFIXES),
    keys=qwen_vae_keys,
    latents=LatentsCachingStrategy(channels=16, frames=True),
)
kinds = pytest.mark.parametrize("kind", [HUNYUAN, QWEN], ids=["hunyuan", "qwen"])


def meta(table: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in table.items()}


def pixels(batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1


@kinds
@pytest.mark.parametrize("spelling", ["diffusers", "original", "vae."])
def test_a_file_in_any_naming_says_what_diffusers_does(kind: Kind, spelling: str) -> None:
    theirs = kind.tiny()
    held = {
        "diffusers": theirs.state_dict,
        "original": kind.original,
        "vae.": lambda: add_prefix(kind.original(), "vae."),
    }[spelling]()
    assert set(held) == set(theirs.state_dict()) or spelling != "diffusers"
    ours = nets.built(kind.part, held)
    x = pixels()
    with torch.no_grad():
        wanted = kind.mean(theirs, x)
        mean = kind.latents.encode(ours, x)
        assert mean.shape == (1, kind.latents.channels, 64 // kind.latents.stride, 96 // kind.latents.stride)
        torch.testing.assert_close(mean, wanted, atol=1e-5, rtol=1e-5)
        again = theirs.decode(wanted[:, :, None] if kind.latents.frames else wanted).sample
        torch.testing.assert_close(
            kind.latents.decode(ours, mean), again.squeeze(2) if kind.latents.frames else again, atol=1e-5, rtol=1e-5
        )
    assert not list(ours.buffers()) and not any(p.requires_grad for p in ours.parameters())


def test_every_tensor_of_the_real_vae_of_64_channels_has_its_place(keys: Keys) -> None:
    table = keys("hunyuan_image.vae")
    native = hunyuan_vae_keys(table).to_native(meta(table))
    net = HUNYUAN.part.net(shapes(native), {})
    assert shapes(net.state_dict()) == shapes(native)
    assert shapes(hunyuan_vae_keys(native).to_foreign(native)) == table
    config: Any = net.config
    assert config.block_out_channels == (128, 256, 512, 512, 1024, 1024)
    assert (config.layers_per_block, config.spatial_compression_ratio, config.scaling_factor) == (2, 32, 0.75289)


def test_every_tensor_of_the_real_video_vae_has_its_place(keys: Keys) -> None:
    table = keys("qwen_image.vae.diffusers")
    original = qwen_vae_keys(table).to_foreign(meta(table))
    assert not set(original) & set(table) - {n for n in table if ".resample." in n or ".time_conv." in n}
    assert {n: tuple(t.shape) for n, t in convert_wan_vae_to_diffusers(dict(original)).items()} == table
    assert shapes(qwen_vae_keys(original).to_native(original)) == table
    net = QWEN.part.net(table, {})
    assert shapes(net.state_dict()) == table
    config: Any = net.config
    assert (config.base_dim, config.dim_mult, config.num_res_blocks) == (96, [1, 2, 4, 4], 2)
    assert config.temperal_downsample == [False, True, True]


def test_latents_of_videos_are_scaled_by_channel_as_by_the_pipeline() -> None:
    vae, x = vaes.qwen_vae(), pixels(2)
    held = SimpleNamespace(vae=vae)
    with torch.no_grad():
        wanted = QwenImageImg2ImgPipeline._encode_vae_image(held, x[:, :, None], torch.Generator().manual_seed(1))
        raw = vae.encode(x[:, :, None]).latent_dist.sample(torch.Generator().manual_seed(1))
    ours = scaled(raw[:, :, 0], scaling_of(vae))
    torch.testing.assert_close(ours, wanted[:, :, 0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(unscale(vae, ours), raw[:, :, 0], atol=1e-5, rtol=1e-5)


def test_a_picture_costs_no_video(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' class keeps the input of every layer for a second frame, and puts two frames of zeros before the first."""
    ours, kept = nets.built(QWEN.part, QWEN.original()), []
    for half in (ours.encoder, ours.decoder):
        half.register_forward_hook(lambda net, args, kwargs, out: kept.append(kwargs["feat_cache"]), with_kwargs=True)
    monkeypatch.setattr(torch.nn.Conv3d, "_conv_forward", lambda *_: pytest.fail("a convolution over frames"))
    with torch.no_grad():
        QWEN.latents.decode(ours, QWEN.latents.encode(ours, pixels()))
        assert kept == [None, None]
        with pytest.raises(RuntimeError):
            ours.encode(torch.zeros(1, 3, 5, 16, 16))


@kinds
def test_a_models_verbs_are_the_pipelines(kind: Kind) -> None:
    """Pictures to the denoiser's latents and back, all 4-D."""
    family = replace(families.family("flux"), latents=kind.latents)
    models = Models(
        family=family, options=families.facts("flux").options(), denoiser=torch.nn.Identity(), encoders={},
        tokenizers={}, vaes=nets.built(kind.part, kind.original()),
    )  # fmt: skip
    x, theirs = pixels(2), kind.tiny()
    ours = models.scaled(models.encode_images(x))
    with torch.no_grad():
        if kind is QWEN:
            wanted = encode_vae_image(x[:, :, None], theirs, None, torch.device("cpu"), torch.float32)
            state = PipelineState(values={"latents": wanted})
            components = SimpleNamespace(vae=theirs)
            back = AnimaVaeDecoderStep()(components, state)[1].get("images")
        else:  # HunyuanImagePipeline encodes no images, and its decoding is a line of `__call__`
            wanted = theirs.encode(x).latent_dist.mode() * theirs.config.scaling_factor
            back = theirs.decode(wanted / theirs.config.scaling_factor).sample
    torch.testing.assert_close(ours, wanted.reshape(ours.shape), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(models.decode(ours), back, atol=1e-5, rtol=1e-4)


@kinds
def test_what_a_file_lacks_and_a_folder_says_of_scaling(kind: Kind, tmp_path: Path) -> None:
    raw = torch.rand(2, kind.latents.channels, 3, 2, generator=torch.Generator().manual_seed(0))
    save(tmp_path / "vae.safetensors", kind.original())
    alone = open_component(kind.part, str(tmp_path / "vae.safetensors"))
    by_file, by_net = (kind.part.scaling(alone.config), scaled(raw, scaling_of(alone.build())))  # type: ignore[misc]
    assert torch.equal(scaled(raw, by_file), by_net)
    assert torch.equal(by_net, scaled(raw, scaling_of(kind.tiny()))) and not torch.allclose(by_net, raw, atol=0.1)
    kind.tiny().save_pretrained(tmp_path / "model" / "vae")
    config = (tmp_path / "model" / "vae" / "config.json").read_text()
    (tmp_path / "model" / "vae" / "config.json").write_text(
        config.replace("0.75289", "0.5").replace("-0.7571", "-0.25").replace("2.8184", "2.0")
    )
    folder = open_component(kind.part, str(tmp_path / "model"))
    said = scaled(raw, kind.part.scaling(folder.config))  # type: ignore[misc]
    wanted = (raw[:, 0] + 0.25) / 2 if kind is QWEN else raw[:, 0] * 0.5
    torch.testing.assert_close(said[:, 0], wanted)
    assert torch.equal(scaled(raw, scaling_of(folder.build())), said)


@kinds
def test_another_models_vae_is_refused(kind: Kind, tmp_path: Path) -> None:
    others = [encoders.vae16().state_dict(), (QWEN if kind is HUNYUAN else HUNYUAN).original()]
    others.append((QWEN if kind is HUNYUAN else HUNYUAN).tiny().state_dict())
    for tensors in others:
        save(tmp_path / "vae.safetensors", tensors)
        with pytest.raises(UserError, match=f"does not hold the.* VAE of {kind.latents.channels} channels"):
            open_component(kind.part, str(tmp_path / "vae.safetensors"))


SINGLES = {
    "hunyuan original": (lambda: headers.table("hunyuan_image.vae"), "original"),
    "hunyuan diffusers": (
        lambda: shapes(HUNYUAN.keys(t := headers.table("hunyuan_image.vae")).to_native(meta(t))),
        "diffusers",
    ),
    "qwen diffusers": (lambda: headers.table("qwen_image.vae.diffusers"), "diffusers"),
    "qwen original": (
        lambda: shapes(QWEN.keys(t := headers.table("qwen_image.vae.diffusers")).to_foreign(meta(t))),
        "original",
    ),
}


@pytest.mark.parametrize("name", SINGLES)
def test_a_file_is_known_by_its_tensors(name: str) -> None:
    make, dialect = SINGLES[name]
    known = {
        "hunyuan": detection.hunyuan_vae("vae."),
        "qwen": detection.qwen_vae("vae."),
        "kl": (*detection.vae(16, "vae."), *detection.vae(64, "vae.")),
    }
    for prefix in ("", "vae."):
        found = {
            kind: [s.dialect for s in singles if s.fits({prefix + n: s for n, s in make().items()})]
            for kind, singles in known.items()
        }
        kl = ["ldm"] if name == "hunyuan original" else []
        assert found == {"hunyuan": [], "qwen": [], name.split()[0]: [dialect], "kl": kl}


def test_a_kl_autoencoder_is_none_of_these() -> None:
    for name in ("flux.vae", "sd3.vae"):
        single = (*detection.hunyuan_vae("vae."), *detection.qwen_vae("vae."))
        assert not any(s.fits(headers.table(name)) for s in single)


def test_a_kl_autoencoder_in_the_same_names_is_refused() -> None:
    theirs = encoders.vae16().state_dict()
    with pytest.raises(
        UserError, match="its latents have 16 channels, those of this model 64: it is another model's VAE"
    ):
        nets.built(HUNYUAN.part, vae_keys(theirs).to_foreign(theirs))
