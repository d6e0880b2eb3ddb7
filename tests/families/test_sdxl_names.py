"""The tables of Stable Diffusion XL against the names and shapes of real files, at full size, on the meta device."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from sparse import sparse
from tinies import sdxl
from torch import Tensor, nn

from sfumato.adapters import files as adapter_files
from sfumato.adapters import parse
from sfumato.adapters.insert import AdapterNetwork, choose
from sfumato.config import NetworkConfig
from sfumato.errors import UserError
from sfumato.families.sdxl.facts import Options
from sfumato.families.sdxl.family import FAMILY
from sfumato.families.sdxl.folder import transformer_layers, unet_config
from sfumato.families.sdxl.names import CLIP_G, PASSTHROUGH, unet_keys
from sfumato.formats.dialect import AdapterTensors, Dialect, ModulePath
from sfumato.models.base import Models
from sfumato.models.components import Checkpoint, open_model
from sfumato.models.detection import PREFIX
from sfumato.models.meta_init import check, shapes
from sfumato.models.saving import single_file

Shapes = dict[str, tuple[int, ...]]
Keys = Callable[[str], Shapes]


def meta(table: Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in table.items()}


def claimed(path: Path, table: Shapes) -> Checkpoint:
    """A file of full size with these tensors, as it is opened; no value is read."""
    return open_model(
        sparse(path / "model.safetensors", table),
        FAMILY.components,
        FAMILY.title,
        given={},
        passthrough_keys=FAMILY.passthrough_keys,
    )


@pytest.fixture(scope="module")
def source(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return claimed(tmp_path_factory.mktemp("full"), keys("sdxl.single_file"))


@pytest.fixture(scope="module")
def nets(source: Checkpoint) -> dict[str, nn.Module]:
    """The nets of full size, without values."""
    made = {name: held.component.net(held.shapes(), {}) for name, held in source.components.items()}
    for name, net in made.items():
        check(net, source.components[name].shapes(), name)
    return made


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """diffusers' net as the published config has it."""
    with torch.device("meta"):
        return UNet2DConditionModel(**PUBLISHED)


PUBLISHED = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}


def test_the_config_of_a_new_folder_is_the_published_one(keys: Keys) -> None:
    made = unet_config(keys("sdxl.unet"))
    assert {name: made[name] for name in PUBLISHED} == PUBLISHED
    assert transformer_layers(unet_keys(names := sdxl.unet(refiner=True).state_dict()).to_native(names).keys()) == [
        1,
        2,
        2,
        1,
    ]  # type: ignore[arg-type]


def test_the_unet_table_is_whole_in_both_directions(keys: Keys, theirs: nn.Module) -> None:
    native, foreign = keys("sdxl.unet"), shapes(theirs.state_dict())
    assert shapes(unet_keys(native).to_foreign(meta(native))) == foreign
    assert shapes(unet_keys(foreign).to_native(meta(foreign))) == native


@pytest.mark.parametrize("refiner", [False, True])
def test_values_come_back_bit_for_bit(refiner: bool) -> None:
    tensors = sdxl.unet(refiner=refiner).state_dict()
    native = unet_keys(tensors).to_native(tensors)
    back = unet_keys(native).to_foreign(native)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], t) for name, t in tensors.items())


def test_every_tensor_of_a_single_file_is_claimed_and_written_again(
    keys: Keys, source: Checkpoint, nets: dict[str, nn.Module]
) -> None:
    _, complete = FAMILY.complete(Options(), source)
    assert set(complete.components) == {"denoiser", "clip_l", "clip_g", "vae"}
    assert list(source.passthrough) == [f"{CLIP_G}logit_scale"]
    assert [len(nets[name].layers) for name in ("clip_l", "clip_g")] == [12, 32]  # type: ignore[arg-type]
    kept = replace(complete, passthrough=meta(source.passthrough.shapes))  # type: ignore[attr-defined]
    assert shapes(single_file(kept, {name: net.state_dict() for name, net in nets.items()})) == keys("sdxl.single_file")


@pytest.mark.parametrize(("name", "table"), [("clip_l", "clip_l.hf"), ("clip_g", "clip_g.hf")])
def test_folders_hold_the_text_encoders_of_transformers(
    keys: Keys, nets: dict[str, nn.Module], name: str, table: str
) -> None:
    """The table of CLIP-L has a projection, which SDXL does not use and its folders do not hold."""
    part = next(part for part in FAMILY.components if part.name == name)
    held = nets[name].state_dict()
    wanted = {k: v for k, v in keys(table).items() if name == "clip_g" or k != "text_projection.weight"}
    assert shapes(part.diffusers(shapes(held)).write(held)) == wanted


@pytest.mark.parametrize(
    "name",
    [
        "alphas_cumprod",
        "denoiser.sigmas",
        "model_ema.decay",
        "v_pred",
        "ztsnr",
        "first_stage_model.loss.logvar",
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.0.transformer.text_projection.weight",
        "conditioner.embedders.0.logit_scale",
        "conditioner.embedders.1.logit_scale",
        "conditioner.embedders.1.model.attn_mask",
        "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids",
    ],
)
def test_tensors_that_programs_leave_beside_the_nets_are_kept(name: str) -> None:
    assert PASSTHROUGH.fullmatch(name)


@pytest.mark.parametrize(
    "name", ["conditioner.embedders.1.model.text_projection", "cond_stage_model.logit_scale", "edm_vpred.sigma_max"]
)
def test_what_is_of_a_net_or_of_another_model_is_not_kept(name: str) -> None:
    """bigG's projection is used; a model of another noise process must not pass for one of this."""
    assert not PASSTHROUGH.fullmatch(name)


