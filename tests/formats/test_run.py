"""A run's state: whole or not there, and checked when it is read."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.formats import leftovers, run

COMPONENTS = {"adapter": {"a": torch.rand(3, 4), "b": torch.tensor(2.0)}, "ema": {"a": torch.rand(3, 4)}, "empty": {}}
FACTS = {"step": 7, "epoch": 1, "nested": {"x": [1, None, "é"]}}


def equal(a: Any, b: Any) -> bool:
    """Nested values of the same types, tensors bit for bit, NaN equal to NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(map(equal, a.values(), b.values()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b or repr(a) == repr(b))


def test_round_trip(tmp_path: Path) -> None:
    run.save_run(tmp_path / "x-state", COMPONENTS, FACTS)
    parts, facts = run.load_run(tmp_path / "x-state")
    assert equal(dict(sorted(parts.items())), dict(sorted(COMPONENTS.items())))
    assert facts == FACTS
    assert os.listdir(tmp_path) == ["x-state"]
    assert not list((tmp_path / "x-state").glob(".*"))


def test_saving_again_replaces_the_whole(tmp_path: Path) -> None:
    run.save_run(tmp_path / "s", COMPONENTS, FACTS)
    run.save_run(tmp_path / "s", {"adapter": {"a": torch.ones(1)}}, {"step": 8})
    parts, facts = run.load_run(tmp_path / "s")
    assert parts.keys() == {"adapter"}
    assert facts == {"step": 8}
    assert os.listdir(tmp_path) == ["s"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (lambda f: flip(f / "adapter.safetensors"), r"adapter\.safetensors was changed"),
        (lambda f: os.truncate(f / "ema.safetensors", 20), r"ema\.safetensors has 20 bytes, \d+ were written"),
        (lambda f: (f / "facts.json").unlink(), r"facts\.json is missing"),
        (lambda f: (f / "manifest.json").unlink(), r"it has no manifest\.json"),
        (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json is damaged"),
        (
            lambda f: (f / "more.safetensors").write_bytes((f / "ema.safetensors").read_bytes()),
            r"more\.safetensors is not in the manifest",
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, wanted: str) -> None:
    folder = tmp_path / "x-state"
    run.save_run(folder, COMPONENTS, FACTS)
    damage(folder)
    with pytest.raises(UserError, match=f"x-state: cannot resume from this state: .*{wanted}"):
        run.load_run(folder)


def test_what_is_not_whole_is_found_without_reading_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "x-state"
    run.save_run(folder, COMPONENTS, FACTS)
    monkeypatch.setattr(run, "file_digest", lambda _: pytest.fail("all of a file was read"))
    run.check_whole(folder)
    os.truncate(folder / "ema.safetensors", 20)
    with pytest.raises(UserError, match=r"x-state: cannot resume from this state: ema\.safetensors has 20 bytes"):
        run.check_whole(folder)


def test_no_such_state(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        run.load_run(tmp_path / "x")


def test_newest_passes_over_what_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter([100.0, 300.0, 200.0, 400.0])
    monkeypatch.setattr(run.time, "time", lambda: next(clock, 500.0))
    for name in ("x-1-state", "x-3-state", "x-2-state", "y-state"):
        run.save_run(tmp_path / name, COMPONENTS, FACTS)
    (tmp_path / "x-9-state").mkdir()
    assert run.newest(tmp_path, "x-.*") == tmp_path / "x-3-state"
    flip(tmp_path / "x-3-state" / "adapter.safetensors")
    with caplog.at_level(logging.WARNING):
        assert run.newest(tmp_path, "x-.*") == tmp_path / "x-2-state"
    assert "x-3-state is passed over: adapter.safetensors was changed" in caplog.text
    assert run.newest(tmp_path, "z") is None
    assert run.newest(tmp_path / "none", "x") is None


def test_a_full_disk_keeps_the_old_state(tmp_path: Path, small_disk: Any) -> None:
    run.save_run(tmp_path / "s", COMPONENTS, FACTS)
    with (
        small_disk(10_000),
        pytest.raises(UserError, match=r"state of the run could not be saved: .*disk is full: 400,000 bytes needed"),
    ):
        run.save_run(tmp_path / "s", {"adapter": {"a": torch.ones(100_000)}}, {})
    assert run.load_run(tmp_path / "s")[1] == FACTS
    assert os.listdir(tmp_path) == ["s"]


@pytest.mark.skipif(os.name == "nt", reason="a process cannot kill itself there")
@pytest.mark.parametrize("moment", ["writing", "between the renames", "deleting"])
def test_a_kill_at_any_moment_leaves_a_whole_state(tmp_path: Path, moment: str) -> None:
    """Killed while writing; between moving the old state away and the new one in; and before the old one is deleted."""
    folder = tmp_path / "s"
    run.save_run(folder, COMPONENTS, {"step": 1})
    code = f"""
import os, signal, torch
from sfumato.formats import folders, run
def kill(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
real, calls = os.replace, []
def second(a, b):
    # files are renamed as well; the folders' own two moves are what is counted
    calls.append(a) if os.path.isdir(a) else None
    kill() if len(calls) == 2 else real(a, b)
if {moment!r} == "between the renames":
    os.replace = second
elif {moment!r} == "writing":
    run.write_text = kill
else:
    folders.shutil.rmtree = lambda p, **k: kill() if p.exists() else None
run.save_run({str(folder)!r}, {{"adapter": {{"a": torch.ones(2)}}}}, {{"step": 2}})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert run.newest(tmp_path, "s.*") == folder
    assert run.load_run(folder)[1] == {"step": 2 if moment == "deleting" else 1}
    leftovers.clear(tmp_path, lambda name: name == "s")
    assert os.listdir(tmp_path) == ["s"]


def test_names_of_parts_stay_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a name for a file"):
        run.save_run(tmp_path / "s", {"../x": {}}, {})
    assert os.listdir(tmp_path) == []


# --- pack ---

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.builds(torch.arange, st.integers(0, 3))
)
KEYS = (
    st.text(max_size=3)
    | st.integers(-3, 3)
    | st.sampled_from(["$tensor", "$dict", "$tuple", "a.b", "0"])
    | st.tuples(st.integers())
)
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.tuples(v, v) | st.dictionaries(KEYS, v, max_size=3), max_leaves=12
)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(VALUES)
def test_pack_and_back_through_json(value: Any) -> None:
    packed, tensors = run.pack(value)
    assert equal(run.unpack(json.loads(json.dumps(packed, allow_nan=False)), tensors), value)


def test_pack_names_tensors_by_their_place() -> None:
    packed, tensors = run.pack({"state": {0: {"exp_avg": torch.ones(2)}}, "groups": [{"betas": (0.9, 0.999)}]})
    assert tensors.keys() == {"state.0.exp_avg"}
    assert packed["groups"] == [{"betas": {"$tuple": [0.9, 0.999]}}]


def test_pack_refuses_what_would_need_pickle() -> None:
    with pytest.raises(TypeError, match=r"a\.0: a builtins\.set cannot be stored"):
        run.pack({"a": [{1, 2}]})


def test_an_optimizer_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    def made() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        return net, torch.optim.AdamW(
            [{"params": [net.weight], "lr": 0.1}, {"params": [net.bias], "betas": (0.8, 0.9)}]
        )

    def train(net: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.arange(3.0)).square().sum().backward()
            optimizer.step()

    net, optimizer = made()
    train(net, optimizer)
    facts, tensors = run.pack(optimizer.state_dict())
    run.save_run(tmp_path / "s", {"net": net.state_dict(), "optimizer": tensors}, {"optimizer": facts})
    parts, read = run.load_run(tmp_path / "s")
    other, resumed = made()
    other.load_state_dict(parts["net"])
    resumed.load_state_dict(run.unpack(read["optimizer"], parts["optimizer"]))
    assert equal(resumed.state_dict(), optimizer.state_dict())
    train(net, optimizer)
    train(other, resumed)
    assert torch.equal(net.weight, other.weight)


@pytest.mark.parametrize(
    "packed",
    [{"$tensor": "none"}, {"$tensor": []}, {"$dict": [1]}, {"$float": "x"}, {"$tuple": 3}, {"$dict": [[{}, 1]]}],
)
def test_values_that_pack_does_not_write_are_reported(packed: object) -> None:
    with pytest.raises(UserError, match="the state's values are damaged"):
        run.unpack(packed, {})


# --- which state is taken ---


def test_the_highest_step_is_taken_although_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([900.0, 100.0, 500.0])
    monkeypatch.setattr(run.time, "time", lambda: next(clock, 1000.0))
    run.save_run(tmp_path / "x-1-state", COMPONENTS, {"step": 100})
    run.save_run(tmp_path / "x-2-state", COMPONENTS, {"step": 200})
    run.save_run(tmp_path / "x-3-state", COMPONENTS, {"step": 200})
    assert run.newest(tmp_path, "x-.*") == tmp_path / "x-3-state"


ODD = [
    "[]",
    "3",
    "null",
    '"x"',
    "{}",
    '{"files": []}',
    '{"files": {"facts.json": 3}}',
    '{"files": {"facts.json": {"size": "3"}}}',
]
ODD += [
    '{"files": {"../../x": {"size": 1, "sha256": "0"}}}',
    '{"files": {}}',
    "[" * 100_000,
    '{"written": "x", "files": null}',
]


@pytest.mark.parametrize("odd", [*(text.encode() for text in ODD), b"\xff\xfe"], ids=lambda b: b[:24].decode("latin1"))
def test_manifests_and_facts_of_odd_shapes_are_passed_over(
    tmp_path: Path, odd: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    run.save_run(tmp_path / "x-1-state", COMPONENTS, {"step": 1})
    names = ("manifest.json", "facts.json") if odd != b"{}" else ("manifest.json",)  # no facts are facts
    for name in names:
        folder = tmp_path / f"x-2-{name[0]}-state"
        run.save_run(folder, COMPONENTS, {"step": 2})
        (folder / name).write_bytes(odd)
        if name == "facts.json" and not odd.startswith(b"{"):  # and a manifest that fits them
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest["files"][name] = {"size": len(odd), "sha256": run.file_digest(folder / name)}
            (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="cannot resume from this state"):
            run.load_run(folder)
    assert run.newest(tmp_path, "x-.*") == tmp_path / "x-1-state"
    assert caplog.text.count("is passed over") >= 1


def test_a_state_that_another_process_keeps_replacing_is_read_without_a_traceback(tmp_path: Path) -> None:
    """50 readings of a state that a second process writes anew all the time: each is one state, whole."""
    folder = tmp_path / "x-state"
    run.save_run(folder, {"a": {"x": torch.zeros(300, 300)}}, {"step": 0})
    code = f"""
import torch
from sfumato.formats import run
for step in range(1, 10_000):
    run.save_run({str(folder)!r}, {{"a": {{"x": torch.full((300, 300), float(step))}}}}, {{"step": step}})
"""
    writer = subprocess.Popen([sys.executable, "-c", code])
    try:
        for _ in range(50):
            assert run.newest(tmp_path, "x-.*") == folder
            with contextlib.suppress(UserError):  # raised when it was replaced each time it was read
                parts, facts = run.load_run(folder)
                assert parts["a"]["x"].unique().tolist() == [float(facts["step"])]
    finally:
        writer.kill()
        writer.wait()


def test_what_is_loaded_is_not_mapped_so_that_the_state_can_be_replaced(tmp_path: Path) -> None:
    """Windows replaces no file that is mapped; and a state that is cut short must not end a run."""
    run.save_run(tmp_path / "s", COMPONENTS, FACTS)
    parts, _ = run.load_run(tmp_path / "s")
    for path in (tmp_path / "s").glob("*.safetensors"):
        os.truncate(path, 0)
    assert torch.equal(parts["adapter"]["a"], COMPONENTS["adapter"]["a"])


def test_a_folder_of_the_users_is_not_replaced_by_a_state(tmp_path: Path) -> None:
    """Such as a state of sd-scripts, which has the same name."""
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "train_state.json").write_text("{}")
    with pytest.raises(UserError, match=r"not sfumato's; move it away"):
        run.save_run(tmp_path / "s", COMPONENTS, FACTS)
    assert (tmp_path / "s" / "train_state.json").exists()
