"""ControlNet-LLLites: kohya's names and formulas, and nothing that a new one changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runs.test_families import says
from tinies.cases import Case, cases
from torch import Tensor, nn

from sfumato import families
from sfumato.config import LossConfig, NoiseConfig
from sfumato.errors import UserError
from sfumato.families.anima import lllite as anima
from sfumato.families.anima.facts import Options
from sfumato.families.detect import identify
from sfumato.families.sdxl import lllite as sdxl
from sfumato.formats.files import load, read_header, save
from sfumato.models.base import Models
from sfumato.models.controlled import follow_by
from sfumato.models.lllite import LiteNet
from sfumato.models.lllites import Lite, new_net, read_net, save_net
from sfumato.models.meta_init import shapes
from sfumato.sampling.sample import sample_latents

CASES = {case.name: case for case in cases() if families.family(case.family).lllite}
Keys = Callable[[str], dict[str, tuple[int, ...]]]


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def models(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Models:
    more = {"lllite_target_layers": ",".join(anima.LITE_LAYERS), "lllite_use_aspp": True, "lllite_cond_dim": 32}
    files = case.write(tmp_path_factory.mktemp("model"))
    return case.models(files, options=more if case.family == "anima" else {})


def filled(models: Models) -> LiteNet:
    """A net whose tensors are all random."""
    net = new_net(models, 8, 6, seed=1)
    for i, p in enumerate(net.parameters()):
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.3)
    return net


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def test_names_and_shapes_are_those_of_a_real_file(keys: Keys) -> None:
    prefix = "model.diffusion_model."
    unet = {n.removeprefix(prefix): s for n, s in keys("sdxl.single_file").items() if n.startswith(prefix)}
    net = sdxl.Lite.of(sdxl.sizes(unet, families.facts("sdxl").options(), 32, 64))
    assert shapes(net.state_dict()) == keys("sdxl.lllite")


def test_anima_has_the_names_that_loaders_look_for(keys: Keys) -> None:
    """Those of ComfyUI's comfy/ldm/anima/lllite.py and sd-scripts' networks/control_net_lllite_anima.py."""
    table = {n.removeprefix("net."): s for n, s in keys("anima.transformer").items()}
    made = shapes(anima.Lite.of(anima.sizes(table, Options(lllite_target_layers="self_attn_q"), 32, 64)).state_dict())
    layers = [f"lllite_dit_blocks_{i}_self_attn_q_proj" for i in range(28)]
    sizes: dict[str, tuple[int, ...]] = {
        f"{layer}.{name}": size
        for layer in layers
        for name, size in (("down", (64, 2048)), ("mid", (64, 96)), ("cond_to_film", (128, 32)), ("up", (2048, 64)))
    }
    eye = {
        "conv1": (32, 3, 4, 4), "conv2": (32, 32, 3, 3), "conv3": (64, 32, 4, 4), "proj": (32, 64, 1, 1),
        "resblocks.0.conv1": (64, 64, 3, 3), "resblocks.0.conv2": (64, 64, 3, 3), "resblocks.0.norm1": (64,),
        "resblocks.0.norm2": (64,), "norm1": (32,), "norm2": (32,), "norm3": (64,), "out_norm": (32,),
    }  # fmt: skip
    sizes |= {f"lllite_conditioning1.{name}": size for name, size in eye.items()}
    wanted = {f"{name}.weight": size for name, size in sizes.items()}
    wanted |= {f"{name}.bias": size[:1] for name, size in sizes.items()}
    assert made == wanted | {f"{layer}.depth_embed": (32,) for layer in layers}
    told = anima.metadata(made)
    assert (told["lllite.version"], told["lllite.cond_emb_dim"], told["lllite.mlp_dim"]) == ("2", "32", "64")
    assert (told["lllite.target_atomics"], told["lllite.use_aspp"]) == ("self_attn_q_pre", "false")
    found = identify(made)
    assert found and (found.family, found.kind, found.dialect) == ("anima", "controlnet", "lllite")


def test_a_new_net_and_one_of_strength_0_change_no_bit(models: Models) -> None:
    alone = says(models)
    for net, strength in ((new_net(models, 8, 6, seed=1), 1.0), (filled(models), 0.0)):
        lite = Lite(models, net, strength)
        lite.follow(images())
        assert torch.equal(says(models), alone)
        lite.remove()
    lite = Lite(models, filled(models))
    assert torch.equal(says(models), alone)  # no image
    lite.follow(images())
    assert (says(models) - alone).abs().max() > 1e-3
    lite.remove()
    assert torch.equal(says(models), alone)


def linear(t: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])


def of_sdxl(t: Mapping[str, Tensor], name: str, image: Tensor, x: Tensor) -> Tensor:
    """What ControlNet-LLLite-ComfyUI adds to x."""
    seen = image * 2 - 1
    for i in (0, 2, 4):
        if f"{name}.conditioning1.{i}.weight" in t:
            weight = t[f"{name}.conditioning1.{i}.weight"]
            seen = F.conv2d(F.relu(seen) if i else seen, weight, t[f"{name}.conditioning1.{i}.bias"], weight.shape[-1])
    both = torch.cat([seen.flatten(2).permute(0, 2, 1), F.relu(linear(t, f"{name}.down.0", x))], 2)
    return linear(t, f"{name}.up.0", F.relu(linear(t, f"{name}.mid.0", both)))


def normed(t: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 8, t[f"{name}.weight"], t[f"{name}.bias"])


def conv(t: Mapping[str, Tensor], name: str, x: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    weight = t[f"{name}.weight"]
    padding = dilation if weight.shape[-1] == 3 else 0
    return F.conv2d(x, weight, t[f"{name}.bias"], stride, padding, dilation)


def of_anima(t: Mapping[str, Tensor], name: str, image: Tensor, x: Tensor) -> Tensor:
    """What ComfyUI's AnimaLLLiteModule adds to x."""
    t = {key.removeprefix("lllite_conditioning1."): tensor for key, tensor in t.items()}
    c = F.silu(normed(t, "norm1", conv(t, "conv1", image * 2 - 1, stride=4)))
    c = F.silu(normed(t, "norm2", conv(t, "conv2", c)))
    c = F.silu(normed(t, "norm3", conv(t, "conv3", c, stride=4)))
    h = conv(t, "resblocks.0.conv1", F.silu(normed(t, "resblocks.0.norm1", c)))
    c = c + conv(t, "resblocks.0.conv2", F.silu(normed(t, "resblocks.0.norm2", h)))
    seen = [conv(t, f"aspp.branches.{i}.0", c, dilation=d) for i, d in enumerate((1, 2, 4, 8))]
    seen = [F.silu(normed(t, f"aspp.branches.{i}.1", s)) for i, s in enumerate(seen)]
    mean = F.silu(normed(t, "aspp.global_conv.1", conv(t, "aspp.global_conv.0", F.adaptive_avg_pool2d(c, 1))))
    seen += [F.interpolate(mean, c.shape[-2:], mode="bilinear")]
    c = conv(t, "proj", F.silu(normed(t, "aspp.proj.1", conv(t, "aspp.proj.0", torch.cat(seen, 1)))))
    c = F.layer_norm(c.flatten(2).transpose(1, 2), c.shape[1:2], t["out_norm.weight"], t["out_norm.bias"])
    c = c + t[f"{name}.depth_embed"]
    gamma, beta = linear(t, f"{name}.cond_to_film", c).chunk(2, -1)
    m = linear(t, f"{name}.mid", torch.cat((c, F.silu(linear(t, f"{name}.down", x))), -1))
    return linear(t, f"{name}.up", F.silu(m * (1 + gamma) + beta))


