"""Cases measured one after another, each in a process of its own, beside the machine that the figures belong to; two
sets of figures compared."""

from __future__ import annotations

import json
import multiprocessing
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import UserError
from sfumato.formats import files

if TYPE_CHECKING:
    from sfumato.train.bench import Case

COLUMNS: dict[str, tuple[str, float, str]] = {
    "seconds_per_step": ("s/step", 1, ".3f"),
    "phases.data": ("data", 1, ".3f"),
    "phases.forward": ("forward", 1, ".3f"),
    "phases.backward": ("backward", 1, ".3f"),
    "phases.optimizer": ("optimizer", 1, ".3f"),
    "peak_device": ("device GiB", 2**-30, ".2f"),
    "peak_host": ("host GiB", 2**-30, ".2f"),
    "share_of_matmul": ("of matmul", 100, ".0f"),
    "share_of_copy": ("of copies", 100, ".0f"),
}
"""Figure -> its title in the table, what it is multiplied with, how it is written. The shares are percent."""


def machine() -> dict[str, Any]:
    """What figures belong to; JSON-able, memory in bytes."""
    import torch

    from sfumato.tools import doctor
    from sfumato.train import dist

    known = doctor.examine()
    found = {name: known[name] for name in ("sfumato", "python", "platform", "memory", "cuda_build", "hip_build")}
    found |= {
        "torch": torch.__version__,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "device": dist.device_of().type,
        "cards": [{name: card[name] for name in ("name", "memory", "capability")} for card in known["devices"]],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if known["devices"]:
        found["driver"] = _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return found


def _cpu() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _said(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except OSError:  # AMD's cards have no nvidia-smi
        return ""


def apart(case: Case, limit: float) -> dict[str, Any]:
    """The figures of a case, measured in a process of its own, or {"error": why there are none}: a case that fails
    leaves the next ones alone. `limit`: seconds that it may take."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(case, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            return {"error": f"took more than {limit:.0f} s"}
        found: dict[str, Any] = ours.recv()
        return found
    except EOFError:
        process.join()
        return {"error": f"the process ended with code {process.exitcode}; a negative one is a signal: out of memory?"}
    finally:
        process.kill()
        process.join()


def _measured(case: Case, out: Connection) -> None:
    from sfumato.train.bench import measure

    try:
        out.send(measure(case))
    except UserError as error:
        out.send({"error": "; ".join(error.messages)})
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        out.send({"error": f"{type(error).__name__}: {first[:300]}"})


def facts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is written: the machine, the command and the rows."""
    return {"machine": machine(), "command": shlex.join(["sfumato", *sys.argv[1:]]), "rows": list(rows)}


def read(path: Path) -> dict[str, Any]:
    """Figures that were written before. Errors: `UserError`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
            raise ValueError("it has no rows")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a file of `sfumato bench --json` ({error})") from None
    return found


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write the figures as JSON."""
    files.write_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def table(rows: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]] = ()) -> str:
    """The rows for people. `before`: the same cases as they were, to which ratios are shown (below 1: less)."""
    lines = [["", *(title for title, _, _ in COLUMNS.values())]]
    old = {_name(row): row for row in before}
    for row in rows:
        if error := row.get("error"):
            lines.append([_name(row), f"failed: {error}"])
            continue
        lines.append([_name(row), *(_shown(row, name) for name in COLUMNS)])
        if then := old.get(_name(row)):
            lines.append(["  / before", *(_ratio(row, then, name) for name in COLUMNS)])
    widths = [max(len(line[i]) for line in lines if len(line) > max(i, 2)) for i in range(len(lines[0]))]
    widths[0] = max(len(line[0]) for line in lines)
    return "\n".join(
        "  ".join(
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=False))
        )
        for line in lines
    )


def _name(row: Mapping[str, Any]) -> str:
    return " ".join(filter(None, (row["model"], row["method"], row["setting"])))


def _figure(row: Mapping[str, Any], name: str) -> float | None:
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def _shown(row: Mapping[str, Any], name: str) -> str:
    _, factor, form = COLUMNS[name]
    value = _figure(row, name)
    return "-" if value is None else format(value * factor, form)


def _ratio(row: Mapping[str, Any], before: Mapping[str, Any], name: str) -> str:
    now, then = _figure(row, name), _figure(before, name)
    return f"x {now / then:.2f}" if now and then else "-"
