"""Anima's files, in and out: bare, with each prefix, in bundles, in folders, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse import sparse
from tinies import anima, encoders, llms, vaes
from tinies.cases import Files
from torch import Tensor

from sfumato import families
from sfumato.errors import UserError
from sfumato.families.anima.facts import NET, QWEN3, VAE, Completed, Options
from sfumato.families.detect import detect_file
from sfumato.formats.files import load, save
from sfumato.formats.names import add_prefix
from sfumato.models import loading
from sfumato.models.base import Models
from sfumato.models.detection import PREFIX

FAMILY = families.family("anima")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return anima.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder") / "model"
    anima.pipeline().save_pretrained(path)
    return path


def opened(files: Files, model: Path | None = None, **options: Any) -> Models:
    told = Options(**{**files.options, **options})
    where, beside = str(model or files.model), str(files.model.parent)
    return loading.load(FAMILY, where, told, vae=files.vae, tokenizer=beside, detect=detect_file)


def written(models: Models, path: Path, **more: Any) -> dict[str, Tensor]:
    loading.save(models, path, layout="single_file", dtype=None, metadata={}, **more)
    return load(path)


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name, t in a.items() if t.dtype != b[name].dtype or not torch.equal(t, b[name])]


# --- in and out ---


@pytest.mark.parametrize("prefix", ["", NET, PREFIX])
def test_a_denoiser_keeps_its_prefix_and_what_no_net_has(files: Files, tmp_path: Path, prefix: str) -> None:
    """NVIDIA's files hold counters besides, and the places of patches, which are computed."""
    more = {"pos_embedder.seq": torch.arange(9.0), "accum_iteration": torch.tensor(7)}
    tensors = add_prefix({**anima.tensors(), **more}, prefix)
    save(tmp_path / "alone.safetensors", tensors, {})
    models = opened(files, tmp_path / "alone.safetensors")
    assert_same(models.denoiser.state_dict(), anima.tensors())
    assert_same(tensors, written(models, tmp_path / "again.safetensors"))


def test_a_bundle_comes_back_as_one(files: Files, tmp_path: Path) -> None:
    """As ComfyUI saves a checkpoint; a trained Qwen3 stays in it."""
    qwen3 = add_prefix(llms.qwen3().state_dict(), f"{QWEN3}model.")
    bundle = {**add_prefix(anima.tensors(), PREFIX), **qwen3, **add_prefix(vaes.qwen_vae_original(), VAE)}
    save(tmp_path / "bundle.safetensors", bundle, {})
    models = opened(Files(model=files.model), tmp_path / "bundle.safetensors")
    assert_same(bundle, written(models, tmp_path / "again.safetensors"))
    models.encoders["qwen3"].get_parameter("norm.weight").data += 1
    out = written(models, tmp_path / "out.safetensors", trained={"qwen3"})
    assert {name for name, t in bundle.items() if not torch.equal(t, out[name])} == {f"{QWEN3}model.norm.weight"}


def test_a_trained_qwen3_is_written_beside_a_file_that_does_not_hold_it(files: Files, tmp_path: Path) -> None:
    models = opened(files)
    models.encoders["qwen3"].get_parameter("norm.weight").data += 1
    assert_same(load(files.model), written(models, tmp_path / "out.safetensors", trained={"denoiser", "qwen3"}))
    old = load(Path(files.options["qwen3"]))
    assert_same(load(tmp_path / "out_qwen3.safetensors"), {**old, "model.norm.weight": old["model.norm.weight"] + 1})