FORMULAS = {"sdxl": ("lllite_unet_", of_sdxl), "anima": ("lllite_dit_", of_anima)}


def test_layers_are_given_what_the_formula_says(case: Case, models: Models, tmp_path: Path) -> None:
    """Computed anew from the tensors of a file; of two samples with one image, as guidance asks for them."""
    save_net(models, filled(models), tmp_path / "net.safetensors", metadata={"a": "b"})
    assert read_header(tmp_path / "net.safetensors").metadata["a"] == "b"
    tensors, given, changed = load(tmp_path / "net.safetensors"), dict[str, Tensor](), dict[str, Tensor]()

    def seen(where: dict[str, Tensor], path: str) -> Any:
        layer = models.denoiser.get_submodule(path)
        return layer.register_forward_pre_hook(lambda _, args: where.__setitem__(path, args[0]))

    linears = [path for path, m in models.denoiser.named_modules() if isinstance(m, nn.Linear)]
    handles = [seen(given, path) for path in linears]
    lite = Lite(models, read_net(models, tmp_path / "net.safetensors"), 0.5)
    handles += [seen(changed, path) for path in linears]
    lite.follow(images(1))
    says(models)
    prefix, formula = FORMULAS[case.family]
    names = {name.partition(".")[0] for name in tensors if name.startswith(prefix)}
    assert names == {prefix + path.replace(".", "_") for path in lite.parts}
    for path in linears:
        name, x = prefix + path.replace(".", "_"), given[path]
        wanted = x + 0.5 * formula(tensors, name, images(1).repeat(2, 1, 1, 1), x) if name in names else x
        torch.testing.assert_close(changed[path], wanted, atol=1e-5, rtol=1e-5)
    for handle in handles:
        handle.remove()
    lite.remove()


