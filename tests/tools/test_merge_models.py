"""Checkpoints added with weights: the sums are torch's own over the files' tensors, in all layouts and number formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tinies import flux, sd3, sdxl
from tinies.cases import Case, Files, cases
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats.files import load, read_header, save
from sfumato.formats.lazy import Lazy
from sfumato.tools.convert import convert
from sfumato.tools.merge_models import merge_checkpoints

ONE = {case.family: case for case in reversed(cases())}
"""A case of each family."""


def other(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Tensors of the same names with other values."""
    g = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(t.shape, generator=g).to(t.dtype) if t.is_floating_point() else t for n, t in tensors.items()
    }


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in ONE.items()])
def test_sums_of_every_family(case: Case, tmp_path: Path) -> None:
    files: Files = case.write(tmp_path)
    tensors = [load(files.model), other(load(files.model), 1), other(load(files.model), 2)]
    paths = [files.model, tmp_path / "b.safetensors", tmp_path / "c.safetensors"]
    for path, each in zip(paths[1:], tensors[1:], strict=True):
        save(path, each)
    seen: list[tuple[int, int]] = []
    facts = merge_checkpoints(
        paths, tmp_path / "out.safetensors", (0.5, 0.3, -0.2), progress=lambda *at: seen.append(at)
    )
    assert facts["family"] == case.family and not facts["lacking"] and seen[-1][0] == seen[-1][1] > 0
    out = load(tmp_path / "out.safetensors")
    # An average of the old weights would be taken for the new ones'.
    assert out.keys() == {n for n in tensors[0] if not n.startswith("model_ema.")}
    sums = {
        n: 0.5 * t + 0.3 * tensors[1][n] - 0.2 * tensors[2][n]
        for n, t in tensors[0].items()
        if n in out and t.is_floating_point()
    }
    wrong = [
        n
        for n, t in sums.items()
        if not torch.allclose(out[n], t, atol=1e-6) and not torch.equal(out[n], tensors[0][n])
    ]
    assert not wrong
    changed = [n for n, t in out.items() if not torch.equal(t, tensors[0][n])]
    assert len(changed) > 0.9 * len([n for n, t in out.items() if t.is_floating_point() and t.numel() > 1])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("two")
    first = sd3.write("medium", folder).model
    save(folder / "b.safetensors", other(load(first), 3))
    return first, folder / "b.safetensors"


