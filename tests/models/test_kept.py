"""Frozen layers that keep the codes of their files: as many bytes as there, and the numbers that they mean."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from formats import gguf_files
from tinies import flux, quantised
from torch import Tensor, nn

from sfumato.families.flux.facts import Options
from sfumato.families.flux.family import FAMILY
from sfumato.formats.files import save
from sfumato.formats.lazy import Lazy
from sfumato.memory.formats import quantise
from sfumato.memory.quantise import stored_layers
from sfumato.models import loading
from sfumato.models.components import ComponentWeights
from sfumato.models.kept import keep, widened
from sfumato.models.meta_init import drop

NAMES = {"GGUF Q8_0": "GGUF Q8_0", "int8 rotated": "int8", "fp8 scaled": "fp8"}


def denoiser(path: Path) -> ComponentWeights:
    found = loading.outline_parts(FAMILY, str(path), Options()).source.components["denoiser"]
    return replace(found, quantise=partial(keep, found.tensors, found.key_format))


@pytest.fixture(scope="module", params=quantised.FORMS)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, Tensor]]:
    """A form, a file in it, and what its weights are."""
    folder = tmp_path_factory.mktemp("kept")
    return request.param, *quantised.FORMS[request.param](folder, "base", flux.parts()["transformer"])


def test_codes_are_kept_and_mean_what_they_did(case: tuple[str, Path, dict[str, Tensor]]) -> None:
    form, path, exact = case
    weights = denoiser(path)
    net = weights.build(torch.bfloat16)
    layers, codes = stored_layers(net), Lazy.of([path]).coded
    linear = {f"{n}.weight" for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    assert {f"{n}.weight" for n in layers} == codes.keys() & linear and len(layers) > 20
    assert {layer.format.name for layer in layers.values()} == {NAMES[form]}
    held = {
        f"{n}.weight": sum(t.nbytes for name, t in layer.parts.items() if name == "codes")
        for n, layer in layers.items()
    }
    assert held == {n: weights.tensors.codes(n)[0].nbytes for n in held}
    for name, layer in layers.items():
        wanted = exact[f"{name}.weight"]
        assert layer.error is None and layer.weight.dtype == torch.bfloat16
        atol = float(wanted.abs().max())
        torch.testing.assert_close(layer.weight.float(), wanted, rtol=0, atol=atol * 2**-7)
        torch.testing.assert_close(layer.weight_in(torch.float32), wanted, rtol=0, atol=atol * 2**-20)
    # Given up, and read again.
    drop(net)
    assert all(t.is_meta for layer in layers.values() for t in layer.parts.values())
    weights.put_into(net, torch.bfloat16)
    assert {layer.format.name for layer in layers.values()} == {NAMES[form]}
    assert not any(t.is_meta for layer in layers.values() for t in layer.parts.values())


def test_what_something_is_merged_into_is_quantised_again(case: tuple[str, Path, dict[str, Tensor]]) -> None:
    _, path, exact = case
    name = "double_blocks.0.img_mlp.0"
    weights = replace(denoiser(path), changes={f"{name}.weight": lambda t, dtype: (2 * t.float()).to(dtype)})
    layer = stored_layers(weights.build(torch.float32))[name]
    assert layer.format.name == "int8"
    wanted = 2 * exact[f"{name}.weight"]
    assert (layer.weight - wanted).norm() < 0.05 * wanted.norm()


def test_what_is_asked_for_is_taken_from_the_file_where_it_is_that(case: tuple[str, Path, dict[str, Tensor]]) -> None:
    form, path, _ = case
    for choice in ("int8", "fp8"):
        found = denoiser(path)
        weights = replace(found, quantise=lambda net, choice=choice: quantise(net, FAMILY.blocks(net), choice))
        layers = stored_layers(weights.build(torch.float32)).values()
        assert {layer.error is None for layer in layers if layer.format.name == NAMES[form]} <= {True}
        assert {layer.error is None for layer in layers if layer.format.name != NAMES[form]} <= {False}


def test_pieces_of_one_weight_and_halves_that_change_places(tmp_path: Path) -> None:
    """diffusers' names: q, k and v apart, and scale before shift."""
    foreign = dict(flux.transformer().state_dict())
    plain = flux.parts()["transformer"]
    for form, write in quantised.FORMS.items():
        path, means = write(tmp_path, form, foreign)
        save(tmp_path / "wide.safetensors", means)
        wide = loading.outline_parts(FAMILY, str(tmp_path / "wide.safetensors"), Options())
        wanted = wide.source.components["denoiser"].build(torch.float32).state_dict()
        layers = stored_layers(denoiser(path).build(torch.float32))
        assert "double_blocks.0.img_attn.qkv" in layers and wanted.keys() == plain.keys()
        assert ("final_layer.adaLN_modulation.1" in layers) == ("GGUF" in form)
        for name, layer in layers.items():
            torch.testing.assert_close(layer.weight, wanted[f"{name}.weight"], rtol=0, atol=1e-6)


def test_other_formats_are_made_wide(tmp_path: Path) -> None:
    wanted = gguf_files.write(tmp_path / "a.gguf", flux.parts()["transformer"], "TQ2_0")
    weights = denoiser(tmp_path / "a.gguf")
    net = weights.build(torch.float32)
    assert weights.tensors.coded and not stored_layers(net)
    assert all(torch.equal(t, wanted[n]) for n, t in net.state_dict().items())
    count = len(weights.tensors.coded)
    assert widened(weights.tensors, kept=True) == f"{count} weights are GGUF TQ2_0"
