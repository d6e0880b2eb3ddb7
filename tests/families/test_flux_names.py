"""FLUX.1's tables against the names and shapes of real files, at full size, on the meta device, and against ComfyUI's keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from flux_checks import adapters, change, dialects, known_to_comfyui, meta, state, with_peft
from sparse import sparse
from test_flux_net import diffusers, inputs, native
from tinies import flux
from torch import nn

from sfumato.adapters import files as adapter_files
from sfumato.errors import UserError
from sfumato.families.flux.facts import CLIP_L, T5XXL, VAE
from sfumato.families.flux.family import FAMILY
from sfumato.families.flux.names import flux_keys
from sfumato.families.flux.net import Flux
from sfumato.models.components import Checkpoint, open_model
from sfumato.models.detection import PREFIX
from sfumato.models.meta_init import check, fill, shapes
from sfumato.models.saving import single_file

Keys = Callable[[str], dict[str, tuple[int, ...]]]
each_version = pytest.mark.parametrize("version", ["dev", "schnell"])
each_dialect = pytest.mark.parametrize("spelling", ["kohya", "comfy", "peft"])


@each_version
def test_the_net_has_the_names_and_shapes_of_the_real_file(keys: Keys, version: str) -> None:
    table = keys(f"flux_{version}.transformer")
    net = fill(Flux.of(table), meta(table), "transformer")
    assert shapes(net.state_dict()) == table
    assert (len(net.double_blocks), len(net.single_blocks), net.axes) == (19, 38, (16, 56, 56))
    assert (net.guidance_in is None) == (version == "schnell")


@each_version
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_every_tensor_of_a_file_is_claimed_and_written_again(
    keys: Keys, version: str, prefix: str, tmp_path: Path
) -> None:
    table = below(prefix, keys(f"flux_{version}.transformer"))
    source = opened(tmp_path, table)
    assert set(source.components) == {"denoiser"}
    assert shapes(single_file(source, {"denoiser": empty(source, "denoiser").state_dict()})) == table


@each_version
def test_every_tensor_of_a_bundle_is_claimed_and_written_again(keys: Keys, version: str, tmp_path: Path) -> None:
    tables = {PREFIX: f"flux_{version}.transformer", CLIP_L: "clip_l.hf", T5XXL: "t5xxl.hf", VAE: "flux.vae"}
    table = {name: shape for prefix, held in tables.items() for name, shape in below(prefix, keys(held)).items()}
    others = {
        "text_encoders.t5xxl.logit_scale": (),
        f"{CLIP_L}logit_scale": (),
        f"{CLIP_L}text_projection.weight": (768, 768),
    }
    source = opened(tmp_path, {**table, **others})
    assert set(source.components) == {"denoiser", "clip_l", "t5xxl", "vae"}
    kept = replace(source, passthrough=meta(source.passthrough.shapes))  # type: ignore[attr-defined]
    assert set(kept.passthrough) == {*others, *(name for name in table if name.endswith("embed_tokens.weight"))}
    nets = {name: empty(source, name).state_dict() for name in source.components}
    assert shapes(single_file(kept, nets)) == {**table, **others}


def test_a_tensor_of_no_part_of_a_bundle_is_refused_by_name(keys: Keys, tmp_path: Path) -> None:
    table = below(PREFIX, keys("flux_dev.transformer"))
    with pytest.raises(UserError, match=r"text_encoders\.qwen\.mystery"):
        opened(tmp_path, {**table, "text_encoders.qwen.mystery": (1,)})


def below(prefix: str, table: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in table.items()}


def opened(path: Path, table: dict[str, tuple[int, ...]]) -> Checkpoint:
    """A file of full size with these tensors, as it is opened; no value is read."""
    return open_model(
        sparse(path / "model.safetensors", table),
        FAMILY.components,
        FAMILY.title,
        given={},
        passthrough_keys=FAMILY.passthrough_keys,
    )


def empty(source: Checkpoint, name: str) -> nn.Module:
    """A net of full size without values."""
    held = source.components[name]
    net = held.component.net(held.shapes(), {})
    check(net, held.shapes(), name)
    return net


@each_version
def test_the_table_is_whole_in_both_directions(keys: Keys, version: str) -> None:
    """The foreign side is diffusers' own class at its own full size."""
    table = keys(f"flux_{version}.transformer")
    with torch.device("meta"):
        foreign = shapes(FluxTransformer2DModel(guidance_embeds=version == "dev").state_dict())
    assert shapes(flux_keys(foreign).to_native(meta(foreign))) == table
    assert shapes(flux_keys(table).to_foreign(meta(table))) == foreign


