"""Base models whose weights stand in fewer bits: the tools read what they mean, and adapters change that and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import pytest
import torch
from adapters_on_tinies import adapter_file
from formats import gguf_files
from tinies import flux, quantised
from torch import Tensor

from sfumato.families.detect import detect_file
from sfumato.families.flux.facts import Options
from sfumato.families.flux.family import FAMILY
from sfumato.formats.files import load, read_header, save
from sfumato.formats.lazy import Lazy
from sfumato.models import loading
from sfumato.tools import show
from sfumato.tools.convert import convert
from sfumato.tools.extract import Extraction, extract
from sfumato.tools.merge import Merging, merge

close = torch.testing.assert_close
STEP = {"GGUF Q8_0": 2**-8, "int8 rotated": 0.01, "fp8 scaled": 2**-4}
"""Rounding of what is written again, as a share of the largest number of a row."""


@dataclass(frozen=True)
class Base:
    form: str
    path: Path
    wide: Path
    """The same in fp32."""
    adapter: Path
    merged: dict[str, Tensor]
    """The same with the adapter merged, in fp32."""


@pytest.fixture(scope="module", params=quantised.FORMS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    path, wide = quantised.FORMS[request.param](folder, "base", flux.parts()["transformer"])
    save(folder / "wide.safetensors", wide)
    models = loading.outline_parts(FAMILY, str(folder / "wide.safetensors"), Options())
    adapter_file(models, folder / "adapter.safetensors")
    into = Merging(
        model=folder / "wide.safetensors",
        adapters=[(folder / "adapter.safetensors", 1.0)],
        out=folder / "m.safetensors",
    )
    merge(into)
    return Base(
        request.param, path, folder / "wide.safetensors", folder / "adapter.safetensors", load(folder / "m.safetensors")
    )


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], share: float) -> None:
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        close(found[name].float(), t.float(), rtol=0, atol=share * float(t.abs().max()))


def test_what_it_is_is_told(base: Base) -> None:
    facts = show.describe(base.path)
    assert (facts["kind"], facts["family"], facts["variant"]) == ("checkpoint", "flux", "dev")
    assert base.form in facts["quantised"] and detect_file(base.path).family == "flux"


def test_a_net_has_what_the_codes_say(base: Base) -> None:
    exact = load(base.wide)
    net = loading.outline_parts(FAMILY, str(base.path), Options()).source.components["denoiser"]
    assert_near(net.build(torch.float32).state_dict(), exact, 1e-6)
    half = net.build(torch.bfloat16).state_dict()
    assert all(t.dtype == torch.bfloat16 for t in half.values())
    assert_near(half, exact, 2**-8)


def test_an_adapter_is_merged_into_what_the_codes_say(base: Base, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    into = Merging(model=base.path, adapters=[(base.adapter, 1.0)], out=out, dtype=torch.float32)
    merge(into)
    assert_near(load(out), base.merged, 1e-6)
    assert not [key for key in read_header(out).metadata if "quant" in key or key.startswith("general.")]
    # In the file's own format, which of GGUF no other file can have.
    merge(Merging(model=base.path, adapters=[(base.adapter, 1.0)], out=out))
    again = Lazy.of([out])
    assert_near(dict(again.cast(torch.float32)), base.merged, STEP[base.form])
    kinds = {n: of.form for n, of in Lazy.of([base.path]).coded.items()}
    assert {n: of.form for n, of in again.coded.items()} == ({} if "GGUF" in base.form else kinds)


def test_it_is_converted_to_what_other_programs_read(base: Base, tmp_path: Path) -> None:
    convert(base.path, tmp_path / "out.safetensors", dtype="bf16")
    assert_near(load(tmp_path / "out.safetensors"), load(base.wide), 2**-8)
    convert(base.path, tmp_path / "own.safetensors")
    exact = base.form == "fp8 scaled"  # which single files keep
    assert_near(
        dict(Lazy.of([tmp_path / "own.safetensors"]).cast(torch.float32)), load(base.wide), 0 if exact else 2**-8
    )
    assert not [key for key in read_header(tmp_path / "own.safetensors").metadata if "quant" in key]


def test_what_was_trained_on_it_is_extracted(base: Base, tmp_path: Path) -> None:
    save(tmp_path / "tuned.safetensors", base.merged)
    how = Extraction(rank=2, dtype=torch.float32)
    told = extract(base.path, tmp_path / "tuned.safetensors", tmp_path / "lora.safetensors", how)
    assert max(layer["error"] for layer in told["layers"]) < 1e-3
    merge(
        Merging(
            model=base.path,
            adapters=[(tmp_path / "lora.safetensors", 1.0)],
            out=tmp_path / "out.safetensors",
            dtype=torch.float32,
        )
    )
    assert_near(load(tmp_path / "out.safetensors"), base.merged, 1e-3)


def test_an_adapter_is_merged_into_a_text_encoder_in_gguf(tmp_path: Path) -> None:
    """Which becomes a file that other programs read."""
    plain = flux.parts()
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 8)
    names = {key: table.get_name(key, try_suffixes=(".weight",)) for key in plain["t5xxl"]}
    held = {names[key]: t for key, t in plain["t5xxl"].items()}
    wanted = gguf_files.write(tmp_path / "t5.gguf", held, arch="t5encoder")
    save(tmp_path / "wide.safetensors", {key: wanted[names[key]] for key in names})
    save(tmp_path / "base.safetensors", plain["transformer"])
    models = loading.outline_parts(
        FAMILY, str(tmp_path / "base.safetensors"), Options(t5xxl=str(tmp_path / "wide.safetensors"))
    )
    adapter_file(models, tmp_path / "a.safetensors", "train_t5xxl=True")
    for file in ("t5.gguf", "wide.safetensors"):
        merge(
            Merging(
                model=tmp_path / "base.safetensors",
                adapters=[(tmp_path / "a.safetensors", 1.0)],
                out=tmp_path / "out.safetensors",
                outs={"t5xxl": tmp_path / f"{file[:2]}.safetensors"},
                options={"t5xxl": str(tmp_path / file)},
                dtype=torch.float32,
            )
        )
    assert_near(load(tmp_path / "t5.safetensors"), load(tmp_path / "wi.safetensors"), 1e-6)
