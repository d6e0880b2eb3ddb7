"""HunyuanImage-2.1's tables against the names and shapes of real files, at full size, on the meta device, and against
diffusers' and ComfyUI's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import full_size
import pytest
import torch
from adapted import inserted, places, plan_of, ranks
from diffusers import HunyuanImageTransformer2DModel
from flux_checks import change, known_to_comfyui, meta, state, with_peft
from sparse import sparse
from test_hunyuan_image_net import diffusers, each_kind, inputs, native
from tinies import hunyuan_image
from torch import nn

from sfumato.adapters import files as adapter_files
from sfumato.adapters.insert import AdapterNetwork
from sfumato.cli.kohya_tools import run
from sfumato.errors import UserError
from sfumato.families.hunyuan_image.facts import Completed
from sfumato.families.hunyuan_image.family import FAMILY
from sfumato.families.hunyuan_image.names import COMFY, transformer_keys
from sfumato.families.hunyuan_image.net import HunyuanImage
from sfumato.formats.files import load, save
from sfumato.models.base import Models
from sfumato.models.components import open_model
from sfumato.models.meta_init import check, fill, shapes
from sfumato.models.saving import single_file

Keys = Callable[[str], dict[str, tuple[int, ...]]]
each_dialect = pytest.mark.parametrize("spelling", ["kohya", "comfy", "peft"])
BASE = "hunyuan_image-base"


@each_kind
def test_the_net_has_the_names_and_shapes_of_the_real_file(distilled: bool) -> None:
    table = hunyuan_image.net(distilled=distilled)
    net = fill(HunyuanImage.of(table), meta(table), "transformer")
    assert shapes(net.state_dict()) == table
    assert (len(net.double_blocks), len(net.single_blocks), len(net.txt_in.blocks)) == (20, 40, 2)
    assert (net.axes, net.guidance_in is not None, net.time_r_in is not None) == ((64, 64), distilled, distilled)


@each_kind
def test_the_table_is_whole_in_both_directions(distilled: bool) -> None:
    """The foreign side is diffusers' own class at its own full size."""
    table = hunyuan_image.net(distilled=distilled)
    with torch.device("meta"):
        net = HunyuanImageTransformer2DModel(text_embed_2_dim=1472, guidance_embeds=distilled, use_meanflow=distilled)
    foreign = shapes(net.state_dict())
    assert shapes(transformer_keys(foreign).to_native(meta(foreign))) == table
    assert shapes(transformer_keys(table).to_foreign(meta(table))) == foreign


def test_comfyui_has_a_weight_for_every_tensor_and_no_other() -> None:
    known = {place.weight.removeprefix("diffusion_model.") for place in known_to_comfyui("hunyuan_image").values()}
    assert set(hunyuan_image.comfy(hunyuan_image.net())) == known


@each_kind
def test_values_go_over_and_back_unchanged(distilled: bool) -> None:
    foreign = hunyuan_image.transformer(distilled=distilled).state_dict()
    ours = transformer_keys(shapes(foreign)).to_native(foreign)
    again = transformer_keys(shapes(ours)).to_foreign(COMFY.to_native(COMFY.to_foreign(ours)))
    assert again.keys() == foreign.keys()
    assert all(torch.equal(again[name], t) for name, t in foreign.items())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model.model."])
@pytest.mark.parametrize("names", ["tencent", "comfy"])
def test_every_tensor_of_a_file_is_claimed_and_written_again(prefix: str, names: str, tmp_path: Path) -> None:
    """In bundles with all other nets, and alone."""
    table = hunyuan_image.whole(prefix=prefix, names=hunyuan_image.comfy if names == "comfy" else lambda table: table)
    if not prefix:
        table = {name: shape for name, shape in table.items() if not name.startswith(("text_encoders.", "vae."))}
    path = sparse(tmp_path / "model.safetensors", table)
    source = open_model(path, FAMILY.components, "", given={}, passthrough_keys=FAMILY.passthrough_keys)
    assert set(source.components) == ({"denoiser", "qwen25vl", "byt5", "vae"} if prefix else {"denoiser"})
    nets = {}
    for name, weights in source.components.items():
        net = weights.component.net(weights.shapes(), {})
        check(net, weights.shapes(), name)
        nets[name] = net.state_dict()
    passed = set(source.passthrough)
    assert all("visual." in name for name in passed)
    assert shapes(single_file(source, nets)) == table


def test_a_tensor_of_no_part_is_refused_by_name() -> None:
    table = hunyuan_image.net()
    for name in ("mystery.weight", "double_blocks.0.img_attn_qkv2.weight", "vector_in.in_layer.weight"):
        with pytest.raises(UserError, match=name):
            transformer_keys(table).to_foreign(meta({**table, name: (1,)}))
        with pytest.raises(UserError, match=name):
            fill(HunyuanImage.of({**table, name: (1,)}), meta({**table, name: (1,)}), "transformer")


# --- adapters ---


def test_adapters_have_the_names_and_shapes_of_sd_scripts(keys: Keys) -> None:
    models = full_size.models(BASE)
    plan = plan_of("hunyuan_image", network_alpha=1)
    held = AdapterNetwork({"denoiser": places(models, plan)}, seed=0)
    held.remove()
    written = adapter_files.write(models.dialects["kohya"], state(held))
    assert shapes(written) == keys("adapter.hunyuan_image.lora")
    assert len(written) == 3 * (20 * 10 + 40 * 3)


