"""What is logged while training: JSON lines always, tensorboard and wandb when asked, the loss as an image."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from sfumato.config import Config, LogConfig
from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.formats.text import parse_toml, read_text
from sfumato.train.mishaps import Mishaps

TRACKERS = ("tensorboard", "wandb")
PREFIX = "loss/validation/"
"""Names of what is measured of held-out images begin with it."""


class Sink(Protocol):
    """A place for numbers."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class Lines:
    """`NAME.jsonl`: one JSON object per line; a resumed run goes on where its state ends."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        earlier = [line for line in _lines(path) if _step_of(line) <= start] if start and path.exists() else []
        files.write_text(path, "".join(line + "\n" for line in earlier))
        self.file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        self.file.close()


def _lines(path: Path) -> list[str]:
    """A log's lines; a byte that is not text, as a crash may leave it, costs its own line alone."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n")


def _entry(line: str) -> dict[str, Any]:
    """The numbers of a line; empty if it holds none of a step."""
    with suppress(ValueError, RecursionError):
        values = json.loads(line)
        if isinstance(values, dict) and isinstance(values.get("step"), (int, float)):
            return {name: value for name, value in values.items() if isinstance(value, (int, float))}
    return {}


def _step_of(line: str) -> float:
    step: float = _entry(line).get("step", float("inf"))
    return step


