"""Settings that make a training fit a card: what `vram` chooses, and how it is told."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

from sfumato.adapters import AdapterPlan
from sfumato.config import Config, MemoryConfig, Method
from sfumato.config.sizes import size
from sfumato.data.plan import Plan
from sfumato.errors import UserError
from sfumato.memory import swap_plan
from sfumato.memory.solve import CONTEXT, LOST, Candidate, Format, Levers, choose, halves, seconds, usable
from sfumato.memory.trace import Peak
from sfumato.train import resume
from sfumato.train.predict import Predicted, predict
from sfumato.train.progress import answers, print_table
from sfumato.train.stand_in import Largest
from sfumato.train.trainables import caches_latents, caches_text

GIB = 2**30
FORMATS: tuple[Format | None, ...] = (None, "int8", "nf4")
"""What weights may be kept in, the most exact first. int8 is smaller than fp8 and nearer to the weights."""
EVERY = (None, 3, 2, 1)
"""Which blocks are recomputed: none, every third ..."""
CANDIDATES = ("settings", "card, GiB", "host, GiB", "time", "choice")
SHOWN = 14
"""Rows of the table."""
PHASES = ("phase", "weights", "optimizer", "activations", "gradients", "temporary", "card, GiB")
_FREE = {
    "quantize": {"quantize", "fp8_base", "fp8_base_unet", "fp8_scaled"},
    "every": {"gradient_checkpointing", "gradient_checkpointing_every", "gradient_checkpointing_keep"},
    "offloaded": {"cpu_offload_checkpointing"},
    "swapped": {"blocks_to_swap", "double_blocks_to_swap", "single_blocks_to_swap"},
    "micro": {"micro_batch"},
}
"""Lever -> the settings that it turns: where one of them was set, it stands."""
_KNOWN = frozenset(f.name for f in fields(MemoryConfig))


@dataclass(frozen=True, slots=True)
class Fit:
    """What was chosen, of what."""

    config: Config
    """With the chosen settings."""
    chosen: Candidate
    tried: tuple[Candidate, ...]
    budget: int
    """Bytes that tensors may take of the card."""
    largest: Largest
    notes: tuple[str, ...] = ()


class Forecast:
    """What a training takes, with each of its levers turned."""

    def __init__(
        self,
        config: Config,
        method: Method,
        plan: AdapterPlan | None,
        images: Plan,
        given: Collection[str],
        *,
        card: bool,
    ) -> None:
        """`given`: settings that the user set, which stand. `card`: see `predict`."""
        self.config, self.method, self.plan, self.card = config, method, plan, card
        self.largest = Largest.of(images)
        changed = {name for name in _KNOWN if getattr(config.memory, name) != getattr(MemoryConfig(), name)}
        self.fixed = {lever for lever, names in _FREE.items() if names & (changed | set(given))}
        self._predicted: dict[tuple[Format | None, int], Predicted] = {}
        self._peaks: dict[Levers, dict[str, Peak]] = {}

    def now(self) -> Levers:
        """As the config has them."""
        m = self.config.memory
        by_list = (m.double_blocks_to_swap or 0) + (m.single_blocks_to_swap or 0)
        return Levers(
            m.denoiser_format, m.gradient_checkpointing_every if m.gradient_checkpointing else None,
            m.cpu_offload_checkpointing, m.blocks_to_swap or by_list,
            min(m.micro_batch or self.largest.count, self.largest.count),
        )  # fmt: skip

    def candidates(self, budget: int) -> Iterator[Candidate]:
        """One for each setting of the levers that are free; blocks are swapped until it fits. Formats that are less
        exact come last, and not at all where all fits without them and without swapping."""
        now, count = self.now(), self.largest.count
        frozen = self.method != "full"
        formats = [now.quantize] if "quantize" in self.fixed or not frozen else FORMATS
        everies = [now.every] if "every" in self.fixed else [e for e in EVERY if e is None or e <= self.blocks]
        asides = [now.offloaded] if "offloaded" in self.fixed else [False, True]
        micros = [now.micro] if "micro" in self.fixed else halves(count)
        for format in formats:
            easy = False
            for every, aside, micro in product(everies, asides, micros):
                if aside and every != 1 and "every" not in self.fixed:
                    continue
                levers = Levers(format, every, aside and every is not None, now.swapped, micro)
                found = self._swapped(levers, budget) if frozen and "swapped" not in self.fixed else self.of(levers)
                easy = easy or (found.device <= budget and not found.levers.swapped)
                yield found
            if easy:
                return

    def _swapped(self, levers: Levers, budget: int) -> Candidate:
        """With as few blocks swapped as make it fit, or as many as can be."""
        found = self.of(levers)
        for count in range(1, self.blocks):
            if found.device <= budget:
                break
            found = self.of(replace(levers, swapped=count))
        return found

    def of(self, levers: Levers) -> Candidate:
        """What a training takes with these levers."""
        count, same = self.largest.count, replace(levers, swapped=0)
        whole = self.predicted(levers.quantize, count)
        if same not in self._peaks:
            self._peaks[same] = self._at_once(same)
        found = self._peaks[same]
        resident, host = self._weights(whole, levers)
        fixed = {
            "weights": resident,
            "optimizer": 0 if self.config.optimizer.optimizer_state_on_cpu else whole.weights.state,
        }
        phases = {name: {**fixed, **asdict(peak)} for name, peak in found.items()}
        kept = whole.step.kept_inputs(self._again(whole, levers)) if levers.offloaded else 0
        host += kept * levers.micro // count + whole.weights.state - fixed["optimizer"]
        again = sum(whole.step.records[i].flops[0] for i in self._again(whole, levers))
        copied = 2 * self._weights(whole, levers)[1] + 2 * kept * levers.micro // count
        time = seconds(levers, flops=whole.step.flops, again=again, copied=copied, batch=count)
        return Candidate(levers, max(sum(p.values()) for p in phases.values()), host, time, phases)

    def predicted(self, quantize: Format | None, count: int) -> Predicted:
        """A step on `count` images, 1 or all of the batch, traced."""
        if (quantize, count) not in self._predicted:
            memory = replace(self.config.memory, quantize=quantize) if quantize else self.config.memory
            config, counts = replace(self.config, memory=memory), self._counts()
            batches = [partial(self.largest.batch, config, count=n) for n in counts]
            found = predict(config, self.method, self.plan, batches, card=self.card)
            self._predicted |= {(quantize, n): each for n, each in zip(counts, found, strict=True)}
        return self._predicted[quantize, count]

    def _counts(self) -> list[int]:
        """Images that steps are traced on: what lies between follows from these."""
        parts = "micro" not in self.fixed or self.now().micro < self.largest.count
        return sorted({self.largest.count, *([1] if parts else [])})

    @cached_property
    def blocks(self) -> int:
        """The denoiser's."""
        return len(self.predicted(self.now().quantize, self.largest.count).weights.blocks)

    def _at_once(self, levers: Levers) -> dict[str, Peak]:
        """The peaks of phases, for as many images as pass at once."""
        count = self.largest.count
        whole = self._phases(self.predicted(levers.quantize, count), levers)
        if levers.micro == count:
            return whole
        one = self._phases(self.predicted(levers.quantize, 1), levers)
        share = (levers.micro - 1) / (count - 1)
        return {name: _between(one[name], whole[name], share) for name in whole}

    def _phases(self, traced: Predicted, levers: Levers) -> dict[str, Peak]:
        fused = self.config.optimizer.fused
        found = traced.step.peaks(self._again(traced, levers), offloaded=levers.offloaded, fused=fused)
        if fused:  # weights step while the backward pass goes on
            backward = found["backward"]
            return {**found, "backward": replace(backward, temporary=backward.temporary + traced.update)}
        return {**found, "update": Peak(gradients=traced.gradients, temporary=traced.update)}

    def _again(self, traced: Predicted, levers: Levers) -> list[int]:
        """Calls of blocks that are recomputed."""
        if levers.every is None:
            return []
        own = range(traced.before, len(traced.step.records))
        return [*range(traced.before), *own[levers.every - 1 :: levers.every]]

    def _weights(self, traced: Predicted, levers: Levers) -> tuple[int, int]:
        """Bytes on the card and on the host."""
        w = traced.weights
        whole = w.denoiser + w.others + w.trained
        if not levers.swapped:
            return whole, 0
        choice = swap_plan.choose(len(w.blocks), levers.swapped)
        return whole - sum(w.blocks) + choice.device(w.blocks), choice.host(w.blocks)


