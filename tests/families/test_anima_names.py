"""The tables of Anima against real files, at full size, on the meta device, and against diffusers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AnimaTextConditioner, CosmosTransformer3DModel
from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers
from test_anima_net import diffusers, inputs, native
from tinies import anima
from torch import Tensor, nn

from sfumato import families
from sfumato.adapters import files as adapter_files
from sfumato.adapters import parse
from sfumato.adapters.insert import AdapterNetwork, choose
from sfumato.cli.kohya_tools import run
from sfumato.config import NetworkConfig
from sfumato.errors import UserError
from sfumato.families.anima.facts import Completed
from sfumato.families.anima.names import anima_keys, dialects
from sfumato.families.anima.net import Anima
from sfumato.formats import dialect
from sfumato.formats.files import load, save
from sfumato.models.meta_init import fill, shapes

Keys = Callable[[str], dict[str, tuple[int, ...]]]
FAMILY, FACTS = families.family("anima"), families.facts("anima")


def meta(table: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in table.items()}


# --- the denoiser ---


@pytest.mark.parametrize("blocks", [28, 36, 40])
def test_the_net_has_the_names_and_shapes_of_the_real_file(keys: Keys, blocks: int) -> None:
    """Of whatever depth. What is left is computed: the places of patches."""
    table = keys("anima.transformer") if blocks == 28 else anima.deeper(blocks)
    part = next(part for part in FAMILY.components if part.name == "denoiser")
    unused = set(part.unused_keys(list(table)))
    assert unused == {f"pos_embedder.{name}" for name in ("dim_spatial_range", "dim_temporal_range", "seq")}
    used = {name: shape for name, shape in table.items() if name not in unused}
    net = fill(Anima.of(used), meta(used), "transformer")
    assert shapes(net.state_dict()) == used
    assert (len(net.blocks), len(net.llm_adapter.blocks)) == (blocks, 6)


def test_the_table_is_whole_in_both_directions() -> None:
    """diffusers keeps the text adapter as a component of its own."""
    with torch.device("meta"):
        transformer = CosmosTransformer3DModel(
            num_attention_heads=16, attention_head_dim=128, rope_scale=(1.0, 4.0, 4.0), extra_pos_embed_type=None
        )
        text = AnimaTextConditioner().state_dict()
    foreign = shapes({**transformer.state_dict(), **{f"text_conditioner.{name}": t for name, t in text.items()}})
    assert shapes(anima_keys().to_native(meta(foreign))) == anima.plain()
    assert shapes(anima_keys().to_foreign(meta(anima.plain()))) == foreign


def test_values_go_over_and_back_unchanged() -> None:
    back = anima_keys().to_foreign(anima.tensors())
    assert back.keys() == anima.foreign().keys()
    assert all(torch.equal(back[name], t) for name, t in anima.foreign().items())


def test_values_go_where_diffusers_puts_those_of_a_single_file() -> None:
    held = {name: t for name, t in anima.tensors().items() if not name.startswith("llm_adapter.")}
    theirs = convert_cosmos_transformer_checkpoint_to_diffusers({f"net.{name}": t for name, t in held.items()})
    ours = anima_keys().to_foreign(held)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())


@pytest.mark.parametrize("name", ["mystery.weight", "blocks.3.self_attn.o_proj.weight"])
def test_a_tensor_of_no_part_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=name):
        anima_keys().to_foreign(meta({**anima.plain(), name: (1,)}))


# --- adapters ---


@pytest.fixture(scope="module")
def full_size(keys: Keys) -> dict[str, nn.Module]:
    """Nets of full size without values."""
    parts = {part.name: part for part in FAMILY.components}
    return {"denoiser": Anima.of(anima.plain()), "qwen3": parts["qwen3"].net(keys("qwen3_06b.hf"), {})}


def written(nets: Mapping[str, nn.Module], *args: str, module: str = "networks.lora_anima") -> dict[str, Tensor]:
    """What sfumato writes of an adapter of rank 4 and alpha 1 on these nets, in kohya's names."""
    network = NetworkConfig(network_module=module, network_dim=4, network_alpha=1, network_args=args)
    plan = parse(network, FACTS.network_args)
    layer = partial(FAMILY.target_layer, Completed(blocks=28), plan)
    inserted = AdapterNetwork(
        {name: choose(net, name, FAMILY.targets[name], plan, layer) for name, net in nets.items()}, seed=0
    )
    inserted.remove()
    state = {site: {**leaves, "alpha": torch.tensor(1.0)} for site, leaves in inserted.state().items()}
    return adapter_files.write(dialects()["kohya"], state)


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_adapters_have_the_names_and_shapes_of_sd_scripts(
    keys: Keys, full_size: dict[str, nn.Module], kind: str
) -> None:
    """Those of Qwen3 as well; the text adapter, modulations and ends get none unasked."""
    table = keys(f"adapter.anima.{kind}")
    module = {"lora": "networks.lora_anima", "lokr": "networks.lokr"}[kind]
    assert shapes(written(full_size, module=module)) == table
    assert len({name.split(".")[0] for name in table if name.startswith("lora_unet_")}) == 280


def test_the_text_adapter_gets_adapters_where_it_is_asked_for(full_size: dict[str, nn.Module]) -> None:
    """Ten layers in each of its six blocks, as sd-scripts' LLMAdapterTransformerBlock has them."""
    nets = {"denoiser": full_size["denoiser"]}
    more = written(nets, "train_llm_adapter=True").keys() - written(nets).keys()
    layers = {name.split(".")[0] for name in more}
    assert len(layers) == 60
    assert {"lora_unet_llm_adapter_blocks_5_mlp_2", "lora_unet_llm_adapter_blocks_0_cross_attn_o_proj"} <= layers
    assert all(name.startswith("lora_unet_llm_adapter_blocks_") for name in layers)


