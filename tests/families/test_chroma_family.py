"""Chroma at work: captions, masks, sampling and the layers that adapters go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from flux_checks import meta
from tinies.cases import PROMPT
from tinies.chroma import CASES, drawn, pipeline, true_mask
from tinies.encoders import t5_tokenizer
from torch import Tensor, nn

from sfumato.adapters import AdapterPlan, parse
from sfumato.adapters import files as adapter_files
from sfumato.adapters.insert import AdapterNetwork, TargetLayer, choose
from sfumato.config import LossConfig, NetworkConfig, NoiseConfig
from sfumato.errors import UserError
from sfumato.families.chroma.facts import Completed, NetworkArgs
from sfumato.families.chroma.family import FAMILY
from sfumato.families.chroma.net import Chroma
from sfumato.families.chroma.strategies import OUTPUTS, ChromaTokenize
from sfumato.families.detect import identify
from sfumato.models.base import Models
from sfumato.models.meta_init import fill, shapes
from sfumato.sampling.sample import sample_latents
from sfumato.tensors.flow import Flow
from sfumato.tensors.random import SampleRandom

(CASE,) = CASES
Keys = Callable[[str], dict[str, tuple[int, ...]]]
CAPTIONS = ["a cat", "", "red " * 30 + "end"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return CASE.models(CASE.write(tmp_path_factory.mktemp("model")))


def encoded(models: Models, captions: list[str]) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(models.encode(models.tokenize(captions)))


# --- captions ---


def test_one_token_of_the_padding_is_seen() -> None:
    tokens = ChromaTokenize(t5_tokenizer(), 12).tokenize(CAPTIONS)
    used, seen = tokens["t5_mask"].sum(1), tokens["t5_visible"]
    assert seen.sum(1).tolist() == (used + 1).clamp(max=12).tolist()
    assert int(used.max()) == 12 and int(used.min()) == 1
    assert torch.equal(seen[1], torch.arange(12) < 2)


def test_captions_are_padded_no_further_than_is_needed() -> None:
    tokens = ChromaTokenize(t5_tokenizer(), 512).tokenize(CAPTIONS)
    used = tokens["t5_mask"].sum(1)
    assert tokens["t5"].shape == tokens["t5_mask"].shape == (3, int(used.max()) + 1)
    assert used[1] == 1  # an empty caption is its end mark
    assert ChromaTokenize(t5_tokenizer(), 8).tokenize(CAPTIONS)["t5"].shape == (3, 8)


@pytest.mark.parametrize("length", [8, 33, 512])
def test_captions_of_any_length_are_those_of_the_pipeline(models: Models, length: int) -> None:
    """A caption that is cut has no padding, so none is seen."""
    told = replace(models, options=replace(models.options, t5xxl_max_token_length=length))
    found = encoded(told, CAPTIONS)
    with torch.no_grad():
        states, _, mask, *_ = pipeline().encode_prompt(
            CAPTIONS, device="cpu", do_classifier_free_guidance=False, max_sequence_length=length
        )
    assert found["t5_mask"].sum(1).tolist() == mask.sum(1).tolist()  # of the three, one is empty
    for mine, theirs, n in zip(found["t5"], states, mask.sum(1).long().tolist(), strict=True):
        torch.testing.assert_close(mine[:n], theirs[:n], atol=1e-5, rtol=1e-5)
    assert (int(mask.sum(1).max()) == length) == (length < 40)


def test_what_is_seen_is_what_is_kept(models: Models) -> None:
    cond = encoded(models, CAPTIONS)
    kept = [OUTPUTS.entry(cond, i) for i in range(3)]
    assert [list(each) for each in kept] == [["t5"]] * 3
    assert [len(each["t5"]) for each in kept] == cond["t5_mask"].sum(1).tolist()
    assert OUTPUTS.dtype == torch.bfloat16
    joined = OUTPUTS.join(kept)
    assert torch.equal(joined["t5_mask"], cond["t5_mask"])
    assert torch.equal(joined["t5"][joined["t5_mask"]], cond["t5"][cond["t5_mask"]])


def test_settings_say_what_the_result_depends_on(models: Models) -> None:
    short = replace(models, options=replace(models.options, t5xxl_max_token_length=8))
    assert models.tokenize_strategy.settings != short.tokenize_strategy.settings


# --- the mask ---


def test_a_mask_that_hides_nothing_is_left_out(models: Models) -> None:
    alone, together = encoded(models, ["a cat"]), encoded(models, CAPTIONS)
    assert set(alone) == {"t5"} and set(together) == {"t5", "t5_mask"}
    x, t = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0])
    mask = torch.ones(alone["t5"].shape[:2], dtype=torch.bool)
    with torch.no_grad():
        with_, without = (models.predict(x, t, c) for c in ({**alone, "t5_mask": mask}, alone))
    torch.testing.assert_close(with_, without, atol=1e-5, rtol=1e-5)


def test_the_token_of_padding_is_heard(models: Models) -> None:
    x, t, cond = torch.ones(1, 16, 4, 6), torch.tensor([500.0]), encoded(models, ["a cat"])
    with torch.no_grad():
        whole = models.predict(x, t, cond)
        less = models.predict(x, t, {"t5": cond["t5"][:, :-1]})
    assert (whole - less).abs().max() > 1e-3


# --- drawing ---


@pytest.mark.parametrize(
    "change",
    [{"scale": 1.0}, {"negative_prompt": ""}, {"width": 64, "height": 96, "sample_steps": 5}, {"prompt": "red " * 30}],
    ids=["unguided", "empty negative", "larger", "longer"],
)
def test_images_are_those_of_the_pipeline(models: Models, change: dict[str, Any]) -> None:
    prompt = replace(PROMPT, **change)
    noise = torch.randn(1, 16, prompt.height // 8, prompt.width // 8, generator=torch.Generator().manual_seed(3))
    process = models.process(NoiseConfig(), LossConfig())
    (ours,) = sample_latents(models, [prompt], process=process, sampler="euler", noise=noise)
    with torch.no_grad():
        torch.testing.assert_close(ours, drawn(pipeline(), prompt, noise), atol=1e-3, rtol=1e-3)


def test_the_pipelines_images_do_not_depend_on_its_padding_once_its_mask_is_true() -> None:
    """What `drawn` compares with: the mask that the pipeline makes is right, only its kind is not."""
    noise = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(3))
    pipe = pipeline()
    draw = partial(
        pipe, "a cat", height=32, width=48, num_inference_steps=2, latents=pipe._pack_latents(noise, *noise.shape)
    )
    with torch.no_grad(), true_mask(pipe.transformer):
        few, many = (draw(max_sequence_length=n, output_type="latent").images for n in (16, 128))
    torch.testing.assert_close(few, many, atol=1e-4, rtol=1e-4)


def test_noise_levels_of_training(models: Models) -> None:
    process = models.process(NoiseConfig(), LossConfig())
    assert isinstance(process, Flow)
    drawn_ = process.sigmas(SampleRandom(list(range(4000))), 8, 8)
    # The sigmoid of a normal number: 0.5 at the middle, 0.3363 and 0.6637 at the quartiles.
    quartiles = torch.tensor([0.3375, 0.5, 0.6625])
    torch.testing.assert_close(drawn_.quantile(torch.tensor([0.25, 0.5, 0.75])), quartiles, atol=0.02, rtol=0)


# --- adapters ---


@pytest.fixture(scope="module")
def full_size(keys: Keys) -> Models:
    """The real sizes, without values."""
    table = keys("chroma.transformer")
    t5 = next(part for part in FAMILY.components if part.name == "t5xxl")
    names = {name: shape for name, shape in keys("t5xxl.hf").items() if name != "encoder.embed_tokens.weight"}
    spelling = t5.key_format(names)
    assert spelling is not None
    options = Completed(double_blocks=19, single_blocks=38)
    transformer = fill(Chroma.of(table), meta(table), "transformer")
    return Models(FAMILY, options, transformer, {"t5xxl": t5.net(spelling.shapes(names), {})}, {}, None)


def planned(*args: str) -> AdapterPlan:
    return parse(NetworkConfig(network_dim=4, network_alpha=1, network_args=args), NetworkArgs)


def places(models: Models, *args: str) -> dict[str, list[TargetLayer]]:
    plan = planned(*args)
    trained = {"denoiser", *(FAMILY.trainable(models.options, plan) or ())}
    layer = partial(FAMILY.target_layer, models.options, plan)
    return {
        name: choose(net, name, FAMILY.targets[name], plan, layer)
        for name, net in models.nets().items()
        if name in trained
    }


def kohya(models: Models, *args: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an adapter file."""
    inserted = AdapterNetwork(places(models, *args), seed=0)
    inserted.remove()
    return shapes(adapter_files.write(models.dialects["kohya"], inserted.state()))