@pytest.fixture
def tiny_models() -> Models:
    return Models(FAMILY, Completed(variant="base", double_blocks=2, single_blocks=3), native(), {}, {}, None)


@each_dialect
def test_an_adapter_is_read_back_in_every_dialect(tiny_models: Models, spelling: str) -> None:
    dialects, held = tiny_models.dialects, inserted(tiny_models, plan_of("hunyuan_image", network_alpha=1))
    held.remove()
    paths = [("denoiser", p) for p, m in tiny_models.denoiser.named_modules() if isinstance(m, nn.Linear)]
    names = adapter_files.write(dialects[spelling], state(held))
    back = adapter_files.read(dialects.values(), names, paths)
    assert back.keys() == state(held).keys()
    assert all(torch.equal(change(back[site]), change(leaves)) for site, leaves in state(held).items())


def test_the_launcher_that_sd_scripts_has_converts_to_comfyuis_names(keys: Keys, tmp_path: Path) -> None:
    table = {name: shape for name, shape in keys("adapter.hunyuan_image.lora").items() if "single_blocks_7_" in name}
    tensors = {name: torch.randn(shape) for name, shape in table.items()}
    save(tmp_path / "kohya.safetensors", tensors, {})
    kohya, comfy, again = (str(tmp_path / f"{name}.safetensors") for name in ("kohya", "comfy", "again"))
    assert run("convert_hunyuan_image_lora_to_comfy", [kohya, comfy]) == 0
    known = known_to_comfyui("hunyuan_image")
    names = {
        name.removesuffix(f".{leaf}") for name in load(comfy) for leaf in ("alpha", "lora_A.weight", "lora_B.weight")
    }
    assert len({name for name in names if name in known}) == 3
    assert run("convert_hunyuan_image_lora_to_comfy", ["--reverse", comfy, again]) == 0
    back = load(again)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], t) for name, t in tensors.items())


def test_other_programs_names_are_read(tiny_models: Models) -> None:
    """kohya's prefix before ComfyUI's names, ComfyUI's before the official ones, and both of diffusers'."""
    paths = [("denoiser", p) for p, m in tiny_models.denoiser.named_modules() if isinstance(m, nn.Linear)]
    named = {
        "lora_unet_double_blocks_1_img_mlp_2": "double_blocks.1.img_mlp.fc2",
        "lora_unet_single_blocks_2_modulation_lin": "single_blocks.2.modulation.linear",
        "diffusion_model.double_blocks.0.txt_attn_proj": "double_blocks.0.txt_attn_proj",
        "diffusion_model.double_blocks.0.txt_attn.proj": "double_blocks.0.txt_attn_proj",
        "lora_transformer_single_transformer_blocks_0_proj_out": "single_blocks.0.linear2",
        "transformer.transformer_blocks.1.ff_context.net.2": "double_blocks.1.txt_mlp.fc2",
    }
    for name, path in named.items():
        tensors = {f"{name}.lora_down.weight": torch.ones(2, 3), f"{name}.lora_up.weight": torch.ones(4, 2)}
        assert [found for _, found in adapter_files.read(tiny_models.dialects.values(), tensors, paths)] == [path]


@torch.no_grad()
def test_an_adapter_acts_the_same_in_diffusers(tiny_models: Models) -> None:
    net, told = tiny_models.denoiser, inputs()
    held = inserted(tiny_models, plan_of("hunyuan_image", network_alpha=1))
    written = adapter_files.write(tiny_models.dialects["peft"], state(held))
    said = net(**told)
    held.remove()
    theirs = with_peft(hunyuan_image.transformer(), written)
    torch.testing.assert_close(said, diffusers(theirs, told), atol=1e-5, rtol=1e-5)
    assert (net(**told) - said).abs().max() > 0.02


def test_network_args_of_sd_scripts(tiny_models: Models) -> None:
    every = ranks(tiny_models)
    assert len(every) == 2 * 10 + 3 * 3 and set(every.values()) == {4}
    dims = ranks(tiny_models, "img_attn_dim=2", "txt_mlp_dim=3", "img_mod_dim=0", "single_dim=6", "single_mod_dim=0")
    assert {path: rank for path, rank in dims.items() if rank != 4} == {
        **{f"double_blocks.{i}.img_attn_{part}": 2 for i in (0, 1) for part in ("qkv", "proj")},
        **{f"double_blocks.{i}.txt_mlp.fc{j}": 3 for i in (0, 1) for j in (1, 2)},
        **{f"single_blocks.{i}.linear{j}": 6 for i in (0, 1, 2) for j in (1, 2)},
    }
    assert not [path for path in dims if "img_mod" in path or "modulation" in path]
    some = ranks(tiny_models, "train_double_block_indices=1", "train_single_block_indices=none")
    assert {path.split(".")[0] + path.split(".")[1] for path in some} == {"double_blocks1"}
    with pytest.raises(UserError, match=r"train_single_block_indices=3: the model has 3 such blocks"):
        ranks(tiny_models, "train_single_block_indices=3")
    with pytest.raises(UserError, match="split_qkv"):
        plan_of("hunyuan_image", "split_qkv=True")
