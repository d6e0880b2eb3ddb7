"""Adapters merged into files: the nets of the result are those on which the adapters act."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters_on_tinies import adapter_file, adapter_state
from diffusers import StableDiffusionPipeline
from tinies.cases import Case, cases
from torch import Tensor, nn

from sfumato import adapters, families
from sfumato.adapters import files as adapter_files
from sfumato.adapters.insert import from_state
from sfumato.errors import UserError
from sfumato.families.detect import detect_file
from sfumato.formats import files
from sfumato.formats.files import load, read_header, save
from sfumato.models.base import Models
from sfumato.models.components import Checkpoint, open_model
from sfumato.models.loading import outline_parts
from sfumato.tools.merge import Merging, merge

close = torch.testing.assert_close


def opened(path: Path, **options: str) -> Checkpoint:
    """Where the nets are in a file; none is made."""
    family = families.family(detect_file(path).family)
    given = {c.flag: options.get(c.flag) for c in family.components if c.flag}
    source = open_model(path, family.components, family.title, given=given, passthrough_keys=family.passthrough_keys)
    if path.is_dir() and family.name == "sd":
        return replace(source, components={n: w for n, w in source.components.items() if n != "clip_h"})
    return source


def nets(path: Path, **options: str) -> dict[str, dict[str, Tensor]]:
    """The native tensors of the nets in a file."""
    return {name: dict(w.natives()) for name, w in opened(path, **options).components.items() if name != "vae"}


def outlined(path: Path, **options: str) -> Models:
    family = detect_file(path).family
    return outline_parts(families.family(family), str(path), families.facts(family).options(**options))


def acting(path: Path, *merged: tuple[Mapping[Any, Any], float], **options: str) -> dict[str, dict[str, Tensor]]:
    """The same, with adapters merged one after the other into nets that have values."""
    held = built(path, tuple(options.items()))
    before = {name: {key: t.clone() for key, t in net.state_dict().items()} for name, net in held.items()}
    for state, ratio in merged:
        network = from_state(held, state)
        network.multiplier = ratio
        network.merge()
        network.remove()
    after = {name: {key: t.clone() for key, t in net.state_dict().items()} for name, net in held.items()}
    for name, net in held.items():
        net.load_state_dict(before[name])
    return after


@cache
def built(path: Path, options: tuple[tuple[str, str], ...]) -> dict[str, nn.Module]:
    """The nets with their values."""
    parts = opened(path, **dict(options)).components
    return {name: w.build(torch.float32, map=False) for name, w in parts.items() if name != "vae"}


def same(
    one: Mapping[str, Mapping[str, Tensor]], other: Mapping[str, Mapping[str, Tensor]], atol: float = 1e-5
) -> None:
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        assert tensors.keys() == other[name].keys()
        for key, t in tensors.items():
            close(t.float(), other[name][key].float(), atol=atol, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 1.x single file."""
    return tiny.tiny_sd1(tmp_path_factory.mktemp("merge"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer alone, of fewer tensors."""
    return next(case for case in cases() if case.family == "chroma").write(tmp_path_factory.mktemp("small")).model


# --- families and layouts ---

ONE_OF_EACH = list({case.family: case for case in cases()}.values())


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.name)
def test_a_merged_file_is_the_net_with_the_adapter_acting(case: Case, tmp_path: Path) -> None:
    held = case.write(tmp_path)
    models = outlined(held.model, **held.options)
    state = adapter_file(models, tmp_path / "lora.safetensors")
    out = tmp_path / "out" / "merged.safetensors"
    out.parent.mkdir()
    facts = merge(
        Merging(model=held.model, adapters=[(tmp_path / "lora.safetensors", 0.7)], out=out, options=held.options)
    )
    # Text encoders that no adapter goes on stay where they are.
    changed_parts = [w.component for n, w in models.source.components.items() if n in models.family.targets]
    beside = {
        c.flag: str(out.with_name(f"merged_{c.name}.safetensors")) for c in changed_parts if c.flag in held.options
    }
    assert [facts["out"], *facts["beside"]] == [str(out), *beside.values()]
    same(nets(out, **{**held.options, **beside}), acting(held.model, (state, 0.7), **held.options))
    before, after = load(held.model), load(out)
    assert {name for name in before if not name.startswith("model_ema.")} == after.keys()
    changed = {name for name, t in after.items() if not torch.equal(t, before[name])}
    assert changed and not any(name.endswith("bias") for name in changed)


def test_folders_stay_folders_file_by_file(tmp_path: Path) -> None:
    folder = tiny.tiny_sd1_diffusers(tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"of an older day")
    state = adapter_file(outlined(folder), tmp_path / "lora.safetensors")
    merge(Merging(model=folder, adapters=[(tmp_path / "lora.safetensors", 1.0)], out=tmp_path / "out"))
    same(nets(tmp_path / "out"), acting(folder, (state, 1.0)))
    StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and ".fp16." not in p.name}
    assert {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()} == names
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (folder / vae).read_bytes() == (tmp_path / "out" / vae).read_bytes()


def test_shards_stay_shards_and_fused_layers_are_cut(tmp_path: Path) -> None:
    """FLUX in diffusers' names: q, k and v of one adapter lie in two files."""
    case = next(case for case in cases() if case.family == "flux")
    pipe = case.pipeline()
    pipe.save_pretrained(tmp_path / "model")
    pipe.transformer.save_pretrained(tmp_path / "model" / "transformer", max_shard_size="300KB")
    (tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    state = adapter_file(outlined(tmp_path / "model"), tmp_path / "lora.safetensors")
    what = Merging(
        model=tmp_path / "model",
        adapters=[(tmp_path / "lora.safetensors", 1.0)],
        out=tmp_path / "out",
        dtype=torch.float64,
    )
    merge(what)
    same(nets(tmp_path / "out"), acting(tmp_path / "model", (state, 1.0)))
    shards = list((tmp_path / "out" / "transformer").glob("*.safetensors"))
    assert len(shards) > 2
    index = next((tmp_path / "out" / "transformer").glob("*.index.json")).read_text()
    total = sum(t.nbytes for shard in shards for t in load(shard).values())
    assert f'"total_size": {total}' in index


# --- kinds, ratios ---


@pytest.mark.parametrize("kind", adapters.kinds())
def test_every_kind_merges_as_it_acts(kind: str, model: Path, tmp_path: Path) -> None:
    state = adapter_file(outlined(model), tmp_path / "a.safetensors", kind=kind, rank=4, every=9)
    merge(Merging(model=model, adapters=[(tmp_path / "a.safetensors", -0.5)], out=tmp_path / "out.safetensors"))
    same(nets(tmp_path / "out.safetensors"), acting(model, (state, -0.5)))


def test_linear_in_the_ratio_and_in_order(small: Path, tmp_path: Path) -> None:
    models = outlined(small)
    files_ = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    states = [adapter_file(models, path, seed=i, every=1) for i, path in enumerate(files_)]

    def merged(*ratios: float) -> dict[str, dict[str, Tensor]]:
        pairs = list(zip(files_, ratios, strict=True))
        merge(Merging(model=small, adapters=pairs, out=tmp_path / "out.safetensors"))
        return nets(tmp_path / "out.safetensors")

    base, whole, half, both = nets(small), merged(1, 0), merged(0.5, 0), merged(0.5, -2)
    for name, t in base["denoiser"].items():
        close(half["denoiser"][name] - t, (whole["denoiser"][name] - t) / 2, atol=2e-6, rtol=0)
    same(both, acting(small, (states[0], 0.5), (states[1], -2.0)))
    # One after the other: what does not add up goes by what was merged before it.
    once = tmp_path / "once.safetensors"
    merge(Merging(model=small, adapters=[(files_[0], 0.5), (files_[0], 0.5)], out=once))
    same(nets(once), whole)


def test_layer_wise_weights(sd: Path, tmp_path: Path) -> None:
    state = adapter_file(outlined(sd), tmp_path / "a.safetensors")
    weights = [0.0] * 17
    weights[0], weights[2] = 0.5, 2.0  # the text encoder, IN02
    what = Merging(
        model=sd,
        adapters=[(tmp_path / "a.safetensors", 1.0)],
        out=tmp_path / "out.safetensors",
        block_weights=[weights],
    )
    merge(what)
    text = {path: tensors for path, tensors in state.items() if path[0] == "clip_l"}
    block = {path: tensors for path, tensors in state.items() if path[1].startswith("input_blocks.2.")}
    assert block
    same(nets(what.out), acting(sd, (text, 0.5), (block, 2.0)))
    with pytest.raises(UserError, match="a list of 12 numbers; expected 17 or 26"):
        merge(Merging(model=sd, adapters=what.adapters, out=what.out, block_weights=[[1.0] * 12]))


def test_lists_of_weights_name_the_blocks_that_sd_scripts_does() -> None:
    lists = families.family("sdxl").block_weights
    assert lists and {n: len(names) for n, names in lists.lists.items()} == {12: 12, 20: 20}
    assert lists.block(("denoiser", "input_blocks.4.1.proj_in")) == "IN04"
    assert lists.block(("denoiser", "middle_block.1.proj_in")) == "MID"
    assert lists.block(("denoiser", "output_blocks.8.0.skip_connection")) == "OUT08"
    assert lists.block(("clip_g", "text_model.encoder.layers.0.mlp.fc1")) == "BASE"
    other = families.family("sd").block_weights
    assert other and {n: len(names) for n, names in other.lists.items()} == {17: 17, 26: 26}


# --- number formats ---


def test_results_in_another_format_are_rounded_once(small: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    save(half, {n: t.half() if t.is_floating_point() else t for n, t in load(small).items()})
    state = adapter_file(outlined(half), tmp_path / "a.safetensors", every=1)
    exact = acting(half, (state, 1.0))
    for dtype in (None, torch.float32, torch.bfloat16):
        merge(
            Merging(
                model=half, adapters=[(tmp_path / "a.safetensors", 1.0)], out=tmp_path / "o.safetensors", dtype=dtype
            )
        )
        found = nets(tmp_path / "o.safetensors")
        for name, t in exact["denoiser"].items():
            wanted = t.to(dtype or torch.float16)
            assert found["denoiser"][name].dtype == wanted.dtype
            eps = torch.finfo(wanted.dtype).eps
            close(found["denoiser"][name].float(), t, atol=2e-6, rtol=eps if dtype == torch.float32 else eps / 1.9)


def eight_bits(base: Path, out: Path, scaled: str | None) -> dict[str, Tensor]:
    """The file with its large matrices in fp8. `scaled`: how their scales lie beside them."""
    tensors, wide = {}, {}
    for name, t in load(base).items():
        tensors[name] = wide[name] = t
        if not (t.ndim == 2 and "attn" in name):
            continue
        if scaled is None:
            tensors[name] = t.to(torch.float8_e4m3fn)
            wide[name] = tensors[name].float()
            continue
        blocks = {"tensor": t.view(1, -1), "row": t}[scaled]
        scale = blocks.abs().amax(-1, keepdim=True) / 448
        q = (blocks / scale).to(torch.float8_e4m3fn)
        tensors[name] = q.view(t.shape)
        wide[name] = (q.float() * scale).view(t.shape)
        tensors[name.removesuffix("weight") + "scale_weight"] = scale.view(()) if scaled == "tensor" else scale
    if scaled:
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save(out, tensors)
    return wide


@pytest.mark.parametrize("scaled", [None, "tensor", "row"])
def test_bases_in_fp8_are_read_and_written(scaled: str | None, small: Path, tmp_path: Path) -> None:
    wide = eight_bits(small, tmp_path / "fp8.safetensors", scaled)
    save(tmp_path / "wide.safetensors", wide)
    state = adapter_file(outlined(small), tmp_path / "a.safetensors", every=1)
    exact = acting(tmp_path / "wide.safetensors", (state, 1.0))
    files_ = [(tmp_path / "a.safetensors", 1.0)]
    merge(Merging(model=tmp_path / "fp8.safetensors", adapters=files_, out=tmp_path / "out.safetensors"))
    before, after = load(tmp_path / "fp8.safetensors"), load(tmp_path / "out.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    for name, t in exact["denoiser"].items():
        found = after[name].float()
        if (scale := after.get(name.removesuffix("weight") + "scale_weight")) is not None:
            found = found * scale
        if after[name].dtype == torch.float8_e4m3fn:
            close(found, t, atol=2**-9 * (1 if scaled is None else 0.1), rtol=2**-4)
    # Nothing is touched that nothing is merged into.
    merge(Merging(model=tmp_path / "fp8.safetensors", adapters=[(files_[0][0], 0.0)], out=tmp_path / "out.safetensors"))
    assert (tmp_path / "out.safetensors").stat().st_size >= (tmp_path / "fp8.safetensors").stat().st_size
    assert all(torch.equal(t.float(), before[n].float()) for n, t in load(tmp_path / "out.safetensors").items())
    merge(
        Merging(
            model=tmp_path / "fp8.safetensors", adapters=files_, out=tmp_path / "out.safetensors", dtype=torch.float32
        )
    )
    same(nets(tmp_path / "out.safetensors"), exact)
    assert load(tmp_path / "out.safetensors").keys() == wide.keys()


# --- metadata and mistakes ---


def test_the_result_says_what_it_was_made_of(small: Path, tmp_path: Path) -> None:
    named = {"modelspec.title": "the base", "modelspec.hash_sha256": "0x1", "sshs_model_hash": "1", "x": "y"}
    save(tmp_path / "base.safetensors", load(small), named)
    adapter_file(outlined(small), tmp_path / "style.safetensors", every=1)
    what = Merging(
        model=tmp_path / "base.safetensors",
        adapters=[(tmp_path / "style.safetensors", 1.0)],
        out=tmp_path / "out.safetensors",
    )
    merge(what)
    found = read_header(what.out).metadata
    assert (
        found["modelspec.merged_from"] == "the base, style" and found["modelspec.title"] == "out" and found["x"] == "y"
    )
    assert (
        found["modelspec.architecture"] == "chroma" and not {"sshs_model_hash", "modelspec.hash_sha256"} & found.keys()
    )


def test_components_that_are_not_there(tmp_path: Path) -> None:
    case = next(case for case in cases() if case.family == "flux")
    held = case.write(tmp_path)
    state = adapter_file(outlined(held.model, **held.options), tmp_path / "a.safetensors")
    files_ = [(tmp_path / "a.safetensors", 1.0)]
    with pytest.raises(UserError, match=r"for clip_l, which the model does not hold.*--clip_l, or .*--only denoiser"):
        merge(Merging(model=held.model, adapters=files_, out=tmp_path / "out.safetensors"))
    merge(Merging(model=held.model, adapters=files_, out=tmp_path / "out.safetensors", only=["denoiser"]))
    alone = {path: tensors for path, tensors in state.items() if path[0] == "denoiser"}
    same(nets(tmp_path / "out.safetensors"), acting(held.model, (alone, 1.0)))


def test_mistakes_are_told_and_nothing_is_written(small: Path, tmp_path: Path) -> None:
    models = outlined(small)
    state = adapter_state(models, every=1)
    names = adapter_files.write(models.dialects["kohya"], state)
    first = next(name for name in names if name.endswith("lora_up.weight"))
    other = next(case for case in cases() if case.family == "sd3").write(tmp_path / "sd3")
    adapter_file(outlined(other.model, **other.options), tmp_path / "sd3.safetensors")
    bad = {
        "nan": ({**names, first: names[first] * torch.nan}, "holds NaN"),
        "wide": ({**names, first: torch.zeros(3, 2)}, r"wide\.safetensors: .*, expected \[[\d, ]+\]$"),
        "strange": ({**names, first.replace("double_blocks", "double_block"): names[first]}, "name no layer"),
        "sd3": (load(tmp_path / "sd3.safetensors"), "looks like an adapter of Stable Diffusion 3"),
        "empty": ({}, "holds no tensors"),
    }
    for name, (tensors, says) in bad.items():
        path = tmp_path / f"{name}.safetensors"
        save(path, tensors)
        with pytest.raises(UserError, match=says):
            merge(Merging(model=small, adapters=[(path, 1.0)], out=tmp_path / "out.safetensors"))
    save(tmp_path / "good.safetensors", names)
    with pytest.raises(UserError, match="is also read"):
        merge(Merging(model=small, adapters=[(tmp_path / "good.safetensors", 1.0)], out=tmp_path / "good.safetensors"))
    with pytest.raises(UserError, match=r"expected NAME\.safetensors"):
        merge(Merging(model=small, adapters=[(tmp_path / "good.safetensors", 1.0)], out=tmp_path / "out"))
    large = Merging(
        model=small,
        adapters=[(tmp_path / "good.safetensors", 1e9)],
        out=tmp_path / "out.safetensors",
        dtype=torch.float16,
    )
    with pytest.raises(UserError, match="save_precision float16 may be too small"):
        merge(large)
    assert not (tmp_path / "out.safetensors").exists() and not list(tmp_path.glob(".*"))
    assert files.load(small)
