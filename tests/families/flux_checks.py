"""What the tests of FLUX.1 and of Chroma share."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sfumato.adapters import parse
from sfumato.adapters.insert import AdapterNetwork, choose
from sfumato.config import NetworkConfig
from sfumato.families.flux.names import TARGETS
from sfumato.formats.dialect import AdapterTensors, Dialect, ModulePath
from sfumato.formats.names import KeyMap

LEAVES = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


def meta(table: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in table.items()}


def within(got: Mapping[str, Tensor], want: Mapping[str, Tensor], part: float = 1e-5) -> None:
    """Every tensor is known to a small part of its own largest value, however small that is."""
    assert got.keys() == want.keys()
    for name, t in want.items():
        largest = t.abs().max()
        assert 0 < largest < torch.inf, name
        torch.testing.assert_close(
            got[name] / largest, t / largest, atol=part, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def dialects(keys: KeyMap) -> dict[str, Dialect]:
    """The transformer's part of a family's dialects."""
    return {
        "kohya": Dialect(name="kohya", prefix={"denoiser": "lora_unet_"}, separator="_"),
        "comfy": Dialect(name="comfy", prefix={"denoiser": "diffusion_model."}, tensor_names=LEAVES),
        "peft": Dialect(
            name="peft",
            prefix={"denoiser": "transformer."},
            keys={"denoiser": keys},
            tensor_names=LEAVES,
            fold_alpha=True,
        ),
    }


def adapters(net: nn.Module) -> AdapterNetwork:
    """LoRA of rank 4 and alpha 1 at the targets, at work, with values that change the net if it has any."""
    plan = parse(NetworkConfig(network_dim=4, network_alpha=1))
    inserted = AdapterNetwork({"denoiser": choose(net, "denoiser", TARGETS, plan)}, seed=0)
    g = torch.Generator().manual_seed(0)
    for leaves in inserted.state().values():
        up = leaves["lora_up.weight"]
        if not up.is_meta:
            up.detach().copy_(0.5 * torch.randn(up.shape, generator=g))
    return inserted


def state(inserted: AdapterNetwork) -> dict[ModulePath, AdapterTensors]:
    """As a file holds them. Adapters of layers without values have none; PEFT's names need that of alpha."""
    return {site: {**leaves, "alpha": torch.tensor(1.0)} for site, leaves in inserted.state().items()}


def change(leaves: AdapterTensors) -> Tensor:
    """The change of the layer's weight."""
    down, up = leaves["lora_down.weight"], leaves["lora_up.weight"]
    return up @ down * (leaves["alpha"] / down.shape[0])


def with_peft(model: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A copy of diffusers' model with this adapter file, read by diffusers and PEFT themselves."""
    model = deepcopy(model)
    model.load_lora_adapter({name: t.detach().clone() for name, t in tensors.items()}, prefix="transformer")
    return model


class TargetLayer(NamedTuple):
    """What ComfyUI puts under a key."""

    weight: str
    rows: tuple[int, int] | None = None
    """Start and length of the rows of a fused weight that the key stands for."""
    function: str | None = None


def known_to_comfyui(version: str) -> dict[str, TargetLayer]:
    """Key without leaf -> place."""
    path = Path(__file__).parents[1] / "fixtures" / f"comfy.{version}.json.gz"
    return {key: _place(value) for key, value in json.loads(gzip.decompress(path.read_bytes())).items()}


def _place(value: Any) -> TargetLayer:
    weight, cut, function = [value, None, None] if isinstance(value, str) else [*value, None][:3]
    if cut:
        assert cut[0] == 0
    return TargetLayer(weight, tuple(cut[1:]) if cut else None, function)