def test_patterns_choose_layers_that_have_none_unasked(full_size: dict[str, nn.Module]) -> None:
    """kohya's network_args of this family."""
    nets = {"denoiser": full_size["denoiser"]}
    args = (
        r"include_patterns=['.*adaln_modulation_mlp.*', 'final_layer\\.linear']",
        r"exclude_patterns=['.*cross_attn.*']",
        r"network_reg_dims=blocks\.0\..*=8",
    )
    held = written(nets, *args)
    layers = {name.split(".")[0] for name in held}
    assert len(layers) == 28 * (6 + 2) + 1
    assert held["lora_unet_blocks_0_self_attn_q_proj.lora_down.weight"].shape == (8, 2048)
    assert held["lora_unet_blocks_1_self_attn_q_proj.lora_down.weight"].shape == (4, 2048)


def test_what_a_program_has_no_names_for_is_refused() -> None:
    with pytest.raises(UserError, match="the peft names have no place for 'qwen3'"):
        dialects()["peft"].names(("qwen3", "layers.0.mlp.up_proj"))


def test_qwen3s_layers_are_named_as_comfyui_names_them() -> None:
    """As convert_anima_lora_to_comfy.py has them."""
    (name,), _ = dialects()["comfy"].names(("qwen3", "layers.3.mlp.up_proj"))
    assert name == "text_encoders.qwen3_06b.transformer.model.layers.3.mlp.up_proj"


@torch.no_grad()
def test_an_adapter_acts_the_same_in_diffusers() -> None:
    """Read by diffusers and PEFT themselves, each of its two nets its part, on every layer that may have one."""
    net, told = native(), inputs()
    plan = parse(NetworkConfig(network_dim=4, network_alpha=1, network_args=("target=all",)), FACTS.network_args)
    inserted = AdapterNetwork({"denoiser": choose(net, "denoiser", FAMILY.targets["denoiser"], plan)}, seed=0)
    g = torch.Generator().manual_seed(0)
    for leaves in inserted.state().values():
        leaves["lora_up.weight"].normal_(0, 1, generator=g)
    plain = native()(**told)
    held = {site: {**leaves, "alpha": torch.tensor(1.0)} for site, leaves in inserted.state().items()}
    sent = adapter_files.write(dialects()["peft"], held)
    transformer, text = deepcopy(anima.transformer()), deepcopy(anima.conditioner())
    for model, prefix in ((transformer, "transformer"), (text, "text_conditioner")):
        model.load_lora_adapter({name: t.clone() for name, t in sent.items()}, prefix=prefix)
    said = net(**told)
    torch.testing.assert_close(said, diffusers(told, transformer, text), atol=2e-5, rtol=2e-5)
    assert (said - plain).abs().max() > 0.1


@pytest.mark.parametrize("spelling", ["kohya", "comfy", "peft"])
def test_an_adapter_is_read_back_in_every_dialect(spelling: str) -> None:
    net = native()
    plan = parse(NetworkConfig(network_dim=2, network_alpha=2, network_args=("target=all",)), FACTS.network_args)
    inserted = AdapterNetwork({"denoiser": choose(net, "denoiser", FAMILY.targets["denoiser"], plan)}, seed=0)
    held: dict[dialect.ModulePath, dialect.AdapterTensors] = {**inserted.state()}
    paths = [("denoiser", path) for path, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    sent = adapter_files.write(dialects()[spelling], held)
    back = adapter_files.read(dialects().values(), sent, paths)
    assert back.keys() == held.keys() == set(paths)


def test_kohyas_converter_to_comfyui_knows_the_family(keys: Keys, tmp_path: Path) -> None:
    """And back, with the same values; it needs no model."""
    kohya, comfy, back = (tmp_path / f"{name}.safetensors" for name in ("kohya", "comfy", "back"))
    shown = ("lora_unet_blocks_27_", "lora_te_layers_27_")
    table = {name: shape for name, shape in keys("adapter.anima.lora").items() if name.startswith(shown)}
    g = torch.Generator().manual_seed(0)
    save(kohya, {name: torch.rand(shape, generator=g) for name, shape in table.items()}, {})
    assert run("convert_anima_lora_to_comfy", [str(kohya), str(comfy)]) == 0
    names = load(comfy).keys()
    assert "diffusion_model.blocks.27.self_attn.output_proj.lora_A.weight" in names
    assert "text_encoders.qwen3_06b.transformer.model.layers.27.mlp.down_proj.lora_B.weight" in names
    assert run("convert_anima_lora_to_comfy", ["--reverse", str(comfy), str(back)]) == 0
    one, other = load(kohya), load(back)
    assert one.keys() == other.keys()
    assert all(torch.equal(t, other[name]) for name, t in one.items())


@pytest.mark.parametrize("blocks", [36, 40])
def test_adapters_of_deeper_models_are_converted_without_the_model(tmp_path: Path, blocks: int) -> None:
    """sd-scripts' converter, which takes none, has them too."""
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    down, up = torch.ones(1, 2048), torch.ones(2048, 1)
    layers = [f"lora_unet_blocks_{i}_self_attn_q_proj" for i in (0, blocks - 1)]
    pairs = [{f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up} for layer in layers]
    save(one, pairs[0] | pairs[1], {})
    assert run("convert_anima_lora_to_comfy", [str(one), str(other)]) == 0
    assert f"diffusion_model.blocks.{blocks - 1}.self_attn.q_proj.lora_B.weight" in load(other)
