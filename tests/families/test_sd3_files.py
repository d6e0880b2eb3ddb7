"""Stable Diffusion 3's files, in and out: bare, with prefix, in bundles, in folders, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse import sparse
from tinies import encoders, sd3
from tinies.cases import Files
from torch import Tensor

from sfumato.config import LossConfig, NoiseConfig, Settings
from sfumato.errors import UserError
from sfumato.families.detect import detect_file
from sfumato.families.sd3.facts import FACTS, Completed, Options
from sfumato.families.sd3.family import FAMILY
from sfumato.families.sd3.names import CLIP_G, CLIP_L, T5, VAE
from sfumato.formats.files import load, save
from sfumato.formats.names import add_prefix
from sfumato.models import loading
from sfumato.models.base import Models
from sfumato.models.components import open_model
from sfumato.models.detection import PREFIX
from sfumato.models.meta_init import check, shapes
from sfumato.models.saving import single_file
from sfumato.tensors.flow import Flow

Keys = Callable[[str], dict[str, tuple[int, ...]]]
TWIN = "encoder.embed_tokens.weight"


def opened(
    files: Files, model: Path | None = None, *, vae: str | None = None, dtype: Any = None, **options: Any
) -> Models:
    told = Options(**{**files.options, **options})
    return loading.load(
        FAMILY,
        str(model or files.model),
        told,
        vae=vae or files.vae,
        tokenizer=str(files.model.parent),
        dtype=dtype,
        detect=detect_file,
    )


def written(models: Models, path: Path, **more: Any) -> dict[str, Tensor]:
    loading.save(models, path, layout="single_file", dtype=None, metadata={}, **more)
    return load(path)


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name, t in a.items() if t.dtype != b[name].dtype or not torch.equal(t, b[name])]


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Transformer and VAE in one file, the encoders in files of their own."""
    return sd3.write("3.5_medium", tmp_path_factory.mktemp("apart"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """All in one file."""
    return sd3.write("medium", tmp_path_factory.mktemp("bundle"))


# --- in and out ---


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_transformer_alone_keeps_its_prefix(apart: Files, tmp_path: Path, prefix: str) -> None:
    tensors = add_prefix(sd3.parts("3.5_medium")["transformer"], prefix)
    save(tmp_path / "alone.safetensors", tensors, {})
    models = opened(apart, tmp_path / "alone.safetensors", vae=str(apart.model.with_name("vae.safetensors")))
    assert_same(tensors, written(models, tmp_path / "again.safetensors"))


def test_a_transformer_in_diffusers_names_comes_back_in_them(apart: Files, tmp_path: Path) -> None:
    tensors = sd3.transformer("3.5_medium").state_dict()
    save(tmp_path / "alone.safetensors", tensors, {})
    models = opened(apart, tmp_path / "alone.safetensors", vae=str(apart.model.with_name("vae.safetensors")))
    assert_same(models.denoiser.state_dict(), sd3.parts("3.5_medium")["transformer"])
    assert_same(tensors, written(models, tmp_path / "again.safetensors"))


@pytest.mark.parametrize("shard", ["10GB", "300KB"])
def test_a_folder_becomes_a_file_of_transformer_and_vae(tmp_path: Path, shard: str) -> None:
    sd3.pipeline("3.5_medium").save_pretrained(tmp_path / "folder", max_shard_size=shard)
    models = loading.load(FAMILY, str(tmp_path / "folder"), Options())
    assert set(models.encoders) == {"clip_l", "clip_g", "t5xxl"}
    assert_same(sd3.single_file("3.5_medium", "transformer", "vae"), written(models, tmp_path / "single.safetensors"))
    assert not list(tmp_path.glob("single_*"))


def test_trained_encoders_are_written_beside_a_file_that_does_not_hold_them(apart: Files, tmp_path: Path) -> None:
    models = opened(apart)
    models.encoders["clip_g"].get_parameter("text_projection.weight").data += 1
    assert_same(load(apart.model), written(models, tmp_path / "out.safetensors", trained={"denoiser", "clip_g"}))
    (beside,) = tmp_path.glob("out_*")
    assert beside.name == "out_clip_g.safetensors"
    old = sd3.parts("3.5_medium")["clip_g"]
    assert_same(load(beside), {**old, "text_projection.weight": old["text_projection.weight"] + 1})


def test_trained_encoders_stay_in_a_bundle(bundle: Files, tmp_path: Path) -> None:
    models = opened(bundle)
    models.encoders["clip_l"].get_parameter("text_projection.weight").data += 1
    out = written(models, tmp_path / "out.safetensors", trained={"clip_l"})
    changed = {name for name, t in load(bundle.model).items() if not torch.equal(t, out[name])}
    assert changed == {f"{CLIP_L}text_projection.weight"}
    assert not list(tmp_path.glob("out_*"))


def test_an_encoder_of_its_own_goes_before_that_of_a_bundle(bundle: Files, tmp_path: Path) -> None:
    other = {name: t + 1 for name, t in sd3.parts("medium")["clip_l"].items()}
    save(tmp_path / "clip_l.safetensors", other, {})
    models = opened(bundle, clip_l=str(tmp_path / "clip_l.safetensors"))
    assert_same(models.encoders["clip_l"].state_dict(), other)
    out = written(models, tmp_path / "out.safetensors")
    assert_same(out, {**load(bundle.model), **add_prefix(other, CLIP_L)})


def test_an_embedding_that_stands_twice_is_written_twice(bundle: Files, tmp_path: Path) -> None:
    """Readers of bundles take one or the other."""
    tensors = load(bundle.model)
    save(tmp_path / "twice.safetensors", {**tensors, T5 + TWIN: tensors[T5 + "shared.weight"]}, {})
    models = opened(bundle, tmp_path / "twice.safetensors", train_t5xxl=True)
    models.encoders["t5xxl"].get_parameter("shared.weight").data += 1
    out = written(models, tmp_path / "out.safetensors", trained={"t5xxl"})
    assert torch.equal(out[T5 + TWIN], tensors[T5 + "shared.weight"] + 1)
    assert torch.equal(out[T5 + TWIN], out[T5 + "shared.weight"])


def test_a_bundle_brings_the_tokenizer_of_its_t5_with_it(bundle: Files, tmp_path: Path) -> None:
    written(opened(bundle), tmp_path / "out.safetensors")
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["tokenizer_3"]


def test_t5_in_fp8_is_read_as_what_it_holds(bundle: Files, tmp_path: Path) -> None:
    """As in Stability's own bundle, sd3_medium_incl_clips_t5xxlfp8."""
    small = {
        name: t.to(torch.float8_e4m3fn) if name.startswith(T5) else t.half() for name, t in load(bundle.model).items()
    }
    save(tmp_path / "fp8.safetensors", small, {})
    plain, wide = (
        opened(bundle, tmp_path / "fp8.safetensors"),
        opened(bundle, tmp_path / "fp8.safetensors", dtype=torch.float32),
    )
    assert {p.dtype for p in plain.encoders["t5xxl"].parameters()} == {torch.bfloat16}
    for name, p in wide.encoders["t5xxl"].named_parameters():
        assert torch.equal(p, small[T5 + name].float())
    cond = wide.encode(wide.tokenize(["a cat"]))
    assert all(t.isfinite().all() for t in cond.values())


def test_a_tokenizer_given_alone_is_t5s(apart: Files) -> None:
    folder = apart.model.parent / "tokenizer_3"
    read = FAMILY.tokenizer_specs["t5xxl"].make(folder)
    assert (
        FAMILY.tokenizer_specs["t5xxl"].alone
        and not FAMILY.tokenizer_specs["clip_l"].alone
        and not FAMILY.tokenizer_specs["clip_g"].alone
    )
    assert read.get_vocab() == encoders.t5_tokenizer().get_vocab()


def test_what_both_clips_pad_with(apart: Files) -> None:
    """CLIP-L pads with its end mark, CLIP-G with "!": where the vocabularies are sfumato's own as well."""
    own = {name: FAMILY.tokenizer_specs[name].make(None) for name in ("clip_l", "clip_g")}
    assert (own["clip_l"].pad_token, own["clip_g"].pad_token) == ("<|endoftext|>", "!")
    assert own["clip_g"].pad_token_id == 0
    tokenizers = opened(apart).tokenizers
    assert (tokenizers["clip_l"].pad_token, tokenizers["clip_g"].pad_token) == ("<|endoftext|>", "!")


def test_latents_are_scaled_as_stable_diffusion_3s(apart: Files) -> None:
    config = opened(apart).vae.config
    assert (config.scaling_factor, config.shift_factor) == (1.5305, 0.0609)  # type: ignore[union-attr]


# --- what the files say ---


@pytest.mark.parametrize("kind", sd3.KINDS)
def test_the_version_is_seen_from_the_file(tmp_path: Path, kind: sd3.Kind) -> None:
    models = opened(sd3.write(kind, tmp_path))
    o = models.options
    assert isinstance(o, Completed)
    assert (o.version, o.blocks, o.has_t5) == (kind.replace("_", "-"), 3, kind != "3.5_large")


def test_the_recipe_is_filled_in(apart: Files) -> None:
    plain, asked = opened(apart), opened(apart, training_shift=1.5, timestep_sampling="shift")
    assert (plain.options.weighting_scheme, plain.options.discrete_flow_shift) == ("logit_normal", None)
    assert (asked.options.weighting_scheme, asked.options.discrete_flow_shift, asked.options.training_shift) == (
        "uniform",
        1.5,
        None,
    )
    flows = [models.process(NoiseConfig(), LossConfig()) for models in (plain, asked)]
    assert flows[0] == Flow(timestep_sampling="sigma", weighting_scheme="logit_normal", shift=3.0)
    assert flows[1] == Flow(timestep_sampling="shift", discrete_flow_shift=1.5, shift=3.0)


@pytest.mark.parametrize("sampling", ["sigma", "uniform", "sigmoid", "shift", "flux_shift"])
def test_every_way_of_drawing_noise_levels_can_be_chosen_alone(apart: Files, sampling: str) -> None:
    process = opened(apart, timestep_sampling=sampling).process(NoiseConfig(), LossConfig())
    assert isinstance(process, Flow) and process.timestep_sampling == sampling


def test_settings_of_older_models_are_refused() -> None:
    with pytest.raises(UserError, match="noise_offset: a flow is sampled from plain noise"):
        FACTS.check(Settings(noise_offset=0.05, family=Options()))


@pytest.mark.parametrize("name", ["apply_t5_attn_mask", "train_t5xxl", "t5_dropout_rate", "learning_rate_te3"])
def test_what_only_t5_could_do_is_refused_without_one(apart: Files, name: str) -> None:
    value = 0.5 if name in ("t5_dropout_rate", "learning_rate_te3") else True
    lone = Files(model=apart.model, options={n: path for n, path in apart.options.items() if n != "t5xxl"})
    with pytest.raises(UserError, match=rf"{name}: .* holds no T5; name its file with t5xxl, or leave {name} out"):
        opened(lone, **{name: value})


def test_options_out_of_range_are_refused_in_code_too(apart: Files) -> None:
    with pytest.raises(UserError) as told:
        opened(apart, clip_l_dropout_rate=1.5, t5xxl_max_token_length=0)
    assert [message.partition(":")[0] for message in told.value.messages] == [
        "t5xxl_max_token_length",
        "clip_l_dropout_rate",
    ]


# --- what is refused ---


def test_missing_parts_are_named_with_their_settings(apart: Files, tmp_path: Path) -> None:
    save(tmp_path / "alone.safetensors", sd3.parts("3.5_medium")["transformer"], {})
    with pytest.raises(UserError) as told:
        loading.load(FAMILY, str(tmp_path / "alone.safetensors"), Options())
    assert [message.rpartition(" with ")[2] for message in told.value.messages] == ["--clip_l", "--clip_g", "--vae"]


@pytest.mark.parametrize("name", ["context_embedder.weight", "pos_embed", "joint_blocks.1.x_block.mlp.fc1.weight"])
def test_a_missing_tensor_is_named(apart: Files, tmp_path: Path, name: str) -> None:
    tensors = sd3.single_file("3.5_medium", "transformer", "vae")
    del tensors[PREFIX + name]
    save(tmp_path / "cut.safetensors", tensors, {})
    with pytest.raises(UserError, match=rf"lacks the tensor '{name}'"):
        opened(apart, tmp_path / "cut.safetensors")


def test_exchanged_and_foreign_encoders_are_refused(apart: Files, tmp_path: Path) -> None:
    narrow, wide = apart.options["clip_l"], apart.options["clip_g"]
    with pytest.raises(UserError, match="clip_l, clip_g: the files are exchanged"):
        opened(apart, clip_l=wide, clip_g=narrow)
    with pytest.raises(
        UserError, match="clip_l, clip_g: their pooled states are 64 and 64 wide, the transformer takes 192 of both"
    ):
        opened(apart, clip_g=narrow)
    save(tmp_path / "t5.safetensors", encoders.t5().state_dict(), {})
    with pytest.raises(UserError, match="t5xxl: its states are 96 wide, 256 was expected"):
        opened(apart, t5xxl=str(tmp_path / "t5.safetensors"))
    with pytest.raises(UserError, match=r"clip_g: .*t5xxl\.safetensors does not hold the text encoder clip_g"):
        opened(apart, clip_g=apart.options["t5xxl"])


def test_another_models_vae_is_refused(apart: Files, tmp_path: Path) -> None:
    tensors = {
        name: t[:, :4] if name == "decoder.conv_in.weight" else t for name, t in sd3.parts("3.5_medium")["vae"].items()
    }
    save(tmp_path / "vae.safetensors", tensors, {})
    with pytest.raises(UserError, match="vae: its latents have 4 channels, those of this model 16"):
        opened(apart, vae=str(tmp_path / "vae.safetensors"))


def test_models_that_take_more_than_a_image_are_refused(apart: Files, tmp_path: Path) -> None:
    tensors = sd3.single_file("3.5_medium", "transformer", "vae")
    wide = tensors[f"{PREFIX}x_embedder.proj.weight"].repeat(1, 2, 1, 1)
    save(tmp_path / "fill.safetensors", {**tensors, f"{PREFIX}x_embedder.proj.weight": wide}, {})
    with pytest.raises(UserError, match="takes 32 channels, not 16"):
        opened(apart, tmp_path / "fill.safetensors")


def test_a_folder_of_other_heads_is_refused(tmp_path: Path) -> None:
    sd3.pipeline("medium").save_pretrained(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"attention_head_dim": 64', '"attention_head_dim": 32'))
    with pytest.raises(
        UserError, match=r"transformer .the transformer.: config\.json: attention_head_dim is 32; only 64 is supported"
    ):
        loading.load(FAMILY, str(tmp_path), Options())


@pytest.mark.parametrize(
    "projection", [None, torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 8], ids=["none", "CLIP's"]
)
def test_clip_l_says_what_it_pooled_where_the_projection_is_not_stable_diffusion_3s(
    apart: Files, tmp_path: Path, projection: Tensor | None
) -> None:
    """CLIP-L's files for other uses have no projection, or CLIP's own; here it is the identity, or near it where it was trained."""
    tensors = sd3.parts("3.5_medium")["clip_l"]
    sd3s = tensors.pop("text_projection.weight")
    save(
        tmp_path / "clip_l.safetensors",
        tensors | ({} if projection is None else {"text_projection.weight": projection}),
        {},
    )
    models = opened(apart, clip_l=str(tmp_path / "clip_l.safetensors"))
    ids = encoders.clip_tokenizer()(["a cat"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        cond = models.encode(models.tokenize(["a cat"]))
        projected = sd3.clip_l()(ids).text_embeds
    torch.testing.assert_close(cond["clip_l_pooled"] @ sd3s.T, projected, atol=1e-5, rtol=1e-5)


# --- files of full size ---


def bundled(keys: Keys, version: str) -> dict[str, tuple[int, ...]]:
    """All that a file of a version with its encoders holds. The table of CLIP-L lacks the projection that SD3's has."""
    tables = {
        PREFIX: keys(f"{version}.transformer"),
        VAE: keys("sd3.vae"),
        CLIP_L: {**keys("clip_l.hf"), "text_projection.weight": (768, 768)},
        CLIP_G: keys("clip_g.hf"),
        T5: keys("t5xxl.hf"),
    }
    held = {prefix + name: shape for prefix, table in tables.items() for name, shape in table.items()}
    return held | {"text_encoders.clip_l.logit_scale": (), "text_encoders.t5xxl.logit_scale": ()}


@pytest.mark.parametrize("version", ["sd3_medium", "sd3.5_medium", "sd3.5_large"])
def test_every_tensor_of_a_bundle_is_claimed_and_written_again(keys: Keys, version: str, tmp_path: Path) -> None:
    table = bundled(keys, version)
    path = sparse(tmp_path / "model.safetensors", table)
    source = open_model(path, FAMILY.components, FAMILY.title, given={}, passthrough_keys=FAMILY.passthrough_keys)
    options, source = FAMILY.complete(Options(), source)
    assert (options.version, options.has_t5) == (
        version.removeprefix("sd3_").removeprefix("sd").replace("_", "-"),
        True,
    )
    nets = {}
    for name, held in source.components.items():
        nets[name] = held.component.net(held.shapes(), {})
        check(nets[name], held.shapes(), name)
    kept = {name: torch.empty(table[name], device="meta") for name in source.passthrough}
    out = single_file(replace(source, passthrough=kept), {name: net.state_dict() for name, net in nets.items()})
    assert shapes(out) == table


def test_a_tensor_of_no_part_is_refused_by_name(keys: Keys, tmp_path: Path) -> None:
    path = sparse(
        tmp_path / "model.safetensors",
        {**bundled(keys, "sd3_medium"), "text_encoders.clip_l.text_projection": (768, 768)},
    )
    with pytest.raises(UserError, match=r"belong to no part of .*: text_encoders\.clip_l\.text_projection"):
        open_model(path, FAMILY.components, FAMILY.title, given={}, passthrough_keys=FAMILY.passthrough_keys)
