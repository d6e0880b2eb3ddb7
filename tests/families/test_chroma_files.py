"""Chroma's files: known by their headers, opened whole at full size, in every layout that people have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from flux_checks import meta
from sparse import sparse
from tinies.chroma import autoencoder, native, pipeline, write
from tinies.encoders import t5, t5_tokenizer
from torch import Tensor, nn

from sfumato import families
from sfumato.errors import UserError
from sfumato.families.chroma.facts import Options
from sfumato.families.chroma.family import FAMILY
from sfumato.families.detect import Detected, detect_file, identify
from sfumato.families.flux.facts import T5XXL, VAE
from sfumato.formats import files
from sfumato.formats.names import add_prefix
from sfumato.models.base import Models
from sfumato.models.components import Checkpoint, open_component, open_model
from sfumato.models.detection import PREFIX
from sfumato.models.loading import load, save
from sfumato.models.meta_init import check, shapes
from sfumato.models.saving import single_file

Keys = Callable[[str], dict[str, tuple[int, ...]]]
COMPONENTS = {part.name: part for part in FAMILY.components}


def known(found: Detected | None) -> tuple[str, str, str, tuple[str, ...]]:
    assert found is not None
    return found.family, found.kind, found.dialect, found.parts


def bundle() -> dict[str, Tensor]:
    """All in one file, as ComfyUI writes it."""
    held = native(PREFIX) | add_prefix(t5().state_dict(), T5XXL) | autoencoder(VAE)
    return held | {"text_encoders.t5xxl.logit_scale": torch.tensor(4.6)}


def opened(path: Path, **told: str) -> Models:
    vae = told.pop("vae", None)
    return load(FAMILY, str(path), Options(**told), vae=vae)


def states(models: Models) -> dict[str, Tensor]:
    nets = {**models.nets(), "vae": models.vae}
    return {f"{name}.{k}": t for name, net in nets.items() for k, t in net.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name, t in a.items() if t.dtype != b[name].dtype or not torch.equal(t, b[name])]


# --- what a file is ---


def test_checkpoints_are_known(keys: Keys) -> None:
    table = keys("chroma.transformer")
    assert known(identify(table)) == ("chroma", "checkpoint", "bfl", ("denoiser",))
    prefixed = {PREFIX + name: shape for name, shape in table.items()}
    assert known(identify(prefixed)) == ("chroma", "checkpoint", "bfl", ("denoiser",))
    whole = {**prefixed, f"{T5XXL}shared.weight": (1, 1), f"{VAE}decoder.conv_in.weight": (1, 16, 3, 3)}
    assert known(identify(whole)) == ("chroma", "checkpoint", "bfl", ("denoiser", "text_encoder", "vae"))
    with torch.device("meta"):
        foreign = shapes(ChromaTransformer2DModel().state_dict())
    assert known(identify(foreign)) == ("chroma", "checkpoint", "diffusers", ("denoiser",))


@pytest.mark.parametrize(
    "name", ["flux_dev.transformer", "flux_schnell.transformer", "flux.vae", "t5xxl.hf", "adapter.flux.lora"]
)
def test_files_of_flux_are_not_claimed(keys: Keys, name: str) -> None:
    assert families.facts("chroma").signature.detect(keys(name)) is None


@pytest.mark.parametrize(
    ("name", "dialect"),
    [
        ("lora_unet_distilled_guidance_layer_in_proj.lora_down.weight", "kohya"),
        ("diffusion_model.distilled_guidance_layer.in_proj.lora_A.weight", "comfy"),
        ("transformer.distilled_guidance_layer.in_proj.lora_A.weight", "peft"),
    ],
)
def test_an_adapter_is_known_by_the_net_that_is_chromas_own(keys: Keys, name: str, dialect: str) -> None:
    """Without it, it may be for either model; FLUX.1 answers."""
    table = keys("adapter.chroma.lora")
    assert known(identify({**table, name: (4, 64)}))[:3] == ("chroma", "adapter", dialect)
    assert known(identify(table))[:2] == ("flux", "adapter")


# --- at full size ---


def claimed(path: Path, table: dict[str, tuple[int, ...]]) -> Checkpoint:
    return open_model(
        sparse(path / "model.safetensors", table),
        FAMILY.components,
        FAMILY.title,
        given={},
        passthrough_keys=FAMILY.passthrough_keys,
    )


def empty(source: Checkpoint, name: str) -> nn.Module:
    held = source.components[name]
    net = held.component.net(held.shapes(), {})
    check(net, held.shapes(), name)
    return net


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["bare", "prefixed"])
def test_every_tensor_of_a_file_is_claimed_and_written_again(keys: Keys, prefix: str, tmp_path: Path) -> None:
    table = {prefix + name: shape for name, shape in keys("chroma.transformer").items()}
    options, source = FAMILY.complete(Options(), claimed(tmp_path, table))
    assert source.components.keys() == {"denoiser"} and not source.passthrough
    assert (options.double_blocks, options.single_blocks, options.model_type) == (19, 38, "chroma")
    assert shapes(single_file(source, {"denoiser": empty(source, "denoiser").state_dict()})) == table


def test_every_tensor_of_a_bundle_is_claimed(keys: Keys, tmp_path: Path) -> None:
    placed = {PREFIX: "chroma.transformer", T5XXL: "t5xxl.hf", VAE: "flux.vae"}
    source = claimed(
        tmp_path, {prefix + name: shape for prefix, file in placed.items() for name, shape in keys(file).items()}
    )
    assert set(source.components) == {"denoiser", "t5xxl", "vae"}
    # The second name of T5's embedding is the first one's.
    assert set(source.passthrough) == {f"{T5XXL}encoder.embed_tokens.weight"}
    nets = {name: empty(source, name) for name in source.components}
    assert len(nets["t5xxl"].layers) == 24  # type: ignore[arg-type]
    config = nets["vae"].config  # type: ignore[attr-defined]
    assert (config.latent_channels, config.scaling_factor, config.shift_factor) == (16, 0.3611, 0.1159)


def test_every_tensor_of_a_sharded_folder_is_claimed(keys: Keys, tmp_path: Path) -> None:
    with torch.device("meta"):
        table = shapes(ChromaTransformer2DModel().state_dict())
    names, folder = list(table), tmp_path / "transformer"
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in shards.items():
        sparse(folder / file, {name: table[name] for name in held})
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    files.write_text(folder / "diffusion_pytorch_model.safetensors.index.json", json.dumps(index))
    source = open_model(tmp_path, FAMILY.components, FAMILY.title, given={}, passthrough_keys=FAMILY.passthrough_keys)
    assert shapes(empty(source, "denoiser").state_dict()) == keys("chroma.transformer")
    written = COMPONENTS["denoiser"].diffusers(keys("chroma.transformer")).write(meta(keys("chroma.transformer")))
    assert shapes(written) == table


def test_files_of_single_parts_are_claimed(keys: Keys, tmp_path: Path) -> None:
    for part, table in (("t5xxl", "t5xxl.hf"), ("vae", "flux.vae")):
        held = open_component(COMPONENTS[part], str(sparse(tmp_path / f"{part}.safetensors", keys(table))))
        check(held.component.net(held.shapes(), {}), held.shapes(), part)


# --- every layout holds the same ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The tensors of the model, as read from files of its parts."""
    made = write(tmp_path_factory.mktemp("model"))
    return states(opened(made.model, **made.options, vae=str(made.vae)))


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["bare", "prefixed"])
def test_a_transformer_keeps_its_prefix(whole: dict[str, Tensor], prefix: str, tmp_path: Path) -> None:
    made = write(tmp_path)
    files.save(made.model, native(prefix), {})
    models = opened(made.model, **made.options, vae=str(made.vae))
    assert_same(states(models), whole)
    save(models, tmp_path / "again.safetensors", layout="single_file", dtype=None, metadata={})
    assert_same(files.load(tmp_path / "again.safetensors"), native(prefix))


