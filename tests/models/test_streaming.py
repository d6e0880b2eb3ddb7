"""Text encoders that are read block by block say what they say when they are in memory, and are never there whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tinies.cases import Case, cases
from torch import Tensor

from sfumato import families
from sfumato.formats import lazy
from sfumato.models import streaming
from sfumato.models.base import Models
from sfumato.models.components import ComponentWeights
from sfumato.models.loading import materialize, outline, read_values, unload
from sfumato.models.relay import relay, wait_for
from sfumato.sampling.prompts import Prompt
from sfumato.sampling.sample import encode_prompts

CASES = {case.family: case for case in reversed(cases())}.values()
CPU = torch.device("cpu")
BATCHES = [["a cat", "a red house by the sea"], [""], ["a dog and another dog, sitting"]]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A tiny model without values."""
    case: Case = request.param
    files = case.write(tmp_path_factory.mktemp("model"))
    options = families.facts(case.family).options(**{**files.options, **case.options})
    made = outline(families.family(case.family), str(files.model), options, vae=files.vae)
    read_values(made, later=made.source.components)
    return made


@pytest.fixture
def streamed(models: Models) -> Iterator[Models]:
    models.streamed, threads = frozenset(models.encoders), threading.active_count()
    yield models
    models.streamed = frozenset()
    assert all(t.is_meta for net in models.encoders.values() for t in net.state_dict().values())
    assert threading.active_count() == threads


def whole(models: Models, dtype: torch.dtype | None) -> list[dict[str, Tensor]]:
    """What the encoders say when they are in memory."""
    models.dtypes, models.streamed = dict.fromkeys(models.nets(), dtype), frozenset()
    materialize(models)
    said = [dict(cond) for cond in streaming.encode_each(models, BATCHES, CPU)]
    unload(models)
    models.streamed = frozenset(models.encoders)
    return said


