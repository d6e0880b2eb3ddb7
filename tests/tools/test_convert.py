"""Checkpoints converted between single file and diffusers folder: the tensors are those of diffusers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tinies import flux, sd3, sdxl
from tinies.cases import Case, Files, cases
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from sfumato.errors import UserError
from sfumato.families.detect import detect_file
from sfumato.formats.files import load, read_header, save
from sfumato.formats.lazy import Lazy
from sfumato.models.detection import PREFIX
from sfumato.tools import checkpoints
from sfumato.tools.convert import convert, is_adapter

ALL = [pytest.param(case, id=case.name) for case in cases() if "masked" not in case.name]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name, t in a.items() if t.dtype != b[name].dtype or not torch.equal(t, b[name])]


def parts_of(files: Files) -> dict[str, str]:
    return {**files.options, **({"vae": files.vae} if files.vae else {})}


@pytest.fixture(scope="module", params=ALL)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def files(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return case.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(case: Case, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "folder"
    facts = convert(files.model, out, parts=parts_of(files))
    assert facts["to"] == "diffusers" and facts["family"] == case.family
    return out


def test_a_file_becomes_diffusers_folder(case: Case, folder: Path) -> None:
    """`test_all.py` proves that the pipeline reads such a folder and draws the same."""
    for name, part in case.pipeline().components.items():
        if isinstance(part, torch.nn.Module):
            (weights,) = (folder / name).glob("*.safetensors")
            theirs = {on_disk(n): t for n, t in part.state_dict().items() if n != "encoder.embed_tokens.weight"}
            found = load(weights)
            assert {n.removeprefix("text_model.") for n in found} == {n.removeprefix("text_model.") for n in theirs}
            assert not [n for n, t in theirs.items() if not torch.equal(found.get(n, found.get(f"text_model.{n}")), t)]  # type: ignore[arg-type]


def on_disk(name: str) -> str:
    """What transformers calls a tensor of Qwen2.5-VL in files, as the hub has them."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def test_a_folder_becomes_the_file_again(case: Case, files: Files, folder: Path, tmp_path: Path) -> None:
    """All that the file held, but for text encoders and VAE in a bundle, which new files of some families have not."""
    out = tmp_path / "again.safetensors"
    convert(folder, out)
    first, again = ({n.removeprefix(PREFIX): t for n, t in named_anew(p).items()} for p in (files.model, out))
    absent = {n for n in first.keys() - again.keys() if not n.startswith(("text_encoders.", "vae."))}
    assert not [n for n in absent if "weight" in n or "bias" in n]
    # Of the layer that 2.x does not use, folders know nothing.
    unlike = {n for n in first.keys() & again.keys() if not torch.equal(first[n], again[n])}
    assert not [n for n in unlike if "transformer.resblocks.3" not in n]


