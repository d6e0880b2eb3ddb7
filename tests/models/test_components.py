"""Nets of a model in files: where they stand, what is told when they do not, and what is written again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import pytest
import tiny
import torch
from tinies import encoders
from torch import Tensor, nn

from sfumato import families
from sfumato.errors import UserError
from sfumato.formats.files import load, read_header, save
from sfumato.formats.names import KeyMap, add_prefix, rule
from sfumato.formats.planned import Writable, made
from sfumato.models import loading
from sfumato.models.autoencoders import vae_component, vae_keys
from sfumato.models.base import Models
from sfumato.models.components import Checkpoint, Component, lacking, matching, open_component, open_model
from sfumato.models.encoders.clip import clip_component
from sfumato.models.encoders.t5 import EMBEDDING, TWIN
from sfumato.models.key_formats import KeyFormat
from sfumato.models.saving import single_file, values

Tensors = dict[str, Tensor]
KEYS = KeyMap(rule("attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"), rule("out"))
"""native: the small denoiser. foreign: the same as a diffusers folder has it."""


class Denoiser(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width)})
        self.out = nn.Linear(width, 2)


def denoiser_net(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return Denoiser(shapes["attn.qkv.weight"][1])


def denoiser_spelling(names: Mapping[str, tuple[int, ...]]) -> KeyFormat | None:
    if "attn.qkv.weight" in names:
        return KeyFormat("native")
    return KeyFormat("diffusers", KEYS) if "attn.to_q.weight" in names else None


CLIP, VAE = "text_encoders.clip_l.transformer.", "first_stage_model."
COMPONENTS = (
    Component(
        name="denoiser",
        title="the transformer",
        net=denoiser_net,
        key_format=denoiser_spelling,
        prefixes=("model.diffusion_model.", "net.", ""),
        folder="transformer",
        unused_keys=matching(r"ema\..*"),
        diffusers=lambda shapes: KeyFormat("diffusers", KEYS),
    ),
    clip_component("clip_l", (CLIP,), "text_encoder", "quick_gelu", flag="clip_l"),
    nets.T5,
    vae_component((VAE, "vae."), 1.5, 0.5, channels=16),
)
DENOISER, CLIP_L, T5, AE = COMPONENTS
KEPT = re.compile(r"alphas|model_ema\..*")
KEPT_NAMES = {"alphas", "model.diffusion_model.ema.decay", f"{CLIP}text_model.embeddings.position_ids"}
"""Of `bundle`, what belongs to no net, apart from the second copy of T5's embedding."""


# --- the parts as files hold them ---


def denoiser(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator) for name, t in Denoiser(8).state_dict().items()}


def clip_l() -> Tensors:
    return tiny.text_states(encoders.clip_l())


def t5() -> Tensors:
    return {name: t for name, t in encoders.t5().state_dict().items() if name != TWIN}


def vae() -> Tensors:
    return dict(encoders.vae16().state_dict())


def native() -> dict[str, Tensors]:
    """Each part's tensors by the net's own names."""
    return {"denoiser": denoiser(), "clip_l": clip_l(), "t5xxl": t5(), "vae": vae()}


def bundle() -> Tensors:
    """All parts in one file, with tensors of no net and a second copy of T5's embedding."""
    tensors = add_prefix(denoiser(), "model.diffusion_model.") | add_prefix(clip_l(), CLIP)
    tensors |= add_prefix(t5() | {TWIN: t5()[EMBEDDING]}, nets.T5.prefixes[0])
    tensors |= add_prefix(vae_keys(vae()).to_foreign(vae()), VAE)
    tensors |= {
        f"{CLIP}text_model.embeddings.position_ids": torch.arange(77)[None],
        "model.diffusion_model.ema.decay": torch.ones(()),
    }
    return tensors | {"alphas": torch.linspace(1, 0, 5)}


