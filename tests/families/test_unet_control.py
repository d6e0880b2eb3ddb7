"""ControlNets of U-Nets against diffusers' ControlNetModel, and against the names of real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from tinies import headers
from tinies.cases import Case, cases
from torch import Tensor

from sfumato import families
from sfumato.errors import UserError
from sfumato.families.detect import identify
from sfumato.formats.files import load, save
from sfumato.formats.names import add_prefix
from sfumato.models.base import Models, SampleInfo
from sfumato.models.controlled import Controlled, new_net, read_net, save_folder, save_net

SIZES = torch.tensor([[80, 56, 0, 0, 80, 56]] * 2)
CASES = {case.name: case for case in cases() if case.family in ("sd", "sdxl")}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def models(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return case.models(case.write(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def theirs(case: Case) -> Any:
    """diffusers' net, with doors that are open."""
    net = ControlNetModel.from_unet(case.pipeline().unet)
    generator = torch.Generator().manual_seed(3)
    for p in net.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    return net.eval().requires_grad_(False)


def inputs(models: Models) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """x, t, cond, and images to follow."""
    g = torch.Generator().manual_seed(1)
    x, images = torch.randn(2, 4, 10, 7, generator=g), torch.rand(2, 3, 80, 56, generator=g)
    with torch.no_grad():
        cond = models.condition(models.encode(models.tokenize(["a cat", "b"])), SampleInfo(sizes=SIZES))
    return x, torch.tensor([3.0, 977.0]), dict(cond), images


def said(models: Models, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return models.predict(x, t, cond)


def they_say(unet: Any, control: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor], images: Tensor) -> Tensor:
    more = {}
    if "y" in cond:  # the pooled text, and the sizes, which they embed themselves
        more = {"added_cond_kwargs": {"text_embeds": cond["y"][:, : -6 * 256], "time_ids": SIZES}}
    with torch.no_grad():
        down, middle = control(x, t, cond["hidden"], images, 0.7, return_dict=False, **more)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        prediction: Tensor = unet(x, t, cond["hidden"], **residuals, **more).sample
    return prediction


def test_theirs_and_ours_say_the_same(case: Case, models: Models, theirs: Any, tmp_path: Path) -> None:
    """Their folder in ours, ours in theirs."""
    theirs.save_pretrained(tmp_path / "theirs")
    net = read_net(models, str(tmp_path / "theirs"))
    x, t, cond, images = inputs(models)
    follower = Controlled(models, net, 0.7)
    follower.follow(images)
    ours = said(models, x, t, cond)
    follower.remove()
    assert (ours - said(models, x, t, cond)).abs().max() > 1e-2
    save_folder(models, net.state_dict(), tmp_path / "ours", {})
    again = ControlNetModel.from_pretrained(tmp_path / "ours")
    same(again.state_dict(), theirs.state_dict())
    for control in (theirs, again):
        wanted = they_say(case.pipeline().unet, control, x, t, cond, images)
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)


def test_a_file_comes_back(case: Case, models: Models, theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "theirs")
    net, file = read_net(models, str(tmp_path / "theirs")), tmp_path / "ours.safetensors"
    save_net(models, net.state_dict(), file, {})
    same(read_net(models, str(file)).state_dict(), net.state_dict())
    if case.family == "sd":  # diffusers reads the first ones' names as well
        again = ControlNetModel.from_single_file(str(file), config=str(tmp_path / "theirs"))
        same(again.state_dict(), theirs.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name, value in a.items() if not torch.equal(value, b[name])]


