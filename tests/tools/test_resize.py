"""Smaller ranks, against the plain singular value decomposition of each layer's change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.tools.dylora import first_ranks
from sfumato.tools.resize import Resizing, resize

LAYERS = {"lora_unet_a": (12, 9, ()), "lora_unet_b": (10, 8, (3, 3)), "lora_te_c": (8, 8, (1, 1))}


def lora(peft: bool = False, rank: int = 6) -> dict[str, Tensor]:
    g, out = torch.Generator().manual_seed(0), {}
    for i, (name, (rows, columns, kernel)) in enumerate(LAYERS.items()):
        scales = torch.arange(1, rank + 1.0) ** -2
        down, up = ("lora_A", "lora_B") if peft else ("lora_down", "lora_up")
        out[f"{name}.{down}.weight"] = torch.randn(rank, columns, *kernel, generator=g)
        out[f"{name}.{up}.weight"] = torch.randn(rows, rank, *[1 for _ in kernel], generator=g) * scales.view(
            1, -1, *[1 for _ in kernel]
        )
        if not peft:
            out[f"{name}.alpha"] = torch.tensor(float(i + 1))
    return out


def change(tensors: dict[str, Tensor], name: str) -> Tensor:
    down = next(t for n, t in tensors.items() if n.startswith(name) and ("lora_down" in n or "lora_A" in n)).flatten(1)
    up = next(t for n, t in tensors.items() if n.startswith(name) and ("lora_up" in n or "lora_B" in n)).flatten(1)
    return up @ down * (float(tensors.get(f"{name}.alpha", len(down))) / len(down))


def resized(
    folder: Path, tensors: dict[str, Tensor], how: Resizing, **more: object
) -> tuple[dict[str, Tensor], list[dict]]:
    files.save(folder / "a.safetensors", tensors, {"ss_network_dim": "6", "ss_network_alpha": "1.0"})
    facts = resize(folder / "a.safetensors", folder / "b.safetensors", how, **more)
    return files.load(folder / "b.safetensors"), facts["layers"]


@pytest.mark.parametrize("peft", [False, True])
def test_never_worse_than_the_plain_decomposition(tmp_path: Path, peft: bool) -> None:
    before = lora(peft)
    after, layers = resized(tmp_path, before, Resizing(rank=3, conv_rank=2))
    assert after.keys() == before.keys()
    for layer in layers:
        rank = 2 if layer["name"] == "lora_unet_b" else 3
        assert (layer["rank"], layer["new_rank"]) == (6, rank)
        wanted, found = change(before, layer["name"]), change(after, layer["name"])
        least = torch.linalg.svdvals(wanted)[rank:].square().sum().sqrt()
        assert torch.linalg.matrix_norm(wanted - found) <= least * 1.001 + 1e-6
        kept = torch.linalg.matrix_norm(found) / torch.linalg.matrix_norm(wanted)
        assert layer["kept"] == pytest.approx(float(kept), rel=1e-4)
    metadata = files.read_header(tmp_path / "b.safetensors").metadata
    assert metadata["ss_network_dim"] == "3" and "resized from 6 to 3" in metadata["ss_training_comment"]
    assert "sshs_model_hash" in metadata


def test_a_word_beside_the_adapter_stays(tmp_path: Path) -> None:
    word = {"bundle_emb.cat.clip_l": torch.randn(2, 8)}
    after, _ = resized(tmp_path, lora() | word, Resizing(rank=3))
    assert torch.equal(after["bundle_emb.cat.clip_l"], word["bundle_emb.cat.clip_l"])


def test_the_same_rank_changes_nothing(tmp_path: Path) -> None:
    before = lora()
    after, _ = resized(tmp_path, before, Resizing(rank=6))
    for name in LAYERS:
        torch.testing.assert_close(change(after, name), change(before, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "parameter"),
    [("sv_ratio", 4.0), ("sv_fro", 0.9), ("sv_cumulative", 0.8), ("sv_fro", 1.0), ("sv_ratio", 1.0)],
)
def test_the_least_rank_that_keeps_enough(tmp_path: Path, method: str, parameter: float) -> None:
    before = lora()
    _, layers = resized(tmp_path, before, Resizing(rank=6, method=method, parameter=parameter))
    for layer in layers:
        s = torch.linalg.svdvals(change(before, layer["name"]).double())[:6]

        def enough(rank: int, s: Tensor = s) -> bool:
            if method == "sv_ratio":
                return bool((s[rank:] < s[0] / parameter * (1 + 1e-6)).all())
            kept = s.square() if method == "sv_fro" else s
            share = kept[:rank].sum() / kept.sum()
            return bool((share.sqrt() if method == "sv_fro" else share) >= parameter - 1e-6)

        assert layer["new_rank"] == next(r for r in range(1, 7) if enough(r))


def test_a_layer_that_learned_nothing_has_rank_one(tmp_path: Path) -> None:
    before = {n: torch.zeros_like(t) if "lora_up" in n else t for n, t in lora().items()}
    after, layers = resized(tmp_path, before, Resizing(rank=4, method="sv_fro", parameter=0.9))
    assert {layer["new_rank"] for layer in layers} == {1}
    assert not any(change(after, name).any() for name in LAYERS)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"rank": 0}, "--rank 0: expected 1 or more"),
        ({"rank": 4, "parameter": 2.0}, "dynamic_param: does nothing"),
        ({"rank": 4, "method": "sv_fro", "parameter": 1.5}, "sv_fro expects a share"),
        ({"rank": 4, "method": "sv_ratio", "parameter": 0.5}, "sv_ratio expects a ratio"),
    ],
)
def test_mistakes(wrong: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Resizing(**wrong)


def test_what_has_no_smaller_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'x.hada_w1_a' is not part of a LoRA's pair"):
        resized(tmp_path, {"x.hada_w1_a": torch.ones(2, 2)}, Resizing(rank=1))
    files.save(tmp_path / "a.safetensors", lora())
    with pytest.raises(UserError, match="also read"):
        resize(tmp_path / "a.safetensors", tmp_path / "a.safetensors", Resizing(rank=1))
    for out in (tmp_path / "x.png", tmp_path):
        with pytest.raises(UserError, match=r"expected NAME\.safetensors"):
            resize(tmp_path / "a.safetensors", out, Resizing(rank=1))
    with pytest.raises(UserError, match="--device nonsense: cannot be used"):
        resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", Resizing(rank=1), device="nonsense")
    transposed = lora() | {"lora_unet_a.lora_down.weight": lora()["lora_unet_a.lora_down.weight"].T.contiguous()}
    with pytest.raises(UserError, match=r"lora_unet_a: factors of shapes .* are of no common rank"):
        resized(tmp_path, transposed, Resizing(rank=1))
    damaged = lora() | {"lora_unet_a.lora_down.weight": torch.full((6, 9), torch.nan)}
    with pytest.raises(UserError, match=r"lora_unet_a.lora_down.weight holds NaN"):
        resized(tmp_path, damaged, Resizing(rank=1))


def test_the_first_ranks_of_a_dylora_act_as_in_training(tmp_path: Path) -> None:
    """sd-scripts scales n ranks out of r by sqrt(r / n)."""
    before = lora()
    files.save(tmp_path / "a.safetensors", before)
    made = first_ranks(tmp_path / "a.safetensors", tmp_path / "b.safetensors", 2)
    assert [path.name for path in made] == ["b-0002.safetensors", "b-0004.safetensors", "b-0006.safetensors"]
    for path, count in zip(made, (2, 4, 6), strict=True):
        after = files.load(path)
        for i, name in enumerate(LAYERS):
            down, up = before[f"{name}.lora_down.weight"].flatten(1), before[f"{name}.lora_up.weight"].flatten(1)
            wanted = up[:, :count] @ down[:count] * ((i + 1) / 6) * (6 / count) ** 0.5
            torch.testing.assert_close(change(after, name), wanted)
    with pytest.raises(UserError, match="unit 4 must divide"):
        first_ranks(tmp_path / "a.safetensors", tmp_path / "b.safetensors", 4)
