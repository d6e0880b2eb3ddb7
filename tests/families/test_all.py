"""What every family must do, proven against diffusers' pipeline of the same weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from streamed import equal_gradients, inputs
from tinies.cases import Case, Files, cases
from torch import Tensor
from training import config

from sfumato import families
from sfumato.config import LossConfig, Method, NoiseConfig, Settings
from sfumato.families.detect import detect_file, identify
from sfumato.formats.files import load
from sfumato.models import components
from sfumato.models.autoencoders import scaled, scaling_of, unscale
from sfumato.models.base import Models
from sfumato.models.loading import save
from sfumato.models.meta_init import shapes
from sfumato.sampling.prompts import Prompt
from sfumato.sampling.sample import sample_latents
from sfumato.train.check import check

CAPTIONS = ['a cat on a "mat"', "", "red " * 30 + "end", "one, two! " * 40]
ALL = [pytest.param(case, id=case.name) for case in cases()]


@pytest.fixture(scope="module", params=ALL)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def files(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return case.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Files:
    path = tmp_path_factory.mktemp("folder") / "model"
    case.pipeline().save_pretrained(path)
    return Files(model=path)


@pytest.fixture(scope="module")
def models(case: Case, files: Files) -> Models:
    return case.models(files)


@pytest.fixture(scope="module")
def drawn(case: Case, models: Models) -> Tensor:
    """The latents that the pipeline draws."""
    with torch.no_grad():
        return case.drawn(case.pipeline(), case.prompt, noise_of(models, case.prompt))


def states(models: Models) -> dict[str, Tensor]:
    nets = {**models.nets(), "vae": models.vae}
    return {f"{name}.{k}": t for name, net in nets.items() for k, t in net.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name, t in a.items() if t.dtype != b[name].dtype or not torch.equal(t, b[name])]


def cond_of(models: Models, captions: list[str]) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(models.encode(models.tokenize(captions)))


def test_every_family_has_cases() -> None:
    assert {case.family for case in cases()} == set(families.names())


def test_the_file_is_known_by_its_header(case: Case, files: Files, folder: Files) -> None:
    for path in (files.model, folder.model):
        found = detect_file(path)
        assert (found.family, found.kind) == (case.family, "checkpoint")


@pytest.mark.parametrize("claim", ["architecture", "base_model_version"])
def test_adapters_in_every_dialect_are_known_by_names_and_metadata(case: Case, models: Models, claim: str) -> None:
    """The patterns of `facts.py` fit the names that the table makes, and its `claims` what is written into results."""
    facts, key = families.facts(case.family), {"architecture": "modelspec.architecture"}.get(claim, f"ss_{claim}")
    metadata = {key: getattr(facts, claim)(models.options)}
    assert facts.signature.claim(metadata, key) is not None
    inside = {id(m) for block in models.family.blocks(models.denoiser) for m in block.modules()}
    layers = {
        path: m for path, m in models.denoiser.named_modules() if isinstance(m, torch.nn.Linear) and id(m) in inside
    }
    for dialect in models.dialects.values():
        down = dialect.tensor_names.get("lora_down.weight", "lora_down.weight")
        made = {
            f"{n}.{down}": (2, m.in_features)
            for path, m in layers.items()
            if dialect.holds(("denoiser", path))
            for n in dialect.names(("denoiser", path))[0]
        }
        found = identify(made, metadata)
        assert found is not None
        assert (found.family, found.kind) == (case.family, "adapter")
        assert dialect.name in (found.dialect, f"{found.dialect}_diffusers")


def test_files_and_folders_hold_the_same(case: Case, models: Models, folder: Files) -> None:
    theirs = case.models(folder)
    assert theirs.options.__class__ is models.options.__class__
    assert_same(states(models), states(theirs))


def test_a_file_comes_back_bit_for_bit(case: Case, files: Files, models: Models, tmp_path: Path) -> None:
    path = tmp_path / f"again{files.model.suffix}"
    save(models, path, layout="single_file", dtype=None, metadata={})
    assert_same(load(files.model), load(path))


def test_a_folder_comes_back_as_the_pipeline_reads_it(case: Case, folder: Files, tmp_path: Path) -> None:
    save(case.models(folder), tmp_path / "again", layout="diffusers", dtype=None, metadata={})
    theirs = case.pipeline()
    absent = {name: None for name, part in theirs.components.items() if part is None}
    ours = type(theirs).from_pretrained(tmp_path / "again", **absent)
    for name, part in theirs.components.items():
        if isinstance(part, torch.nn.Module):
            assert_same(getattr(ours, name).state_dict(), part.state_dict())
        elif hasattr(part, "get_vocab"):
            assert getattr(ours, name).get_vocab() == part.get_vocab()


def test_a_file_becomes_a_folder_that_the_pipeline_reads(
    case: Case, models: Models, drawn: Tensor, tmp_path: Path
) -> None:
    """All settings of its nets, its sampler's too, are those of the pipeline whose weights the file has."""
    save(models, tmp_path / "new", layout="diffusers", dtype=None, metadata={})
    theirs = case.pipeline()
    absent = {name: None for name, part in theirs.components.items() if part is None}
    ours = type(theirs).from_pretrained(tmp_path / "new", **absent)
    for name, part in theirs.components.items():
        mine = getattr(ours, name)
        if isinstance(part, torch.nn.Module):
            assert_same(mine.state_dict(), part.state_dict())
            assert type(mine) is type(part)
        elif hasattr(part, "get_vocab"):
            assert mine.get_vocab() == part.get_vocab()
    ours.set_progress_bar_config(disable=True)
    with torch.no_grad():
        mine = case.drawn(ours, case.prompt, noise_of(models, case.prompt))
    torch.testing.assert_close(mine, drawn, atol=1e-4, rtol=1e-4)