def test_it_is_linear_in_the_ratio(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = []
    for i, ratios in enumerate(((1.0, 0.0), (0.0, 1.0), (0.25, 0.75))):
        merge_checkpoints(two, tmp_path / f"{i}.safetensors", ratios)
        out.append(load(tmp_path / f"{i}.safetensors"))
    for name, t in out[2].items():
        if not t.is_floating_point():
            continue
        torch.testing.assert_close(t, 0.25 * out[0][name] + 0.75 * out[1][name], atol=1e-6, rtol=1e-6)
    merge_checkpoints(two, tmp_path / "equal.safetensors")
    name = "model.diffusion_model.final_layer.linear.weight"
    assert torch.allclose(load(tmp_path / "equal.safetensors")[name], (out[0][name] + out[1][name]) / 2)


def test_layouts_and_names_may_differ(two: tuple[Path, Path], tmp_path: Path) -> None:
    """A folder and a file give what two files give, as a file and as a folder."""
    tokenizers = str(two[0].parent)
    convert(two[1], tmp_path / "b", tokenizer=tokenizers)
    merge_checkpoints(two, tmp_path / "files.safetensors", (0.3, 0.7))
    merge_checkpoints((two[0], tmp_path / "b"), tmp_path / "mixed.safetensors", (0.3, 0.7))
    merge_checkpoints((two[0], tmp_path / "b"), tmp_path / "folder", (0.3, 0.7))
    convert(tmp_path / "folder", tmp_path / "folder.safetensors", bundle=True)
    wanted = load(tmp_path / "files.safetensors")
    for name in ("mixed", "folder"):
        found = load(tmp_path / f"{name}.safetensors")
        nets = [n for n in found if n in wanted and not n.endswith(("position_ids", "logit_scale"))]
        assert len(nets) > 0.95 * len(wanted)
        assert not [n for n in nets if not torch.equal(found[n], wanted[n])]


def test_what_one_lacks_is_taken_from_the_others_and_told(tmp_path: Path) -> None:
    apart = sd3.write("3.5_medium", tmp_path).model
    tensors = load(apart)
    save(tmp_path / "b.safetensors", other({n: t for n, t in tensors.items() if "first_stage" not in n}, 4))
    facts = merge_checkpoints((tmp_path / "b.safetensors", apart), tmp_path / "out.safetensors", (0.25, 0.75))
    out, b = load(tmp_path / "out.safetensors"), load(tmp_path / "b.safetensors")
    assert out.keys() == tensors.keys()
    assert all(torch.equal(t, tensors[n]) for n, t in out.items() if "first_stage" in n)
    assert set(facts["lacking"]) == {n for n in facts["lacking"] if n.startswith("vae.")} != set()
    name = next(n for n in b if n.endswith("context_embedder.weight"))
    torch.testing.assert_close(out[name], 0.25 * b[name] + 0.75 * tensors[name])


def test_only_some_parts(two: tuple[Path, Path], tmp_path: Path) -> None:
    merge_checkpoints(two, tmp_path / "out.safetensors", only=("denoiser",))
    first, out = load(two[0]), load(tmp_path / "out.safetensors")
    changed = {n.split(".")[0] for n, t in out.items() if not torch.equal(t, first[n])}
    assert changed == {"model"}


def test_number_formats(tmp_path: Path) -> None:
    """fp8 and scaled fp8 are read, and written as the first model has them; what is asked for is written."""
    path = flux.write(True, tmp_path).model
    save(tmp_path / "b.safetensors", {n: 0.02 * t for n, t in other(load(path), 5).items()})
    merge_checkpoints((path, tmp_path / "b.safetensors"), tmp_path / "wide.safetensors", (0.5, 0.5))
    wide = load(tmp_path / "wide.safetensors")
    for dtype in ("fp8", "fp8_scaled"):
        convert(path, tmp_path / f"{dtype}.safetensors", dtype=dtype)
        pair, out = (tmp_path / f"{dtype}.safetensors", tmp_path / "b.safetensors"), tmp_path / "out.safetensors"
        merge_checkpoints(pair, out, (0.5, 0.5))
        kinds = [{n: i.dtype for n, i in read_header(p).tensors.items()} for p in (out, pair[0])]
        assert kinds[0] == kinds[1]
        found = Lazy.of([out])
        for name, t in wide.items():
            torch.testing.assert_close(found[name].float(), t, atol=0.05 * float(t.abs().max()) + 2**-8, rtol=0.1)
        merge_checkpoints(pair, out, (0.5, 0.5), save_precision="fp16")
        assert {i.dtype for i in read_header(out).tensors.values()} == {"F16"}


def test_what_cannot_be_merged(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    (tmp_path / "flux").mkdir()
    strange = flux.write(True, tmp_path / "flux").model
    with pytest.raises(UserError, match=r"Stable Diffusion 3.*FLUX\.1"):
        merge_checkpoints((two[0], strange), out)
    with pytest.raises(UserError, match="--ratios: 1 for 2 models"):
        merge_checkpoints(two, out, (0.5,))
    (tmp_path / "sdxl").mkdir()
    noise, v = sdxl.write(tmp_path / "sdxl").model, tmp_path / "v.safetensors"
    save(v, {**load(noise), "v_pred": torch.zeros(0)})
    with pytest.raises(UserError, match="predicts noise"):
        merge_checkpoints((noise, v), out)
    wider = {n: torch.cat([t, t]) if n.endswith("token_embedding.weight") else t for n, t in load(two[1]).items()}
    save(v, wider)
    with pytest.raises(UserError, match="has shape"):
        merge_checkpoints((two[0], v), out)
    with pytest.raises(UserError, match="is also read"):
        merge_checkpoints(two, two[1])
    assert not out.exists()