@pytest.mark.parametrize("case", [CASES["sdxl-base"]], indirect=True, ids=["sdxl"])
def test_one_without_transformers(case: Case, models: Models, tmp_path: Path) -> None:
    """As the small ones that there are of Stable Diffusion XL."""
    unet = case.pipeline().unet
    kept = ("block_out_channels", "attention_head_dim", "cross_attention_dim", "addition_embed_type")
    kept += ("addition_time_embed_dim", "projection_class_embeddings_input_dim", "use_linear_projection")
    small = ControlNetModel(
        **{name: unet.config[name] for name in kept}, down_block_types=("DownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2D",
    )  # fmt: skip
    for p in small.eval().parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    small.save_pretrained(tmp_path / "small")
    x, t, cond, images = inputs(models)
    follower = Controlled(models, read_net(models, str(tmp_path / "small")), 0.7)
    follower.follow(images)
    ours = said(models, x, t, cond)
    follower.remove()
    torch.testing.assert_close(ours, they_say(unet, small, x, t, cond, images), atol=1e-5, rtol=1e-5)


def test_one_of_another_model_is_refused(models: Models, theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "net")
    file = tmp_path / "net" / "diffusion_pytorch_model.safetensors"
    tensors = load(file)
    for t in [name for name in tensors if name.endswith("attn2.to_k.weight")]:
        tensors[t] = torch.cat([tensors[t], tensors[t]], 1)
    save(file, tensors)
    with pytest.raises(UserError, match=r"controlnet_model_name_or_path: .* is for another model than .*to_k\.weight"):
        read_net(models, str(file))
    save(tmp_path / "lora.safetensors", {"lora_unet_mid_block.lora_down.weight": torch.zeros(1, 1)})
    with pytest.raises(UserError, match="does not hold the ControlNet"):
        read_net(models, str(tmp_path / "lora.safetensors"))


def test_a_new_net_changes_nothing(models: Models) -> None:
    x, t, cond, images = inputs(models)
    alone = said(models, x, t, cond)
    net = new_net(models, torch.Generator().manual_seed(1))
    control = Controlled(models, net)
    control.follow(images)
    assert torch.equal(said(models, x, t, cond), alone)
    for p in net.parameters():
        p.data += 0.01
    assert not torch.equal(said(models, x, t, cond), alone)
    control.strength = 0.0
    assert torch.equal(said(models, x, t, cond), alone)
    control.remove()
    assert torch.equal(said(models, x, t, cond), alone)
    assert not models.denoiser._forward_hooks


REAL: dict[str, tuple[str, headers.Table, dict[str, Any]]] = {
    "sd1": ("sd", headers.below(headers.NET, headers.sd(1)), {"cross_attention_dim": 768}),
    "sd2": (
        "sd",
        headers.below(headers.NET, headers.sd(2)),
        {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    ),
    "sdxl": ("sdxl", headers.table("sdxl.unet"), {}),
}
"""Model -> family, U-Net, and what diffusers' own ControlNet of it is made with."""


@pytest.mark.parametrize("name", REAL)
def test_names_and_shapes_of_real_ones(name: str) -> None:
    """diffusers', of which those of Stable Diffusion XL are sd-scripts' as well; and the first ones'."""
    family, unet, made_with = REAL[name]
    spec = families.family(family).control
    assert spec is not None
    shapes = spec.shapes(unet, families.facts(family).options())
    tensors = spec.component.net(shapes, {}).state_dict()
    if made_with:
        with torch.device("meta"):
            wanted = {n: tuple(t.shape) for n, t in ControlNetModel(**made_with).state_dict().items()}
    else:
        wanted = headers.table("sdxl.controlnet")
    assert {n: tuple(t.shape) for n, t in spec.component.diffusers(shapes).write(tensors).items()} == wanted
    theirs = convert_controlnet_checkpoint(add_prefix(tensors, "control_model."), spec.config(shapes))
    if made_with:  # what diffusers makes of the first ones' names, which it reads for Stable Diffusion 1 and 2
        assert {n: tuple(t.shape) for n, t in theirs.items()} == wanted
    for prefix in ("", "control_model."):
        found = identify({prefix + n: tuple(t.shape) for n, t in tensors.items()})
        assert found and (found.family, found.kind) == (family, "controlnet")
    found = identify(wanted)
    assert found and (found.family, found.kind, found.dialect) == (family, "controlnet", "diffusers")