def _between(one: Peak, whole: Peak, share: float) -> Peak:
    """What grows with the images of a batch, for a part of them."""
    return Peak(
        *(round(a + (b - a) * share) for a, b in zip(asdict(one).values(), asdict(whole).values(), strict=True))
    )


def fitted(
    config: Config, method: Method, plan: AdapterPlan | None, images: Plan, given: Collection[str] = (), *, card: bool
) -> Fit | None:
    """Choose what `vram` leaves open; None: it is not set. Errors: `UserError` when nothing fits, naming what would."""
    vram = size(config.memory.vram or "")
    if vram is None:
        return None
    budget = usable(vram) if card else vram
    before = _as_before(config, given)
    notes = () if before is None else (f"vram {config.memory.vram}: the settings are those that the run began with",)
    config, given = (config, given) if before is None else (before, _KNOWN)
    forecast = Forecast(config, method, plan, images, given, card=card)
    tried = list(forecast.candidates(budget))
    chosen = choose(tried, budget, host_room())
    if chosen is None:
        raise UserError(_refusal(config, method, tried, budget, card=card))
    config = with_levers(config, forecast, chosen.levers)
    found = Fit(config, chosen, tuple(tried), budget, forecast.largest, notes)
    return replace(found, notes=(*notes, line(found)))


