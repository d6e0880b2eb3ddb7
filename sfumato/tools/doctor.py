"""What this machine has, and whether it can train: versions, devices, memory, disk, libraries, verdicts."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sfumato import __version__

NEEDED = (
    "torch",
    "safetensors",
    "transformers",
    "diffusers",
    "pytorch_optimizer",
    "huggingface_hub",
    "pydantic",
    "rich",
    "Pillow",
    "numpy",
    "matplotlib",
)
OPTIONAL = {
    "bitsandbytes": "AdamW8bit and the other 8-bit optimizers",
    "xformers": "attn_mode xformers; PyTorch's own attention is as good",
    "flash_attn": "attn_mode flash; PyTorch's own attention uses such a kernel as well",
    "sageattention": "attn_mode sageattn, for samples",
    "tensorboard": "log_with tensorboard",
    "wandb": "log_with wandb",
    "accelerate": "`accelerate launch`; torchrun does the same",
}
LEAST_TORCH = (2, 6)
LEAST_DISK = 10 * 2**30
LEAST_MEMORY = 8 * 2**30
_MARKS = {"ok": "ok  ", "warning": "note", "problem": "FAIL"}


def examine() -> dict[str, Any]:
    """JSON-able facts of this machine; `verdicts`: list of {"level": "ok" | "warning" | "problem", "text"}. Sizes in
    bytes."""
    facts: dict[str, Any] = {
        "sfumato": __version__,
        "python": platform.python_version(),
        "bits": 64 if sys.maxsize > 2**32 else 32,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "memory": _memory(),
        "disk_free": {str(folder): shutil.disk_usage(folder).free for folder in {Path.cwd(), Path.home()}},
        "libraries": {name: installed(name) for name in NEEDED},
        "optional": {name: installed(name) for name in OPTIONAL},
        "launcher": {
            k: os.environ[k]
            for k in ("RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "CUDA_VISIBLE_DEVICES")
            if k in os.environ
        },
    }
    facts |= _torch()
    facts["verdicts"] = verdicts(facts)
    return facts


def installed(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _memory() -> int | None:
    """Bytes of main memory, where the system reports it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None


def _torch() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as e:
        return {"torch_error": str(e), "devices": []}
    return {
        "cuda_build": torch.version.cuda,
        "hip_build": torch.version.hip,
        "mps": torch.backends.mps.is_available(),
        "devices": [_device(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
    }


def _device(i: int) -> dict[str, Any]:
    """One card, with a small product computed on it: a card that torch was not built for fails here."""
    import torch

    card = torch.cuda.get_device_properties(i)
    facts: dict[str, Any] = {
        "name": card.name,
        "memory": card.total_memory,
        "capability": f"{card.major}.{card.minor}",
        "error": None,
    }
    try:
        facts["memory_free"] = torch.cuda.mem_get_info(i)[0]
        facts["bf16"] = torch.cuda.is_bf16_supported()
        x = torch.ones(64, 64, device=f"cuda:{i}")
        (x @ x).sum().item()
    except RuntimeError as e:
        facts["error"] = str(e).splitlines()[0]
    return facts


def verdicts(facts: dict[str, Any]) -> list[dict[str, str]]:
    """What the facts mean for training, the worst first."""
    found = [*_software(facts), *_cards(facts), *_room(facts)]
    return sorted(found, key=lambda v: ("problem", "warning", "ok").index(v["level"]))


def _verdict(level: str, text: str) -> dict[str, str]:
    return {"level": level, "text": text}


def _software(facts: dict[str, Any]) -> Iterator[dict[str, str]]:
    if facts["bits"] == 32:
        yield _verdict("problem", "this Python is a 32-bit build, which torch does not support: install a 64-bit one")
    if missing := [name for name, found in facts["libraries"].items() if found is None]:
        yield _verdict("problem", f"not installed: {', '.join(missing)}; run `pip install -e .` in sfumato's folder")
    if "torch_error" in facts:
        yield _verdict("problem", f"torch does not start: {facts['torch_error']}")
    elif tuple(int(n) for n in facts["libraries"]["torch"].split(".")[:2]) < LEAST_TORCH:
        yield _verdict(
            "problem",
            f"torch {facts['libraries']['torch']} is too old: {'.'.join(map(str, LEAST_TORCH))} or newer is needed",
        )
    for name, found in facts["optional"].items():
        if found is None:
            yield _verdict("ok", f"{name} is not installed (optional: {OPTIONAL[name]})")


def _cards(facts: dict[str, Any]) -> Iterator[dict[str, str]]:
    for i, card in enumerate(facts["devices"]):
        name = f"card {i}, {card['name']}"
        if card["error"]:
            yield _verdict(
                "problem",
                f"{name}: torch cannot compute on it ({card['error']}); install a torch built for {card['capability']}",
            )
        else:
            free, precision = (
                card["memory_free"],
                "mixed_precision bf16" if card["bf16"] else "mixed_precision fp16 (it has no bf16)",
            )
            yield _verdict("ok", f"{name}: {size(free)} of {size(card['memory'])} free; use {precision}")
            if free < card["memory"] / 2:
                yield _verdict("warning", f"{name}: more than half of its memory is taken by other programs")
    if not facts["devices"]:
        built = facts.get("cuda_build") or facts.get("hip_build")
        why = "no card is visible to it (driver? CUDA_VISIBLE_DEVICES?)" if built else "this torch is a CPU build"
        where = "on Apple's GPU" if facts.get("mps") else f"on the CPU: {why}"
        yield _verdict("ok" if facts.get("mps") else "warning", f"training runs {where}")


def _room(facts: dict[str, Any]) -> Iterator[dict[str, str]]:
    for folder, free in facts["disk_free"].items():
        yield _verdict("warning" if free < LEAST_DISK else "ok", f"{size(free)} free on the disk of {folder}")
    if facts["memory"]:
        yield _verdict(
            "warning" if facts["memory"] < LEAST_MEMORY else "ok",
            f"{size(facts['memory'])} of main memory, {facts['cpus']} CPUs",
        )


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.1f} GiB"


def broken(facts: dict[str, Any]) -> bool:
    """Whether training cannot work here."""
    return any(v["level"] == "problem" for v in facts["verdicts"])


def text(facts: dict[str, Any]) -> str:
    """The facts for a reader: versions, then verdicts."""
    libraries = ", ".join(
        f"{name} {found or 'missing'}" for name, found in (facts["libraries"] | facts["optional"]).items()
    )
    head = [f"sfumato {facts['sfumato']}, Python {facts['python']}, {facts['platform']}", libraries]
    if facts["launcher"]:
        head.append("launched with " + ", ".join(f"{k}={v}" for k, v in facts["launcher"].items()))
    return "\n".join([*head, "", *(f"{_MARKS[v['level']]}  {v['text']}" for v in facts["verdicts"])])


def as_json(facts: dict[str, Any]) -> str:
    """The facts as JSON text."""
    return json.dumps(facts, indent=2, ensure_ascii=False)
