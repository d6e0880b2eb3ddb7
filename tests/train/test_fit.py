"""A training fits its card: settings are chosen, a step that runs out of memory is done again with stronger ones, and
what was predicted is told beside what was taken."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from run_fixtures import make_images
from runs.test_families import configured, prepared
from tinies.cases import Case, Files, cases
from torch import nn

from sfumato.config import Config, MemoryConfig, OutputConfig
from sfumato.errors import UserError
from sfumato.train import fit, loop, plan, recover, run
from sfumato.train.dist import World

SETTINGS: dict[str, Any] = {
    "cache_latents": True,
    "cache_text_encoder_outputs": True,
    # Its first step does not make a difference in the last bits of a gradient that is almost 0 as large as any.
    "optimizer_type": "SGDNesterov",
    "learning_rate": 0.1,
    "max_train_steps": 2,
}
Where = tuple[Case, Files, Path]
PREDICT = fit.predict


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Where:
    case = next(case for case in cases() if case.name == "flux-dev")
    folder = tmp_path_factory.mktemp("fit")
    return case, case.write(folder / "model"), make_images(folder)


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    """A step of the same shapes and formats is traced once for all tests: what it says is compared in `test_predict.py`."""
    plain, found = MemoryConfig(), dict[str, Any]()
    levers = {name for names in fit._FREE.values() for name in names} - fit._FREE["quantize"]
    kept = {name: getattr(plain, name) for name in (levers & fit._KNOWN) | {"vram", "simulate_vram"}}

    def predict(config: Config, method: Any, plan: Any, batches: Sequence[partial[Any]], *, card: bool) -> Any:
        train = replace(config.train, max_train_steps=1)
        alike = replace(config, memory=replace(config.memory, **kept), output=OutputConfig(), train=train)
        largest = [(batch.func.__self__, batch.keywords) for batch in batches]  # type: ignore[attr-defined]
        key = repr((alike, method, plan, largest, card))
        if key not in found:
            found[key] = PREDICT(config, method, plan, batches, card=card)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "predict", predict)
        yield


def ready(where: Where, out: Path, **settings: Any) -> loop.Run:
    return prepared(*where, out, "network", **{**SETTINGS, **settings})


def trained(a_run: loop.Run) -> dict[str, torch.Tensor]:
    with a_run.log or nullcontext():
        assert loop.train(a_run)
    return {n: w.detach().clone() for n, w in a_run.trainable.weights().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=1e-3, atol=1e-6) for n in a)


@pytest.fixture(scope="module")
def whole(where: Where, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return trained(ready(where, tmp_path_factory.mktemp("whole")))


def test_a_batch_in_parts_is_the_same_step(where: Where, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert equal(whole, trained(ready(where, tmp_path, micro_batch=1)))


def fail(a_run: loop.Run, times: int, backward: bool) -> None:
    """Have a block in the midst run out of memory so often, in the second step."""
    calls = iter(range(100))

    def full(*_: Any) -> None:
        if a_run.step == 1 and next(calls) < times:
            raise torch.OutOfMemoryError("no room")

    models = a_run.trainable.models  # type: ignore[attr-defined]
    block: nn.Module = models.family.blocks(models.denoiser)[2]
    if backward:
        block.register_full_backward_pre_hook(full)
    else:
        block.register_forward_pre_hook(full)


@pytest.mark.parametrize(
    ("times", "backward", "settings"),
    [
        pytest.param(1, True, {"micro_batch": 1, "vram": "1GB"}, id="backward"),
        pytest.param(
            2, False, {"fused_backward_pass": True, "gradient_accumulation_steps": 2}, id="twice-forward-fused"
        ),
    ],
)
def test_a_step_that_runs_out_of_memory_is_done_again(
    where: Where,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    times: int,
    backward: bool,
    settings: dict[str, Any],
) -> None:
    """The result is that of a run which had the settings that were taken from the start; what is resumed keeps them."""
    a_run = ready(where, tmp_path / "full", **settings)
    before = a_run.config.memory
    fail(a_run, times, backward)
    found, after = trained(a_run), a_run.config.memory
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("out of memory in step 2: the step is done again with") == times
    assert len(re.findall(r"needs about \d+% less of the card's memory", said)) == times
    assert a_run.identity["config"]["memory"] == json.loads(json.dumps(asdict(after)))
    spared = {n: v for n, v in asdict(after).items() if asdict(before)[n] != v}
    if after.vram:
        a_run.save_state(state := tmp_path / "out-state")
        resumed = ready(where, tmp_path / "on", **{**settings, "resume": str(state), "max_train_steps": 3})
        assert resumed.config.memory == after
        trained(resumed)
    chosen = {**settings, **spared, "vram": None}
    assert spared.get("gradient_checkpointing") and equal(found, trained(ready(where, tmp_path, **chosen)))


def test_blocks_that_are_swapped_by_list_are_counted_and_then_swapped_of_all(where: Where, tmp_path: Path) -> None:
    all_else = {"gradient_checkpointing": True, "cpu_offload_checkpointing": True, "micro_batch": 1}
    a_run = ready(where, tmp_path, **all_else, double_blocks_to_swap=1)
    fail(a_run, 1, backward=False)
    trained(a_run)
    after = a_run.config.memory
    assert after.blocks_to_swap and after.blocks_to_swap > 1 and after.double_blocks_to_swap is None
    assert len(a_run.swaps[0]._places) > after.blocks_to_swap


def test_nothing_goes_to_the_host_that_has_no_room_there(
    where: Where, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recover, "host_room", lambda: 0)
    a_run = ready(where, tmp_path, gradient_checkpointing=True, micro_batch=1)
    fail(a_run, 1, backward=False)
    with pytest.raises(UserError, match="nothing is left"):
        trained(a_run)


def test_a_step_that_failed_where_gradients_were_unscaled_is_done_again() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([weight]), torch.amp.GradScaler("cpu")
    a_run: Any = SimpleNamespace(
        optimizer=optimizer, scaler=scaler, tracker=None, world=World(0, 1, torch.device("cpu")),
        trainable=SimpleNamespace(weights=lambda: {"weight": weight}),
    )  # fmt: skip
    for _ in range(2):
        recover.free(a_run)
        scaler.scale(weight.sum()).backward()
        scaler.unscale_(optimizer)
    assert weight.grad is not None and weight.grad.tolist() == [1, 1]


def test_weights_that_are_half_changed_end_the_run(
    where: Where, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_run = ready(where, tmp_path, save_state=True)

    def step() -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(a_run.optimizer, "step", step)
    with a_run.log or nullcontext(), pytest.raises(UserError, match="while the weights changed in step 1"):
        loop.train(a_run)
    assert not list(tmp_path.glob("*state"))


def test_a_run_within_a_simulated_card(where: Where, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tensors are counted on a CPU; a step that would take more is done with less, which the result's config says."""
    written: list[Any] = []

    def train(name: str, **settings: Any) -> dict[str, float]:
        made, data = configured(*where, tmp_path / name, "network", **{**SETTINGS, "micro_batch": 1, **settings})
        run.train(made, "network", data, resolved=lambda config: str(written.append(config.memory)))
        last: dict[str, float] = json.loads((tmp_path / name / "out.jsonl").read_text().splitlines()[-1])
        return last

    told = train("room", vram="500MB", simulate_vram="500MB")
    assert not written[0].gradient_checkpointing
    assert told["memory/predicted_mib"] == pytest.approx(told["memory/peak_mib"], rel=0.05)
    assert f"peak memory {told['memory/peak_mib']:.0f} MiB, {told['memory/predicted_mib']:.0f} MiB predicted" in (
        capsys.readouterr().err
    )
    tight = f"{told['memory/peak_mib'] * 0.9:.3f}MB"
    train("tight", simulate_vram=tight)
    assert "out of memory in step 1: the step is done again with gradient_checkpointing" in capsys.readouterr().err
    assert [m.gradient_checkpointing for m in written[1:]] == [False, True]
    told = train("chosen", vram=tight, simulate_vram=tight)
    assert "out of memory" not in capsys.readouterr().err and written[-1].gradient_checkpointing
    assert told["memory/predicted_mib"] == pytest.approx(told["memory/peak_mib"], rel=0.05)


def test_what_was_set_stands_and_what_cannot_fit_is_refused(
    where: Where, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**SETTINGS, "gradient_checkpointing": True, "quantize": "int8"}
    made, data = configured(*where, tmp_path, "network", **given, vram="1100MB")
    found = plan.facts(made, "network", data)["memory"]
    assert found["chosen"]["levers"]["every"] == 1 and {t["levers"]["every"] for t in found["tried"]} == {1}
    made, data = configured(*where, tmp_path, "network", **given, vram="1025MB")
    with pytest.raises(UserError, match=r"vram 1025MB: nothing fits. The least that would do is 1\.\d+ GB, with ") as e:
        plan.show(made, "network", data)
    assert str(e.value).endswith("less is needed with a smaller network_dim, smaller images (resolution)")
    made, data = configured(*where, tmp_path, "network", **given, blocks_to_swap=1, vram="1100MB")
    monkeypatch.setattr(fit, "host_room", lambda: 0)
    with pytest.raises(UserError, match=r"nothing fits this computer, of whose memory 0\.00 GB may be used: the least"):
        plan.show(made, "network", data)
