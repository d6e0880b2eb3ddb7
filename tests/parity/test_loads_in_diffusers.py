"""What the table promises of diffusers, by diffusers' own loader: what it is said to load does the same as here, what not changes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffusers
import full_size
import pytest
import torch
from diffusers import ChromaPipeline, FluxPipeline
from tinies.cases import Case, cases
from torch import Tensor, nn

from sfumato import adapters, families
from sfumato.adapters import files, parse
from sfumato.adapters.insert import AdapterNetwork, TargetLayer, choose
from sfumato.config import LossConfig, NetworkConfig, NoiseConfig
from sfumato.formats.clients import Loaded, loads_in
from sfumato.formats.dialect import AdapterTensors, ModulePath
from sfumato.models.base import Models
from sfumato.models.meta_init import shapes
from sfumato.sampling.sample import sample_latents

FAMILIES = {case.family: case for case in reversed(cases())}
"""The first tiny model of each."""
REAL_SIZES = {"flux", "chroma"}
"""Of these diffusers reads kohya's names at the real widths only, which stand in its code."""
CELLS = [
    pytest.param((family, dialect, kind), id=f"{family}-{dialect}-{kind}")
    for family in sorted(FAMILIES)
    for dialect in ("kohya", "comfy", "peft")
    for kind in ("lora", "dora")
    if not (family in REAL_SIZES and dialect == "kohya") and not (kind == "dora" and dialect == "comfy")
]