def file(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save(path, tensors, {"made": "here"})
    return path


def shards(
    folder: Path,
    tensors: Mapping[str, Tensor],
    name: str = "diffusion_pytorch_model",
    index: str = "diffusion_pytorch_model.safetensors.index.json",
) -> None:
    """A component in two files and the list of what is where, as diffusers and transformers name them."""
    names, places = list(tensors), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = file(folder / f"{name}-0000{i}-of-00002.safetensors", {key: tensors[key] for key in part})
        places |= dict.fromkeys(part, shard.name)
    (folder / index).write_text(json.dumps({"weight_map": places}))


def pipeline(folder: Path) -> Path:
    """A diffusers folder: one part in shards, one with the names of half precision, one plain."""
    shards(folder / "transformer", KEYS.to_foreign(denoiser()))
    encoders.clip_l().save_pretrained(folder / "text_encoder")
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "model.fp16.safetensors")
    shards(folder / "text_encoder_3", t5(), "model.fp16", "model.safetensors.index.fp16.json")
    encoders.vae16().save_pretrained(folder / "vae")
    return folder


def opened(path: Path, **given: str | Path) -> Checkpoint:
    return open_model(
        path, COMPONENTS, "Small", given={flag: str(name) for flag, name in given.items()}, passthrough_keys=KEPT
    )


def built(source: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, nn.Module]:
    return {name: held.build(dtype) for name, held in source.components.items()}


def assert_same(a: Mapping[str, Writable], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name, t in a.items() if t.dtype != b[name].dtype or not torch.equal(made(t), b[name])]


def assert_holds(source: Checkpoint, wanted: Mapping[str, Tensors]) -> None:
    assert source.components.keys() == wanted.keys()
    for name, net in built(source).items():
        assert_same(net.state_dict(), wanted[name])
        assert not net.training and not [p for p in net.parameters() if p.requires_grad]


# --- where parts stand ---


@pytest.mark.parametrize("prefix", DENOISER.prefixes)
def test_a_part_stands_bare_or_under_each_of_its_prefixes(tmp_path: Path, prefix: str) -> None:
    source = opened(file(tmp_path / "model.safetensors", add_prefix(denoiser(), prefix)))
    assert_holds(source, {"denoiser": denoiser()})
    assert (source.components["denoiser"].prefix, source.layout, source.metadata) == (
        prefix,
        "single_file",
        {"made": "here"},
    )


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_all_parts_stand_in_a_bundle(tmp_path: Path, name: str) -> None:
    source = opened(file(tmp_path / name, bundle()))
    assert_holds(source, native())
    assert set(source.passthrough) == KEPT_NAMES | {f"{nets.T5.prefixes[0]}{TWIN}"}
    assert {name: held.prefix for name, held in source.components.items()} == {
        part.name: part.prefixes[0] for part in COMPONENTS
    }


def test_one_part_stands_bare_beside_others_with_prefixes(tmp_path: Path) -> None:
    tensors = {name.removeprefix("model.diffusion_model."): t for name, t in bundle().items()}
    source = opened(file(tmp_path / "model.safetensors", tensors))
    assert_holds(source, native())
    assert source.components["denoiser"].prefix == ""
    assert "ema.decay" in source.passthrough


def test_a_single_file_may_spell_a_part_as_folders_do(tmp_path: Path) -> None:
    source = opened(file(tmp_path / "model.safetensors", add_prefix(KEYS.to_foreign(denoiser()), "net.")))
    assert_holds(source, {"denoiser": denoiser()})
    assert source.components["denoiser"].key_format.name == "diffusers"


def test_a_folder_with_shards_and_with_names_of_half_precision(tmp_path: Path) -> None:
    source = opened(pipeline(tmp_path / "model"))
    assert_holds(source, native())
    assert source.layout == "diffusers"
    assert len(source.components["denoiser"].tensors.paths) == len(source.components["t5xxl"].tensors.paths) == 2
    # What a new single file would hold, and where.
    prefixes = {"denoiser": "model.diffusion_model.", "clip_l": CLIP, "t5xxl": None, "vae": VAE}
    assert {name: held.prefix for name, held in source.components.items()} == prefixes


def test_the_config_of_a_folder_goes_before_what_is_usual(tmp_path: Path) -> None:
    source = opened(pipeline(tmp_path / "model"))
    config = built(source)["vae"].config
    assert (config.scaling_factor, config.shift_factor) == (0.3611, 0.1159)
    usual = built(opened(file(tmp_path / "model.safetensors", bundle())))["vae"].config
    assert (usual.scaling_factor, usual.shift_factor) == (1.5, 0.5)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "model")
    (folder / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"diffusion_pytorch_model-00002-of-00002\.safetensors: no such file"):
        opened(folder)


