"""Adapters merged into one file: the changes of the layers add up, and the file says no more than that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters_on_tinies import adapter_file as write_adapter
from torch import Tensor

from sfumato import adapters
from sfumato.cli import kohya_tools
from sfumato.cli.main import main
from sfumato.errors import UserError
from sfumato.formats.dialect import ModulePath
from sfumato.formats.files import load, read_header, save
from sfumato.models.base import Models
from sfumato.models.loading import outline_parts
from sfumato.tools import adapter_file, merge_models
from sfumato.tools.convert_adapter import change
from sfumato.tools.merge_adapters import Joining, join

close = torch.testing.assert_close


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of SD 1.x."""
    return tiny.short_sd1(tmp_path_factory.mktemp("join")).parent


@pytest.fixture(scope="module")
def models(where: Path) -> Models:
    from sfumato import families

    return outline_parts(families.family("sd"), str(where / "model.safetensors"), families.facts("sd").options())


def joined(where: Path, out: Path, *merged: tuple[Path, float], **more: Any) -> dict[ModulePath, Tensor]:
    """The changes in the joined file."""
    join(Joining(adapters=merged, out=out, model=str(where / "model.safetensors"), **more))
    return deltas(where, out)


def deltas(where: Path, path: Path) -> dict[ModulePath, Tensor]:
    read = adapter_file.read(path, model=str(where / "model.safetensors"))
    return {
        layer: change(layer, tensors, torch.zeros(read.outline.layers[layer])) for layer, tensors in read.state.items()
    }


def test_changes_of_mixed_dialects_ranks_and_alphas_add_up(where: Path, models: Models, tmp_path: Path) -> None:
    a, b, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "out"))
    write_adapter(models, a, rank=2, every=6)
    write_adapter(models, b, "conv_dim=3", rank=4, seed=1, every=9, dialect="peft")
    one, other = deltas(where, a), deltas(where, b)
    assert one.keys() & other.keys() and one.keys() ^ other.keys()
    found = joined(where, out, (a, 0.5), (b, -2.0))
    assert found.keys() == one.keys() | other.keys()
    for layer, t in found.items():
        close(t, 0.5 * one.get(layer, torch.zeros(())) - 2 * other.get(layer, torch.zeros(())), atol=1e-5, rtol=1e-5)
    ranks = {t.shape[0] for name, t in load(out).items() if name.endswith("lora_down.weight")}
    assert ranks == {2, 4, 6, 3} or ranks <= {2, 3, 4, 6}
    assert read_header(out).metadata["ss_network_dim"] == "Dynamic"


def test_words_beside_adapters_stay_or_are_told(where: Path, models: Models, tmp_path: Path, capsys: Any) -> None:
    a, b, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "out"))
    write_adapter(models, a, every=9)
    vectors = torch.randn(2, 64)
    save(b, {**load(a), "bundle_emb.cat.clip_l": vectors + 1, "bundle_emb.dog.clip_l": vectors})
    save(a, {**load(a), "bundle_emb.cat.clip_l": vectors})
    model = str(where / "model.safetensors")
    command = ["merge", "--adapters", str(a), str(b), "--out", str(out)]
    assert main([*command, "--layers_of", model]) == 0
    found = load(out)
    assert torch.equal(found["bundle_emb.cat.clip_l"], vectors) and "bundle_emb.dog.clip_l" in found
    said = capsys.readouterr().err
    assert "left out: bundle_emb.cat.clip_l of" in said and "dog" not in said
    assert main([*command, "--layers_of", model, "--to", "diffusers"]) == 0
    assert not [name for name in load(out) if name.startswith("bundle")]
    assert "left out: bundle_emb.dog.clip_l of" in capsys.readouterr().err
    assert main([*command, "--model", model]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "its words are not part of a model: cat, dog; `--textual_inversion_embeddings" in said


def test_two_halves_are_the_whole_to_the_bit(where: Path, models: Models, tmp_path: Path) -> None:
    """sd-scripts squares ratios, mixes the factors of different files, and keeps alpha where ranks add up."""
    a, b, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "out"))
    write_adapter(models, a, every=9)
    write_adapter(models, b, seed=1, every=9)
    one, other = deltas(where, a), deltas(where, b)
    whole = joined(where, out, (a, 0.5), (a, 0.5))
    mean = joined(where, out, (a, 0.5), (b, 0.5))
    for layer, t in one.items():
        close(whole[layer], t, atol=1e-7, rtol=1e-6)
        close(mean[layer], (t + other[layer]) / 2, atol=1e-6, rtol=1e-6)
    found = load(out)
    assert all(torch.equal(found[name][:, : t.shape[1]], t) for name, t in load(a).items() if "lora_up" in name)