@dataclass
class Both:
    """A tiny model here and in diffusers."""

    case: Case
    models: Models
    pipe: Any
    noise: Tensor
    plain: Tensor

    def ours(self) -> Tensor:
        """The latents after one step."""
        process = self.models.process(NoiseConfig(), LossConfig())
        (latents,) = sample_latents(
            self.models, [self.prompt], process=process, sampler=self.case.sampler, noise=self.noise
        )
        return latents

    def theirs(self) -> Tensor:
        with torch.no_grad():
            return self.case.drawn(self.pipe, self.prompt, self.noise.clone())

    @property
    def prompt(self) -> Any:
        return replace(self.case.prompt, sample_steps=1)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made: dict[str, Both] = {}

    def of(family: str) -> Both:
        if family not in made:
            case = FAMILIES[family]
            models = case.models(case.write(tmp_path_factory.mktemp(family)))
            facts = models.family.latents
            size = (1, facts.channels, case.prompt.height // facts.stride, case.prompt.width // facts.stride)
            noise = torch.randn(size, generator=torch.Generator().manual_seed(3))
            made[family] = Both(case, models, case.pipeline(), noise, torch.empty(0))
            made[family].plain = made[family].theirs()
        return made[family]

    before = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    yield of
    diffusers.logging.set_verbosity(before)


def one_of_each(chosen: list[TargetLayer]) -> list[TargetLayer]:
    """Of layers whose paths differ in numbers alone, the first."""
    return list({re.sub(r"\d+", "#", target.path): target for target in reversed(chosen)}.values())


def inserted(models: Models, kind: str, *components: str, rank: int = 2) -> AdapterNetwork:
    """Adapters with values, at work, on a layer of each place that they go on."""
    family, nets = models.family, models.nets()
    args = (f"conv_dim={rank}",) if "conv" in family.targets["denoiser"] else ()
    network = NetworkConfig(network_module=kind, network_dim=rank, network_alpha=1.0, network_args=args)
    plan = parse(network, families.facts(family.name).network_args)
    layer = partial(family.target_layer, models.options, plan)
    chosen = {name: one_of_each(choose(nets[name], name, family.targets[name], plan, layer)) for name in components}
    held = AdapterNetwork(chosen, seed=0).eval()
    g = torch.Generator().manual_seed(0)
    for name, p in held.named_parameters():
        if "lora_up" in name:
            p.data = 0.5 * torch.randn(p.shape, generator=g)
        if "dora_scale" in name:
            p.data *= 1 + 0.1 * torch.rand(p.shape, generator=g)
    return held


def promise(models: Models, tensors: dict[str, Tensor]) -> Loaded:
    found = loads_in(shapes(tensors), families.facts(models.family.name).loads_in)
    return next(each for each in found if each.client == "diffusers")


def load(pipe: Any, tensors: dict[str, Tensor]) -> None:
    """By the pipeline, or by the transformer of one that loads none."""
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(dict(tensors), adapter_name="ours")
    else:
        pipe.transformer.load_lora_adapter(dict(tensors), adapter_name="ours", prefix="transformer")


def unload(pipe: Any) -> None:
    pipe.unload_lora_weights() if hasattr(pipe, "unload_lora_weights") else pipe.transformer.unload_lora()


def adapted_layers(pipe: Any) -> int:
    return sum(
        name.endswith("lora_A.ours.weight")
        for part in pipe.components.values()
        if isinstance(part, nn.Module)
        for name, _ in part.named_parameters()
    )


@pytest.mark.parametrize("cell", CELLS)
def test_diffusers_loads_what_is_promised(both: Any, cell: tuple[str, str, str]) -> None:
    family, dialect, kind = cell
    here: Both = both(family)
    spoken = here.models.dialects[dialect]
    held = inserted(here.models, kind, *(name for name in here.models.nets() if name in spoken.prefix))
    wanted = here.ours()
    tensors = {name: t.detach().clone() for name, t in files.write(spoken, held.state()).items()}
    held.remove()
    said = promise(here.models, tensors)
    refused = False
    try:
        load(here.pipe, tensors)
    except (ValueError, AssertionError, KeyError, IndexError, RuntimeError):
        refused = True
    try:
        count, found = adapted_layers(here.pipe), here.theirs()
    finally:
        unload(here.pipe)
    if said.loaded:
        assert (said.loaded, refused) == (count, False)
        assert count == len({name.split(".lora_")[0] for name in tensors if ".lora_" in name})
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert (wanted - here.plain).abs().max() > 1e-2
    elif any("drops the magnitudes" in why for why in said.why):
        assert count and (found - wanted).abs().max() > 1e-3
    else:
        assert refused or count == 0
        torch.testing.assert_close(found, here.plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_other_kinds_are_loaded_as_lora_or_not_at_all(both: Any, family: str) -> None:
    here: Both = both(family)
    for kind in set(adapters.kinds()) - {"lora", "dora"}:
        held = inserted(here.models, kind, "denoiser", rank=4)
        held.remove()
        tensors = {
            name: t.detach().clone() for name, t in files.write(here.models.dialects["kohya"], held.state()).items()
        }
        with suppress(ValueError):
            here.pipe.load_lora_weights(dict(tensors), adapter_name="ours")
        assert adapted_layers(here.pipe) == promise(here.models, tensors).loaded
        here.pipe.unload_lora_weights()


# --- kohya's names of FLUX.1 and Chroma ---


def filled(version: str, *components: str) -> dict[ModulePath, AdapterTensors]:
    """A LoRA of full size with values."""
    g = torch.Generator().manual_seed(0)
    return {
        path: {
            **{name: torch.randn(t.shape, generator=g) for name, t in tensors.items() if t.is_meta},
            "alpha": torch.tensor(0.5),
        }
        for path, tensors in full_size.adapter(version).items()
        if path[0] in components
    }


@pytest.mark.parametrize(
    ("version", "pipeline", "components"),
    [("flux-dev", FluxPipeline, ("denoiser", "clip_l")), ("chroma-chroma", ChromaPipeline, ("denoiser",))],
    ids=["flux", "chroma"],
)
def test_kohyas_names_of_full_size_are_read_as_pefts(version: str, pipeline: Any, components: tuple[str, ...]) -> None:
    """diffusers makes of one file what stands in the other, layer for layer; that it loads the other is proven above."""
    models, state = full_size.models(version), filled(version, *components)
    kohya, peft = (files.write(models.dialects[dialect], state) for dialect in ("kohya", "peft"))
    said = promise(models, kohya)
    assert said.loaded == said.layers == len(state)
    given = {name: t.clone() for name, t in kohya.items()}  # it multiplies in place
    read = {old_names(name): t for name, t in pipeline.lora_state_dict(given).items()}
    assert read.keys() == peft.keys()
    for down in (name for name in peft if name.endswith("lora_A.weight")):
        up = down.replace("lora_A", "lora_B")
        wanted = peft[up].flatten() * peft[down][0, 0]
        torch.testing.assert_close(read[up].flatten() * read[down][0, 0], wanted, atol=1e-4, rtol=1e-4)


def old_names(name: str) -> str:
    """Of text encoders as diffusers wrote them once, which it reads still."""
    factor = {"down": "lora_A", "up": "lora_B"}
    name = re.sub(r"to_(q|k|v|out)_lora\.(down|up)", lambda m: f"{m[1]}_proj.{factor[m[2]]}", name)
    return re.sub(r"lora_linear_layer\.(down|up)", lambda m: factor[m[1]], name)


def test_t5_stands_in_the_way_of_chroma_and_is_left_out_of_flux(both: Any) -> None:
    for family, version in (("chroma", "chroma-chroma"), ("flux", "flux-dev")):
        models = full_size.models(version)
        t5 = files.write(models.dialects["kohya"], filled(version, "t5xxl"))
        with pytest.raises(ValueError):
            both(family).pipe.load_lora_weights(dict(t5))
        assert promise(models, t5).loaded == 0
    whole = files.write(models.dialects["kohya"], filled("flux-dev", "denoiser", "t5xxl"))
    read = FluxPipeline.lora_state_dict(whole)
    assert promise(models, whole).loaded == 304
    assert not [name for name in read if not name.startswith("transformer.")]