@pytest.mark.parametrize("guidance", [True, False])
def test_values_go_over_and_back_unchanged(guidance: bool) -> None:
    foreign = flux.transformer(guidance=guidance).state_dict()
    ours = flux_keys(shapes(foreign)).to_native(foreign)
    back = flux_keys(shapes(ours)).to_foreign(ours)
    assert back.keys() == foreign.keys()
    assert all(torch.equal(back[name], t) for name, t in foreign.items())


def test_a_tensor_of_no_part_is_refused_by_name(keys: Keys) -> None:
    table = keys("flux_dev.transformer")
    with pytest.raises(UserError, match=r"mystery\.weight"):
        flux_keys(table).to_foreign(meta({**table, "mystery.weight": (1,)}))
    more = {**table, "double_blocks.0.img_attn.qkv.extra": (1,)}
    with pytest.raises(UserError, match=r"double_blocks\.0\.img_attn\.qkv\.extra"):
        fill(Flux.of(more), meta(more), "transformer")


def test_a_model_without_single_blocks_has_a_table(keys: Keys) -> None:
    table = {
        name: shape for name, shape in keys("flux_dev.transformer").items() if not name.startswith("single_blocks.")
    }
    foreign = flux_keys(table).to_foreign(meta(table))
    assert shapes(flux_keys(shapes(foreign)).to_native(foreign)) == table == shapes(Flux.of(table).state_dict())


@each_version
def test_adapters_have_the_names_and_shapes_of_sd_scripts(keys: Keys, version: str) -> None:
    table = keys(f"flux_{version}.transformer")
    written = adapter_files.write(dialects(flux_keys(table))["kohya"], state(adapters(Flux.of(table))))
    assert shapes(written) == {
        name: shape for name, shape in keys("adapter.flux.lora").items() if name.startswith("lora_unet_")
    }
    assert len(written) == 3 * 304


@each_version
@each_dialect
def test_every_name_of_every_layer_is_known_to_comfyui(keys: Keys, version: str, spelling: str) -> None:
    """Each name lands on the layer's weight; those of a fused layer on its rows, one slice after another."""
    table, known, checked = keys(f"flux_{version}.transformer"), known_to_comfyui(f"flux_{version}"), 0
    adapter_dialects = dialects(flux_keys(table))[spelling]
    for path, layer in Flux.of(table).named_modules():
        if isinstance(layer, nn.Linear):
            names, _ = adapter_dialects.names(("denoiser", path))
            places = [known[name] for name in names]
            assert {place.weight for place in places} == {f"diffusion_model.{path}.weight"}
            swapped = spelling == "peft" and path == "final_layer.adaLN_modulation.1"
            assert {place.function for place in places} == {"swap_scale_shift" if swapped else None}
            ends = [0]
            for place in places:
                start, length = place.rows or (0, layer.out_features)
                assert start == ends[-1]
                ends.append(start + length)
            assert ends[-1] == layer.out_features
            checked += len(names)
    cut = 19 * 2 * 2 + 38 * 3 if spelling == "peft" else 0
    assert checked == 304 + {"dev": 10, "schnell": 8}[version] + cut


def test_fused_layers_are_cut_into_the_slices_of_comfyui(keys: Keys) -> None:
    table, known = keys("flux_dev.transformer"), known_to_comfyui("flux_dev")
    written = adapter_files.write(dialects(flux_keys(table))["peft"], state(adapters(Flux.of(table))))
    ups = {name.removesuffix(".lora_B.weight"): t for name, t in written.items() if name.endswith(".lora_B.weight")}
    cut = {name: t.shape[0] for name, t in ups.items() if known[name].rows}
    assert len(cut) == 19 * 2 * 3 + 38 * 4
    assert cut == {name: known[name].rows[1] for name in cut}


@each_dialect
def test_an_adapter_is_read_back_in_every_dialect(spelling: str) -> None:
    net = native()
    held, adapter_dialects = state(adapters(net)), dialects(flux_keys(shapes(net.state_dict())))
    by_path = [("denoiser", path) for path, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    back = adapter_files.read(adapter_dialects.values(), adapter_files.write(adapter_dialects[spelling], held), by_path)
    assert back.keys() == held.keys()
    assert all(torch.equal(change(back[site]), change(leaves)) for site, leaves in held.items())


@torch.no_grad()
def test_an_adapter_acts_the_same_in_diffusers() -> None:
    net, told = native(), inputs()
    inserted = adapters(net)
    written = adapter_files.write(dialects(flux_keys(shapes(net.state_dict())))["peft"], state(inserted))
    said = net(**told)
    torch.testing.assert_close(said, diffusers(with_peft(flux.transformer(), written), told), atol=1e-5, rtol=1e-5)
    inserted.remove()
    assert (net(**told) - said).abs().max() > 0.1