def test_a_rank_gives_the_nearest_and_says_the_error(where: Path, models: Models, tmp_path: Path) -> None:
    a, b, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "out"))
    write_adapter(models, a, every=9, rank=4)
    write_adapter(models, b, seed=1, every=9, kind="loha")
    whole, other = deltas(where, a), deltas(where, b)
    facts = join(Joining(adapters=[(a, 1.0), (b, 0.5)], out=out, rank=3, model=str(where / "model.safetensors")))
    found, left, norm = deltas(where, out), 0.0, 0.0
    for each in facts["layers"]:
        layer = each["component"], each["path"]
        wanted = (whole[layer] + 0.5 * other[layer]).flatten(1)
        singular = torch.linalg.svdvals(wanted)
        least = float((singular[3:].square().sum() / singular.square().sum()).sqrt())
        missing = float((wanted - found[layer].flatten(1)).norm() / wanted.norm())
        assert least - 1e-4 <= missing <= least * 1.02 + 1e-4 and each["error"] == pytest.approx(missing, abs=1e-4)
        left, norm = left + float((wanted - found[layer].flatten(1)).norm()) ** 2, norm + float(wanted.norm()) ** 2
    assert facts["error"] == pytest.approx((left / norm) ** 0.5, rel=1e-3)
    exact = joined(where, out, (a, 1.0), (a, 1.0), rank=8)
    for layer, t in whole.items():
        close(exact[layer], 2 * t, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", adapters.kinds())
def test_every_kind_is_scaled_exactly_or_refused(kind: str, where: Path, models: Models, tmp_path: Path) -> None:
    a, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    write_adapter(models, a, kind=kind, rank=4, every=30)
    join(Joining(adapters=[(a, 1.0)], out=out, model=str(where / "model.safetensors")))
    first = load(a)
    assert all(torch.equal(t, first[name]) for name, t in load(out).items() if name in first)
    try:
        whole = deltas(where, a)
    except UserError:
        whole = None
    if whole is None:
        for more in ({}, {"rank": 2}):
            with pytest.raises(UserError, match=r"exactly within one file|acts on the layer's own weight"):
                joined(where, out, (a, -0.5), **more)
        return
    for layer, t in joined(where, out, (a, -0.5)).items():
        close(t, -0.5 * whole[layer], atol=1e-6, rtol=1e-5)


def test_layer_wise_weights(where: Path, models: Models, tmp_path: Path) -> None:
    a, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    write_adapter(models, a, every=5)
    whole, weights = deltas(where, a), [0.0] * 26
    weights[13] = 0.5
    found = joined(where, out, (a, 2.0), block_weights=[weights])
    middle = {layer: t for layer, t in whole.items() if layer[1].startswith("middle_block")}
    assert found.keys() == middle.keys() and middle
    for layer, t in middle.items():
        close(found[layer], t, atol=1e-6, rtol=1e-5)


def test_the_command_and_kohyas(where: Path, models: Models, tmp_path: Path, capsys: Any) -> None:
    a, b, out, again = (str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "out", "again"))
    write_adapter(models, Path(a), every=9)
    write_adapter(models, Path(b), seed=1, every=9)
    model = str(where / "model.safetensors")
    assert main(["merge", "--adapters", a, b, "--ratios", "0.8", "-0.5", "--model", model, "--out", out, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [each["ratio"] for each in facts["adapters"]] == [0.8, -0.5] and (facts["out"], facts["beside"]) == (out, [])
    words = [
        "--sd_model",
        model,
        "--models",
        a,
        b,
        "--ratios",
        "0.8",
        "-0.5",
        "--save_to",
        again,
        "--precision",
        "float",
    ]
    assert kohya_tools.run("merge_lora", words) == 0
    first, second = load(out), load(again)
    assert all(torch.equal(t, first[name]) for name, t in second.items())
    assert main(["merge", "--adapters", a, b, "--out", out, "--layers_of", model, "--to", "diffusers"]) == 0
    assert "exact but for rounding" in capsys.readouterr().err
    assert all(".lora_A." in name or ".lora_B." in name for name in load(out))


def test_models_go_to_the_tool_for_models(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        save(name, {"x": torch.zeros(2)})
    calls: list[Any] = []

    def merge(*given: Any, progress: Any, **more: Any) -> dict[str, Any]:
        calls.append((*given, more))
        return {"models": {"a": 0.5, "b": 1.0}, "lacking": {}}

    monkeypatch.setattr(merge_models, "merge_checkpoints", merge)
    assert main(["merge", "--models", "a", "b", "--ratios", "0.5", "1", "--out", "c", "--only", "denoiser"]) == 0
    how = {"precision": "fp32", "save_precision": None, "only": ["denoiser"], "device": "cpu"}
    assert calls == [([Path("a"), Path("b")], Path("c"), [0.5, 1.0], how)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--adapters", "a", "--ratios", "1", "2"], "2 ratios for 1 adapters"),
        (["--adapters", "none"], "no such file"),
        (["--adapters", "a", "--only", "denoiser"], "--only: is for merging into a model"),
        (["--adapters", "a", "--rnk", "4"], "unknown: --rnk; did you mean '--rank'"),
        (["--adapters", "a", "--lbws", "x"], "expected numbers"),
        (["--models", "a", "b", "--rank", "4"], "--rank: does nothing beside --models"),
        ([], "say what is merged"),
    ],
)
def test_mistakes_of_the_command(words: list[str], says: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    save("a", {"x.lora_down.weight": torch.zeros(2, 2)})
    assert main(["merge", "--out", "out.safetensors", *words]) == 2
    assert says in capsys.readouterr().err
    assert not Path("out.safetensors").exists()


def test_kohyas_flags(capsys: Any, tmp_path: Path) -> None:
    for script, words, says in (
        ("flux_merge_lora", ["--clip_l", "x"], "--flux_model: the transformer is needed"),
        ("flux_merge_lora", ["--clip_l_save_to", "x"], "--clip_l_save_to: does nothing without --clip_l"),
        ("sdxl_merge_lora", ["--lbw", "[1]"], "unknown: --lbw; did you mean '--lbws'"),
        ("svd_merge_lora", ["--new_rnk", "4"], "did you mean '--new_rank'"),
    ):
        assert kohya_tools.run(script, [*words, "--models", "a", "--save_to", str(tmp_path / "o.safetensors")]) == 2
        assert says in capsys.readouterr().err