def test_only_what_the_file_holds_is_read_and_cast(case: Case, files: Files) -> None:
    models = case.models(files, dtype=torch.bfloat16)
    assert {p.dtype for net in models.nets().values() for p in net.parameters() if p.is_floating_point()} == {
        torch.bfloat16
    }
    assert next(models.vae.parameters()).dtype == torch.float32


def test_text_is_encoded_as_by_the_pipeline(case: Case, models: Models) -> None:
    with torch.no_grad():
        wanted = case.encoded(case.pipeline(), CAPTIONS)
    found, ragged = cond_of(models, CAPTIONS), models.outputs.ragged
    assert set(wanted) <= set(found)
    for name, value in wanted.items():
        if name in ragged:
            used = found.get(ragged[name], torch.ones(found[name].shape[:2], dtype=torch.bool))
            for row, (mine, theirs) in enumerate(zip(found[name], value, strict=True)):
                n = int(used[row].sum())
                torch.testing.assert_close(mine[:n], theirs[:n], atol=1e-5, rtol=1e-5)
        else:
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


def test_a_caption_is_what_the_text_encoders_give(case: Case, models: Models) -> None:
    """`sfumato bench` makes one up."""
    given, told = cond_of(models, ["a cat"]), models.family.caption(shapes(models.denoiser.state_dict()))
    assert all(name.endswith("_mask") for name in given.keys() - told.keys())
    assert not told.keys() - given.keys() - ({"t5"} & {n[:2] for n in models.family.optional})
    for name, shape in ((name, shape) for name, shape in told.items() if name in given):
        assert len(shape) + 1 == given[name].ndim
        # Of what is pooled of both CLIPs each has the share that it has in the real model.
        if not name.endswith("_ids") and case.family != "sd3":
            assert shape[-1] == given[name].shape[-1]


def test_a_batch_of_prompts_is_as_one_by_one(case: Case, models: Models) -> None:
    """Through the text encoders and the denoiser, live and as they are kept."""
    strategy = models.outputs
    x, t = latents_of(models, len(CAPTIONS)), torch.full((len(CAPTIONS),), 500.0)
    together, apart = cond_of(models, CAPTIONS), [cond_of(models, [caption]) for caption in CAPTIONS]
    kept = [strategy.entry(together, i) for i in range(len(CAPTIONS))]
    said = predict(models, x, t, together)
    torch.testing.assert_close(predict(models, x, t, strategy.join(kept)), said, atol=1e-5, rtol=1e-4)
    for i, cond in enumerate(apart):
        torch.testing.assert_close(predict(models, x[i : i + 1], t[:1], cond), said[i : i + 1], atol=1e-5, rtol=1e-4)
        short = strategy.join([strategy.entry(cond, 0)])
        torch.testing.assert_close(predict(models, x[i : i + 1], t[:1], short), said[i : i + 1], atol=1e-5, rtol=1e-4)


def test_padding_changes_what_is_said_only_where_no_mask_hides_it(case: Case, models: Models) -> None:
    strategy = models.outputs
    x, t, cond = latents_of(models, 2), torch.full((2,), 300.0), cond_of(models, CAPTIONS[:2])
    said = predict(models, x, t, cond)
    for name, mask in strategy.ragged.items():
        assert not cond[mask].all()
        used = cond[mask].reshape(*cond[mask].shape, *[1] * (cond[name].ndim - 2))
        cond[name] = torch.where(used, cond[name], torch.full_like(cond[name], 7))
    torch.testing.assert_close(predict(models, x, t, cond), said, atol=1e-6, rtol=1e-6)
    if not strategy.ragged:  # the models were trained with padding in sight
        name = next(name for name, value in cond.items() if value.ndim == 3)
        cond[name] = torch.cat([cond[name][:, :-1], cond[name][:, -1:] + 7], 1)
        assert (predict(models, x, t, cond) - said).abs().max() > 1e-4


