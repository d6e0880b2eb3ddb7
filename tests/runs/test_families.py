"""Every family trains with everything that can be trained: what is named changes, nothing else does, and a saved result is what was trained."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from run_fixtures import make_images
from tinies.cases import Case, Files, cases
from torch import Tensor
from training import config

from sfumato import adapters, families
from sfumato.adapters.insert import from_state
from sfumato.config import Config, DatasetConfig, Method, Settings, SubsetConfig
from sfumato.formats.files import read_header
from sfumato.models import embedding_files, embeddings
from sfumato.models.base import Models, SampleInfo
from sfumato.models.loading import materialize, materialize_vae
from sfumato.train import dist, loop, run
from sfumato.train.log import read
from sfumato.train.trainables import read_adapter

ALL = [pytest.param(case, id=case.name) for case in cases()]
CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}
KEPT = {"max_train_steps": 20, "network_train_unet_only": True, **CACHED}
KINDS = sorted(adapters.kinds(), key=lambda kind: kind != "lora")


@pytest.fixture(scope="module", params=ALL)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def files(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return case.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def fresh(case: Case, files: Files) -> Models:
    """The model as its files have it, to be left as it is."""
    return case.models(files)


def prepared(case: Case, files: Files, images: Path, out: Path, method: Method, **settings: Any) -> loop.Run:
    """A run of two steps, ready to go: in the first one, an adapter whose other half is zero does not learn."""
    made, data = configured(case, files, images, out, method, **settings)
    return run.prepare(made, method, data, dist.world(), 0.0)


def configured(
    case: Case,
    files: Files,
    images: Path,
    out: Path,
    method: Method,
    held_out: tuple[SubsetConfig, ...] = (),
    **settings: Any,
) -> tuple[Config, tuple[DatasetConfig, ...]]:
    """Its settings and images."""
    facts = families.facts(case.family)
    options = {**files.options, **case.options, **settings.pop("options", {})}
    flat = {
        "pretrained_model_name_or_path": str(files.model),
        "vae": files.vae,
        "output_dir": str(out),
        "output_name": "out",
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        "network_dim": 2,
        "network_alpha": 2.0,
        "seed": 7,
        **facts.defaults,
        **settings,
    }
    data = DatasetConfig(subsets=(SubsetConfig(image_dir=str(images)), *held_out), resolution=(128, 64), batch_size=2)
    made: Config = config(**flat, family=facts.options(**options))
    idle = facts.without_effect(Settings.of(made, method))
    made = replace(made, family=facts.options(**{name: v for name, v in options.items() if name not in idle}))
    return made, (data,)


def trained(a_run: loop.Run) -> Models:
    with a_run.log or nullcontext():
        assert loop.train(a_run)
    models: Models = a_run.trainable.models  # type: ignore[attr-defined]
    return models


def says(models: Models, captions: Sequence[str] = ("image 1, red", "blue")) -> Tensor:
    """What a model says of fixed latents and captions."""
    facts, n = models.family.latents, 2
    x = torch.randn(n, facts.channels, 8, 8, generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]] * n)
    materialize(models)  # where text outputs are kept, the encoders were not even read
    with torch.no_grad():
        cond = models.condition(models.encode(models.tokenize(captions)), SampleInfo(sizes=sizes))
        return models.predict(x, torch.tensor([100.0, 700.0]), cond)


def states(models: Models) -> dict[str, Tensor]:
    materialize(models)
    nets = {**models.nets(), "vae": materialize_vae(models)}
    return {f"{name}.{k}": t.clone() for name, net in nets.items() for k, t in net.state_dict().items()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_whole_model_without_its_text_encoders(case: Case, files: Files, images: Path, tmp_path: Path) -> None:
    """With all that is kept and recomputed in a run; without, in the next test."""
    whole(case, files, images, tmp_path, {"denoiser"}, gradient_checkpointing=True, **CACHED)


def test_a_whole_model_with_its_text_encoders(
    case: Case, files: Files, images: Path, tmp_path: Path, fresh: Models
) -> None:
    options = families.facts(case.family).options(**{**files.options, **case.options})
    may = families.family(case.family).trainable(options, None)
    encoders = set(fresh.encoders)
    encoders &= encoders if may is None else may
    whole(case, files, images, tmp_path, {"denoiser", *encoders}, train_text_encoder=True)


def whole(case: Case, files: Files, images: Path, out: Path, components: set[str], **settings: Any) -> None:
    a_run = prepared(case, files, images, out, "full", **settings)
    before = states(a_run.trainable.models)  # type: ignore[attr-defined]
    models = trained(a_run)
    moved = changed(before, states(models))
    expected = {
        f"{name}.{path}"
        for name in components
        for path, _ in models.nets()[name].named_parameters()
        if not re.fullmatch(case.unmoved, f"{name}.{path}")
    }
    assert moved == expected
    result = out / "out.safetensors"
    a_run.save_result(result, a_run.step, 0)
    beside = {
        name: str(out / f"out_{name}.safetensors") for name in components if (out / f"out_{name}.safetensors").exists()
    }
    again = case.models(
        Files(model=result, options={**files.options, **beside}, vae=files.vae), tokenizer=str(files.model.parent)
    )
    assert not changed(states(again), states(models))
    # torch multiplies by another kernel where a weight takes gradients, so equal weights may say what differs in the last bits.
    torch.testing.assert_close(says(again), says(models), atol=1e-5, rtol=1e-5)


@dataclass(frozen=True)
class Adapted:
    """A run that trained adapters."""

    a_run: loop.Run
    before: Mapping[str, Tensor]
    out: Path

    @classmethod
    def by(cls, case: Case, files: Files, images: Path, out: Path, kind: str, **settings: Any) -> Adapted:
        a_run = prepared(case, files, images, out, "network", network_module=kind, **settings)
        before = states(a_run.trainable.models)  # type: ignore[attr-defined]
        trained(a_run)
        return cls(a_run, before, out)

    def losses(self) -> list[float]:
        return [loss for _, loss in read(self.out / "out.jsonl")["loss"]]


@pytest.fixture(scope="module")
def kept(case: Case, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """Adapters on the denoiser, 20 steps on what is kept of images and captions; another image is measured."""
    where = tmp_path_factory.mktemp("kept")
    images, more = make_images(where), where / "more"
    more.mkdir()
    with Image.open(images / "4.png") as image:
        image.rotate(90).save(more / "turned.png")
    held_out = (SubsetConfig(image_dir=str(more), class_tokens="picture 4, turned", validation_split=1.0),)
    every = {"validate_every_n_steps": 1000}
    return Adapted.by(case, files, images, where / "out", KINDS[0], held_out=held_out, **every, **KEPT)


def test_adapters_on_what_is_kept(case: Case, fresh: Models, kept: Adapted) -> None:
    adapted(case, fresh, kept, {"denoiser"})


def test_images_that_are_held_out_are_measured(kept: Adapted) -> None:
    """Before and after the training, which made a difference; and again, which makes none."""
    numbers = read(kept.out / "out.jsonl")
    assert [step for step, _ in numbers["loss/validation/mean"]] == [0, 20]
    for name in ("mean", "trained", *(f"level_{i}" for i in range(1, 9))):
        (_, before), (_, after) = numbers[f"loss/validation/{name}"]
        assert math.isfinite(before) and before != after
    with loop.evaluation_weights(kept.a_run):
        again = kept.a_run.validation.measure(None).scalars()  # type: ignore[union-attr]
    assert again == {name: numbers[name][-1][1] for name in again}


def test_adapters_with_text_encoders(case: Case, files: Files, images: Path, tmp_path: Path, fresh: Models) -> None:
    run = Adapted.by(case, files, images, tmp_path / "out", KINDS[0])
    may = families.family(case.family).trainable(run.a_run.trainable.models.options, run.a_run.trainable.plan)  # type: ignore[attr-defined]
    encoders = run.a_run.trainable.models.encoders  # type: ignore[attr-defined]
    adapted(case, fresh, run, {"denoiser", *(encoders if may is None else may)})


@pytest.mark.parametrize(
    ("kind", "other"), [(kind, cases()[i % len(cases())]) for i, kind in enumerate(KINDS) if i], ids=KINDS[1:]
)
def test_every_kind_of_adapter(kind: str, other: Case, images: Path, tmp_path: Path) -> None:
    """On one family each, in turn; tests/adapters/ tries all kinds on all sorts of layers."""
    files = other.write(tmp_path / "model")
    adapted(
        other,
        other.models(files),
        Adapted.by(other, files, images, tmp_path / "out", kind, network_train_unet_only=True),
        {"denoiser"},
    )


def adapted(case: Case, fresh: Models, run: Adapted, components: set[str]) -> None:
    """The nets stay as they are, every layer's adapter changes, and the file does what the training did."""
    a_run, models = run.a_run, run.a_run.trainable.models  # type: ignore[attr-defined]
    assert not changed(run.before, states(models))
    assert set(a_run.trainable.trained) == components
    inserted = a_run.trainable.network.by_path()  # type: ignore[attr-defined]
    still = [
        ".".join(site)
        for site, adapter in inserted.items()
        if not adapter.delta_weight(torch.ones_like(weight_of(models, site))).any()
    ]
    assert not [site for site in still if not re.fullmatch(case.unmoved, f"{site}.weight")]
    result = run.out / "saved.safetensors"
    a_run.save_result(result, a_run.step, 0)
    a_run.trainable.train(False)
    wanted = says(models)
    held = from_state(fresh.nets(), read_adapter(fresh, result)).eval()
    torch.testing.assert_close(says(fresh), wanted, atol=1e-6, rtol=1e-6)
    held.remove()
    assert (says(fresh) - wanted).abs().max() > 1e-4
    assert read_header(result).metadata["ss_base_model_version"] == families.facts(case.family).base_model_version(
        models.options
    )


