"""What ComfyUI is said to load, against the tables of all keys that it takes, and what is said of each program."""

from __future__ import annotations

import re
from collections.abc import Iterator

import full_size
import pytest
import torch
from flux_checks import known_to_comfyui
from tinies import headers
from tinies.cases import modules
from torch import nn

from sfumato import adapters, families
from sfumato.adapters import files
from sfumato.config import NetworkConfig
from sfumato.formats.clients import CLIENTS, Loaded, Names, loads_in, runs
from sfumato.formats.names import Rule
from sfumato.models.meta_init import shapes

DIALECTS = ("kohya", "comfy", "peft")
ALPHA = {"alpha": torch.tensor(1.0)}


def names_of(version: str) -> tuple[Names, ...]:
    return families.facts(full_size.FILES[version][0]).loads_in


def written(version: str, dialect: str, *components: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an adapter file; all components that the dialect has names for, if none are given."""
    spoken = full_size.models(version).dialects[dialect]
    held = {path: {**tensors, **ALPHA} for path, tensors in full_size.adapter(version).items()}
    return shapes(
        files.write(
            spoken,
            {path: tensors for path, tensors in held.items() if path[0] in (components or spoken.prefix)},
        )
    )


def said(version: str, dialect: str, *components: str) -> dict[str, Loaded]:
    return {each.client: each for each in loads_in(written(version, dialect, *components), names_of(version))}


# --- ComfyUI, key by key ---

TABLES = {
    f"{module.CASES[0].family}-{variant}": table
    for module in modules()
    for variant, table in getattr(module, "COMFYUI", {}).items()
}
"""Model -> ComfyUI's table of its keys."""
OTHERS = ("lycoris_", "lora_transformer_", "base_model.model.")
"""How names of the denoiser's layers begin that other programs write."""


def layers(version: str, dialect: str) -> Iterator[tuple[tuple[str, str], int, tuple[str, ...], Rule | None]]:
    """Component and path of a layer, as ComfyUI calls it, its rows, its names, and the rule that cuts it."""
    models = full_size.models(version)
    spoken, nets, comfy = models.dialects[dialect], models.nets(), models.dialects["comfy"].keys
    for component, path in full_size.adapter(version):
        if component in spoken.prefix:
            rows = len(nets[component].get_submodule(path).weight)
            theirs = comfy[component].match(path, native=True).foreign()[0] if component in comfy else path
            yield (component, theirs), rows, *spoken.names((component, path))


def promised(version: str, name: str) -> bool:
    row = next(row for row in names_of(version) if re.fullmatch(row.names, name))
    return row.knows("ComfyUI", name)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("version", TABLES)
def test_comfyui_takes_the_names_that_are_promised_and_no_others(version: str, dialect: str) -> None:
    """Each lands on its layer's weight; those of a fused layer on its rows, one slice after another."""
    known, spoken = known_to_comfyui(TABLES[version]), list(layers(version, dialect))
    # Some tables are of the denoiser alone, and not all have its names in every dialect.
    noted = {"denoiser", *(path[0] for path, _, names, _ in spoken if set(names) & known.keys())}
    for (component, path), rows, names, rule in spoken:
        if component not in noted:
            continue
        assert [promised(version, name) for name in names] == [name in known for name in names]
        ends = [0]
        for place in (known[name] for name in names if name in known):
            start, length = place.rows or (0, rows)
            assert place.weight.endswith(f".{path}.weight")
            assert (place.function, start) == ("swap_scale_shift" if rule and rule.change else None, ends[-1])
            ends.append(start + length)
        assert ends[-1] in (0, rows)


@pytest.mark.parametrize("version", TABLES)
def test_comfyui_takes_the_names_of_other_programs_that_are_promised(version: str) -> None:
    """Built on diffusers' paths, as they build them."""
    known = known_to_comfyui(TABLES[version])
    rows = [row for row in names_of(version) if not row.written and row.component == "denoiser"]
    paths = [
        name.partition(".")[2]
        for (component, _), _, names, _ in layers(version, "peft")
        if component == "denoiser"
        for name in names
    ]
    for row in rows:
        begins = row.names.removesuffix(".*").replace("\\", "")
        built = {begins + (path if begins.endswith(".") else path.replace(".", "_")) for path in paths}
        assert (built <= known.keys()) == ("ComfyUI" in row.known_to)
        assert all(re.fullmatch(row.names, name) for name in built)
    known_rows = [row for row in rows if "ComfyUI" in row.known_to]
    assert {begins for begins in OTHERS if any(key.startswith(begins) for key in known)} == {
        row.names.removesuffix(".*").replace("\\", "") for row in known_rows
    }


def test_a_file_of_another_program_is_to_be_converted_to_names_that_are_written() -> None:
    tensors = {f"lora_transformer_single_transformer_blocks_{i}_proj_out.lora_up.weight": (4, 1) for i in range(20)}
    found = {each.client: each for each in loads_in(tensors, names_of("chroma-chroma"))}
    assert (found["ComfyUI"].loaded, found["Forge"].loaded) == (20, 0)
    assert found["Forge"].dialect == found["diffusers"].dialect == "kohya"


# --- the counts ---


@pytest.mark.parametrize(
    ("version", "count", "of"),
    [("sd-v1", 222, 350), ("sd-v2", 288, 416), ("sdxl-base", 492, 1052)],
    ids=lambda value: str(value),
)
def test_files_in_pefts_names_lack_the_attention_of_unets_in_comfyui(version: str, count: int, of: int) -> None:
    """As it was counted when ComfyUI 0.3.64 loaded them."""
    found = said(version, "peft")
    assert (found["ComfyUI"].loaded, found["ComfyUI"].layers) == (count, of)
    assert "the attention of denoiser in peft names: choose --dialect kohya" in found["ComfyUI"].text()
    assert found["diffusers"].text() == f"diffusers: {of:,} of {of:,} layers"
    # Above twelve unknown tensors Forge leaves a file aside.
    assert (found["Forge"].loaded, found["A1111"].loaded) == (0, 0)


@pytest.mark.parametrize(
    ("version", "lacking"),
    [
        *((version, {}) for version in ("sd-v1", "sd-v2", "sdxl-base", "flux-dev", "chroma-chroma")),
        *((f"sd3-{variant}", {"diffusers": "peft", "A1111": ""}) for variant in ("3_medium", "3.5_medium")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_kohyas_names_load_everywhere_but_where_it_is_said(version: str, lacking: dict[str, str]) -> None:
    """But for a T5. `lacking`: program -> the dialect that it is said to take in place of kohya's."""
    components = [name for name in full_size.models(version).nets() if name != "t5xxl"]
    found = said(version, "kohya", *components)
    assert {name: each.dialect for name, each in found.items() if each.loaded < each.layers} == lacking


@pytest.mark.parametrize("version", TABLES)
def test_by_the_names_of_a_familys_default_comfyui_loads_every_layer_of_the_denoiser(version: str) -> None:
    default = families.facts(version.split("-")[0]).defaults.get("dialect", "kohya")
    found = said(version, str(default), "denoiser")["ComfyUI"]
    assert found.loaded == found.layers > 0


def test_what_is_said_of_stable_diffusion_3() -> None:
    found = said("sd3-3.5_medium", "kohya")
    assert found["diffusers"].text() == (
        "diffusers: none of 695 layers; it does not know denoiser, clip_l, clip_g, t5xxl in kohya names: choose --dialect "
        "peft and leave t5xxl untrained"
    )
    assert found["ComfyUI"].text() == "ComfyUI: 695 of 695 layers"
    assert (
        said("sd3-3.5_medium", "kohya", "denoiser")["diffusers"]
        .text("convert it to {}")
        .endswith(": convert it to peft")
    )
    assert said("sd3-3.5_medium", "peft")["Forge"].loaded == 0


def test_a_t5_stands_in_the_way_of_diffusers_where_it_takes_it_for_a_clip() -> None:
    chroma, flux = said("chroma-chroma", "kohya")["diffusers"], said("flux-dev", "kohya")["diffusers"]
    assert chroma.text().endswith(
        "does not know t5xxl in kohya names, and then loads nothing of the file: leave t5xxl untrained"
    )
    assert (flux.loaded, flux.layers) == (304 + 72, 304 + 72 + 168)
    assert said("chroma-chroma", "kohya", "denoiser")["diffusers"].loaded == 228


def test_programs_that_do_not_run_a_model_are_not_named() -> None:
    assert set(said("flux-dev", "kohya")) == set(said("chroma-chroma", "kohya")) == {"ComfyUI", "Forge", "diffusers"}
    assert [client.name for client in CLIENTS if runs(client, names_of("sdxl-base"))] == [
        client.name for client in CLIENTS
    ]


# --- kinds ---


def of_kind(kind: str) -> dict[str, Loaded]:
    tensors = headers.table(f"adapter.sdxl.{kind}")
    return {each.client: each for each in loads_in(tensors, names_of("sdxl-base"))}


@pytest.mark.parametrize(
    ("kind", "to"),
    [("loha", "ComfyUI Forge A1111"), ("lokr", "ComfyUI Forge A1111"), ("locon", "ComfyUI Forge diffusers A1111")],
)
def test_kinds_of_sd_scripts(kind: str, to: str) -> None:
    found = of_kind(kind)
    assert {name for name, each in found.items() if each.loaded == each.layers} == set(to.split())
    assert all(each.loaded in (0, each.layers) and not each.dialect for each in found.values())
    if kind != "locon":
        assert found["diffusers"].why[0].startswith("does not know Lo")


ONE = "lora_unet_input_blocks_1_0_in_layers_2"


@pytest.mark.parametrize(
    ("tensors", "known_to", "words"),
    [
        (
            {"oft_blocks": (4, 8, 8), "alpha": ()},
            "ComfyUI A1111",
            {"ComfyUI": "OFT: it squares a strength", "Forge": "does not know OFT"},
        ),
        ({"oft_blocks": (2, 4, 8, 8)}, "ComfyUI A1111", {"ComfyUI": "BOFT: it leaves a layer without alpha out"}),
        ({"weight": (8,), "on_input": (1,)}, "A1111", {"ComfyUI": r"does not know (IA)3"}),
        ({"diff": (8, 8)}, "ComfyUI Forge A1111", {}),
        (
            {"lora_up.weight": (8, 1), "lora_down.weight": (1, 8), "dora_scale": (1, 8)},
            "ComfyUI Forge A1111",
            {"diffusers": "drops the magnitudes of DoRA"},
        ),
        (
            {"lora_up.weight": (8, 1), "lora_down.weight": (1, 8), "dora_scale": (8, 1)},
            "ComfyUI Forge",
            {"ComfyUI": "divides by the norm"},
        ),
        ({"lora_B.weight": (8, 1), "lora_A.weight": (1, 8), "lora_magnitude_vector.weight": (8,)}, "diffusers", {}),
        ({"mystery": (8, 8)}, "", {"ComfyUI": "does not know some"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and value else "",
)
def test_kinds_by_their_tensors(tensors: dict[str, tuple[int, ...]], known_to: str, words: dict[str, str]) -> None:
    found = loads_in({f"{ONE}.{leaf}": shape for leaf, shape in tensors.items()}, names_of("sdxl-base"))
    assert {each.client for each in found if each.loaded} == set(known_to.split())
    assert all(words.get(each.client, "") in each.text() for each in found)


def test_a_kind_that_is_not_known_ends_the_loading_of_some() -> None:
    tensors = {f"{ONE}.oft_R.weight": (4, 8)} | {
        f"lora_unet_output_blocks_{i}_0_in_layers_2.{leaf}": (4, 4)
        for i in range(9)
        for leaf in ("lora_up.weight", "lora_down.weight")
    }
    found = {each.client: each.loaded for each in loads_in(tensors, names_of("sdxl-base"))}
    assert found == {"ComfyUI": 9, "Forge": 9, "diffusers": 0, "A1111": 0}


@pytest.mark.parametrize("name", adapters.kinds())
def test_what_every_kind_writes_is_known_by_its_tensors(name: str) -> None:
    plan = adapters.parse(NetworkConfig(network_module=name, network_dim=4))
    adapter = plan.kind(nn.Linear(16, 16), plan.options(conv=False), torch.Generator())
    found = loads_in({f"{ONE}.{leaf}": tuple(t.shape) for leaf, t in adapter.tensors().items()}, names_of("sdxl-base"))
    assert not [each for each in found if "some of its tensors" in each.text()]
    # OFT on inputs is for PEFT itself, and for OneTrainer.
    assert any(each.loaded for each in found) == (name != "oftv2")
