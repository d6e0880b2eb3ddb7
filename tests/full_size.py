"""Models of full size without values, made of the headers of real files, for tests of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

from sparse import sparse
from tinies import headers
from tinies.encoders import t5_tokenizer
from torch import nn

from sfumato import families
from sfumato.adapters import parse
from sfumato.adapters.insert import AdapterNetwork, choose
from sfumato.config import NetworkConfig
from sfumato.formats.dialect import AdapterTensors, ModulePath
from sfumato.models.base import Models
from sfumato.models.loading import outline


def _flow(family: str, name: str, *encoders: str) -> headers.Table:
    held = headers.under(headers.NET, headers.transformer(name)) | headers.text(*encoders)
    autoencoder = {"sd3": ("sd3.vae", headers.FIRST)}.get(family, ("flux.vae", "vae."))
    return held | headers.under(autoencoder[1], headers.table(autoencoder[0]))


ENCODERS = {"sd3": ("clip_l", "clip_g", "t5xxl"), "flux": ("clip_l", "t5xxl"), "chroma": ("t5xxl",)}
FILES: Mapping[str, tuple[str, Callable[[], headers.Table]]] = {
    "sd1": ("sd", partial(headers.sd, 1)),
    "sd2": ("sd", partial(headers.sd, 2)),
    "sdxl": ("sdxl", partial(headers.table, "sdxl.single_file")),
    **{
        name: (family, partial(_flow, family, name, *ENCODERS[family]))
        for family, names in {
            "sd3": ("sd3.5_medium",),
            "flux": ("flux_dev",),
            "chroma": ("chroma",),
        }.items()
        for name in names
    },
}
"""Version of a model, as the tables of `fixtures/` call it -> its family and the tensors of a file with all its nets."""


@cache
def models(version: str) -> Models:
    family, tensors = FILES[version]
    with TemporaryDirectory() as folder:
        path = sparse(Path(folder) / "model.safetensors", tensors())
        if "t5xxl" in (specs := families.family(family).tokenizer_specs):
            t5_tokenizer().save_pretrained(Path(folder) / specs["t5xxl"].folder)
        return outline(families.family(family), str(path), families.facts(family).options())


@cache
def adapter(version: str, *, conv: bool = True) -> dict[ModulePath, AdapterTensors]:
    """A LoRA of rank 1 on all layers that adapters of the family go on, text encoders included."""
    held = models(version)
    targets = held.family.targets
    args = ("conv_dim=1",) if conv and "conv" in targets["denoiser"] else ()
    plan = parse(NetworkConfig(network_dim=1, network_args=args), families.facts(held.family.name).network_args)
    layer = partial(held.family.target_layer, held.options, plan)
    nets: Mapping[str, nn.Module] = held.nets()
    inserted = AdapterNetwork({name: choose(nets[name], name, targets[name], plan, layer) for name in nets}, seed=0)
    inserted.remove()
    return inserted.state()
