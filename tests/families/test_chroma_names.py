"""Chroma's tables against the names and shapes of real files, at full size, on the meta device, and against ComfyUI's keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from flux_checks import adapters, change, dialects, known_to_comfyui, meta, state, with_peft
from test_chroma_net import MASK, diffusers, inputs, native
from tinies import chroma
from torch import nn

from sfumato.adapters import files as adapter_files
from sfumato.errors import UserError
from sfumato.families.chroma.names import TARGETS, chroma_keys
from sfumato.families.chroma.net import Chroma
from sfumato.families.flux import names as flux_names
from sfumato.models.meta_init import fill, shapes

Keys = Callable[[str], dict[str, tuple[int, ...]]]
each_dialect = pytest.mark.parametrize("spelling", ["kohya", "comfy", "peft"])


def test_the_net_has_the_names_and_shapes_of_the_real_file(keys: Keys) -> None:
    table = keys("chroma.transformer")
    net = fill(Chroma.of(table), meta(table), "transformer")
    assert shapes(net.state_dict()) == table
    assert (len(net.double_blocks), len(net.single_blocks), net.axes) == (19, 38, (16, 56, 56))


def test_the_table_is_whole_in_both_directions(keys: Keys) -> None:
    """The foreign side is diffusers' own class at its own full size."""
    table = keys("chroma.transformer")
    with torch.device("meta"):
        foreign = shapes(ChromaTransformer2DModel().state_dict())
    assert shapes(chroma_keys(foreign).to_native(meta(foreign))) == table
    assert shapes(chroma_keys(table).to_foreign(meta(table))) == foreign


def test_values_go_over_and_back_unchanged() -> None:
    foreign = chroma.transformer().state_dict()
    ours = chroma_keys(shapes(foreign)).to_native(foreign)
    back = chroma_keys(shapes(ours)).to_foreign(ours)
    assert back.keys() == foreign.keys()
    assert all(torch.equal(back[name], t) for name, t in foreign.items())


@pytest.mark.parametrize(
    "name", ["mystery.weight", "double_blocks.0.img_mod.lin.weight", "guidance_in.in_layer.weight"]
)
def test_what_flux_alone_has_is_refused_by_name(keys: Keys, name: str) -> None:
    table = {**keys("chroma.transformer"), name: (1, 1)}
    with pytest.raises(UserError, match=name):
        chroma_keys(table).to_foreign(meta(table))
    with pytest.raises(UserError, match=name):
        fill(Chroma.of(table), meta(table), "transformer")


def test_adapters_have_the_names_and_shapes_of_sd_scripts(keys: Keys) -> None:
    table = keys("chroma.transformer")
    written = adapter_files.write(dialects(chroma_keys(table))["kohya"], state(adapters(Chroma.of(table))))
    assert TARGETS is flux_names.TARGETS
    assert shapes(written) == {
        name: shape for name, shape in keys("adapter.chroma.lora").items() if name.startswith("lora_unet_")
    }
    assert len(written) == 3 * 228


@each_dialect
def test_every_name_of_every_layer_is_known_to_comfyui(keys: Keys, spelling: str) -> None:
    """Each name lands on the layer's weight; those of a fused layer on its rows, one slice after another."""
    table, known, unknown, checked = keys("chroma.transformer"), known_to_comfyui("chroma"), set(), 0
    adapter_dialects = dialects(chroma_keys(table))[spelling]
    for path, layer in Chroma.of(table).named_modules():
        if isinstance(layer, nn.Linear):
            names, _ = adapter_dialects.names(("denoiser", path))
            if names[0] not in known:
                unknown.add(path)
                continue
            ends = [0]
            for place in (known[name] for name in names):
                start, length = place.rows or (0, layer.out_features)
                assert (place.weight, place.function, start) == (f"diffusion_model.{path}.weight", None, ends[-1])
                ends.append(start + length)
            assert ends[-1] == layer.out_features
            checked += len(names)
    approximator = {
        path
        for path, layer in Chroma.of(table).named_modules()
        if path.startswith("distilled_") and isinstance(layer, nn.Linear)
    }
    assert len(approximator) == 12
    # ComfyUI knows diffusers' names of FLUX, not those of the small net that Chroma has besides; no adapter goes there.
    assert unknown == (approximator if spelling == "peft" else set())
    assert checked == 228 + 3 + (19 * 2 * 2 + 38 * 3 if spelling == "peft" else 12)


def test_fused_layers_are_cut_into_the_slices_of_comfyui(keys: Keys) -> None:
    table, known = keys("chroma.transformer"), known_to_comfyui("chroma")
    written = adapter_files.write(dialects(chroma_keys(table))["peft"], state(adapters(Chroma.of(table))))
    ups = {name.removesuffix(".lora_B.weight"): t for name, t in written.items() if name.endswith(".lora_B.weight")}
    cut = {name: t.shape[0] for name, t in ups.items() if known[name].rows}
    assert len(cut) == 19 * 2 * 3 + 38 * 4
    assert cut == {name: known[name].rows[1] for name in cut}


@each_dialect
def test_an_adapter_is_read_back_in_every_dialect(spelling: str) -> None:
    net = native()
    held, adapter_dialects = state(adapters(net)), dialects(chroma_keys(shapes(net.state_dict())))
    by_path = [("denoiser", path) for path, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    back = adapter_files.read(adapter_dialects.values(), adapter_files.write(adapter_dialects[spelling], held), by_path)
    assert back.keys() == held.keys()
    assert all(torch.equal(change(back[site]), change(leaves)) for site, leaves in held.items())


@torch.no_grad()
def test_an_adapter_acts_the_same_in_diffusers() -> None:
    net, told = native(), inputs()
    inserted = adapters(net)
    written = adapter_files.write(dialects(chroma_keys(shapes(net.state_dict())))["peft"], state(inserted))
    said = net(**told, mask=MASK)
    torch.testing.assert_close(
        said, diffusers(with_peft(chroma.transformer(), written), told, MASK), atol=1e-5, rtol=1e-5
    )
    inserted.remove()
    assert (net(**told, mask=MASK) - said).abs().max() > 0.1