def test_files_of_other_kinds_are_refused(case: Case, models: Models, tmp_path: Path) -> None:
    path, good = tmp_path / "net.safetensors", filled(models).state_dict()
    name = next(name for name in good if ".up." in name and name.endswith("weight"))
    part = name.partition(".")[0]
    wrong: dict[str, dict[str, Tensor]] = {
        r"net\.safetensors: is not a ControlNet-LLLite": {"some.weight": torch.ones(1)},
        "expected": {**good, name: torch.ones(good[name].shape[0], 5)},
        "no such layer": {n.replace(part, f"{part}x"): t for n, t in good.items()},
        "lacks the tensor": {n: t for n, t in good.items() if n != name.replace("weight", "bias")},
    }
    for message, tensors in wrong.items():
        save(path, tensors)
        with pytest.raises(UserError, match=message):
            read_net(models, path)
    if case.family == "anima":
        save(path, good, {"lllite.version": "3"})
        with pytest.raises(UserError, match="version 3"):
            read_net(models, path)


def test_samples_follow_it(case: Case, models: Models, tmp_path: Path) -> None:
    """Of a size that the U-Net rounds up on its way down, too; strength 0 changes no bit."""
    save_net(models, filled(models), tmp_path / "net.safetensors", metadata={})
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    prompt = replace(case.prompt, width=48, height=32, sample_steps=1)
    followed = replace(prompt, controlnet_image=str(tmp_path / "a.png"))

    def sampled(strength: float | None, *prompts: Any) -> list[Tensor]:
        if strength is not None:
            follow_by(models, str(tmp_path / "net.safetensors"), strength)
        process = models.process(NoiseConfig(), LossConfig())
        found = sample_latents(models, prompts, process=process, sampler="euler", batch_size=2)
        for follower in models.followers:
            follower.remove()
        models.followers.clear()
        return found

    (alone,) = sampled(None, prompt)
    (without,) = sampled(0.0, followed)
    assert torch.equal(without, alone)
    one, other = sampled(0.7, followed, prompt)
    assert torch.equal(other, alone)
    assert (one - alone).abs().max() > 1e-3
