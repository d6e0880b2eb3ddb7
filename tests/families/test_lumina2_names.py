"""The table of Lumina Image 2.0 against real files, at full size, on the meta device, and against diffusers'; the names of adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import full_size
import pytest
import torch
from adapted import inserted, places, plan_of, ranks
from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers
from test_lumina2_net import tensors
from tinies import lumina2
from torch import Tensor, nn

from sfumato.adapters import files as adapter_files
from sfumato.adapters.insert import AdapterNetwork
from sfumato.errors import UserError
from sfumato.families.lumina2.names import UNUSED, transformer_keys
from sfumato.families.lumina2.net import Lumina2
from sfumato.formats.dialect import AdapterTensors, ModulePath
from sfumato.models.base import Models
from sfumato.models.meta_init import fill, shapes

Keys = Callable[[str], dict[str, tuple[int, ...]]]
CONFIG = {"hidden_size": 2304, "cap_feat_dim": 2304}
"""What `transformer/config.json` of the real model says besides diffusers' defaults."""


def meta(table: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in table.items()}


def real(keys: Keys) -> dict[str, tuple[int, ...]]:
    table = keys("lumina2.transformer")
    assert table.pop(UNUSED) == (2304,)
    return table


def test_the_net_has_the_names_and_shapes_of_the_real_file(keys: Keys) -> None:
    table = real(keys)
    net = fill(Lumina2.of(table), meta(table), "transformer")
    assert shapes(net.state_dict()) == table
    assert net.axes == (32, 32, 32)
    attention = net.layers[0].attention
    assert isinstance(attention, nn.Module) and attention.counts == [24, 8, 8]


def test_the_table_is_whole_in_both_directions(keys: Keys) -> None:
    table = real(keys)
    with torch.device("meta"):
        foreign = shapes(Lumina2Transformer2DModel(**CONFIG).state_dict())
    assert shapes(transformer_keys(foreign).to_native(meta(foreign))) == table
    assert shapes(transformer_keys(table).to_foreign(meta(table))) == foreign


def test_values_go_over_and_back_unchanged() -> None:
    foreign = lumina2.transformer().state_dict()
    back = transformer_keys(shapes(tensors())).to_foreign(tensors())
    assert back.keys() == foreign.keys()
    assert all(torch.equal(back[name], t) for name, t in foreign.items())


def test_values_go_where_diffusers_puts_those_of_a_single_file(keys: Keys) -> None:
    """Which has the real model's rows of q, k and v in its code: here one block of each kind, of the real width."""
    table = {
        name: shape
        for name, shape in real(keys).items()
        if "attention.qkv" in name or "adaLN" in name or "norm" in name or "layers" not in name
    }
    table = {name: (*shape[:1], *(2 for _ in shape[1:])) for name, shape in table.items()}
    table |= {"layers.0.attention.out.weight": (2, 2304)}
    held = {name: torch.rand(shape) for name, shape in table.items() if ".1." not in name or "adaLN" in name}
    theirs = convert_lumina2_to_diffusers(dict(held))
    ours = transformer_keys(table).to_foreign(held)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())


def test_a_tensor_of_no_part_is_refused_by_name(keys: Keys) -> None:
    table = real(keys)
    with pytest.raises(UserError, match=r"mystery\.weight"):
        transformer_keys(table).to_foreign(meta({**table, "mystery.weight": (1,)}))
    more = {**table, "layers.3.attention.v_norm.weight": (96,)}
    with pytest.raises(UserError, match=r"layers\.3\.attention\.v_norm\.weight"):
        fill(Lumina2.of(more), meta(more), "transformer")


# --- adapters ---


@pytest.fixture(scope="module")
def usual() -> Models:
    """The model at full size, without values."""
    return full_size.models("lumina2-lumina2")


def with_alpha(held: Mapping[ModulePath, AdapterTensors]) -> dict[ModulePath, AdapterTensors]:
    return {path: {**leaves, "alpha": torch.tensor(1.0)} for path, leaves in held.items()}


def test_adapters_have_the_names_and_shapes_of_sd_scripts(keys: Keys, usual: Models) -> None:
    held = AdapterNetwork({name: places(usual, plan_of("lumina2"), name) for name in usual.nets()}, seed=0)
    held.remove()
    written = adapter_files.write(usual.dialects["kohya"], with_alpha(held.state()))
    assert shapes(written) == keys("adapter.lumina2.lora")