def latents_of(models: Models, n: int) -> Tensor:
    facts = models.family.latents
    return torch.randn(n, facts.channels, 4 * facts.patch, 6 * facts.patch, generator=torch.Generator().manual_seed(2))


def noise_of(models: Models, prompt: Prompt) -> Tensor:
    facts = models.family.latents
    shape = (1, facts.channels, prompt.height // facts.stride, prompt.width // facts.stride)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def predict(models: Models, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    from sfumato.models.base import SampleInfo

    side = models.family.latents.stride
    sizes = torch.tensor([[x.shape[2] * side, x.shape[3] * side, 0, 0, x.shape[2] * side, x.shape[3] * side]] * len(x))
    with torch.no_grad():
        return models.predict(x, t, models.condition(cond, SampleInfo(sizes=sizes)))


def test_a_fixed_latent_becomes_the_pipelines_latents(case: Case, models: Models, drawn: Tensor) -> None:
    prompt, noise = case.prompt, noise_of(models, case.prompt)
    process = models.process(NoiseConfig(), LossConfig())
    (ours,) = sample_latents(models, [prompt], process=process, sampler=case.sampler, noise=noise)
    torch.testing.assert_close(ours, drawn, atol=1e-3, rtol=1e-3)
    assert (ours - noise[0]).abs().mean() > 0.05


def test_latents_are_scaled_as_by_the_pipeline(case: Case, models: Models) -> None:
    side, frames = 2 * models.family.latents.stride, models.family.latents.frames
    pixels = torch.rand(1, 3, side, side + side // 2, generator=torch.Generator().manual_seed(4)) * 2 - 1
    vae = case.pipeline().vae
    with torch.no_grad():
        raw = models.encode_images(pixels)
        config, theirs = vae.config, vae.encode(pixels[:, :, None] if frames else pixels).latent_dist.mode()
        if frames:
            mean, std = (torch.tensor(config[f"latents_{what}"])[:, None, None, None] for what in ("mean", "std"))
        else:
            mean, std = torch.tensor(config.get("shift_factor") or 0.0), torch.tensor(1 / config.scaling_factor)
        wanted = ((theirs - mean) / std).reshape(raw.shape)
        torch.testing.assert_close(scaled(raw, scaling_of(models.vae)), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(unscale(models.vae, scaled(raw, scaling_of(models.vae))), raw, atol=1e-5, rtol=1e-5)
        decoded, wanted = (
            models.decode(scaled(raw, scaling_of(models.vae))),
            vae.decode(theirs).sample.reshape(pixels.shape),
        )
    torch.testing.assert_close(decoded, wanted, atol=1e-4, rtol=1e-4)


def test_blocks_hold_nearly_all_weights(case: Case, models: Models) -> None:
    """Checkpointing and swapping act on them."""
    held = {id(p) for block in models.family.blocks(models.denoiser) for p in block.parameters()}
    rest = [name for name, p in models.denoiser.named_parameters() if id(p) not in held]
    assert len(rest) < 0.35 * len(list(models.denoiser.parameters()))
    assert not [name for name in rest if re.search(r"attn|transformer_blocks", name)]


@pytest.mark.parametrize("method", ["network", "full"])
def test_a_run_is_checked_on_nets_without_values(
    case: Case, files: Files, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`plan` and `train` see every layer and count what is trained before a weight is read."""
    monkeypatch.setattr(components.ComponentWeights, "put_into", lambda *_: pytest.fail("weights were read"))
    facts, options = families.facts(case.family), {**files.options, **case.options}
    idle = facts.without_effect(Settings(method=method, family=facts.options(**options)))
    given = facts.options(**{name: value for name, value in options.items() if name not in idle})
    checked = check(
        config(pretrained_model_name_or_path=str(files.model), vae=files.vae, network_dim=2, family=given), method, ()
    )
    assert checked.trained[0].component == "denoiser" and all(each.numbers and each.layers for each in checked.trained)
    assert checked.suffix == ".safetensors"
    assert all(p.is_meta for net in checked.models.nets().values() for p in net.parameters())


FIRST = {case.family: case.name for case in reversed(cases())}


def test_gradients_are_those_of_the_whole_net_where_blocks_are_streamed(case: Case, models: Models) -> None:
    """Half of the blocks, and all but one, which are recomputed, of a net that is trained with adapters on it; one
    variant of each family."""
    if FIRST[case.family] != case.name:
        pytest.skip("another variant of the family is tried")
    count, given = len(models.family.blocks(models.denoiser)), inputs(models)
    equal_gradients(models, given, "lora", [(count // 2, False), (count - 1, True)], all_weights=True)