def named_anew(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, those of the denoiser as a new file names them."""
    weights, tensors = checkpoints.open_parts(path, {}).source.components["denoiser"], load(path)
    for name in weights.tensors:
        del tensors[f"{weights.prefix}{name}"]
    return tensors | weights.component.single(weights.shapes()).write(dict(weights.natives(map=False)))  # type: ignore[return-value]


def test_a_bundle_holds_all(case: Case, files: Files, folder: Path, tmp_path: Path) -> None:
    """The bundle is known as a whole model, and is the same model as the folder."""
    out = tmp_path / "bundle.safetensors"
    convert(folder, out, bundle=True)
    assert set(detect_file(out).parts) == {"denoiser", "text_encoder", "vae"}
    other = tmp_path / "folder"
    convert(out, other, tokenizer=str(folder))
    for weights in folder.glob("*/*.safetensors"):
        assert_same(load(other / weights.relative_to(folder)), load(weights))


def test_number_formats(tmp_path: Path) -> None:
    """All of the nets; what belongs to no net stays as it is."""
    path = sd3.write("medium", tmp_path).model
    first = load(path)
    for dtype in ("fp16", "bf16", "float"):
        convert(path, tmp_path / "b.safetensors", dtype=dtype)
        again = load(tmp_path / "b.safetensors")
        assert again.keys() == first.keys()
        kinds = {n: checkpoints.PRECISIONS[dtype] if "logit_scale" not in n else t.dtype for n, t in first.items()}
        assert all(torch.equal(again[n], t.to(kinds[n])) and again[n].dtype == kinds[n] for n, t in first.items())


def test_parts_of_their_own_go_into_the_file(tmp_path: Path) -> None:
    """As sd-scripts' merge_sd3_safetensors: transformer, VAE, both CLIPs and T5 in one file, as ComfyUI reads it."""
    apart = sd3.write("3.5_medium", tmp_path)
    names = {"vae": str(tmp_path / "vae.safetensors"), **apart.options}
    convert(apart.model, tmp_path / "one.safetensors", parts=names)
    wanted = {
        n: t for n, t in sd3.single_file("3.5_medium", *sd3.parts("3.5_medium")).items() if "logit_scale" not in n
    }
    assert_same(load(tmp_path / "one.safetensors"), wanted)


def test_a_transformer_alone_is_converted_without_its_encoders(tmp_path: Path) -> None:
    path = flux.write(True, tmp_path).model
    convert(path, tmp_path / "half.safetensors", dtype="bf16")
    assert_same(load(tmp_path / "half.safetensors"), {n: t.bfloat16() for n, t in load(path).items()})
    with pytest.raises(UserError, match="--clip_l"):
        convert(path, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_fp8_is_for_the_layers_of_blocks(tmp_path: Path) -> None:
    path = flux.write(True, tmp_path).model
    first = load(path)
    for dtype in ("fp8", "fp8_scaled"):
        out = tmp_path / f"{dtype}.safetensors"
        convert(path, out, dtype=dtype)
        lazy, kinds = Lazy.of([out]), {n: i.dtype for n, i in read_header(out).tensors.items()}
        narrow = {n for n, kind in kinds.items() if kind == "F8_E4M3"} - {"scaled_fp8"}
        assert narrow == {n for n, t in first.items() if "blocks." in n and n.endswith(".weight") and t.ndim == 2}
        assert set(lazy) == set(first) and lazy.coded.keys() == (narrow if dtype == "fp8_scaled" else set())
        for name, t in first.items():
            torch.testing.assert_close(lazy[name].float(), t, atol=0.01 * float(t.abs().max()) + 2**-9, rtol=0.07)
        convert(out, tmp_path / "same.safetensors")
        convert(out, tmp_path / "wide.safetensors", dtype="bf16")
        assert {n: i.dtype for n, i in read_header(tmp_path / "same.safetensors").tensors.items()} == kinds
        wide = load(tmp_path / "wide.safetensors")
        assert wide.keys() == first.keys() and {t.dtype for t in wide.values()} == {torch.bfloat16}


def test_a_v_prediction_is_kept(tmp_path: Path) -> None:
    """ComfyUI knows it by an empty tensor, diffusers by the scheduler."""
    path = sdxl.put(tmp_path / "model.safetensors", {**sdxl.single_file(), "v_pred": torch.zeros(0)})
    convert(path, tmp_path / "folder")
    assert "v_prediction" in (tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text()
    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    assert detect_file(tmp_path / "again.safetensors").prediction == "v"


def test_a_clip_without_a_projection_gets_the_identity(tmp_path: Path) -> None:
    """diffusers' class for Stable Diffusion 3 has one, and would make it of random numbers."""
    apart = sd3.write("3.5_large", tmp_path)
    clip = {n: t for n, t in load(Path(apart.options["clip_l"])).items() if "text_projection" not in n}
    save(tmp_path / "clip_l.safetensors", clip)
    names = {**parts_of(apart), "clip_l": str(tmp_path / "clip_l.safetensors")}
    convert(apart.model, tmp_path / "folder", parts=names)
    net = CLIPTextModelWithProjection.from_pretrained(tmp_path / "folder" / "text_encoder")
    out = net(torch.tensor([[1, 2, 713]]))
    with torch.no_grad():
        net.text_projection.weight.copy_(torch.eye(64))
    assert torch.equal(out.text_embeds, net(torch.tensor([[1, 2, 713]])).text_embeds)


def test_mistakes(tmp_path: Path) -> None:
    path = sdxl.write(tmp_path / "a").model
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cat.png").touch()
    for wrong, told in (
        ({"out": path}, "is also read"),
        ({"out": tmp_path / "x", "to": "single"}, "a single file is written here"),
        ({"out": tmp_path / "x.safetensors", "to": "diffusers"}, "the name of a file"),
        ({"out": tmp_path / "x.safetensors", "to": "kohya"}, "whole checkpoint"),
        ({"out": tmp_path / "x.safetensors", "parts": {"t5xxl": "a"}}, "--t5xxl"),
        ({"out": tmp_path / "x", "dtype": "fp8_scaled"}, "single files"),
        ({"out": tmp_path / "no" / "x.safetensors"}, "there is no folder"),
        ({"out": tmp_path, "to": "diffusers"}, "holds what is read"),
        ({"out": tmp_path / "other", "to": "diffusers"}, "not sfumato's"),
    ):
        named: dict[str, Any] = dict(wrong)
        with pytest.raises(UserError, match=told):
            convert(path, named.pop("out"), **named)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "other"]
    tensors = load(path)
    name = next(n for n in tensors if "input_blocks.1." in n and n.endswith("weight"))
    save(tmp_path / "nan.safetensors", {**tensors, name: tensors[name] * torch.nan})
    with pytest.raises(UserError, match="NaN"):
        convert(tmp_path / "nan.safetensors", tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists() and not list(tmp_path.glob(".*"))
    assert not is_adapter(path)
