"""Adapters between the names of programs: exact or refused, for every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import PAGE, Form, a_file, cells, model, page, written
from tinies import lumina2

from sfumato import adapters
from sfumato.adapters import files as adapter_files
from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.formats.metadata import hashes
from sfumato.tools import adapter_file
from sfumato.tools.convert_adapter import Nearest, change, convert
from sfumato.tools.verify import verify


def test_the_page_says_what_is_found(tmp_path: Path) -> None:
    """docs/conversions.md: a row for every form that a kind's files have."""
    assert PAGE.read_text(encoding="utf-8") == page(cells(tmp_path)), "write it anew: python tests/conversions.py"


# --- files ---


def test_metadata_stay_and_hashes_are_new(tmp_path: Path) -> None:
    """But for diffusers' config: its alphas stand in the tensors now, and would act twice."""
    config = '{"transformer.r": 2, "transformer.lora_alpha": 6}'
    given = {"ss_network_dim": "2", "sshs_model_hash": "old", "lora_adapter_metadata": config, "author": "me"}
    one = a_file(tmp_path / "one.safetensors", dialect="diffusers", **given)
    found = convert(one, tmp_path / "other.safetensors", "kohya", model=str(model("flux")))
    header = files.read_header(tmp_path / "other.safetensors")
    tensors = files.load(tmp_path / "other.safetensors")
    without = {"ss_network_dim": "2", "author": "me"}
    assert dict(header.metadata) == {**without, **hashes(tensors, without)}
    assert (found.layers, found.keys_in, found.keys_out) == (4, 2 * 9, 3 * 4)
    assert tensors["lora_unet_double_blocks_0_img_mlp_0.alpha"] == 6


def test_what_is_not_of_a_layer_is_listed(tmp_path: Path) -> None:
    one = a_file(tmp_path / "one.safetensors")
    files.save(one, {**files.load(one), "bundle_emb.cat.clip_l": torch.zeros(2, 8)}, {})
    found = convert(one, tmp_path / "words.safetensors", "comfy", model=str(model("flux")))
    assert not found.left_out and "bundle_emb.cat.clip_l" in files.load(tmp_path / "words.safetensors")
    found = convert(
        tmp_path / "words.safetensors", tmp_path / "other.safetensors", "diffusers", model=str(model("flux"))
    )
    assert list(found.left_out) == ["bundle_emb.cat.clip_l"]
    assert "left out: bundle_emb.cat.clip_l: a word beside the adapter" in found.text(one)
    assert not [name for name in files.load(tmp_path / "other.safetensors") if name.startswith("bundle_emb")]
    files.save(one, {**files.load(one), "lora_unet_double_blocks_0_img_mlp_1.alpha": torch.zeros(())}, {})
    with pytest.raises(UserError, match="1 of 13 keys of the adapter name no layer"):
        convert(one, tmp_path / "other.safetensors", "comfy", model=str(model("flux")))


@pytest.mark.parametrize(("dtype", "verdict"), [("bf16", "exact up to bfloat16"), ("fp16", "exact up to float16")])
def test_number_formats(tmp_path: Path, dtype: str, verdict: str) -> None:
    one = a_file(tmp_path / "one.safetensors")
    convert(one, tmp_path / "other.safetensors", "diffusers", model=str(model("flux")), dtype=dtype)
    found = verify(one, tmp_path / "other.safetensors", model=str(model("flux")))
    assert (found.same, found.verdict) == (True, verdict)


@pytest.mark.parametrize(("source", "to"), [("kohya", "diffusers"), ("diffusers", "comfy")])
def test_what_has_no_exact_form_becomes_a_lora_with_a_stated_error(tmp_path: Path, source: str, to: str) -> None:
    """The error that is stated is the error that is there; at the full rank there is none."""
    one, other = a_file(tmp_path / "one.safetensors", "lokr", dialect=source), tmp_path / "other.safetensors"
    found = convert(one, other, to, model=str(model("flux")), rank=4)
    assert set(found.errors) == {"denoiser.single_blocks.0.linear1"} | (
        {"denoiser.double_blocks.0.img_attn.qkv"} if source == "diffusers" else set()
    )
    read = [adapter_file.read(p, model=str(model("flux")), inexact=Nearest(1000).joined) for p in (one, other)]
    for layer, error in found.errors.items():
        path = ("denoiser", layer.removeprefix("denoiser."))
        a, b = (change(path, file.state[path], torch.zeros(file.outline.layers[path])) for file in read)
        assert float((a - b).norm() / a.norm()) == pytest.approx(error, rel=1e-3)
        assert 0 < error < 0.9
    assert max(convert(one, other, to, model=str(model("flux")), rank=1000).errors.values(), default=0) < 1e-6


