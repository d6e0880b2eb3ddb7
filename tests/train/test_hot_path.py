"""A step waits for nothing: what it takes from the host comes in one copy, and nothing is read back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from memory.settings import SETTINGS
from oncard import CARD, Seen, Wait, batch_of, on_card, step, watched
from peft import LoraConfig, inject_adapter_in_model
from run_fixtures import make_images
from runs.test_controlnets import prepared as following
from runs.test_families import prepared
from tinies.cases import Case, Files, cases
from torch import Tensor, nn

from sfumato.adapters import find
from sfumato.adapters.insert import AdapterNetwork, TargetLayer
from sfumato.data.batch import Batch
from sfumato.errors import UserError
from sfumato.tensors.random import SampleRandom
from sfumato.train import loop

BY_NAME = {case.name: case for case in cases()}
FAMILIES = {case.family: case for case in cases()}
"""The last case of each."""
FAMILIES["sd"] = replace(BY_NAME["sd-1"], write=lambda folder: Files(model=tiny.short_sd1(folder)))


def two_samples() -> Batch:
    ones = torch.ones(2, device=CARD)
    return Batch(captions=("", ""), keys=(1, 2), weight=ones, multiplier=ones, sizes=ones)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize(
    "sin",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x + torch.ones(2),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: torch.ones(2).to(x.device),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x.new_tensor([1.0]),
        lambda x: x.copy_(torch.ones(2)),
    ],
)
def test_the_stand_in_sees_every_wait(sin: Callable[[Tensor], object]) -> None:
    x = torch.zeros(2, device=CARD)
    with watched() as seen:
        torch.ones(2).to(CARD, non_blocking=True) + x + torch.arange(2, device=CARD) * 3.0 + torch.tensor(2.0)
        with pytest.raises(Wait):
            sin(x)
    assert len(seen.copies) == 1


def kept(a_run: loop.Run, batch: Batch) -> Batch:
    """The same with all that caches hold."""
    models, there = a_run.trainable.models, batch.to(CARD)  # type: ignore[attr-defined]
    with watched(), torch.no_grad():
        cond = models.encode(there.tokens)
    cond = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in cond.items()}
    whole = replace(batch, tokens=None, pixels=None, cond=cond, latents=torch.zeros_like(batch.drawn["noise"]))
    return whole.pack(pinned=False)


def steps(
    case: Case,
    images: Path,
    where: Path,
    method: Any,
    *,
    live: bool = False,
    short: bool = False,
    prepare: Any = prepared,
    **settings: Any,
) -> Seen:
    """A step of a run. `live`: everything is encoded in the step."""
    a_run = on_card(prepare, case, case.write(where / "model"), images, where / "out", method, short=short, **settings)
    # What is copied once in a run.
    a_run.trainable.models.scaled(torch.zeros(1, 1, 1, 1, device=CARD))  # type: ignore[attr-defined]
    batch = batch_of(a_run)
    seen = step(a_run, batch if live else kept(a_run, batch))
    assert not seen.back or settings.keys() & MOVING
    return seen


NOISE = {"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True}
DRAWN: dict[str, dict[str, Any]] = {
    "sd": {
        **NOISE,
        "noise_offset": 0.1,
        "noise_offset_random_strength": True,
        "adaptive_noise_scale": 0.1,
        "multires_noise_iterations": 4,
        "min_snr_gamma": 5.0,
        "loss_type": "huber",
        "huber_schedule": "snr",
        "token_string": "red",
        "options": {"weighted_captions": True},
    },
    "flux": {**NOISE, "loss_type": "smooth_l1", "huber_schedule": "exponential", "scale_weight_norms": 1.0},
    "sd3": {"ema_decay": 0.9, "options": {"clip_l_dropout_rate": 0.5, "pos_emb_random_crop_rate": 0.5}},
    "hunyuan_image": {"loss_type": "huber"},
}
"""Family -> settings with which more is drawn for a step, or computed."""


@pytest.mark.parametrize("method", ["network", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, method: Any, images: Path, tmp_path: Path) -> None:
    """Adapters with all that may be drawn and is encoded in the step, a whole denoiser with what is kept."""
    settings = DRAWN.get(family, {}) if method == "network" else {}
    seen = steps(FAMILIES[family], images, tmp_path, method, live=method == "network", short=True, **settings)
    assert len(seen.copies) == 1


MOVING = {"optimizer_state_on_cpu", "blocks_to_swap"}
"""Settings that are there to copy in a step."""
FROZEN = {"quantize", "fp8_base"}
"""What a whole model does not take."""


WATCHED = [name for name, settings in SETTINGS.items() if settings and "blocks_to_swap" not in settings]


@pytest.mark.parametrize("name", WATCHED)
def test_every_setting(name: str, images: Path, tmp_path: Path) -> None:
    """With adapters and with a whole denoiser in turn."""
    method = "network" if SETTINGS[name].keys() & FROZEN or WATCHED.index(name) % 2 else "full"
    seen = steps(FAMILIES["chroma"], images, tmp_path, method, **SETTINGS[name])
    if SETTINGS[name].keys() & MOVING:
        assert len(seen.copies) > 1 and seen.back
    else:
        assert len(seen.copies) == 1


@pytest.mark.parametrize(("method", "family"), [("controlnet", "sd"), ("controlnet", "sd3"), ("lllite", "sdxl")])
def test_images_that_are_followed(method: Any, family: str, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "images")
    shutil.copytree(images, tmp_path / "follow", ignore=shutil.ignore_patterns("*.txt"))
    live = {"cache_latents": False, "cache_text_encoder_outputs": False}
    seen = steps(FAMILIES[family], tmp_path, tmp_path, method, prepare=following, **live)
    assert len(seen.copies) == 1


def test_streaming_reads_no_number(images: Path, tmp_path: Path) -> None:
    """On the CPU, as the stand-in has no memory to stream from."""

    def reads(name: str) -> int:
        where, case = tmp_path / name, FAMILIES["chroma"]
        a_run = prepared(case, case.write(where / "model"), images, where / "out", "network", **SETTINGS[name])
        a_run.log.__exit__()  # type: ignore[union-attr]
        return step(a_run, batch_of(a_run)).operators["_local_scalar_dense"]

    assert reads("streaming") == reads("plain")


def test_positions_that_fit_the_size_of_images(images: Path, tmp_path: Path) -> None:
    options = {"enable_scaled_pos_embed": True, "pos_emb_random_crop_rate": 0.5}
    assert len(steps(FAMILIES["sd3"], images, tmp_path, "full", short=True, options=options).copies) == 1


@pytest.mark.parametrize("name", find.kinds())
def test_every_kind_of_adapter_with_its_dropouts(name: str) -> None:
    kind = find.kind(name)
    chances = {chance: 0.5 for chance in ("dropout", "rank_dropout", "module_dropout") if chance in kind.supports}
    options = kind.Options(rank=2, alpha=2.0, **chances) if kind.has_rank else kind.Options(**chances)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    network = AdapterNetwork({"denoiser": [TargetLayer("0", net[0], options, kind)]}, seed=1)
    net.to(CARD), network.to(CARD)
    network.rng, network.multiplier = SampleRandom([1, 2]), torch.ones(2, device=CARD)
    network.noise_level = torch.ones(2, device=CARD)
    with watched() as seen:
        net(torch.ones(2, 3, 8, device=CARD)).sum().backward()
        network.after_step()
        with suppress(UserError):  # a kind for which that has no meaning
            network.scale_norms(1.0)
    assert not seen.copies


def computed(predict: Callable[[], Tensor]) -> int:
    """Operators of a forward and a backward pass."""
    with watched() as seen:
        predict().sum().backward()
    return sum(seen.operators.values())


def with_peft(net: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> nn.Module:
    """diffusers' net on the card, with PEFT's LoRA on the layers that are wanted."""
    names = [name for name, module in net.named_modules() if wanted(name, module)]
    config = LoraConfig(r=2, lora_alpha=2, target_modules=names)
    return inject_adapter_in_model(config, deepcopy(net).requires_grad_(False)).to(CARD)


def test_a_unet_computes_no_more_than_diffusers_with_peft(images: Path, tmp_path: Path) -> None:
    case = FAMILIES["sd"]
    a_run = on_card(prepared, case, case.write(tmp_path / "model"), images, tmp_path / "out", "network")
    models, hidden = a_run.trainable.models, torch.ones(2, 77, tiny.WIDTH, device=CARD)  # type: ignore[attr-defined]
    x, t = torch.ones(2, 4, 8, 8, device=CARD), torch.ones(2, dtype=torch.long, device=CARD)
    theirs = with_peft(
        tiny.parts(v2=False, short=True).unet,
        lambda name, layer: "attentions" in name and isinstance(layer, nn.Linear | nn.Conv2d),
    )
    a_run.trainable.on_batch(two_samples())
    ours = computed(lambda: models.predict(x, t, {"hidden": hidden}))
    assert ours <= computed(lambda: theirs(x, t, hidden).sample)


def test_a_transformer_computes_no_more_than_diffusers_with_peft(images: Path, tmp_path: Path) -> None:
    case = BY_NAME["flux-dev"]
    a_run = on_card(prepared, case, case.write(tmp_path / "model"), images, tmp_path / "out", "network")
    models, net = a_run.trainable.models, case.pipeline().transformer  # type: ignore[attr-defined]
    theirs = with_peft(net, lambda name, layer: "transformer_blocks" in name and isinstance(layer, nn.Linear))
    t5, pooled = (
        torch.ones(2, *shape, device=CARD)
        for shape in ((16, net.config.joint_attention_dim), (net.config.pooled_projection_dim,))
    )
    x, t = torch.ones(2, 16, 8, 8, device=CARD), torch.ones(2, device=CARD)
    a_run.trainable.on_batch(two_samples())
    ours = computed(lambda: models.predict(x, t, {"t5": t5, "pooled": pooled, "guidance": t}))
    ids = torch.zeros(16, 3, device=CARD)
    assert ours <= computed(
        lambda: theirs(
            hidden_states=torch.ones(2, 16, 64, device=CARD), encoder_hidden_states=t5, pooled_projections=pooled,
            timestep=t, img_ids=ids, txt_ids=ids, guidance=t,
        ).sample
    )  # fmt: skip