# --- parts from files of their own ---


def own(tmp_path: Path, kind: str) -> Path:
    """Another CLIP, as people have it: bare, under a prefix, in a model of all parts, in a folder of its own or of a pipeline."""
    other = {name: t + 1 for name, t in clip_l().items()}
    if kind == "bundle":
        return file(tmp_path / "other.safetensors", bundle() | add_prefix(other, CLIP))
    if kind in ("folder", "pipeline"):
        folder = tmp_path / "other" / ("text_encoder" if kind == "pipeline" else "")
        file(folder / "model.safetensors", other)
        return tmp_path / "other"
    return file(tmp_path / "other.safetensors", add_prefix(other, CLIP if kind == "prefixed" else ""))


@pytest.mark.parametrize("kind", ["bare", "prefixed", "bundle", "folder", "pipeline"])
def test_a_part_of_its_own_takes_the_place_of_the_bundles(tmp_path: Path, kind: str) -> None:
    source = opened(file(tmp_path / "model.safetensors", bundle()), clip_l=own(tmp_path, kind))
    assert_holds(source, {**native(), "clip_l": {name: t + 1 for name, t in clip_l().items()}})
    held = source.components["clip_l"]
    assert held.alone and held.prefix == CLIP
    out = single_file(source, {name: net.state_dict() for name, net in built(source).items()})
    assert_same(out, bundle() | add_prefix({name: t + 1 for name, t in clip_l().items()}, CLIP))


def test_parts_of_their_own_complete_a_bare_denoiser_and_stay_out_of_its_file(tmp_path: Path) -> None:
    path = file(tmp_path / "model.safetensors", denoiser())
    files = {
        "clip_l": file(tmp_path / "clip_l.safetensors", clip_l()),
        "t5xxl": file(tmp_path / "t5xxl.safetensors", t5()),
    }
    files["vae"] = file(tmp_path / "ae.safetensors", vae_keys(vae()).to_foreign(vae()))
    source = opened(path, **files)
    assert_holds(source, native())
    assert not lacking(source, COMPONENTS)
    assert_same(single_file(source, native()), denoiser())


def test_a_part_of_its_own_for_a_folder_goes_into_a_new_single_file(tmp_path: Path) -> None:
    source = opened(pipeline(tmp_path / "model"), clip_l=own(tmp_path, "bare"))
    out = single_file(source, {name: net.state_dict() for name, net in built(source).items()})
    assert out.keys() == {name for name in bundle() if not name.startswith(nets.T5.prefixes[0])} - KEPT_NAMES
    first = f"{CLIP}text_model.final_layer_norm.weight"
    assert torch.equal(out[first], bundle()[first] + 1)


def test_a_file_that_does_not_hold_the_part_is_told_with_the_flag(tmp_path: Path) -> None:
    path = file(tmp_path / "model.safetensors", denoiser())
    with pytest.raises(
        UserError, match=r"t5xxl: .*vae\.safetensors does not hold the text encoder t5xxl \(its tensors: \d+, 'decoder"
    ):
        opened(path, t5xxl=file(tmp_path / "vae.safetensors", vae()))
    with pytest.raises(UserError, match=r"clip_l: no such file or folder: '.*nowhere\.safetensors'"):
        opened(path, clip_l=tmp_path / "nowhere.safetensors")


# --- what is missing, and what is too much ---


def test_missing_parts_are_named_with_their_flags(tmp_path: Path) -> None:
    path = file(tmp_path / "model.safetensors", {f"{CLIP}{name}": t for name, t in clip_l().items()})
    source = opened(path)
    assert lacking(source, COMPONENTS) == [
        f"{path} holds no transformer",
        f"{path} holds no text encoder t5xxl; name its file with --t5xxl",
        f"{path} holds no VAE; name its file with --vae",
    ]
    assert lacking(source, [CLIP_L]) == []


