"""The tables against the names and shapes of real files, at full size, on the meta device."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sparse import sparse
from torch import Tensor, nn

from sfumato.adapters import files as adapter_files
from sfumato.adapters import parse
from sfumato.adapters.insert import AdapterNetwork, choose
from sfumato.config import NetworkConfig
from sfumato.errors import UserError
from sfumato.families.sd.facts import Options
from sfumato.families.sd.family import FAMILY
from sfumato.families.sd.names import unet_keys
from sfumato.formats import dialect
from sfumato.models.base import Models
from sfumato.models.components import Checkpoint, open_model
from sfumato.models.meta_init import check, shapes
from sfumato.models.saving import single_file

Keys = Callable[[str], dict[str, tuple[int, ...]]]


def meta(table: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in table.items()}


def claimed(path: Path, table: dict[str, tuple[int, ...]]) -> Checkpoint:
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


@pytest.mark.parametrize("version", ["sd1", "sd2"])
def test_every_tensor_of_a_single_file_is_claimed_and_written_again(keys: Keys, version: str, tmp_path: Path) -> None:
    table = keys(f"{version}.single_file")
    _, source = FAMILY.complete(Options(), claimed(tmp_path, table))
    nets = {name: empty(source, name) for name in source.components}
    (text,) = (net for name, net in nets.items() if name.startswith("clip"))
    assert len(text.layers) == {"sd1": 12, "sd2": 23}[version]  # type: ignore[arg-type]
    kept = replace(source, passthrough=meta(source.passthrough.shapes))  # type: ignore[attr-defined]
    assert shapes(single_file(kept, {name: net.state_dict() for name, net in nets.items()})) == table


@pytest.mark.parametrize("version", ["sd1", "sd2"])
def test_the_unet_table_is_whole_in_both_directions(keys: Keys, version: str) -> None:
    ldm = {
        name.removeprefix("model.diffusion_model."): shape
        for name, shape in keys(f"{version}.single_file").items()
        if name.startswith("model.diffusion_model.")
    }
    diffusers = keys(f"{version}.unet.diffusers")
    assert shapes(unet_keys(diffusers).to_native(meta(diffusers))) == ldm
    assert shapes(unet_keys(ldm).to_foreign(meta(ldm))) == diffusers


def test_a_tensor_of_no_part_is_refused_by_name(keys: Keys, tmp_path: Path) -> None:
    table = keys("sd1.single_file")
    with pytest.raises(UserError, match="mystery"):
        claimed(tmp_path, {**table, "mystery.weight": (1,)})
    more = claimed(tmp_path, {**table, "model.diffusion_model.input_blocks.1.0.norm.weight": (320,)})
    with pytest.raises(UserError, match=r"input_blocks\.1\.0\.norm\.weight"):
        more.components["denoiser"].build()


def test_a_missing_tensor_is_named(keys: Keys, tmp_path: Path) -> None:
    table = keys("sd1.single_file")
    del table["model.diffusion_model.output_blocks.3.1.proj_in.bias"]
    with pytest.raises(UserError, match=r"lacks .*output_blocks\.3\.1\.proj_in\.bias"):
        claimed(tmp_path, table).components["denoiser"].build()
    del (
        table["model.diffusion_model.input_blocks.3.0.op.weight"],
        table["model.diffusion_model.input_blocks.3.0.op.bias"],
    )
    with pytest.raises(UserError, match="has input_blocks up to 11, but none numbered 3;"):
        claimed(tmp_path, table).components["denoiser"].build()


@pytest.fixture(scope="module")
def full_size(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    source = claimed(tmp_path_factory.mktemp("full"), keys("sd1.single_file"))
    return {name: empty(source, name) for name in ("denoiser", "clip_l")}


def adapter(nets: dict[str, nn.Module], *args: str) -> tuple[Models, dict[dialect.ModulePath, dialect.AdapterTensors]]:
    plan = parse(NetworkConfig(network_dim=4, network_alpha=1, network_args=args))
    places = {name: choose(net, name, FAMILY.targets[name], plan) for name, net in nets.items()}
    inserted = AdapterNetwork(places, seed=0)
    inserted.remove()
    denoiser, encoder = nets.values()
    # The layers have no values, and so their adapters have none; PEFT's names need that of alpha.
    state = {site: {**leaves, "alpha": torch.tensor(1.0)} for site, leaves in inserted.state().items()}
    return Models(FAMILY, Options(), denoiser, {"clip_l": encoder}, {}, None), state


@pytest.mark.parametrize(
    ("table", "args"), [("adapter.sd1.lora", ()), ("adapter.sd1.locon", ("conv_dim=4", "conv_alpha=1"))]
)
def test_adapters_have_the_names_and_shapes_of_sd_scripts(
    keys: Keys, full_size: dict[str, nn.Module], table: str, args: tuple[str, ...]
) -> None:
    models, state = adapter(full_size, *args)
    assert shapes(adapter_files.write(models.dialects["kohya"], state)) == keys(table)


@pytest.mark.parametrize("spelling", ["kohya", "comfy", "peft"])
def test_every_name_of_an_adapter_is_known_to_comfyui(full_size: dict[str, nn.Module], spelling: str) -> None:
    """ComfyUI's table holds the U-Net; a name lands on the tensor that the adapter is for."""
    known = json.loads(gzip.decompress((Path(__file__).parents[1] / "fixtures" / "comfy.sd1.json.gz").read_bytes()))
    models, state = adapter(full_size, "conv_dim=4")
    dialect_ = models.dialects[spelling]
    checked = 0
    for component, path in state:
        if component == "denoiser":
            (name,), _ = dialect_.names((component, path))
            if (
                spelling == "peft"
            ):  # ComfyUI lists diffusers' older names of the four projections, and takes the new ones without the prefix
                name = name.removeprefix("unet.")
                name = name if name in known else name.replace(".to_", ".processor.to_").replace(".to_out.0", ".to_out")
            assert known[name] == f"diffusion_model.{path}.weight"
            checked += 1
    assert checked == 278


@pytest.mark.parametrize("spelling", ["kohya", "comfy", "peft"])
def test_an_adapter_is_read_back_in_every_dialect(full_size: dict[str, nn.Module], spelling: str) -> None:
    models, state = adapter(full_size, "conv_dim=4")
    dialects = models.dialects
    by_path = [
        (name, p)
        for name, net in full_size.items()
        for p, layer in net.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    back = adapter_files.read(dialects.values(), adapter_files.write(dialects[spelling], state), by_path)
    assert back.keys() == state.keys()
    assert all(back[site]["lora_down.weight"] is leaves["lora_down.weight"] for site, leaves in state.items())
