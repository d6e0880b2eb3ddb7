"""Models of full size without values, made of the headers of real files, for tests of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

from sparse import sparse
from tinies import cases, headers

from sfumato import families
from sfumato.adapters import parse
from sfumato.adapters.insert import AdapterNetwork, choose
from sfumato.config import NetworkConfig
from sfumato.formats.dialect import AdapterTensors, ModulePath
from sfumato.models.base import Models
from sfumato.models.components import open_model

FILES: Mapping[str, tuple[str, Callable[[], headers.Table]]] = {
    f"{family}-{variant}": (family, tensors)
    for module in cases.modules()
    for family in (module.CASES[0].family,)
    for variant, tensors in module.USUAL.items()
}
"""Name of a model -> its family and the tensors of a file with all its nets."""


@cache
def models(name: str) -> Models:
    family, tensors = families.family(FILES[name][0]), FILES[name][1]
    with TemporaryDirectory() as folder:
        path = sparse(Path(folder) / "model.safetensors", tensors())
        found = open_model(path, family.components, family.title, given={}, passthrough_keys=family.passthrough_keys)
        options, source = family.complete(families.facts(family.name).options(), found)
        nets = {part: weights.empty() for part, weights in source.components.items() if part != "vae"}
    return Models(family, options, nets.pop("denoiser"), nets, {}, None)


@cache
def adapter(name: str) -> dict[ModulePath, AdapterTensors]:
    """A LoRA of rank 1, without values, on all layers that adapters of the family go on, text encoders included."""
    held = models(name)
    targets, nets = held.family.targets, held.nets()
    args = ("conv_dim=1",) if "conv" in targets["denoiser"] else ()
    plan = parse(NetworkConfig(network_dim=1, network_args=args), families.facts(held.family.name).network_args)
    layer = partial(held.family.target_layer, held.options, plan)
    inserted = AdapterNetwork(
        {part: choose(nets[part], part, targets[part], plan, layer) for part in nets if part in targets}, seed=0
    )
    inserted.remove()
    return inserted.state()
