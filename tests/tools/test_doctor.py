from __future__ import annotations

import json
from typing import Any

import pytest

from sfumato.cli.main import main
from sfumato.tools import doctor


def facts(**changes: Any) -> dict[str, Any]:
    """A healthy machine with one card."""
    card = {
        "name": "A card",
        "memory": 24 << 30,
        "memory_free": 23 << 30,
        "capability": "8.9",
        "bf16": True,
        "error": None,
    }
    healthy: dict[str, Any] = {
        "bits": 64, "cpus": 8, "memory": 32 << 30, "disk_free": {"/home": 100 << 30}, "libraries": {"torch": "2.13.0+cu130"}, "optional": {},
        "devices": [card], "cuda_build": "13.0", "hip_build": None, "mps": False,
    }  # fmt: skip
    return healthy | changes


def worst(**changes: Any) -> dict[str, str]:
    return doctor.verdicts(facts(**changes))[0]


def test_this_machine_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert {"python", "libraries", "devices", "disk_free", "verdicts"} <= set(report)
    assert code == int(any(v["level"] == "problem" for v in report["verdicts"]))
    assert report["verdicts"][-1]["text"] in doctor.text(report)


def test_a_healthy_machine_has_no_complaint() -> None:
    assert worst()["level"] == "ok" and not doctor.broken({"verdicts": doctor.verdicts(facts())})


@pytest.mark.parametrize(
    ("changes", "level", "text"),
    [
        ({"bits": 32}, "problem", "64-bit"),
        ({"libraries": {"torch": "2.1.0"}}, "problem", "too old"),
        ({"libraries": {"torch": "2.13.0", "diffusers": None}}, "problem", "not installed: diffusers"),
        ({"torch_error": "no libcuda", "devices": []}, "problem", "no libcuda"),
        (
            {"devices": [{**facts()["devices"][0], "error": "no kernel image", "capability": "12.0"}]},
            "problem",
            "built for 12.0",
        ),
        ({"devices": [{**facts()["devices"][0], "memory_free": 2 << 30}]}, "warning", "other programs"),
        ({"devices": [], "cuda_build": None}, "warning", "CPU build"),
        ({"devices": []}, "warning", "no card is visible"),
        ({"disk_free": {"/home": 1 << 30}}, "warning", "1.0 GiB free"),
        ({"memory": 4 << 30}, "warning", "4.0 GiB of main memory"),
    ],
)
def test_what_stands_in_the_way_comes_first(changes: dict[str, Any], level: str, text: str) -> None:
    found = worst(**changes)
    assert found["level"] == level and text in found["text"]


def test_a_card_without_bf16_is_sent_to_fp16() -> None:
    card = {**facts()["devices"][0], "bf16": False}
    assert "mixed_precision fp16" in worst(devices=[card])["text"]
