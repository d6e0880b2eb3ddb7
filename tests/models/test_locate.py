"""Where a model is."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from tinies import encoders

from sfumato.errors import UserError
from sfumato.formats.files import load
from sfumato.models import locate

KEYS = Path(__file__).parents[1] / "fixtures" / "keys"


def test_what_is_here_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert locate.local("some/model", "vae") == Path("some/model")


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    assert locate.local("someone/some-model.v1", "vae") == tmp_path
    assert asked == ["someone/some-model.v1"]


def test_a_hub_that_does_not_answer_is_told_with_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match=r"vae: 'someone/model' .*no connection"):
        locate.local("someone/model", "vae")
    with pytest.raises(UserError, match=r"vae: no such file or folder: 'a/b/c\.safetensors'"):
        locate.local("a/b/c.safetensors", "vae")


def empty(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"")


def listed(folder: Path, index: str, *shards: str) -> None:
    empty(folder, *shards)
    (folder / index).write_text(json.dumps({"weight_map": {f"{shard}.weight": shard for shard in shards}}))


def found(folder: Path) -> list[str]:
    return [path.name for path in locate.weight_files(folder)]


def test_weights_of_a_folder(tmp_path: Path) -> None:
    """What is best is taken: safetensors before pickles, whole files before shards, full precision before half."""
    with pytest.raises(UserError, match="no weights"):
        found(tmp_path)
    listed(tmp_path, "pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin")
    assert found(tmp_path) == ["pytorch_model-00001-of-00001.bin"]
    listed(tmp_path, "model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors")
    assert found(tmp_path) == ["model.fp16-00001-of-00001.safetensors"]
    listed(
        tmp_path, "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    )
    assert found(tmp_path) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in ("pytorch_model.fp16.bin", "pytorch_model.bin", "model.fp16.safetensors", "model.safetensors"):
        empty(tmp_path, name)
        assert found(tmp_path) == [name]


def test_a_folder_that_diffusers_saved_in_shards(tmp_path: Path) -> None:
    net = encoders.vae16()
    for variant in (None, "fp16"):
        folder = tmp_path / str(variant)
        net.save_pretrained(folder, max_shard_size="100KB", variant=variant)
        shards = found(folder)
        assert len(shards) > 1
        assert {name for shard in shards for name in load(folder / shard)} == set(net.state_dict())


def test_a_list_of_shards_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: no list of shards"):
        found(tmp_path)


QUANTISED = [
    "scaled_fp8",
    "model.diffusion_model.scaled_fp8",
    "encoder.block.0.layer.0.SelfAttention.q.scale_weight",
    "double_blocks.0.img_attn.qkv.scale_input",
    "encoder.block.0.layer.0.SelfAttention.q.weight_scale",
    "double_blocks.0.img_attn.qkv.weight_scale_2",
    "double_blocks.0.img_attn.qkv.comfy_quant",
    "encoder.block.0.layer.0.SelfAttention.q.weight.absmax",
    "encoder.block.0.layer.0.SelfAttention.q.weight.quant_state.bitsandbytes__nf4",
    "transformer_blocks.0.attn.to_q.SCB",
    "transformer_blocks.0.attn.to_q.qweight",
    "transformer_blocks.0.attn.to_q.weight._data",
]


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights_are_refused_with_file_and_tensor(name: str) -> None:
    with pytest.raises(UserError) as error:
        locate.refuse_quantised("models/small.safetensors", ["a.weight", name])
    (line,) = error.value.messages
    assert "models/small.safetensors" in line and repr(name) in line and "quantised" in line


@pytest.mark.parametrize("path", sorted(KEYS.glob("*.json.gz")), ids=lambda path: path.name.removesuffix(".json.gz"))
def test_no_real_file_passes_for_quantised(path: Path) -> None:
    names = json.loads(gzip.decompress(path.read_bytes()))
    locate.refuse_quantised(path.name, names)
    assert names


@pytest.mark.parametrize(
    "text",
    ['{"weight_map": {"a": null}}', '{"weight_map": {"a": "../x"}}', '{"weight_map": []}', "[" * 5000, "[]", "3"],
)
def test_a_list_of_shards_of_an_odd_shape(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        locate.weight_files(tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000 + "b", "~nobody-at-all/x"])
def test_a_model_of_a_name_that_cannot_be(name: str) -> None:
    with pytest.raises(UserError, match="pretrained_model_name_or_path") as told:
        locate.local(name, "pretrained_model_name_or_path")
    assert len(str(told.value)) < 600