@pytest.mark.parametrize("kind", ["oft", "dora", "ia3"])
def test_kinds_that_act_on_the_weight_become_a_lora_beside_the_model(tmp_path: Path, kind: str) -> None:
    """`--rank` with `--model`: at the full rank the LoRA does the same to this model's weights."""
    if kind == "dora":  # of diffusers' pieces, whose magnitudes are those of their own rows
        kind = "loha"
        form = Form("loha", adapters.kind("loha"), {"dora_wd": True})
        files.save(tmp_path / "one.safetensors", written(form, "flux", "kohya"), {})
    else:
        a_file(tmp_path / "one.safetensors", kind)
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    made = convert(one, other, "diffusers", model=str(model("flux")), rank=1000)
    assert made.kinds != ("LoRA",)
    assert max(made.errors.values(), default=0) < 1e-5
    assert verify(one, other, model=str(model("flux"))).same
    text = made.text(other)
    assert "are the nearest LoRA" in text
    assert "diffusers: 9 of 9 layers" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"to": "khoya"}, "--to khoya: expected kohya, comfy, peft, lycoris, diffusers; did you mean 'kohya'"),
        ({"dtype": "fp8"}, "--dtype fp8: expected"),
        ({"rank": 0}, "--rank 0: expected 1 or more"),
        ({"family": "fluxx"}, "--family fluxx: known are .*; did you mean 'flux'"),
        ({"model": None}, r"it was read as an adapter for FLUX.1 \(dev\); if it is for a model of other sizes"),
    ],
)
def test_mistakes(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    one = a_file(tmp_path / "one.safetensors")
    with pytest.raises(UserError, match=message):
        convert(one, tmp_path / "two.safetensors", **{"to": "comfy", "model": str(model("flux")), **given})
    assert not (tmp_path / "two.safetensors").exists()


def test_layers_of_a_component_that_the_names_do_not_hold_are_told_once(tmp_path: Path) -> None:
    """A rank would not help."""
    bundle, one = lumina2.write(tmp_path / "model", bundled=True).model, tmp_path / "one.safetensors"
    rows, columns = files.read_header(bundle).tensors[f"{lumina2.GEMMA}layers.0.mlp.up_proj.weight"].shape
    pair = {"lora_down.weight": torch.zeros(1, columns), "lora_up.weight": torch.zeros(rows, 1)}
    files.save(one, {f"lora_te_layers_0_mlp_up_proj.{leaf}": t for leaf, t in pair.items()}, {})
    with pytest.raises(UserError, match=r"^peft names have no place for layers of gemma2, they hold denoiser: [^:]*$"):
        convert(one, tmp_path / "two.safetensors", "peft", family="lumina2", model=str(bundle), rank=1)


# --- real sizes, and which model a file is for ---


@pytest.mark.parametrize(
    ("name", "family", "variant"),
    [
        ("adapter.sd1.lora", "sd", "v1"),
        ("adapter.sdxl.locon", "sdxl", "base"),
        ("adapter.flux.lora", "flux", "dev"),
        ("adapter.sd3_medium.lora", "sd3", "3_medium"),
    ],
)
def test_a_files_model_is_found_without_one(tmp_path: Path, keys: Any, name: str, family: str, variant: str) -> None:
    """The tables of real files; of each a few layers, to be quick. Under names that no family's signature knows, too."""
    table = keys(name)
    layers = sorted({key.partition(".")[0] for key in table})[::40]
    tensors = {k: torch.ones(s) for k, s in table.items() if k.partition(".")[0] in layers}
    files.save(tmp_path / "one.safetensors", tensors, {})
    first = adapter_file.read(tmp_path / "one.safetensors")
    assert (first.outline.family.name, first.outline.variant) == (family, variant)
    peft = first.outline.dialects["peft"]
    state = {path: t for path, t in first.state.items() if path[0] == "denoiser"}
    theirs = {f"base_model.model.{k.split('.', 1)[1]}": t for k, t in adapter_files.write(peft, state).items()}
    files.save(tmp_path / "two.safetensors", theirs, {})
    second = adapter_file.read(tmp_path / "two.safetensors")
    assert second.outline.family.name == family
    assert second.state.keys() == state.keys()
