"""Files that LyCORIS and PEFT wrote themselves are read with the same effect, and ours by them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conversions import a_file, model, opened_once, outline
from lycoris import create_lycoris
from lycoris import create_lycoris_from_weights as read_by_lycoris
from lycoris.kohya import create_network_from_weights
from tinies import flux
from torch import Tensor, nn

from sfumato import adapters
from sfumato.families.flux.net import Flux
from sfumato.formats import files
from sfumato.formats.adapter_metadata import made_by, with_alphas
from sfumato.models.meta_init import fill, shapes
from sfumato.tools import adapter_file
from sfumato.tools.adapter_file import AdapterFile

LYCORIS = {
    "lora": "lora",
    "loha": "loha",
    "lokr": "lokr",
    "full": "full",
    "diag-oft": "oft",
    "boft": "boft",
    "ia3": "ia3",
}
"""Their name -> ours."""


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened_once(monkeypatch)


def native() -> Flux:
    """The tiny model's transformer, as we have it."""
    tensors = files.load(model("flux"))
    return fill(Flux.of(shapes(tensors)), tensors, "transformer")


def disturbed(module: nn.Module, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.requires_grad and "org_module" not in name:
                p.add_(0.1 * torch.randn(p.shape, generator=g))


def deltas(read: AdapterFile, net: nn.Module) -> Iterator[tuple[str, Tensor, Tensor | float]]:
    """Path of a layer in our net, and what the file adds to its weight and bias."""
    for path, tensors in read.state.items():
        layer = net.get_submodule(path[1])
        assert isinstance(layer, nn.Linear)
        adapter = adapter_file.adapter_of(path, tensors, layer.weight.detach())
        bias = adapter.delta_bias(layer.bias.detach())
        yield path[1], adapter.delta_weight(layer.weight.detach()), 0.0 if bias is None else bias


def same(module: Any, layer: Any, delta: Tensor, bias: Tensor | float) -> None:
    """What a module of LyCORIS adds to its layer's output. (Its `get_merged_weight` scales LoHa and LoKr twice.)"""
    x = torch.eye(layer.in_features)
    before = layer(x)
    module.apply_to()
    after = layer(x)
    module.restore()
    torch.testing.assert_close(after - before, delta.T + bias, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("algo", LYCORIS)
@torch.no_grad()
def test_lycoris_wrapper(tmp_path: Path, algo: str) -> None:
    """A file of `create_lycoris`, which they read again as we do. (Of (IA)3 they cannot: it is compared as it was.)"""
    net = native()
    rank = 16 if algo == "boft" else 8
    with torch.random.fork_rng():
        theirs = create_lycoris(net, 1.0, linear_dim=rank, linear_alpha=3.0, algo=algo, factor=4)
    theirs.apply_to()
    theirs.restore()
    disturbed(theirs)
    files.save(tmp_path / "one.safetensors", theirs.state_dict(), {})
    read = adapter_file.read(tmp_path / "one.safetensors", model=str(model("flux")))
    assert read.kinds == {adapters.kind(LYCORIS[algo]).__name__}
    assert made_by({}, files.load(tmp_path / "one.safetensors")).startswith("LyCORIS")
    again = theirs
    if algo != "ia3":
        again, _ = read_by_lycoris(1.0, None, net, files.load(tmp_path / "one.safetensors"))
    expected = {module.lora_name: module for module in again.loras}
    for path, delta, bias in deltas(read, net):
        same(expected.pop("lycoris_" + path.replace(".", "_")), net.get_submodule(path), delta, bias)
    assert not expected


@pytest.mark.parametrize("kind", [kind for kind in LYCORIS.values() if kind != "ia3"])
@torch.no_grad()
def test_lycoris_for_kohya_reads_ours(tmp_path: Path, kind: str) -> None:
    """`lycoris.kohya.create_network_from_weights`; of (IA)3 it can read no file, not even its own (4.1.3)."""
    net = native()
    one = a_file(tmp_path / "one.safetensors", kind)
    with torch.random.fork_rng():
        theirs, _ = create_network_from_weights(1.0, str(one), None, [], net)
    found = {module.lora_name: module for module in theirs.unet_loras}
    read = adapter_file.read(one, model=str(model("flux")))
    assert len(found) == len(read.state)
    for path, delta, bias in deltas(read, net):
        same(found["lora_unet_" + path.replace(".", "_")], net.get_submodule(path), delta, bias)


UNFUSED = ["ff.net.0.proj", "to_add_out"]
PEFT: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["to_q", "to_k", "to_v", *UNFUSED],
        rank_pattern={r"transformer_blocks\.0\.attn\.to_q": 3},
        alpha_pattern={"to_add_out": 5.0},
        init_lora_weights=False,
    ),
    "rslora": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=UNFUSED, use_rslora=True, init_lora_weights=False
    ),
    "dora": lambda: peft.LoraConfig(r=2, lora_alpha=6, target_modules=UNFUSED, use_dora=True, init_lora_weights=False),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=6, target_modules=UNFUSED, init_weights=False),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=UNFUSED, init_weights=False),
    "lokr of whole factors": lambda: peft.LoKrConfig(r=99, alpha=6, target_modules=UNFUSED, init_weights=False),
}