def test_a_denoiser_in_scaled_fp8_is_read_as_what_it_holds(files: Files, tmp_path: Path) -> None:
    small = anima.tensors()
    matrices = [name for name, t in small.items() if t.ndim == 2 and ".blocks." in name]
    for name in matrices:
        scale = small[name].abs().max() / 448
        small |= {name: (small[name] / scale).to(torch.float8_e4m3fn), f"{name[:-6]}scale_weight": scale}
    held = {**add_prefix(small, NET), f"{NET}scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    save(tmp_path / "fp8.safetensors", held, {})
    found = opened(files, tmp_path / "fp8.safetensors").denoiser.state_dict()
    for name, t in anima.tensors().items():
        torch.testing.assert_close(found[name].float(), t, atol=0.07 * float(t.abs().max()), rtol=0)


# --- folders ---


def test_a_folder_of_the_modular_pipeline_becomes_a_file(folder: Path, tmp_path: Path) -> None:
    """diffusers keeps the text adapter apart; in files it is part of the transformer."""
    assert (folder / "modular_model_index.json").exists() and not (folder / "model_index.json").exists()
    models = loading.load(FAMILY, str(folder), Options(), detect=detect_file)
    assert isinstance(models.options, Completed) and models.options.blocks == 3
    assert_same(add_prefix(anima.tensors(), NET), written(models, tmp_path / "single.safetensors"))


def test_a_folder_that_was_trained_is_whole_wherever_it_stands(folder: Path, tmp_path: Path) -> None:
    """diffusers' index names the folder that it was saved to: a result must not send readers there."""
    models = loading.load(FAMILY, str(folder), Options())
    models.denoiser.get_parameter("llm_adapter.norm.weight").data += 1
    models.denoiser.get_parameter("t_embedding_norm.weight").data += 1
    loading.save(models, tmp_path / "out", layout="diffusers", dtype=None, metadata={}, trained={"denoiser"})
    (tmp_path / "out").rename(tmp_path / "moved")
    theirs = anima.AnimaModularPipeline.from_pretrained(tmp_path / "moved")
    assert torch.equal(theirs.text_conditioner.norm.weight, anima.conditioner().norm.weight + 1)
    assert torch.equal(theirs.transformer.time_embed.norm.weight, anima.transformer().time_embed.norm.weight + 1)


def test_a_folder_that_lacks_the_text_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    for part in ("transformer", "text_encoder", "vae"):
        (tmp_path / part).symlink_to(folder / part)
    (tmp_path / "modular_model_index.json").write_text((folder / "modular_model_index.json").read_text())
    with pytest.raises(UserError, match=r"text_conditioner: no weights in it"):
        detect_file(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rope_scale", [1.0, 3.0, 3.0]), ("extra_pos_embed_type", "learnable"), ("concat_padding_mask", False)],
)
def test_a_config_of_another_net_is_refused(folder: Path, tmp_path: Path, name: str, value: Any) -> None:
    for part in folder.iterdir():
        if part.name != "transformer":
            (tmp_path / part.name).symlink_to(part)
    (tmp_path / "transformer").mkdir()
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / "transformer" / weights).symlink_to(folder / "transformer" / weights)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(UserError, match=rf"transformer .the transformer.: config\.json: {name} is"):
        loading.load(FAMILY, str(tmp_path), Options())


# --- what is refused ---


def test_what_is_missing_is_named_with_its_flag(files: Files) -> None:
    with pytest.raises(UserError) as error:
        loading.load(FAMILY, str(files.model), Options(), tokenizer=str(files.model.parent))
    assert [message.rpartition("--")[2] for message in error.value.messages] == ["qwen3", "vae"]


def test_another_qwen3_is_refused(files: Files, tmp_path: Path) -> None:
    wide = {name: torch.cat([t, t], -1) if t.ndim == 2 else t for name, t in llms.qwen3().state_dict().items()}
    save(tmp_path / "wide.safetensors", wide, {})
    with pytest.raises(UserError, match="qwen3: its states are 80 wide, the transformer takes 40"):
        opened(files, qwen3=str(tmp_path / "wide.safetensors"))


def test_a_tensor_of_no_part_is_refused_by_name(files: Files, tmp_path: Path) -> None:
    save(tmp_path / "odd.safetensors", {**load(files.model), "net.blocks.0.mystery.weight": torch.zeros(1)}, {})
    with pytest.raises(UserError, match=r"'blocks\.0\.mystery\.weight'"):
        opened(files, tmp_path / "odd.safetensors")


# --- tokenizers ---


def test_t5s_tokenizer_may_have_a_folder_of_its_own(files: Files, tmp_path: Path) -> None:
    """By sd-scripts' flag, as it is or in a folder by its name; what `tokenizer` names is Qwen3's."""
    encoders.t5_tokenizer().save_pretrained(tmp_path / "any")
    encoders.t5_tokenizer().save_pretrained(tmp_path / "both" / "t5_tokenizer")
    for path in (tmp_path / "any", tmp_path / "both"):
        options = Options(**files.options, t5_tokenizer_path=str(path))
        qwen3 = str(files.model.parent / "tokenizer")
        models = loading.load(FAMILY, str(files.model), options, vae=files.vae, tokenizer=qwen3)
        assert models.tokenizers["denoiser"].get_vocab() == encoders.t5_tokenizer().get_vocab()
        assert models.tokenizers["qwen3"].get_vocab() == llms.qwen_tokenizer().get_vocab()


def test_a_tokenizer_with_more_tokens_than_the_text_adapter_knows_is_refused(files: Files, tmp_path: Path) -> None:
    tokenizer = type(encoders.t5_tokenizer())(vocab=[(f"▁{i}", -1.0) for i in range(300)] + [("<unk>", 0.0)])
    tokenizer.save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match=r"t5_tokenizer_path: it has \d+ tokens, the denoiser only 94"):
        opened(files, t5_tokenizer_path=str(tmp_path / "t5"))


def test_vocabularies_come_with_sfumato(tmp_path: Path) -> None:
    """Qwen3's and T5's, for a model of the real size, with nothing beside it."""
    path = sparse(tmp_path / "anima.safetensors", anima.bundle())
    models = loading.outline(FAMILY, str(path), Options(), later=("qwen3", "vae"))
    tokens = models.tokenize(["masterpiece, 1girl", ""])
    sizes = {name: len(tokenizer) for name, tokenizer in models.tokenizers.items()}
    assert sizes == {"qwen3": 151669, "denoiser": 32100}
    assert models.tokenizers["qwen3"].decode(tokens["qwen3"][0]) == "masterpiece, 1girl"
    assert tokens["t5"][1].tolist() == [1] + [0] * (tokens["t5"].shape[1] - 1)