class Tensorboard:
    def __init__(self, folder: Path, more: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "--log_with tensorboard: the library is not installed; run `pip install tensorboard`"
            ) from error
        try:
            self.writer: Any = SummaryWriter(str(folder), **more)  # type: ignore[no-untyped-call]
        except TypeError as error:
            raise UserError(f"log_tracker_config, [tensorboard]: {error}") from error
        except OSError as error:
            raise UserError(f"--log_with tensorboard: {folder} cannot be written ({error.strerror})") from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    def __init__(self, settings: Mapping[str, Any], **started: Any) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("--log_with wandb: the library is not installed; run `pip install wandb`") from error
        try:
            self.run: Any = wandb.init(config=dict(settings), **started)
        except Exception as error:  # it has many kinds: no key, no network, no such project
            raise UserError(
                f"--log_with wandb: it cannot be started ({error}); run `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def tracker_config(config: LogConfig) -> dict[str, dict[str, Any]]:
    """Tracker -> what else it is started with. Errors: `UserError` for what no tracker that is asked for takes."""
    path, asked = config.log_tracker_config, config.log_with
    if path is None:
        return {}
    tables = parse_toml(path, read_text(path))
    if odd := [n for n, t in tables.items() if asked not in (n, "all") or n not in TRACKERS or not isinstance(t, dict)]:
        raise UserError(
            f"{path}: {odd[0]}: expected a table for a tracker of log_with {asked}: "
            f"{' or '.join(f'[{name}]' for name in TRACKERS if asked in (name, 'all'))}"
        )
    return tables


def check(config: LogConfig) -> None:
    """Errors: `UserError` for a tracker that is not installed, and as `tracker_config`."""
    tracker_config(config)
    missing = [name for name in TRACKERS if config.log_with in (name, "all") and not find_spec(name)]
    if missing:
        raise UserError(
            *(f"--log_with {config.log_with}: {name} is not installed; run `pip install {name}`" for name in missing)
        )


class Log:
    """All sinks of a run. One that fails is reported once and tried again with the next line: no training ends for its
    log."""

    def __init__(self, config: Config, start: int, settings: Mapping[str, Any]) -> None:
        folder, name, asked = Path(config.output.output_dir), config.output.output_name, config.log.log_with
        self.path, self.mishaps = folder / f"{name}.jsonl", Mishaps()
        self.sinks: list[Sink] = [Lines(self.path, start)]
        more = tracker_config(config.log)
        if asked in ("tensorboard", "all"):
            base = Path(config.log.logging_dir) if config.log.logging_dir else folder / "logs"
            self.sinks.append(Tensorboard(base / f"{config.log.log_prefix or ''}{name}", more.get("tensorboard", {})))
        if asked in ("wandb", "all"):
            named = {"project": config.log.log_tracker_name or "sfumato", "name": config.log.wandb_run_name or name}
            self.sinks.append(Wandb(settings, **{**named, **more.get("wandb", {})}))

    def write(self, step: int, details: Mapping[str, Any] | None = None, /, **values: float) -> None:
        """`details`: what only the lines hold besides, as JSON."""
        for sink in self.sinks:
            with self.mishaps.survived(f"{type(sink).__name__.lower()} of the log not written"):
                sink.write(step, {**values, **(details or {})} if isinstance(sink, Lines) else values)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self.sinks:
            with self.mishaps.survived(f"{type(sink).__name__.lower()} of the log not closed"):
                sink.close()


def read(path: Path) -> dict[str, list[tuple[int, float]]]:
    """A log's numbers by name: {"loss": [(step, value), ...]}."""
    out: dict[str, list[tuple[int, float]]] = {}
    for entry in map(_entry, _lines(path)):
        for name, value in entry.items():
            if name != "step":
                out.setdefault(name, []).append((entry["step"], value))
    return out


def smooth(values: list[float], weight: float) -> list[float]:
    """Exponential moving average without the bias of its start (as Adam's moments)."""
    out, average, norm = [], 0.0, 0.0
    for value in values:
        average, norm = weight * average + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(average / norm)
    return out


def curve(log: Path, image: Path) -> None:
    """Plot the loss and the learning rates of a log as a PNG; where held-out images were measured, their loss too."""
    from matplotlib.figure import Figure

    numbers = read(log)
    if not numbers.get("loss"):
        return
    measured = f"{PREFIX}mean" in numbers
    figure = Figure(figsize=(11 if measured else 8, 4.5), dpi=120, layout="constrained")
    axes, *levels = figure.subplots(1, 1 + measured, squeeze=False, width_ratios=(3, 1.5)[: 1 + measured])[0]
    _losses(axes, numbers)
    if measured:
        _held_out(axes, numbers)
        _levels(levels[0], numbers)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    rates = axes.twinx()
    for name in sorted(n for n in numbers if n.startswith("lr/")):
        rates.plot(*zip(*numbers[name], strict=True), linewidth=0.8, linestyle=":", label=name)
    rates.set_ylabel("learning rate")
    handles = [h for a in (axes, rates) for h in a.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="upper right", frameon=False)
    with files.aside(image) as path:
        figure.savefig(path, format="png")


Numbers = Mapping[str, list[tuple[int, float]]]


def _losses(axes: Any, numbers: Numbers) -> None:
    steps, loss = (list(column) for column in zip(*numbers["loss"], strict=True))
    axes.plot(steps, loss, color="#c8c8d8", linewidth=0.7, label="loss of a step")
    axes.plot(
        steps,
        smooth([float(v) for v in loss], 0.98 if len(loss) > 200 else 0.9),
        color="#2040c0",
        linewidth=1.8,
        label="smoothed",
    )


def _held_out(axes: Any, numbers: Numbers) -> None:
    """The loss on held-out images, and at the same noise levels on some that are trained on."""
    for name, colour, label in (("mean", "#d04020", "held-out images"), ("trained", "#208050", "trained, same noise")):
        points = numbers.get(f"{PREFIX}{name}", [])
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, marker="o", markersize=3, label=label)
    step, loss = min(numbers[f"{PREFIX}mean"], key=lambda point: point[1])
    axes.plot([step], [loss], marker="o", markersize=9, fillstyle="none", color="#d04020")
    axes.annotate(f"best: {step}", (step, loss), textcoords="offset points", xytext=(0, 9), ha="center")


def _levels(axes: Any, numbers: Numbers) -> None:
    """How the loss on held-out images stands to that at the start, by noise level."""
    mean, levels = numbers[f"{PREFIX}mean"], [numbers[n] for n in numbers if n.startswith(f"{PREFIX}level_")]
    best = min(range(len(mean)), key=lambda i: mean[i][1])
    for place in sorted({best, len(mean) - 1} - {0}):
        ratios = [level[place][1] / level[0][1] for level in levels]
        axes.plot(range(1, len(levels) + 1), ratios, marker="o", markersize=3, label=f"step {mean[place][0]}")
    axes.axhline(1.0, color="#808080", linewidth=0.8)
    axes.set_xlabel("noise level, least to most")
    axes.set_title("held-out loss / that at the start", fontsize=9)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