def test_a_bundle(whole: dict[str, Tensor], tmp_path: Path) -> None:
    files.save(tmp_path / "all.safetensors", bundle(), {})
    t5_tokenizer().save_pretrained(tmp_path / "tokenizer")
    models = opened(tmp_path / "all.safetensors")
    assert_same(states(models), whole)
    save(models, tmp_path / "again.safetensors", layout="single_file", dtype=None, metadata={})
    assert_same(files.load(tmp_path / "again.safetensors"), bundle())


def test_a_sharded_folder(whole: dict[str, Tensor], tmp_path: Path) -> None:
    pipeline().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 3
    assert detect_file(tmp_path).family == "chroma"
    models = opened(tmp_path)
    assert_same(states(models), whole)
    # The transformer alone makes a new single file, as it is published.
    save(models, tmp_path / "one.safetensors", layout="single_file", dtype=None, metadata={})
    assert_same(files.load(tmp_path / "one.safetensors"), native())


def test_plain_fp8_is_read(whole: dict[str, Tensor], tmp_path: Path) -> None:
    made = write(tmp_path)
    small = {name: t.to(torch.float8_e4m3fn) for name, t in native().items()}
    files.save(made.model, small, {})
    models = load(FAMILY, str(made.model), Options(**made.options), vae=made.vae, dtype=torch.float32)
    assert_same(dict(models.denoiser.state_dict()), {name: t.float() for name, t in small.items()})


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"img_in.weight": torch.zeros(64, 384)}, "384 channels a patch, not 64"),
        ({"img_in_patch.weight": torch.zeros(64, 3, 16, 16)}, "takes pixels, not latents"),
        ({"double_blocks.0.img_mod.lin.weight": torch.zeros(1, 1)}, r"double_blocks\.0\.img_mod\.lin\.weight"),
        ({"scaled_fp8": torch.zeros(1)}, "quantised .*'scaled_fp8'"),
    ],
)
def test_other_models_are_refused_with_a_reason(change: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    made = write(tmp_path)
    files.save(made.model, native() | change, {})
    with pytest.raises(UserError, match=said):
        opened(made.model, **made.options, vae=str(made.vae))


def test_what_is_not_there_is_asked_for_by_its_flag(tmp_path: Path) -> None:
    made = write(tmp_path)
    with pytest.raises(UserError) as error:
        opened(made.model)
    assert [message.rpartition("; ")[2] for message in error.value.messages] == [
        "name its file with --t5xxl",
        "name its file with --vae",
    ]
    with pytest.raises(UserError, match=r"t5xxl: .*ae\.safetensors does not hold the text encoder t5xxl"):
        opened(made.model, t5xxl=str(made.vae), vae=str(made.vae))


def test_a_config_that_asks_for_another_net_is_refused(tmp_path: Path) -> None:
    pipeline().save_pretrained(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"patch_size": 1', '"patch_size": 2'))
    with pytest.raises(
        UserError, match=r"transformer .the transformer.: config\.json: patch_size is 2; 1 was expected"
    ):
        opened(tmp_path)