def test_what_does_not_fit_is_named(keys: Keys, tmp_path: Path) -> None:
    table = keys("sdxl.single_file")
    with pytest.raises(UserError, match="mystery"):
        claimed(tmp_path, {**table, "mystery.weight": (1,)})
    with pytest.raises(UserError, match=r"no rule names the tensor 'label_emb\.1\.0\.weight'"):
        unet_keys(keys("sdxl.unet")).to_foreign(meta({**keys("sdxl.unet"), "label_emb.1.0.weight": (1,)}))
    del table[f"{PREFIX}output_blocks.0.1.transformer_blocks.9.attn2.to_v.weight"]
    with pytest.raises(UserError, match=r"lacks the tensor 'output_blocks\.0\.1\.transformer_blocks\.9\.attn2\.to_v"):
        claimed(tmp_path, table).components["denoiser"].build()


# --- adapters ---


def adapter(
    nets: dict[str, nn.Module], *args: str, kind: str = "lora"
) -> tuple[Models, dict[ModulePath, AdapterTensors]]:
    plan = parse(NetworkConfig(network_module=f"networks.{kind}", network_dim=4, network_alpha=1, network_args=args))
    places = {name: choose(nets[name], name, FAMILY.targets[name], plan) for name in ("denoiser", "clip_l", "clip_g")}
    inserted = AdapterNetwork(places, seed=0)
    inserted.remove()
    # The layers have no values, and so their adapters have none; PEFT's names need that of alpha.
    state = {site: {**leaves, "alpha": torch.tensor(1.0)} for site, leaves in inserted.state().items()}
    return Models(
        FAMILY, Options(), nets["denoiser"], {name: nets[name] for name in ("clip_l", "clip_g")}, {}, None
    ), state


CONV = ("conv_dim=4", "conv_alpha=1")
IN_RESBLOCKS = re.compile(r"lora_unet_.*_(emb_layers_1|skip_connection)\..*")


@pytest.mark.parametrize(("table", "args", "surplus"), [("adapter.sdxl.locon", CONV, 0), ("adapter.sdxl.lora", (), 28)])
def test_adapters_have_the_names_and_shapes_of_sd_scripts(
    keys: Keys, nets: dict[str, nn.Module], table: str, args: tuple[str, ...], surplus: int
) -> None:
    """The table without convolutions was made in a process that had made the other, after which sd-scripts does not
    forget the ResBlocks (`+=` on a list of the class); made alone, it has 722 layers in the U-Net."""
    wanted = keys(table)
    odd = [name for name in wanted if surplus and IN_RESBLOCKS.fullmatch(name)]
    assert len(odd) == 3 * surplus
    models, state = adapter(nets, *args)
    layers = {name: sum(component == name for component, _ in state) for name in nets if name != "vae"}
    assert layers == {"denoiser": 788 if args else 722, "clip_l": 12 * 6, "clip_g": 32 * 6}
    assert shapes(adapter_files.write(models.dialects["kohya"], state)) == {
        k: v for k, v in wanted.items() if k not in odd
    }


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_other_kinds_have_the_names_and_shapes_of_sd_scripts(keys: Keys, nets: dict[str, nn.Module], kind: str) -> None:
    models, state = adapter(nets, *CONV, "use_tucker=True", kind=kind)
    assert shapes(adapter_files.write(models.dialects["kohya"], state)) == keys(f"adapter.sdxl.{kind}")


def test_linear_targets_are_the_layers_of_diffusers_transformers(nets: dict[str, nn.Module], theirs: nn.Module) -> None:
    """sd-scripts chooses by the class `Transformer2DModel`."""
    wanted = {
        f"{path}.{below}"
        for path, part in theirs.named_modules()
        if type(part).__name__ == "Transformer2DModel"
        for below, layer in part.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    table = unet_keys(nets["denoiser"].state_dict())
    _, state = adapter(nets)
    assert {
        table.match(path, native=True).foreign()[0] for component, path in state if component == "denoiser"
    } == wanted


SPELLINGS = ["kohya", "kohya of diffusers", "comfy", "peft"]


def named(models: Models, spelling: str) -> Dialect:
    """A dialect; kohya's may also be built on diffusers' paths."""
    if spelling != "kohya of diffusers":
        return models.dialects[spelling]
    return replace(models.dialects["kohya"], keys=models.dialects["peft"].keys)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_name_of_an_adapter_is_known_to_comfyui(nets: dict[str, nn.Module], spelling: str) -> None:
    """ComfyUI's table holds the U-Net; a name lands on the tensor that the adapter is for."""
    known = json.loads(gzip.decompress((Path(__file__).parents[1] / "fixtures" / "comfy.sdxl.json.gz").read_bytes()))
    models, _ = adapter(nets)
    adapter_dialects = named(models, spelling)
    every = [path for path, layer in nets["denoiser"].named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    for path in every:
        (name,), _ = adapter_dialects.names(("denoiser", path))
        if spelling == "peft" and ".attn" in name:  # the table has only diffusers' older names of the four projections
            name = name.replace(".to_", ".processor.to_").removesuffix(".0")
        assert known[name] == f"diffusion_model.{path}.weight"
    assert len(every) == 794


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_adapter_is_read_back_in_every_dialect(nets: dict[str, nn.Module], spelling: str) -> None:
    models, state = adapter(nets, *CONV)
    dialects = models.dialects
    by_path = [
        (c, path)
        for c, net in models.nets().items()
        for path, layer in net.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    back = adapter_files.read(dialects.values(), adapter_files.write(named(models, spelling), state), by_path)
    assert back.keys() == state.keys()
    assert all(back[site]["lora_down.weight"] is leaves["lora_down.weight"] for site, leaves in state.items())
