"""ControlNets of FLUX.1 against diffusers' FluxControlNetModel, and against the names of a real file of sd-scripts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import FluxControlNetModel, FluxPipeline
from tinies import flux, headers
from tinies.cases import Case
from tinies.encoders import L_WIDTH, T5_WIDTH
from torch import Tensor

from sfumato import families
from sfumato.errors import UserError
from sfumato.families.flux.control import spread
from sfumato.models.base import Models
from sfumato.models.controlled import Controlled, new_net, read_net, save_folder, save_net
from sfumato.models.meta_init import shapes

H, W, TOKENS, STRENGTH = 8, 12, 9, 0.7
KINDS = {"pixels": (16, 0), "latents": (None, 2)}
"""What it follows -> channels of the convolutions, single blocks."""


class Told(NamedTuple):
    x: Tensor
    t: Tensor
    cond: dict[str, Tensor]
    images: Tensor


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    case: Case = next(case for case in flux.CASES if case.variant == "dev")
    return case.models(case.write(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module", params=KINDS)
def theirs(request: pytest.FixtureRequest) -> Any:
    """diffusers' net, with doors that are open."""
    hint, single = KINDS[request.param]
    made: Any = FluxControlNetModel.from_transformer(
        flux.transformer(), num_layers=1, num_single_layers=single, attention_head_dim=flux.HEAD, num_attention_heads=2
    )
    config = {**made.config, "conditioning_embedding_channels": hint, "patch_size": 2 if hint else 1}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net: Any = FluxControlNetModel.from_config(config)
        for p in net.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return net.eval().requires_grad_(False)


def told() -> Told:
    g = torch.Generator().manual_seed(1)
    cond = {
        "t5": torch.randn(2, TOKENS, T5_WIDTH, generator=g),
        "pooled": torch.randn(2, L_WIDTH, generator=g),
        "guidance": torch.tensor([1.0, 3.5]),
    }
    x, images = torch.randn(2, 16, H, W, generator=g), torch.rand(2, 3, 8 * H, 8 * W, generator=g)
    return Told(x, torch.tensor([3.1, 977.0]), cond, images)


def said(models: Models, what: Told) -> Tensor:
    with torch.no_grad():
        return models.predict(what.x, what.t, what.cond)