def same(found: Sequence[Any], wanted: Sequence[Any]) -> bool:
    return len(found) == len(wanted) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize(
    ("dtype", "autocast", "ahead"),
    [(torch.float32, False, False), (torch.float32, True, True), (torch.bfloat16, False, True)],
    ids=["fp32", "autocast, read ahead", "bf16, read ahead"],
)
def test_the_numbers_are_the_same(
    streamed: Models, dtype: torch.dtype, autocast: bool, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_reads_ahead", lambda device: ahead)
    counts = list[tuple[int, int]]()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted = whole(streamed, dtype)
        found = list(streaming.encode_each(streamed, BATCHES, CPU, lambda *count: counts.append(count)))
    assert same(found, wanted)
    blocks = sum(len(streamed.family.encoder_blocks(net)) for net in streamed.encoders.values())
    assert counts == sorted(counts) and counts[-1] == (len(BATCHES) * blocks, len(BATCHES) * blocks)
    assert not any(t.requires_grad for cond in found for t in cond.values())


def test_each_block_is_read_once_a_pass_and_no_two_are_there(streamed: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {
        (name, f"{path}."): module
        for name, net in streamed.encoders.items()
        for path, module in net.named_modules()
        if module in list(streamed.family.encoder_blocks(net))
    }
    # Some families take an earlier state than the last.
    inner = set[tuple[str, str]]()
    handles = [block.register_forward_hook(lambda *_, key=key: inner.add(key)) for key, block in blocks.items()]
    whole(streamed, None)
    for handle in handles:
        handle.remove()
    read, natives = [], ComponentWeights.natives

    def watched(weights: ComponentWeights, *args: Any, **named: Any) -> Iterator[tuple[str, Tensor]]:
        found = list(natives(weights, *args, **named))
        own = {key for key in blocks for name, _ in found if (weights.component.name, name[: len(key[1])]) == key}
        assert len(own) <= 1
        held = [(n, m) for n, m in blocks_with_values(streamed)]
        assert len(held) <= 1 - len(own), "the block before has gone when the next is read"
        read.extend(own)
        return iter(found)

    monkeypatch.setattr(ComponentWeights, "natives", watched)
    list(streaming.encode_each(streamed, BATCHES, CPU))
    assert read == list(dict.fromkeys(read)) and set(read) == inner
    monkeypatch.setattr(streaming, "HELD", 1)  # every batch alone passes it
    read.clear()
    list(streaming.encode_each(streamed, BATCHES, CPU))
    assert sorted(read) == sorted([*inner] * len(BATCHES))


def blocks_with_values(models: Models) -> list[tuple[str, int]]:
    return [
        (name, i)
        for name, net in models.encoders.items()
        for i, block in enumerate(models.family.encoder_blocks(net))
        if any(not t.is_meta for t in block.state_dict().values())
    ]


class FirstBlock:
    """Stands in for a family that uses the state after the first block."""

    def encode(self, encoders: Any, tokens: Any) -> dict[str, Tensor]:
        net = encoders["t5xxl"]
        out: Tensor = net.layers[0](net.shared(tokens["t5"]))[0]
        return {"t5": out}


ONE = pytest.mark.parametrize(
    "models", [c for c in CASES if c.family == "flux"], indirect=True, ids=lambda case: case.name
)


@ONE
def test_what_is_not_run_is_not_read_and_tables_stay_in_the_file(
    models: Models, streamed: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed.dtypes = dict.fromkeys(streamed.nets(), torch.float32)
    monkeypatch.setattr(streamed, "family", replace(streamed.family, encode=lambda models: FirstBlock()))
    copied, mapped, old, old_mapped = set[str](), set[str](), lazy._File._read, lazy._File.mapped

    def reads(file: Any, name: str, *args: Any) -> Any:
        copied.add(name)
        return old(file, name, *args)

    def maps(file: Any, name: str) -> Any:
        mapped.add(name)
        return old_mapped(file, name)

    monkeypatch.setattr(lazy._File, "_read", reads)
    monkeypatch.setattr(lazy._File, "mapped", maps)
    assert len(list(streaming.encode_each(streamed, BATCHES, CPU))) == len(BATCHES)
    assert any("encoder.block.0." in name for name in copied) and "shared.weight" in mapped
    assert not any("encoder.block.1." in name or "shared" in name for name in copied)
    assert not any(".block." in name for name in mapped)


@ONE
def test_an_error_ends_all_and_leaves_the_encoders_without_values(
    models: Models, streamed: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(captions: Sequence[str], **more: Any) -> Any:
        raise KeyError("a tokenizer that fails")

    tokenize = Models.tokenize
    monkeypatch.setattr(
        Models,
        "tokenize",
        lambda models, captions, **more: (broken if captions == BATCHES[2] else partial(tokenize, models))(
            captions, **more
        ),
    )
    with pytest.raises(KeyError, match="a tokenizer that fails"):
        list(streaming.encode_each(streamed, BATCHES, CPU))
    left = streaming.encode_each(streamed, BATCHES[:2], CPU)
    next(left)
    left.close()  # type: ignore[attr-defined]


@ONE
def test_sample_prompts_are_encoded_in_one_pass(models: Models, streamed: Models) -> None:
    prompts = [Prompt(prompt=text, negative_prompt="dull", scale=scale) for text, scale in (("a", 5.0), ("b", 1.0))]
    streamed.dtypes, streamed.streamed = dict.fromkeys(streamed.nets(), torch.float32), frozenset()
    materialize(streamed)
    wanted = encode_prompts(streamed, prompts, CPU)
    unload(streamed)
    streamed.streamed = frozenset(streamed.encoders)
    materialize(streamed)  # leaves them to be streamed
    found = encode_prompts(streamed, prompts, CPU)
    assert list(found) == [("dull", True), ("a", False), ("b", False)]
    assert same([*found.values()], [*wanted.values()])


def test_calls_pass_every_stage_together_as_many_as_memory_takes() -> None:
    entered = list[int]()

    def call(number: int, stages: Sequence[int]) -> Callable[[], int]:
        def run() -> int:
            for stage in stages:
                wait_for(stage, 10)
            return number

        return run

    calls = [call(0, [0, 1, 2]), call(1, [0, 2]), call(2, []), call(3, [0, 1])]
    assert list(relay(calls, entered.append, most=9, memory=1000)) == [0, 1, 2, 3]
    assert [stage for i, stage in enumerate(entered) if entered[i - 1 : i] != [stage]] == [0, 1, 2]
    for limits in ({"most": 2, "memory": 1000}, {"most": 9, "memory": 20}):
        entered.clear()
        assert list(relay(calls, entered.append, **limits)) == [0, 1, 2, 3]
        assert [stage for i, stage in enumerate(entered) if entered[i - 1 : i] != [stage]] == [0, 1, 2, 0, 1]
