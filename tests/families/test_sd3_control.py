"""ControlNets of Stable Diffusion 3 and 3.5 against diffusers' SD3ControlNetModel."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import SD3ControlNetModel
from safetensors import safe_open
from tinies import headers, sd3
from tinies.cases import Case
from torch import Tensor

from sfumato import families
from sfumato.errors import UserError
from sfumato.models.base import Models
from sfumato.models.controlled import Controlled, new_net, read_net, save_folder, save_net
from sfumato.models.meta_init import shapes

KINDS: tuple[sd3.Kind, ...] = ("medium", "3.5_medium")
H, W, STRENGTH = 8, 12, 0.7


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> sd3.Kind:
    return cast(sd3.Kind, request.param)


@pytest.fixture(scope="module")
def models(kind: sd3.Kind, tmp_path_factory: pytest.TempPathFactory) -> Models:
    case: Case = next(case for case in sd3.CASES if case.variant == kind)
    return case.models(case.write(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def theirs(kind: sd3.Kind) -> Any:
    """diffusers' net, with doors that are open."""
    transformer = deepcopy(sd3.transformer(kind))
    net: Any = SD3ControlNetModel.from_transformer(
        transformer, num_layers=2, num_extra_conditioning_channels=0, load_weights_from_transformer=False
    )
    generator = torch.Generator().manual_seed(3)
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return net.eval().requires_grad_(False)


def inputs() -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """x, t, cond, and images to follow."""
    g = torch.Generator().manual_seed(1)
    cond = {
        "context": torch.randn(2, 9, sd3.CONTEXT, generator=g),
        "y": torch.randn(2, sd3.POOLED, generator=g),
    }
    x, images = torch.randn(2, 16, H, W, generator=g), torch.rand(2, 3, 8 * H, 8 * W, generator=g)
    return x, torch.tensor([3.1, 977.0]), cond, images


def said(models: Models, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return models.predict(x, t, cond)


def test_theirs_and_ours_say_the_same(kind: sd3.Kind, models: Models, theirs: Any, tmp_path: Path) -> None:
    """Their folder in ours, ours in theirs; their pipeline gives the net no pooled text, and latents without a shift."""
    theirs.save_pretrained(tmp_path / "theirs")
    net, (x, t, cond, images) = read_net(models, str(tmp_path / "theirs")), inputs()
    follower = Controlled(models, net, STRENGTH)
    follower.follow(images)
    ours = said(models, x, t, cond)
    follower.remove()
    assert (ours - said(models, x, t, cond)).abs().max() > 1e-2
    save_folder(models, net.state_dict(), tmp_path / "ours", {})
    again = SD3ControlNetModel.from_pretrained(tmp_path / "ours")
    assert again.config.force_zeros_for_pooled_projection
    assert not [n for n, p in again.state_dict().items() if not torch.equal(p, theirs.state_dict()[n])]
    hint = models.encode_images(2 * images - 1) * sd3.vae().config.scaling_factor
    with torch.no_grad():
        residuals = again(x, hint, STRENGTH, cond["context"], torch.zeros_like(cond["y"]), t, return_dict=False)[0]
        wanted = sd3.transformer(kind)(x, cond["context"], cond["y"], t, residuals).sample
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)


def test_a_single_file_has_the_names_that_programs_look_for(models: Models, theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "theirs")
    net = read_net(models, str(tmp_path / "theirs"))
    save_net(models, net.state_dict(), tmp_path / "ours.safetensors", {})
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert set(file.keys()) == theirs.state_dict().keys()
    again = read_net(models, str(tmp_path / "ours.safetensors")).state_dict()
    assert not [name for name, t in net.state_dict().items() if not torch.equal(t, again[name])]


@pytest.mark.parametrize("model", ["sd3_medium", "sd3.5_medium", "sd3.5_large"])
def test_names_and_shapes_of_real_ones(model: str) -> None:
    """diffusers', for a net of the size that its own are of."""
    spec = families.family("sd3").control
    assert spec is not None
    wanted = spec.shapes(headers.table(f"{model}.transformer"), families.facts("sd3").options())
    with torch.device("meta"):
        theirs: Any = SD3ControlNetModel.from_config(dict(spec.config(wanted)))
    assert theirs.config.num_layers == (19 if model == "sd3.5_large" else 12)
    tensors = spec.component.net(wanted, {}).state_dict()
    assert shapes(spec.component.single(wanted).write(tensors)) == shapes(theirs.state_dict())


def test_a_new_net_is_the_first_blocks(models: Models) -> None:
    """Through doors that let all pass, its states are those of the model for a caption without pooled states."""
    net: Any = new_net(models, torch.Generator().manual_seed(1))
    assert len(net.joint_blocks) == 1
    net.controlnet_blocks[0].weight.data = torch.eye(128)
    x, t, cond, _ = inputs()
    states: list[Tensor] = []
    first = models.denoiser.get_submodule("joint_blocks.0")
    hook = first.register_forward_hook(lambda module, args, output: states.append(output[1]))
    cond["y"].zero_()
    said(models, x, t, cond)
    hook.remove()
    with torch.no_grad():
        got = net(x, t, cond["context"], cond["y"], hint=torch.ones_like(x))
    torch.testing.assert_close(got, states, atol=1e-5, rtol=1e-5)


def test_what_a_net_is_not_for_is_refused(models: Models, theirs: Any, tmp_path: Path) -> None:
    config = {name: value for name, value in theirs.config.items() if not name.startswith("_")}
    filling: Any = SD3ControlNetModel.from_config({**config, "extra_conditioning_channels": 1})
    filling.save_pretrained(tmp_path / "filling")
    with pytest.raises(UserError, match="takes 17 channels of the image to follow, not 16"):
        read_net(models, str(tmp_path / "filling"))
    pooled: Any = SD3ControlNetModel.from_config({**config, "force_zeros_for_pooled_projection": False})
    pooled.save_pretrained(tmp_path / "pooled")
    with pytest.raises(UserError, match="force_zeros_for_pooled_projection is False; True was expected"):
        read_net(models, str(tmp_path / "pooled"))