def test_tensors_of_no_part_are_named(tmp_path: Path) -> None:
    strange = {f"mystery.{i}": torch.zeros(1) for i in range(7)}
    path = file(tmp_path / "model.safetensors", add_prefix(denoiser(), "net.") | strange)
    with pytest.raises(UserError) as error:
        opened(path)
    names = ", ".join(f"mystery.{i}" for i in range(5))
    assert error.value.messages == (f"{path}: tensors that belong to no part of Small: {names} and 2 more",)


@pytest.mark.parametrize("prefix", ["net.", ""])
def test_a_strange_tensor_of_a_part_is_named(tmp_path: Path, prefix: str) -> None:
    path = file(tmp_path / "model.safetensors", add_prefix(denoiser() | {"out.scale": torch.ones(1)}, prefix))
    with pytest.raises(UserError, match=r"model\.safetensors \(the transformer\) has the tensor 'out\.scale'"):
        opened(path).components["denoiser"].build()


def test_a_strange_tensor_in_a_folder_is_named(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "model")
    shards(folder / "transformer", KEYS.to_foreign(denoiser()) | {"outs.scale": torch.ones(1)})
    with pytest.raises(UserError, match=r"transformer \(the transformer\): no rule names the tensor 'outs\.scale'"):
        opened(folder).components["denoiser"].build()


@pytest.mark.parametrize("name", ["attn.qkv.bias", "out.weight"])
def test_a_missing_tensor_of_a_part_is_named(tmp_path: Path, name: str) -> None:
    path = file(tmp_path / "model.safetensors", {n: t for n, t in denoiser().items() if n != name})
    with pytest.raises(
        UserError, match=rf"model\.safetensors \(the transformer\) lacks the tensor '{re.escape(name)}'"
    ):
        opened(path).components["denoiser"].build()


# --- number formats ---


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_net_is_held_in_the_format_asked_for_and_fp8_as_bf16(
    tmp_path: Path, dtype: torch.dtype | None, stored: torch.dtype
) -> None:
    tensors = {name: t.to(stored) for name, t in denoiser().items()}
    folder = tmp_path / "model"
    shards(folder / "transformer", {name: t.to(stored) for name, t in KEYS.to_foreign(denoiser()).items()})
    for path in (file(tmp_path / "model.safetensors", add_prefix(tensors, "net.")), folder):
        told: list[int] = []
        net = opened(path).components["denoiser"].build(dtype, told.append)
        held = dtype or (torch.bfloat16 if stored.itemsize == 1 else stored)
        assert_same(net.state_dict(), {name: t.to(held) for name, t in tensors.items()})
        assert sum(told) == sum(t.numel() for t in tensors.values())


QUANTISED = "blocks.0.weight.absmax"


def test_quantised_weights_are_refused_in_every_part(tmp_path: Path) -> None:
    """The denoiser's in a single file and in a folder, and each part's that has a file of its own."""
    said, plain = "its weights are quantised", file(tmp_path / "model.safetensors", denoiser())
    for prefix in DENOISER.prefixes:
        path = file(tmp_path / "small.safetensors", add_prefix(denoiser() | {QUANTISED: torch.zeros(1)}, prefix))
        with pytest.raises(UserError, match=rf"small\.safetensors: {said} \(it has the tensor '{prefix}{QUANTISED}'\)"):
            opened(path)
    folder = pipeline(tmp_path / "model")
    shards(folder / "transformer", KEYS.to_foreign(denoiser()) | {QUANTISED: torch.zeros(1)})
    with pytest.raises(UserError, match=rf"model/transformer: {said}"):
        opened(folder)
    for part, tensors in ((CLIP_L, clip_l()), (T5, t5()), (AE, vae())):
        path = file(tmp_path / "part.safetensors", tensors | {QUANTISED: torch.zeros(1)})
        with pytest.raises(UserError, match=rf"{part.flag}: .*part\.safetensors: {said}"):
            opened(plain, **{part.flag: path})


def test_a_part_is_taken_from_a_file_whose_other_parts_are_quantised(tmp_path: Path) -> None:
    path = file(tmp_path / "small.safetensors", bundle() | {"model.diffusion_model.scaled_fp8": torch.zeros(2)})
    assert_same(open_component(AE, str(path)).build().state_dict(), vae())


