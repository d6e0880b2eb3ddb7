"""Latents and text outputs that sd-scripts has cached are taken over: names, shapes and scaling of its files, by family.

How its files look was read off its `library/strategy_*.py` (0.10): whole lengths with masks, fp32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from folders import dataset, folder, plan, subset
from tinies.cases import Case, cases
from torch import Tensor

from sfumato.data import augment
from sfumato.data.cache import CachedLatents, CachedText, cache_latents, cache_texts
from sfumato.data.plan import Plan
from sfumato.data.prior import with_class
from sfumato.data.store import FileIndex, TensorStore
from sfumato.models.autoencoders import unscale
from sfumato.models.base import Models

ENDINGS = {
    "sd": ("_sd.npz", ""), "sdxl": ("_sdxl.npz", "_te_outputs.npz"), "sd3": ("_sd3.npz", "_sd3_te.npz"),
    "flux": ("_flux.npz", "_flux_te.npz"), "chroma": ("_flux.npz", "_flux_te.npz"),
    "lumina2": ("_lumina.npz", "_lumina_te.npz"), "hunyuan_image": ("_hi.npz", "_hi_te.npz"),
    "anima": ("_anima.npz", "_anima_te.npz"),
}  # fmt: skip
"""Latents and text outputs of each family."""
SCALED = ("flux", "chroma", "lumina2", "anima")
"""Families whose latents sd-scripts keeps as the denoiser takes them."""
ONE_SIZE = ("sd", "sdxl")
"""Families with one size of latents in a file."""
IMAGES = [(96, 64), (64, 64), (64, 64), (64, 96), (64, 64)]
ONE_OF_EACH = list({case.family: case for case in reversed(cases())}.values())
MASKED = [
    replace(case, variant="masked", options=dict.fromkeys(case_masks, True))
    for case in ONE_OF_EACH
    if (
        case_masks := {"flux": ["apply_t5_attn_mask"], "sd3": ["apply_lg_attn_mask", "apply_t5_attn_mask"]}.get(
            case.family
        )
    )
]


@pytest.fixture(scope="module", params=[*ONE_OF_EACH, *MASKED], ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def models(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return case.models(case.write(tmp_path_factory.mktemp("model")))


@pytest.fixture
def planned(models: Models, tmp_path: Path) -> Plan:
    latents = models.family.latents
    sizes = {"resolution": (64, 96), "bucket_reso_steps": 32, "min_bucket_reso": 32, "max_bucket_reso": 128}
    images = folder(tmp_path / "images", IMAGES)
    (images / "3.txt").write_text('a sign "open", red')
    of = dataset(subset(images, flip_aug=True), **sizes)
    return plan(of, stride=latents.stride, multiple=latents.multiple)


def wide(t: Tensor, rows: int) -> np.ndarray:
    """(n, ...) -> (n + rows, ...): with padding that no mask shows."""
    return torch.cat([t, torch.full((rows, *t.shape[1:]), 7, dtype=t.dtype)]).float().numpy()


def mask(n: int, rows: int) -> np.ndarray:
    return np.array([1] * n + [0] * rows, dtype=np.int64)


def of_sdxl(cond: Mapping[str, Tensor], models: Models) -> dict[str, Any]:
    hidden, width = cond["hidden"].numpy(), cast(Any, models.encoders["clip_l"]).config.hidden_size
    return {"hidden_state1": hidden[:, :width], "hidden_state2": hidden[:, width:], "pool2": cond["pooled"].numpy()}


def of_t5(t5: Tensor, masked: bool, padding: int = 0) -> dict[str, Any]:
    """`padding`: tokens of it that are seen, for which the mask has no place."""
    rows = len(t5) - padding
    if not masked:
        return {"t5_out": t5.numpy(), "t5_attn_mask": mask(3, rows - 3), "apply_t5_attn_mask": np.array(False)}
    return {"t5_out": wide(t5, 5), "t5_attn_mask": mask(rows, padding + 5), "apply_t5_attn_mask": np.array(True)}


def of_flux(cond: Mapping[str, Tensor], models: Models) -> dict[str, Any]:
    t5 = of_t5(cond["t5"], cast(Any, models.options).apply_t5_attn_mask)
    return {"l_pooled": cond["pooled"].numpy(), "txt_ids": np.zeros((len(t5["t5_out"]), 3), np.float32), **t5}


def of_chroma(cond: Mapping[str, Tensor], models: Models) -> dict[str, Any]:
    return {"l_pooled": np.zeros(768, np.float32), **of_t5(cond["t5"], True, padding=1)}


def of_sd3(cond: Mapping[str, Tensor], models: Models) -> dict[str, Any]:
    """Padding is not hidden in the states themselves."""
    clips, masked = ("clip_l", "clip_g"), cast(Any, models.options).apply_lg_attn_mask
    used = [int(cond[name].any(1).sum()) for name in clips] if masked else [5, 5]
    states = torch.cat([cond[name] for name in clips], -1)
    return {
        "lg_out": torch.where(states == 0, 7, states).numpy() if masked else states.numpy(),
        "lg_pooled": torch.cat([cond[f"{name}_pooled"] for name in clips], -1).numpy(),
        **{f"{name}_attn_mask": mask(n, 77 - n) for name, n in zip(clips, used, strict=True)},
        "apply_lg_attn_mask": np.array(masked),
        **of_t5(cond["t5"], cast(Any, models.options).apply_t5_attn_mask),
    }


def of_lumina2(cond: Mapping[str, Tensor], models: Models) -> dict[str, Any]:
    states = cond["gemma2"]
    ids = {"input_ids": np.zeros(len(states) + 4, np.int64)}
    return {"hidden_state": wide(states, 4), "attention_mask": mask(len(states), 4), **ids}


def of_hunyuan_image(cond: Mapping[str, Tensor], models: Models) -> dict[str, Any]:
    text, glyphs = cond["text"], cond["glyphs"]
    return {
        "vlm_embed": wide(text, 4), "vlm_mask": mask(len(text), 4), "byt5_embed": wide(glyphs, 2),
        "byt5_mask": mask(len(glyphs), 2), "ocr_mask": np.array(len(glyphs) > 0),
    }  # fmt: skip


def of_anima(cond: Mapping[str, Tensor], models: Models) -> dict[str, Any]:
    qwen3, ids = cond["qwen3"], cond["t5_ids"]
    return {
        "prompt_embeds": wide(qwen3, 4), "attn_mask": mask(len(qwen3), 4),
        "t5_input_ids": np.concatenate([ids.numpy(), np.zeros(3)]).astype(np.int32),
        "t5_attn_mask": mask(len(ids), 3).astype(np.int32), "caption_dropout_rate": np.float32(0),
    }  # fmt: skip


class Encoder:
    """The VAE or the text encoders, counting what they are given."""

    def __init__(self, models: Models) -> None:
        self.models, self.count = models, 0

    def images(self, pixels: Tensor) -> Tensor:
        self.count += len(pixels)
        return self.models.encode_images(pixels)

    def texts(self, batches: Sequence[Sequence[str]]) -> Iterator[Mapping[str, Tensor]]:
        for batch in batches:
            self.count += len(batch)
            with torch.no_grad():
                yield self.models.encode(self.models.tokenize(batch))


def cached_latents(models: Models, of: Plan) -> tuple[CachedLatents, int]:
    encoder = Encoder(models)
    made = cache_latents(
        of, TensorStore(), FileIndex(), encoder.images, "vae", models.family.latents,
        unscale=lambda x: unscale(models.vae, x),
    )  # fmt: skip
    return made, encoder.count


def cached_texts(models: Models, of: Plan) -> tuple[CachedText, int]:
    encoder = Encoder(models)
    made = cache_texts(of, TensorStore(), FileIndex(), encoder.texts, "te", models.outputs, settings={}, batch_size=1)
    return made, encoder.count


def write_latents(models: Models, of: Plan) -> None:
    """As sd-scripts does, with what its sampling of the posterior adds."""
    family = models.family.name
    for i, item in enumerate(of.items):
        pixels = augment.load(
            item.image, of.subset(item), item.placement, item.placement.centre, stride=of.stride
        )["pixels"][None]  # fmt: skip
        arrays: dict[str, Any] = {}
        for name, seen in {"latents": pixels, "latents_flipped": pixels.flip(3)}.items():
            raw = models.encode_images(seen)[0]
            raw = raw + raw.std() * 0.02 * torch.randn(raw.shape, generator=torch.Generator().manual_seed(i))
            value = models.scaled(raw) if family in SCALED else raw
            arrays[name] = (value[:, None] if models.family.latents.frames else value).numpy()
        arrays |= {"original_size": np.array([item.image.width, item.image.height]), "crop_ltrb": np.zeros(4)}
        _, h, w = raw.shape
        key = "" if family in ONE_SIZE else f"_{h}x{w}"
        size = f"_{item.image.width:04d}x{item.image.height:04d}"
        path = item.image.path.with_name(f"{item.image.path.stem}{size}{ENDINGS[family][0]}")
        before = dict(np.load(path)) if key and path.exists() else {}  # files of several sizes hold all of them
        np.savez(path, **before, **{name + key: value for name, value in arrays.items()})


def test_latents_of_sd_scripts_are_taken_over_raw(case: Case, models: Models, planned: Plan) -> None:
    kohya = models.family.latents.kohya
    assert kohya is not None and kohya.suffixes[0] == ENDINGS[case.family][0]
    assert (kohya.scaled, kohya.plain) == (case.family in SCALED, case.family in ONE_SIZE)
    if case.family not in ("sd", "flux", "anima") or case in MASKED:  # raw, scaled, of a video's VAE
        return
    own, count = cached_latents(models, planned)
    assert (count, own.imported) == (2 * len(IMAGES), 0)
    write_latents(models, planned)
    made, count = cached_latents(models, planned)
    assert (made.imported, made.encoded, count) == (1, 4, 2 * 4), made
    assert str(made).startswith("0 found, 1 imported from sd-scripts' files, 4 encoded")
    for place in range(len(IMAGES)):
        for flip in (False, True):
            a, b = (each.latents(planned, place, flip=flip)["latents"] for each in (own, made))
            assert (a - b).norm() / a.norm() < 0.05


def test_one_folder_at_two_sizes_has_both_in_its_files(case: Case, models: Models, planned: Plan) -> None:
    if case.family != "flux" or case in MASKED:
        return
    [small] = planned.datasets
    both = plan(
        small, replace(small, resolution=(96, 128)), stride=planned.stride, multiple=models.family.latents.multiple
    )
    assert len({item.placement.bucket for item in both.items}) > len({item.placement.bucket for item in planned.items})
    write_latents(models, both)
    made, _ = cached_latents(models, both)
    assert (made.imported, made.encoded) == (2 * len(IMAGES) - 4, 4)


def write_texts(models: Models, of: Plan, change: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> None:
    pack = globals()[f"of_{models.family.name}"]
    for item in of.items:
        [cond] = Encoder(models).texts([item.image.captions])
        entry = {name: t.float() if t.is_floating_point() else t for name, t in models.outputs.entry(cond, 0).items()}
        arrays = {name: change(a) if a.dtype == np.float32 and a.ndim else a for name, a in pack(entry, models).items()}
        np.savez(item.image.path.with_name(item.image.path.stem + ENDINGS[models.family.name][1]), **arrays)


def test_text_outputs_of_sd_scripts_are_taken_over(models: Models, planned: Plan) -> None:
    if not ENDINGS[models.family.name][1]:
        assert models.outputs.kohya is None, "sd-scripts keeps no text outputs of this family"
        return
    write_texts(models, planned)
    made, count = cached_texts(models, planned)
    assert (made.imported, made.encoded, count) == (1, 4, 4), made
    for item in planned.items:
        [caption] = item.image.captions
        [cond] = Encoder(models).texts([[caption]])
        fresh, read = models.outputs.entry(cond, 0), made.read(caption, caption)
        assert fresh.keys() == read.keys()
        for name, t in fresh.items():
            assert torch.equal(read[name], t.to(read[name].dtype)), name


def test_text_outputs_of_other_encoders_or_old_captions_are_not(models: Models, planned: Plan) -> None:
    if models.family.name != "lumina2":  # as good as another
        return
    write_texts(models, planned, lambda a: np.roll(a, 1, -1))
    made, count = cached_texts(models, planned)
    assert (made.imported, made.encoded, count) == (0, 5, 5) and "5 files of sd-scripts" in str(made)
    write_texts(models, planned)
    made, count = cached_texts(models, with_class(planned, "thing"))  # a caption that no file is of
    assert (made.imported, made.encoded, count) == (1, 5, 5), made
    for item in planned.items[:-1]:
        os.utime(item.image.path.with_suffix(".txt"), ns=(2**62, 2**62))
    made, _ = cached_texts(models, planned)
    assert (made.imported, made.encoded, made.refused) == (0, 5, "")
