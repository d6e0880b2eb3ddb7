"""The tables of Stable Diffusion 3 and 3.5 against real files, at full size, on the meta device, and against diffusers' and ComfyUI's."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from test_sd3_net import diffusers, each_kind, inputs, native, tensors
from tinies import sd3
from torch import Tensor, nn

from sfumato.adapters import files as adapter_files
from sfumato.adapters import parse
from sfumato.adapters.insert import AdapterNetwork, choose
from sfumato.config import NetworkConfig
from sfumato.errors import UserError
from sfumato.families.sd3.facts import Completed
from sfumato.families.sd3.family import FAMILY
from sfumato.families.sd3.names import TARGETS, dialects, transformer_keys
from sfumato.families.sd3.net import MMDiT
from sfumato.families.sd3.network_args import NetworkArgs
from sfumato.formats import dialect
from sfumato.models.base import Models
from sfumato.models.meta_init import fill, shapes

Keys = Callable[[str], dict[str, tuple[int, ...]]]
VERSIONS = {
    "sd3_medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
    "sd3.5_medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "sd3.5_large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
}
"""What `transformer/config.json` says in the folders of the real models."""
each_version = pytest.mark.parametrize("version", VERSIONS)
each_dialect = pytest.mark.parametrize("spelling", ["kohya", "comfy", "peft"])


def meta(table: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in table.items()}


@each_version
def test_the_net_has_the_names_and_shapes_of_the_real_file(keys: Keys, version: str) -> None:
    table = keys(f"{version}.transformer")
    net = fill(MMDiT.of(table), meta(table), "transformer")
    assert shapes(net.state_dict()) == table
    assert net.largest == 2 * VERSIONS[version]["pos_embed_max_size"]
    assert [i for i, block in enumerate(net.joint_blocks) if block.x_block.attn2 is not None] == list(
        VERSIONS[version].get("dual_attention_layers", ())
    )


@each_version
def test_the_table_is_whole_in_both_directions(keys: Keys, version: str) -> None:
    table = keys(f"{version}.transformer")
    with torch.device("meta"):
        foreign = shapes(SD3Transformer2DModel(**VERSIONS[version]).state_dict())
    assert shapes(transformer_keys(foreign).to_native(meta(foreign))) == table
    assert shapes(transformer_keys(table).to_foreign(meta(table))) == foreign


@each_kind
def test_values_go_over_and_back_unchanged(kind: sd3.Kind) -> None:
    foreign = sd3.transformer(kind).state_dict()
    ours = transformer_keys(foreign).to_native(foreign)
    back = transformer_keys(ours).to_foreign(ours)
    assert back.keys() == foreign.keys()
    assert all(torch.equal(back[name], t) for name, t in foreign.items())


@each_kind
def test_values_go_where_diffusers_puts_those_of_a_single_file(kind: sd3.Kind) -> None:
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(
        {f"model.diffusion_model.{name}": t for name, t in tensors(kind).items()}
    )
    ours = transformer_keys(tensors(kind)).to_foreign(tensors(kind))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())


def test_a_tensor_of_no_part_is_refused_by_name(keys: Keys) -> None:
    table = keys("sd3_medium.transformer")
    with pytest.raises(UserError, match=r"mystery\.weight"):
        transformer_keys(table).to_foreign(meta({**table, "mystery.weight": (1,)}))
    more = {**table, "joint_blocks.23.x_block.attn.ln_q.bias": (64,)}
    with pytest.raises(UserError, match=r"joint_blocks\.23\.x_block\.attn\.ln_q\.bias"):
        fill(MMDiT.of(more), meta(more), "transformer")


# --- adapters ---


def adapters(net: MMDiT) -> AdapterNetwork:
    """LoRA of rank 4 and alpha 1 at the targets, at work, with values that change the net if it has any."""
    plan = parse(NetworkConfig(network_dim=4, network_alpha=1))
    inserted = AdapterNetwork({"denoiser": choose(net, "denoiser", TARGETS, plan)}, seed=0)
    g = torch.Generator().manual_seed(0)
    for leaves in inserted.state().values():
        if not (up := leaves["lora_up.weight"]).is_meta:
            up.normal_(0, 2, generator=g)
    return inserted


def state(inserted: AdapterNetwork) -> dict[dialect.ModulePath, dialect.AdapterTensors]:
    """As a file holds them. Adapters of layers without values have none; PEFT's names need that of alpha."""
    return {site: {**leaves, "alpha": torch.tensor(1.0)} for site, leaves in inserted.state().items()}


def change(leaves: dialect.AdapterTensors) -> Tensor:
    """The change of the layer's weight."""
    down, up = leaves["lora_down.weight"], leaves["lora_up.weight"]
    return up @ down * (leaves["alpha"] / down.shape[0])


@pytest.fixture(scope="module")
def full_size(keys: Keys) -> dict[str, nn.Module]:
    """Nets of full size without values."""
    parts = {part.name: part for part in FAMILY.components}
    tables = {"denoiser": "sd3_medium.transformer", "clip_l": "clip_l.hf", "clip_g": "clip_g.hf", "t5xxl": "t5xxl.hf"}
    return {name: parts[name].net(keys(table), {}) for name, table in tables.items()}


