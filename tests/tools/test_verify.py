"""Whether two files have the same effect: what is wrong with one is found, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conversions import a_file, model, opened_once, outline
from tinies import sdxl
from tinies.cases import cases
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.tools import adapter_file
from sfumato.tools.verify import verify

BLOCK = "lora_unet_double_blocks_0_img_mlp_0"


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened_once(monkeypatch)


def swapped(tensors: dict[str, Tensor]) -> None:
    """Two pairs of factors of the same shapes change places."""
    one, other = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_1_img_attn_qkv"
    for leaf in ("lora_up.weight", "lora_down.weight"):
        tensors[f"{one}.{leaf}"], tensors[f"{other}.{leaf}"] = tensors[f"{other}.{leaf}"], tensors[f"{one}.{leaf}"]


def without_alpha(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{BLOCK}.alpha"]


def transposed(tensors: dict[str, Tensor]) -> None:
    tensors[f"{BLOCK}.lora_down.weight"] = tensors[f"{BLOCK}.lora_down.weight"].T.contiguous()


def missing(tensors: dict[str, Tensor]) -> None:
    for leaf in ("lora_up.weight", "lora_down.weight", "alpha"):
        del tensors[f"{BLOCK}.{leaf}"]


def renamed(tensors: dict[str, Tensor]) -> None:
    tensors["lora_unet_double_blocks_0_img_mlp_9.alpha"] = tensors.pop(f"{BLOCK}.alpha")


@pytest.mark.parametrize(
    ("damage", "layer"),
    [
        (swapped, "denoiser.double_blocks.0.img_attn.qkv"),
        (without_alpha, "denoiser.double_blocks.0.img_mlp.0"),
        (transposed, "denoiser.double_blocks.0.img_mlp.0"),
        (missing, "denoiser.double_blocks.0.img_mlp.0"),
        (renamed, "lora_unet_double_blocks_0_img_mlp_9.alpha"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_what_is_wrong_is_found(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], layer: str, turned: bool
) -> None:
    one, other = a_file(tmp_path / "one.safetensors"), tmp_path / "other.safetensors"
    tensors = files.load(one)
    theirs = {k.replace("blocks_0_img_attn", "blocks_1_img_attn"): t * 0.5 for k, t in tensors.items() if "qkv" in k}
    files.save(one, tensors | theirs, {})
    tensors = files.load(one)
    damage(tensors)
    files.save(other, tensors, {})
    pair = (other, one) if turned else (one, other)
    found = verify(*pair, model=str(model("flux")))
    assert (found.same, found.verdict) == (False, "not the same")
    assert layer in {d.layer for d in found.differences}
    assert len(found.differences) <= 2, "the others are as they were"
    assert found.facts()["differences"][0]["layer"] == found.differences[0].layer
    same = verify(one, one, model=str(model("flux")))
    assert (same.same, same.verdict, same.differences, same.compared) == (True, "exact", (), 5)


@pytest.mark.parametrize(
    "word", [{}, {"cat": torch.ones(2, 8)}, {"cat": torch.zeros(3, 8)}, {"dog": torch.zeros(2, 8)}]
)
def test_words_beside_adapters_are_compared(tmp_path: Path, word: dict[str, Tensor]) -> None:
    one, other = a_file(tmp_path / "one.safetensors"), tmp_path / "other.safetensors"
    tensors = files.load(one)
    files.save(one, {**tensors, "bundle_emb.cat.clip_l": torch.zeros(2, 8)}, {})
    files.save(other, {**tensors, **{f"bundle_emb.{name}.clip_l": t for name, t in word.items()}}, {})
    found = verify(one, other, model=str(model("flux")))
    assert not found.same and found.differences[0].layer.startswith("bundle_emb.")
    assert verify(one, one, model=str(model("flux"))).verdict == "exact"


@pytest.mark.parametrize("kind", ["oft", "ia3", "dora"])
def test_kinds_that_act_on_the_weight(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their parameters without the model; with it by what they make of its weights."""
    one = a_file(tmp_path / "one.safetensors", kind, "sdxl")
    tensors = files.load(one)
    key = next(k for k, t in tensors.items() if t.is_floating_point() and t.numel() > 1)
    files.save(tmp_path / "other.safetensors", tensors | {key: tensors[key] * 1.5}, {})
    a_file(tmp_path / "lora.safetensors", "lora", "sdxl")
    monkeypatch.setattr(adapter_file, "_outlines", lambda *given: [outline("sdxl")])
    for given in (None, str(model("sdxl"))):
        found = verify(one, tmp_path / "other.safetensors", model=given)
        assert (found.same, len(found.differences)) == (False, 1)
        assert found.differences[0].layer.split(".")[-1] in key
        assert verify(one, one, model=given).verdict == "exact"
        (why,) = {bool(d.why) for d in verify(one, tmp_path / "lora.safetensors", model=given).differences}
        assert why == (given is None), "only with the model can two kinds be compared"


def test_the_same_checkpoint_in_another_layout(tmp_path: Path) -> None:
    one = model("sdxl")
    sdxl.pipeline().save_pretrained(tmp_path / "folder")
    found = verify(one, tmp_path / "folder")
    assert found.same, found.differences[:3]
    tensors = files.load(one)
    key = "model.diffusion_model.input_blocks.4.0.in_layers.2.weight"
    files.save(tmp_path / "other.safetensors", tensors | {key: tensors[key] * 1.01}, {})
    found = verify(one, tmp_path / "other.safetensors")
    assert [d.layer for d in found.differences] == ["denoiser.input_blocks.4.0.in_layers.2.weight"]
    assert not found.same
    files.save(tmp_path / "nan.safetensors", tensors | {key: tensors[key] * float("nan")}, {})
    found = verify(one, tmp_path / "nan.safetensors")
    assert (found.same, found.verdict, len(found.differences)) == (False, "not the same", 1)


def test_a_folder_holds_the_text_encoder_of_its_variant_alone(tmp_path: Path) -> None:
    case = next(case for case in cases() if case.name == "sd-1")
    case.pipeline().save_pretrained(tmp_path / "folder")
    found = verify(case.write(tmp_path).model, tmp_path / "folder")
    assert found.same, found.differences[:3]


def test_a_damaged_adapter_is_refused_on_either_side(tmp_path: Path) -> None:
    good = a_file(tmp_path / "good.safetensors")
    tensors = files.load(good)
    key = next(k for k in tensors if k.endswith("lora_up.weight"))
    files.save(tmp_path / "nan.safetensors", tensors | {key: tensors[key] * float("nan")}, {})
    for pair in ((good, tmp_path / "nan.safetensors"), (tmp_path / "nan.safetensors", good)):
        with pytest.raises(UserError, match=rf"nan\.safetensors: {key} holds NaN"):
            verify(*pair)


def test_what_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a base model, not an adapter"):
        verify(a_file(tmp_path / "one.safetensors"), model("sdxl"), model=None)