@pytest.mark.parametrize("name", PEFT)
def test_peft(tmp_path: Path, name: str) -> None:
    """A folder as PEFT saves it: the alphas stand in its config alone."""
    net = flux.transformer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(deepcopy(net), PEFT[name]())
    disturbed(wrapped)
    wrapped.save_pretrained(tmp_path)
    read = adapter_file.read(tmp_path, model=str(model("flux")))
    keys = outline("flux").dialects["peft"].keys["denoiser"]
    merged = wrapped.merge_and_unload().state_dict()
    before = net.state_dict()
    change = keys.to_native({name: t - before[name] for name, t in merged.items()})
    ours = native()
    checked = 0
    for path, delta, _ in deltas(read, ours):
        torch.testing.assert_close(delta, change.pop(f"{path}.weight"), atol=2e-6, rtol=1e-4)
        checked += 1
    assert checked >= 2 * len(UNFUSED)
    assert all(not t.any() for t in change.values())


def test_configs_of_diffusers_stand_in_the_metadata() -> None:
    tensors = {"transformer.a.lora_A.weight": torch.zeros(4, 2), "text_encoder.a.lora_A.weight": torch.zeros(4, 2)}
    config = {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.use_rslora": True,
        "text_encoder.r": 4,
        "text_encoder.lora_alpha": 2,
        "text_encoder.alpha_pattern": {"b": 1},
    }
    found = with_alphas(tensors, json.loads(json.dumps(config)))
    assert float(found["transformer.a.alpha"]) == 8 * math.sqrt(4)
    assert float(found["text_encoder.a.alpha"]) == 2
    assert with_alphas(tensors, {}) == tensors
    own = {**tensors, "transformer.a.alpha": torch.tensor(1.0)}
    assert float(with_alphas(own, config)["transformer.a.alpha"]) == 1, "what the file itself says counts"


@pytest.mark.parametrize(
    ("metadata", "names", "program"),
    [
        ({"ss_network_module": "networks.lora"}, (), "kohya's scripts"),
        ({"ss_network_module": "lycoris.kohya"}, (), "LyCORIS in kohya's scripts"),
        ({"ss_network_module": "networks.lora", "ss_sfumato_version": "1"}, (), "sfumato"),
        ({"software": '{"name": "ai-toolkit", "url": "..."}'}, (), "ai-toolkit"),
        ({"ot_revision": "1"}, (), "OneTrainer"),
        ({}, ("lora_transformer_x.alpha",), "OneTrainer"),
        ({}, ("base_model.model.x.lora_A.weight",), "PEFT"),
        ({"lora_adapter_metadata": "{}"}, ("transformer.x.lora_A.weight",), "diffusers"),
        ({}, ("double_blocks.0.processor.qkv_lora1.down.weight",), "diffusers or XLabs"),
        ({}, ("x.lora_A.weight",), ""),
    ],
)
def test_who_made_a_file(metadata: dict[str, str], names: tuple[str, ...], program: str) -> None:
    assert made_by(metadata, names) == program