def _refusal(config: Config, method: Method, tried: list[Candidate], budget: int, *, card: bool) -> str:
    """Why nothing fits, and what would."""
    begin = f"vram {config.memory.vram}: nothing fits"
    if on_card := [c for c in tried if c.device <= budget]:
        least = min(on_card, key=lambda c: c.host)
        return (
            f"{begin} this computer, of whose memory {_gib(host_room())} GB may be used: the least that would do for "
            f"the card is {_gib(least.host)} GB, with {least.levers}"
        )
    least = min(tried, key=lambda c: c.device)
    return (
        f"{begin}. The least that would do is {_gib(_card(least.device, card=card))} GB, with {least.levers}"
        + (f" and {_gib(least.host)} GB of the computer's memory" if least.host else "")
        + f"; less is needed with {', '.join(_spared(config, method))}"
    )


def _spared(config: Config, method: Method) -> Iterator[str]:
    """What else would need less memory: not chosen, as it changes what is trained, or how."""
    if method == "full":
        o = config.optimizer
        named: dict[str, object] = {"full_bf16": config.train.full_bf16, "fused_backward_pass": o.fused}
        named |= {"optimizer_state_on_cpu": o.optimizer_state_on_cpu}
        named |= {"blocks_to_swap (beside the last two)": bool(config.memory.blocks_to_swap)}
        yield from (name for name, there in named.items() if not there)
    elif method in ("network", "lllite"):
        yield "a smaller network_dim"
    yield from () if caches_latents(config) else ("cache_latents",)
    yield from () if caches_text(config) else ("cache_text_encoder_outputs",)
    yield "smaller images (resolution)"


def with_levers(config: Config, forecast: Forecast, levers: Levers) -> Config:
    """The config with these settings, where the user left them open."""
    settings = levers.settings(forecast.largest.count)
    free = {name for lever, names in _FREE.items() if lever not in forecast.fixed for name in names}
    return replace(config, memory=replace(config.memory, **{n: v for n, v in settings.items() if n in free & _KNOWN}))


def _as_before(config: Config, given: Collection[str]) -> Config | None:
    """A run that is resumed keeps what was chosen for it; None: nothing was."""
    if config.output.resume is None:
        return None
    identity = resume.read_facts(Path(config.output.resume)).get("identity")
    saved = identity["config"]["memory"] if isinstance(identity, dict) else {}
    if saved.get("vram") != config.memory.vram:
        return None
    free = {name for names in _FREE.values() if not names & set(given) for name in names}
    kept = {name: saved[name] for name in free & _KNOWN if name in saved}
    return replace(config, memory=replace(config.memory, **kept))


def facts(found: Fit) -> dict[str, Any]:
    """What was chosen, of what, for scripts; in bytes and seconds."""
    return {
        "usable": found.budget,
        "batch": {"width": found.largest.size[0], "height": found.largest.size[1], "images": found.largest.count},
        "chosen": asdict(found.chosen),
        "tried": [asdict(each) for each in found.tried],
    }


def show(found: Fit) -> None:
    """Print what was tried and what was chosen."""
    fastest = min(c.seconds for c in found.tried)
    order = sorted(_unbeaten(found), key=lambda c: (c is not found.chosen, c.device > found.budget, c.seconds))
    rows = [
        (str(c.levers), _gib(c.device), _gib(c.host), f"{c.seconds / fastest:.2f}", _verdict(found, c))
        for c in order[:SHOWN]
    ]
    print_table(CANDIDATES, rows)
    print_table(PHASES, phase_rows(found.chosen))
    answers.print(line(found))


def phase_rows(chosen: Candidate) -> list[tuple[str, ...]]:
    """One row per phase, in the columns of `PHASES`."""
    return [
        (name, *(_gib(part.get(what, 0)) for what in PHASES[1:-1]), _gib(sum(part.values())))
        for name, part in chosen.phases.items()
    ]


def line(found: Fit) -> str:
    """The choice in words."""
    return (
        f"vram {found.config.memory.vram}: {found.chosen.levers}; {_gib(found.chosen.device)} of {_gib(found.budget)} "
        f"GiB that tensors may take, predicted for batches of {found.largest.count} at {found.largest.size[0]}x"
        f"{found.largest.size[1]}"
    )


def _unbeaten(found: Fit) -> list[Candidate]:
    """Without what takes longer than something else that needs no more of card and host, nor fewer bits."""

    def beats(one: Candidate, other: Candidate) -> bool:
        a, b = ((c.seconds, c.device, c.host, FORMATS.index(c.levers.quantize)) for c in (one, other))
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    return [c for c in found.tried if c is found.chosen or not any(beats(other, c) for other in found.tried)]


def _verdict(found: Fit, candidate: Candidate) -> str:
    if candidate is found.chosen:
        return "chosen"
    if candidate.device > found.budget:
        return "does not fit"
    return "" if candidate.host <= host_room() else "host too small"


def host_room() -> int:
    """Bytes of this computer's memory that may wait for the card: the rest is for reading files, and for others."""
    import psutil

    return int(psutil.virtual_memory().total * 0.8)


def _card(device: int, *, card: bool) -> int:
    """The memory of a card that has so much for tensors."""
    return math.ceil(device / (1 - LOST)) + CONTEXT if card else device


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}"