FIRST = {case.family: case.name for case in reversed(cases())}


def test_a_word(case: Case, files: Files, images: Path, tmp_path: Path) -> None:
    """Its vectors change in every text encoder that reads captions, and nothing else does; its file says what was trained;
    a run that was resumed is the same bit for bit. One variant of each family."""
    if FIRST[case.family] != case.name:
        pytest.skip("another variant of the family is tried")
    for caption in images.glob("*.txt"):
        caption.write_text(f"a red hoge, {caption.stem}")
    word = {"token_string": "hoge", "num_vectors_per_token": 2, "max_train_steps": 5, "cache_latents": True}
    state = {"save_every_n_steps": 4, "save_state": True}
    a_run = prepared(case, files, images, tmp_path / "out", "embedding", **word, **state)
    models: Models = a_run.trainable.models  # type: ignore[attr-defined]
    before, rows = states(models), {name: p.detach().clone() for name, p in a_run.trainable.weights().items()}
    assert rows.keys() == {f"{name}.hoge" for name in models.encoders if name != "byt5"}
    trained(a_run)
    assert not changed(before, states(models))
    assert all((p != rows[name]).any(1).all() for name, p in a_run.trainable.weights().items())
    captions = ["a hoge, (hoge)", "blue"]
    wanted = says(models, captions)
    with a_run.trainable.without():
        assert (says(models, captions)[0] - wanted[0]).abs().max() > 1e-5
    result = tmp_path / "out" / "hoge.safetensors"
    a_run.save_result(result, a_run.step, 0)
    a_run.trainable.remove()
    plain = says(models, captions)
    assert (plain[0] - wanted[0]).abs().max() > 1e-4
    torch.testing.assert_close(plain[1], wanted[1], atol=1e-5, rtol=1e-5)  # the padding of its batch is another
    read = embeddings.Words(models, embedding_files.read(result, models, "weights"))
    assert torch.equal(says(models, captions), wanted)
    read.remove()

    after = str(tmp_path / "out" / "out-step00000004-state")
    again = prepared(case, files, images, tmp_path / "again", "embedding", resume=after, **word)
    trained(again)
    assert not changed(a_run.trainable.weights(), again.trainable.weights())


def weight_of(models: Models, site: tuple[str, str]) -> Tensor:
    weight = models.nets()[site[0]].get_submodule(site[1]).weight
    assert isinstance(weight, Tensor)
    return weight


def pinned(case: Case) -> Path:
    """The file of the losses of a case's family."""
    return Path(__file__).parents[1] / "fixtures" / "curves" / f"{case.family}.json"


def curve(case: Case, files: Files, images: Path, out: Path) -> list[float]:
    """Losses of 20 steps."""
    return Adapted.by(case, files, images, out, KINDS[0], **KEPT).losses()


def test_twenty_steps_are_what_they_were(case: Case, kept: Adapted) -> None:
    """A change that should not alter numbers does not. One that should brings a new tests/fixtures/curves/: see tests/curves.py."""
    assert pinned(case).exists(), f"run `python tests/curves.py {case.name}`"
    wanted = json.loads(pinned(case).read_text(encoding="utf-8"))[case.name]
    assert kept.losses() == pytest.approx(wanted, rel=1e-3)