def below(table: dict[str, tuple[int, ...]], start: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in table.items() if name.startswith(start)}


def test_adapters_have_the_names_and_shapes_of_sd_scripts(keys: Keys, full_size: Models) -> None:
    """That table was made beside a CLIP, which Chroma does not have."""
    assert kohya(full_size) == below(keys("adapter.chroma.lora"), "lora_unet_")


def with_alphas(table: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors without values, but for alphas."""
    return {name: torch.ones(()) if name.endswith(".alpha") else t for name, t in meta(table).items()}


def test_adapters_of_t5_have_the_shapes_of_flux_and_the_first_encoders_names(keys: Keys, full_size: Models) -> None:
    """ComfyUI (`comfy/lora.py`) and Forge number the text encoders that a model has; sd-scripts' number is read too."""
    theirs = below(keys("adapter.flux.lora"), "lora_te3_")
    t5 = {name.replace("lora_te3_", "lora_te1_"): shape for name, shape in theirs.items()}
    assert kohya(full_size, "train_t5xxl=True") == below(keys("adapter.chroma.lora"), "lora_unet_") | t5
    paths = [("t5xxl", path) for path, _ in full_size.encoders["t5xxl"].named_modules()]
    known = [adapter_files.read([full_size.dialects["kohya"]], with_alphas(names), paths) for names in (theirs, t5)]
    assert known[0].keys() == known[1].keys()
    assert len(known[0]) == len(theirs) // 3
    assert (found := identify(t5)) is not None
    assert found.family == "chroma"


@pytest.mark.parametrize(
    ("args", "count"),
    [
        (("train_blocks=double",), 19 * 8),
        (("train_blocks=single",), 38 * 2),
        (("single_dim=0", "txt_attn_dim=0"), 19 * 6),
        (("train_double_block_indices=0-2,18", "train_single_block_indices=none"), 4 * 8),
        (("in_dims=[2,0,0,0,2]",), 228 + 2),
        (("img_mod_dim=0",), 228),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_network_args_choose_the_layers(full_size: Models, args: tuple[str, ...], count: int) -> None:
    chosen = places(full_size, *args)["denoiser"]
    assert len(chosen) == count
    assert {p.options.rank for p in chosen if p.path in ("img_in", "txt_in")} <= {2}
    assert {p.options.rank for p in chosen if "blocks" in p.path} == {4}
    assert not [p.path for p in chosen if "distilled" in p.path]


def test_fused_layers_are_cut_and_joined(full_size: Models) -> None:
    cut = {p.path: p.options.pieces for p in places(full_size, "split_qkv=True")["denoiser"] if p.options.pieces}
    assert len(cut) == 19 * 2 + 38
    assert cut["double_blocks.3.txt_attn.qkv"] == (3072,) * 3
    assert cut["single_blocks.7.linear1"] == (3072, 3072, 3072, 12288)
    table = kohya(full_size, "split_qkv=True")
    assert table["lora_unet_single_blocks_7_linear1.lora_up.weight"] == (21504, 16)


def test_blocks_that_are_not_there_are_refused(full_size: Models) -> None:
    with pytest.raises(UserError, match=r"train_single_block_indices=0,38: the model has 38 such blocks"):
        places(full_size, "train_single_block_indices=0,38")


def test_t5_has_no_name_in_diffusers(full_size: Models) -> None:
    """Its pipeline cannot read adapters of a T5."""
    with pytest.raises(UserError, match="peft names have no place for 't5xxl'"):
        full_size.dialects["peft"].names(("t5xxl", "encoder.block.0.layer.0.SelfAttention.q"))


def test_the_net_that_makes_modulations_is_not_trained(models: Models) -> None:
    rates = {path: FAMILY.rate(models.options, "denoiser", path) for path, _ in models.denoiser.named_parameters()}
    still = {path for path, rate in rates.items() if rate == 0}
    assert still == {path for path in rates if path.startswith("distilled_guidance_layer.")} and still
    assert set(rates.values()) == {0, None}
    assert FAMILY.rate(models.options, "t5xxl", "shared.weight") is None


def test_every_layer_of_every_block_gets_an_adapter(models: Models) -> None:
    layers = {
        path for path, layer in models.denoiser.named_modules() if isinstance(layer, nn.Linear) and "_blocks." in path
    }
    assert {p.path for p in places(models)["denoiser"]} == layers