def they_say(models: Models, control: Any, what: Told) -> Tensor:
    """What diffusers' pipeline has its nets say."""
    packed = FluxPipeline._pack_latents(what.x, *what.x.shape)
    common = {
        "hidden_states": packed,
        "encoder_hidden_states": what.cond["t5"],
        "pooled_projections": what.cond["pooled"],
        "timestep": what.t / 1000,
        "img_ids": FluxPipeline._prepare_latent_image_ids(2, H // 2, W // 2, "cpu", torch.float32),
        "txt_ids": torch.zeros(TOKENS, 3),
        "guidance": what.cond["guidance"],
    }
    around = control.input_hint_block is not None
    hint = 2 * what.images - 1
    if not around:
        hint = models.scaled(models.encode_images(hint))
        hint = FluxPipeline._pack_latents(hint, *hint.shape)
    with torch.no_grad():
        double, single = control(controlnet_cond=hint, conditioning_scale=STRENGTH, return_dict=False, **common)
        answer = flux.transformer()(
            controlnet_block_samples=double, controlnet_single_block_samples=single, controlnet_blocks_repeat=around,
            **common,
        ).sample  # fmt: skip
    return FluxPipeline._unpack_latents(answer, 8 * H, 8 * W, 8)


def test_theirs_and_ours_say_the_same(models: Models, theirs: Any, tmp_path: Path) -> None:
    """Their folder in ours, ours in theirs, and a file of ours."""
    theirs.save_pretrained(tmp_path / "theirs")
    net, what = read_net(models, str(tmp_path / "theirs")), told()
    follower = Controlled(models, net, STRENGTH)
    follower.follow(what.images)
    ours = said(models, what)
    follower.remove()
    assert (ours - said(models, what)).abs().max() > 1e-2
    save_folder(models, net.state_dict(), tmp_path / "ours", {})
    again = FluxControlNetModel.from_pretrained(tmp_path / "ours")
    same(again.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours, they_say(models, again, what), atol=1e-5, rtol=1e-5)
    save_net(models, net.state_dict(), tmp_path / "ours.safetensors", {})
    same(read_net(models, str(tmp_path / "ours.safetensors")).state_dict(), net.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name, value in a.items() if not torch.equal(value, b[name])]


@pytest.mark.parametrize("model", ["flux_dev", "flux_schnell"])
@pytest.mark.parametrize("latents", [False, True], ids=["pixels", "latents"])
def test_names_and_shapes_of_real_ones(model: str, latents: bool) -> None:
    """sd-scripts' where pixels are followed, and diffusers'."""
    spec = families.family("flux").control
    assert spec is not None
    options = families.facts("flux").options(controlnet_latents=latents, controlnet_single_blocks=int(latents))
    wanted = spec.shapes(headers.table(f"{model}.transformer"), options)
    tensors = spec.component.net(wanted, {}).state_dict()
    if model == "flux_dev" and not latents:
        assert shapes(spec.component.single(wanted).write(tensors)) == headers.table("flux.controlnet")
    with torch.device("meta"):
        theirs: Any = FluxControlNetModel.from_config(dict(spec.config(wanted)))
    assert shapes(spec.component.diffusers(wanted).write(tensors)) == shapes(theirs.state_dict())


@pytest.mark.parametrize(
    ("settings", "blocks"),
    [({}, 2), ({"controlnet_latents": True, "controlnet_single_blocks": 3}, 5)],
    ids=["pixels", "latents"],
)
def test_a_new_net_is_the_first_blocks(models: Models, settings: dict[str, Any], blocks: int) -> None:
    """Through doors that let all pass, its states are those of the model; as they are at first, it changes nothing."""
    what, made = told(), replace(models, options=replace(models.options, **settings), followers=[])
    net: Any = new_net(made, torch.Generator().manual_seed(1))
    follower = Controlled(made, net)
    follower.follow(what.images)
    followed = said(models, what)
    follower.remove()
    states: list[Tensor] = []

    def keep(module: Any, args: Any, out: Any) -> None:
        states.append(out[0] if isinstance(out, tuple) else out[:, TOKENS:])

    hooks = [block.register_forward_hook(keep) for block in models.family.blocks(models.denoiser)[:blocks]]
    assert torch.equal(said(models, what), followed)
    for hook in hooks:
        hook.remove()
    for door in net.doors():
        door.weight.data = torch.eye(len(door.weight))
    hint, cond = torch.ones_like(what.x) if settings else what.images, what.cond
    with torch.no_grad():
        got = net(what.x, what.t / 1000, cond["t5"], cond["pooled"], cond["guidance"], hint=hint)
    torch.testing.assert_close(got, states, atol=1e-5, rtol=1e-5)
    spec = models.family.control
    assert spec is not None
    assert spec.component.single(shapes(net.state_dict())).name == ("diffusers" if settings else "native")


def test_what_a_net_is_not_for_is_refused(models: Models, tmp_path: Path) -> None:
    small = FluxControlNetModel(
        num_layers=1, num_single_layers=0, attention_head_dim=flux.HEAD, num_attention_heads=1,
        joint_attention_dim=T5_WIDTH, pooled_projection_dim=L_WIDTH, axes_dims_rope=flux.AXES, num_mode=3,
    )  # fmt: skip
    small.save_pretrained(tmp_path / "union")
    with pytest.raises(UserError, match=r"union"):
        read_net(models, str(tmp_path / "union"))
    small.controlnet_mode_embedder = None
    small.register_to_config(num_mode=None)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match=r"is for another model"):
        Controlled(models, read_net(models, str(tmp_path / "small")))


@pytest.mark.parametrize(("kind", "most"), [("double_blocks", 2), ("single_blocks", 3)])
def test_more_blocks_than_there_are_are_refused(models: Models, kind: str, most: int) -> None:
    options = replace(models.options, **{f"controlnet_{kind}": most + 1})
    with pytest.raises(UserError, match=f"controlnet_{kind}: {most + 1}; the model has {most}"):
        new_net(replace(models, options=options), torch.Generator())


def test_which_residual_each_block_gets() -> None:
    assert spread(19, 2, True) == [0, 1] * 9 + [0]
    assert spread(19, 2, False) == [0] * 10 + [1] * 9
    assert spread(38, 0, False) == []