def chosen(nets: Mapping[str, nn.Module], *args: str) -> dict[str, Tensor]:
    """What sfumato writes of a LoRA on these nets, of rank 4 and alpha 1, in kohya's names."""
    plan = parse(NetworkConfig(network_dim=4, network_alpha=1, network_args=args), NetworkArgs)
    options = Completed(version="medium", blocks=24, has_t5="t5xxl" in nets)
    may = FAMILY.trainable(options, plan)
    layer = partial(FAMILY.target_layer, options, plan)
    places = {
        name: choose(net, name, FAMILY.targets[name], plan, layer)
        for name, net in nets.items()
        if name == "denoiser" or may is None or name in may
    }
    inserted = AdapterNetwork(places, seed=0)
    inserted.remove()
    return adapter_files.write(
        FAMILY.dialects(Models(FAMILY, options, nets["denoiser"], {}, {}, None))["kohya"], state(inserted)
    )


def test_adapters_have_the_names_and_shapes_of_sd_scripts(keys: Keys, full_size: dict[str, nn.Module]) -> None:
    """Those of both CLIPs as well; T5 gets none unasked."""
    table = keys("adapter.sd3_medium.lora")
    assert shapes(chosen(full_size)) == table
    assert sum(name.startswith("lora_unet_") for name in table) == 3 * 237


def test_t5_gets_adapters_where_it_is_asked_for(keys: Keys, full_size: dict[str, nn.Module]) -> None:
    """sd-scripts names them lora_te3_: seven layers in each of its 24 blocks."""
    more = chosen(full_size, "train_t5xxl=True").keys() - keys("adapter.sd3_medium.lora").keys()
    assert len(more) == 3 * 7 * 24
    assert "lora_te3_encoder_block_23_layer_1_DenseReluDense_wi_0.lora_up.weight" in more
    assert all(name.startswith("lora_te3_encoder_block_") for name in more)


@pytest.mark.parametrize(("component", "spelling"), [("t5xxl", "peft"), ("vae", "kohya")])
def test_what_a_program_has_no_names_for_is_refused(keys: Keys, component: str, spelling: str) -> None:
    with pytest.raises(UserError, match=f"the {spelling} names have no place for '{component}'"):
        dialects(keys("sd3_medium.transformer"))[spelling].names((component, "encoder"))


def comfyui(version: str) -> dict[str, tuple[str, list[int] | None, str | None]]:
    """Key without leaf -> the weight it is for, [0, first row, rows] of a fused weight, what is done to the change."""
    path = Path(__file__).parents[1] / "fixtures" / f"comfy.{version}.json.gz"
    known: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return {key: (value, None, None) if isinstance(value, str) else (*value, None)[:3] for key, value in known.items()}


@each_version
@each_dialect
def test_every_name_of_every_layer_is_known_to_comfyui(keys: Keys, version: str, spelling: str) -> None:
    """Each name lands on the layer's weight; those of a fused layer on its rows, one slice after another."""
    table, known = keys(f"{version}.transformer"), comfyui(version)
    adapter_dialects, last, checked = dialects(table)[spelling], VERSIONS[version]["num_layers"] - 1, 0
    swapped = (
        {"final_layer.adaLN_modulation.1", f"joint_blocks.{last}.context_block.adaLN_modulation.1"}
        if spelling == "peft"
        else set()
    )
    for path, layer in MMDiT.of(table).named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            names, _ = adapter_dialects.names(("denoiser", path))
            rows = layer.weight.shape[0] // len(names)
            slices = [[0, i * rows, rows] for i in range(len(names))] if len(names) > 1 else [None]
            function = "swap_scale_shift" if path in swapped else None
            assert [known[name] for name in names] == [
                (f"diffusion_model.{path}.weight", cut, function) for cut in slices
            ]
            checked += len(names)
    layers = {"sd3_medium": 245, "sd3.5_medium": 271, "sd3.5_large": 385}[version]
    fused = 2 * (last + 1) + (13 if version == "sd3.5_medium" else 0)
    assert checked == layers + (2 * fused if spelling == "peft" else 0)


@each_kind
@each_dialect
def test_an_adapter_is_read_back_in_every_dialect(kind: sd3.Kind, spelling: str) -> None:
    net = native(kind)
    held, adapter_dialects = state(adapters(net)), dialects(tensors(kind))
    by_path = [("denoiser", path) for path, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    back = adapter_files.read(adapter_dialects.values(), adapter_files.write(adapter_dialects[spelling], held), by_path)
    assert back.keys() == held.keys()
    for site, leaves in held.items():
        if spelling == "peft":  # alpha is multiplied into lora_up
            torch.testing.assert_close(change(back[site]), change(leaves), atol=1e-6, rtol=1e-6)
        else:
            assert back[site].keys() == leaves.keys()
            assert all(torch.equal(t, leaves[leaf]) for leaf, t in back[site].items())


@each_kind
@torch.no_grad()
def test_an_adapter_acts_the_same_in_diffusers(kind: sd3.Kind) -> None:
    """Read by diffusers and PEFT themselves; fused layers are cut, and the last text modulation is swapped."""
    net, told, theirs = native(kind), inputs(), deepcopy(sd3.transformer(kind))
    inserted = adapters(net)
    written = adapter_files.write(dialects(tensors(kind))["peft"], state(inserted))
    theirs.load_lora_adapter({name: t.clone() for name, t in written.items()}, prefix="transformer")
    said = net(**told)
    torch.testing.assert_close(said, diffusers(theirs, told), atol=1e-5, rtol=1e-5)
    inserted.remove()
    assert (net(**told) - said).abs().max() > 0.1