def test_an_adapter_is_read_back_in_every_dialect(tmp_path: Path) -> None:
    """Also in PEFT's names, which cut q, k and v of unequal rows, and have no place for Gemma."""
    files = lumina2.write(tmp_path, bundled=True)
    models = lumina2.CASES[0].models(files)
    network = inserted(models, plan_of("lumina2"), *models.nets())
    network.remove()
    held = with_alpha(network.state())
    paths = [
        (name, path)
        for name, net in models.nets().items()
        for path, m in net.named_modules()
        if isinstance(m, nn.Linear)
    ]
    for name in ("kohya", "comfy", "peft"):
        spoken = models.dialects[name]
        mine = {path: leaves for path, leaves in held.items() if spoken.holds(path)}
        assert {path[0] for path in mine} == ({"denoiser"} if name == "peft" else {"denoiser", "gemma2"})
        back = adapter_files.read(models.dialects.values(), adapter_files.write(spoken, mine), paths)
        assert back.keys() == mine.keys()
        for path, leaves in mine.items():
            torch.testing.assert_close(change(back[path]), change(leaves), atol=1e-6, rtol=1e-6)


def change(leaves: AdapterTensors) -> Tensor:
    """The change of the layer's weight."""
    down, up = leaves["lora_down.weight"], leaves["lora_up.weight"]
    return up @ down * (leaves["alpha"] / down.shape[0])


def test_diffusers_stops_at_comfyuis_names_of_a_whole_adapter(usual: Models) -> None:
    """At full size, which it has in its code: it knows neither alpha nor the last layer."""
    held = {path: leaves for path, leaves in full_size.adapter("lumina2-lumina2").items() if path[0] == "denoiser"}
    written = adapter_files.write(usual.dialects["comfy"], with_alpha(held))
    with pytest.raises(ValueError, match="should be empty"):
        Lumina2Pipeline.lora_state_dict(dict(written))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((), {"layers": {4}, "noise_refiner": {4}, "context_refiner": {4}, "final_layer": {4}}),
        (("train_blocks=all",), {"layers": {4}, "noise_refiner": {4}, "context_refiner": {4}, "final_layer": {4}}),
        (("train_blocks=transformer",), {"layers": {4}}),
        (("train_blocks=refiners",), {"noise_refiner": {4}, "context_refiner": {4}}),
        (("train_blocks=noise_refiner",), {"noise_refiner": {4}}),
        (("train_blocks=context_refiner",), {"context_refiner": {4}}),
        (("train_blocks=transformer", "attn_dim=2", "mlp_dim=3", "mod_dim=0"), {"layers": {2, 3}}),
        (
            ("attn_dim=2", "mlp_dim=2", "mod_dim=2", "refiner_dim=5"),
            {"layers": {2}, "noise_refiner": {5}, "context_refiner": {5}, "final_layer": {2, 4}},
        ),
        (("train_blocks=refiners", "attn_dim=2", "mlp_dim=0"), {"noise_refiner": {2, 4}, "context_refiner": {2}}),
        (
            ("train_blocks=noise_refiner", "embedder_dims=[1,0,3]"),
            {"noise_refiner": {4}, "x_embedder": {1}, "cap_embedder": {3}},
        ),
    ],
)  # fmt: skip
def test_network_args_choose_layers_and_ranks(
    args: tuple[str, ...], expected: dict[str, set[int]], usual: Models
) -> None:
    found: dict[str, set[int]] = {}
    for path, rank in ranks(usual, *args).items():
        found.setdefault(path.partition(".")[0], set()).add(rank)
    assert found == expected
    gemma = places(usual, plan_of("lumina2", *args), "gemma2")
    assert len(gemma) == 26 * 7 and {place.options.rank for place in gemma} == {4}, (
        "the text encoder goes by network_dim"
    )


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("train_blocks=double", "expected one of all, transformer, refiners, noise_refiner, context_refiner"),
        ("embedder_dims=[4,4]", "3 ranks, those of x_embedder, t_embedder, cap_embedder"),
        ("attn_dim=-1", "attn_dim=-1: expected 0 or more"),
    ],
)
def test_network_args_that_cannot_be_are_refused(arg: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of("lumina2", arg)