# --- writing ---


def again(source: Checkpoint, dtype: torch.dtype | None = None, **instead: Tensors) -> Tensors:
    parts = {
        name: values(net, source.components[name], instead.get(name, {}), dtype) for name, net in built(source).items()
    }
    return single_file(source, parts)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_read_is_written_again(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    tensors = {n: t.to(dtype) if t.is_floating_point() and n not in KEPT_NAMES else t for n, t in bundle().items()}
    assert_same(again(opened(file(tmp_path / name, tensors))), tensors)


@pytest.mark.parametrize("prefix", DENOISER.prefixes)
@pytest.mark.parametrize("spelled", [denoiser(), KEYS.to_foreign(denoiser())], ids=["native", "diffusers"])
def test_names_are_written_as_they_were_spelled(tmp_path: Path, prefix: str, spelled: Tensors) -> None:
    tensors = add_prefix(spelled, prefix)
    assert_same(again(opened(file(tmp_path / "model.safetensors", tensors))), tensors)


def test_unchanged_parts_keep_their_format_and_trained_ones_have_that_of_the_net(tmp_path: Path) -> None:
    source = opened(file(tmp_path / "model.safetensors", {n: t.half() for n, t in bundle().items()}))
    trained = {"out.bias": torch.full((2,), 7.0)}
    nets_ = {name: held.build(torch.float32) for name, held in source.components.items()}
    out = {
        name: values(net, source.components[name], {"denoiser": trained}.get(name, {}), None)
        for name, net in nets_.items()
    }
    assert out["denoiser"]["out.bias"].tolist() == [7.0, 7.0]
    assert {name: {t.dtype for t in part.values()} for name, part in out.items()} == {
        "denoiser": {torch.float32},
        "clip_l": {torch.float16},
        "t5xxl": {torch.float16},
        "vae": {torch.float16},
    }
    cast = values(nets_["denoiser"], source.components["denoiser"], trained, torch.bfloat16)
    assert {t.dtype for t in cast.values()} == {torch.bfloat16}


@pytest.mark.parametrize("held", [None, torch.float32])
def test_an_unchanged_part_in_fp8_is_written_in_bf16(tmp_path: Path, held: torch.dtype | None) -> None:
    tensors = add_prefix({n: t.to(torch.float8_e4m3fn) for n, t in denoiser().items()}, "net.")
    source = opened(file(tmp_path / "model.safetensors", tensors))
    net = source.components["denoiser"].build(held)
    out = single_file(source, {"denoiser": values(net, source.components["denoiser"], {}, None)})
    assert_same(out, {name: t.bfloat16() for name, t in tensors.items()})


def models(source: Checkpoint) -> Models:
    """As a family of these parts would hold them; all else is another family's."""
    held = built(source)
    family = replace(
        families.family("sd"),
        title="Small",
        components=COMPONENTS,
        tokenizer_specs={},
        adjust_single_file=lambda models, tensors: tensors,
    )
    return Models(family, None, held.pop("denoiser"), held, {}, held.pop("vae", None), source)  # type: ignore[arg-type]


def saved(
    source: Checkpoint, path: Path, *, layout: str = "single_file", trained: tuple[str, ...] = (), **state: Tensors
) -> Path:
    loading.save(
        models(source), path, layout=layout, dtype=None, metadata={"made": "again"}, state=state, trained=trained
    )
    return path


@pytest.fixture
def apart(tmp_path: Path) -> Checkpoint:
    """A denoiser, and encoders in files of their own: one as early files spell it, one with the embedding's other name."""
    early = {name.removeprefix("text_model."): t for name, t in clip_l().items()}
    twin = {TWIN if name == EMBEDDING else name: t for name, t in t5().items()}
    files = {
        "clip_l": file(tmp_path / "clip_l.safetensors", early),
        "t5xxl": file(tmp_path / "t5xxl.safetensors", twin),
    }
    return opened(file(tmp_path / "model.safetensors", denoiser()), **files)


def test_a_trained_encoder_from_a_file_of_its_own_is_written_beside_the_result(
    apart: Checkpoint, tmp_path: Path
) -> None:
    new = {"text_model.final_layer_norm.bias": torch.full((encoders.L_WIDTH,), 3.0)}
    out = saved(apart, tmp_path / "out" / "new.safetensors", trained=("denoiser", "clip_l"), clip_l=new)
    assert sorted(path.name for path in out.parent.iterdir()) == ["new.safetensors", "new_clip_l.safetensors"]
    assert_same(load(out), denoiser())
    beside = load(tmp_path / "out" / "new_clip_l.safetensors")
    assert_same(
        beside, load(tmp_path / "clip_l.safetensors") | {"final_layer_norm.bias": torch.full((encoders.L_WIDTH,), 3.0)}
    )
    assert read_header(tmp_path / "out" / "new_clip_l.safetensors").metadata == {"made": "again"}
    read = opened(out, clip_l=tmp_path / "out" / "new_clip_l.safetensors")
    assert_holds(read, {"denoiser": denoiser(), "clip_l": clip_l() | new})


def test_encoders_that_were_not_trained_stay_where_they_are(apart: Checkpoint, tmp_path: Path) -> None:
    saved(apart, tmp_path / "out" / "new.safetensors", trained=("denoiser",))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new.safetensors"]


def test_every_encoder_beside_is_spelled_as_its_file(apart: Checkpoint, tmp_path: Path) -> None:
    out = saved(apart, tmp_path / "out" / "new.ckpt", trained=("denoiser", "clip_l", "t5xxl"))
    for name in ("clip_l", "t5xxl"):
        assert_same(load(out.with_name(f"new_{name}.ckpt")), load(tmp_path / f"{name}.safetensors"))


def test_a_trained_encoder_of_a_bundle_is_written_into_it(tmp_path: Path) -> None:
    new = {"text_model.final_layer_norm.bias": torch.full((encoders.L_WIDTH,), 3.0)}
    source = opened(file(tmp_path / "model.safetensors", bundle()))
    out = saved(source, tmp_path / "out" / "new.safetensors", trained=("denoiser", "clip_l"), clip_l=new)
    assert [path.name for path in out.parent.iterdir()] == ["new.safetensors"]
    assert_same(load(out), bundle() | add_prefix(new, CLIP))


def test_a_copy_that_a_file_holds_follows_what_was_trained(tmp_path: Path) -> None:
    """T5's embedding stands in most files twice; readers differ in which one they take."""
    new = {EMBEDDING: t5()[EMBEDDING] + 1}
    source = opened(file(tmp_path / "model.safetensors", bundle()))
    out = saved(source, tmp_path / "out" / "new.safetensors", trained=("t5xxl",), t5xxl=new)
    prefix = nets.T5.prefixes[0]
    assert_same(load(out), bundle() | {prefix + EMBEDDING: new[EMBEDDING], prefix + TWIN: new[EMBEDDING]})


def test_a_folder_is_written_as_a_folder(tmp_path: Path) -> None:
    """Weights in one file each, in the folder's own names; lists of shards that are no more are left out."""
    folder = pipeline(tmp_path / "model")
    (folder / "model_index.json").write_text("{}")
    source = opened(folder)
    held = models(source)
    held.family = replace(held.family, new_folder=None)
    loading.save(held, tmp_path / "out", layout="diffusers", dtype=None, metadata={}, trained=("denoiser",))
    assert_same(
        load(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors"), KEYS.to_foreign(denoiser())
    )
    assert not list((tmp_path / "out").rglob("*.index*.json"))
    assert_holds(opened(tmp_path / "out"), native())
    assert built(opened(tmp_path / "out"))["vae"].config.scaling_factor == 0.3611


def test_what_a_net_says_of_its_tensors_names_their_file(tmp_path: Path) -> None:
    def odd(shapes: Mapping[str, Any], config: Mapping[str, Any]) -> nn.Module:
        raise UserError("heads of 7 channels cannot be turned")

    held = opened(file(tmp_path / "model.safetensors", denoiser())).components["denoiser"]
    with pytest.raises(UserError) as error:
        replace(held, component=replace(held.component, net=odd)).empty()
    said = f"{tmp_path / 'model.safetensors'} ({DENOISER.title}): heads of 7 channels cannot be turned"
    assert error.value.messages == (said,)
