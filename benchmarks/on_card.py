"""What no test on the CPU shows: tiny models of every family trained through the front end on the accelerator at hand.

Each model is one task; what fails is recorded, and the next check goes on.

    python benchmarks/on_card.py --out results.json          # one kind of model per family, then all others
    python benchmarks/on_card.py --cases sdxl-base           # on a machine without an accelerator: CPU against CPU
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from run_fixtures import make_images  # noqa: E402
from tinies.cases import Case, Files, cases  # noqa: E402
from training import config  # noqa: E402

from sfumato import families  # noqa: E402
from sfumato.adapters.insert import from_state  # noqa: E402
from sfumato.config import DatasetConfig, SubsetConfig  # noqa: E402
from sfumato.data.loader import StepBatches  # noqa: E402
from sfumato.formats.files import load  # noqa: E402
from sfumato.tools.bench import machine  # noqa: E402
from sfumato.train import loop, run  # noqa: E402
from sfumato.train.trainables import read_adapter  # noqa: E402

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms need of cuBLAS
STEPS, BOUND = 6, 1e-3
"""Steps of a run; how far the losses of two devices may differ, as a share."""
COMMON: dict[str, Any] = {
    "output_name": "out", "max_train_steps": STEPS, "learning_rate": 1e-3, "network_dim": 2, "network_alpha": 2.0,
    "seed": 7, "save_every_n_steps": 3, "save_state": True,
}  # fmt: skip
CACHED = {"network_train_unet_only": True, "cache_latents": True, "cache_text_encoder_outputs": True}
BF16 = {**CACHED, "mixed_precision": "bf16"}
AGAIN = {**BF16, "gradient_checkpointing": True}
WHOLE = {"method": "full", "cache_latents": True, "cache_text_encoder_outputs": True, "mixed_precision": "bf16"}
ON_HOST = {"fused_backward_pass": True, "optimizer_state_on_cpu": True}
RUNS: dict[str, dict[str, Any]] = {
    "cpu": CACHED,
    "exact": CACHED,
    "fp32": CACHED,
    "fp32 again": CACHED,
    "fp32 resumed": {**CACHED, "resume": "fp32"},
    "bf16": {**BF16, "sample_every_n_steps": STEPS},
    "bf16 resumed": {**BF16, "resume": "bf16"},
    "deterministic": BF16,
    "deterministic resumed": {**BF16, "resume": "deterministic"},
    "checkpointing": AGAIN,
    "checkpointing resumed": {**AGAIN, "resume": "checkpointing"},
    "streamed": {**BF16, "stream_text_encoders": True},
    "fp16": {**CACHED, "mixed_precision": "fp16"},
    "uncached": {"mixed_precision": "bf16", "gradient_checkpointing": True},
    "full_bf16": {**WHOLE, "full_bf16": True},
    "full_bf16 resumed": {**WHOLE, "full_bf16": True, "resume": "full_bf16"},
    "swapped": {**AGAIN, "blocks_to_swap": 1},
    "swapped, plain": {**BF16, "blocks_to_swap": 1},
    "offloaded": {**AGAIN, "cpu_offload_checkpointing": True},
    "int8": {**BF16, "quantize": "int8", "int8_matmul": True},
    "nf4": {**BF16, "quantize": "nf4"},
    "fp8": {**BF16, "quantize": "fp8"},
    "fused": {**BF16, "fused_backward_pass": True, "fused_clipping": "two_passes"},
    "whole": WHOLE,
    "whole, on the host": {**WHOLE, **ON_HOST},
    "whole, swapped": {**WHOLE, **ON_HOST, "blocks_to_swap": 1},
    "unwaited": {**BF16, "scale_weight_norms": 1.0},
    "unwaited, swapped": {**AGAIN, "blocks_to_swap": 1},
    "unwaited, uncached": {"mixed_precision": "bf16"},
    "unwaited, whole": WHOLE,
}
"""The runs, by what they are set to; resume: from the third step of that run. exact: convolutions not in TF32, torch's
default. deterministic: with torch's deterministic algorithms alone. unwaited: a step that waits for the card fails."""


STEP = loop._optimizer_step


def unwaited(a_run: loop.Run, batches: StepBatches) -> dict[str, torch.Tensor]:
    """An optimizer step in which torch refuses to wait for a CUDA card, but in the first ones: what is made once in a
    run is made there."""
    if a_run.world.device.type != "cuda" or a_run.step < 2:
        return STEP(a_run, batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        return STEP(a_run, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Runs:
    """The runs of one tiny model; each is made when it is asked for."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.files: Files = case.write(folder / "model")
        self.images = make_images(folder)
        (folder / "prompts.txt").write_text("a cat --w 64 --h 64 --s 4 --d 1", encoding="utf-8")

    def __getitem__(self, name: str) -> Path:
        """The folder with a run's results."""
        out = self.folder / name
        if not out.exists():
            settings = dict(RUNS[name])
            if source := settings.pop("resume", None):
                settings["resume"] = str(self[source] / "out-step00000003-state")
            if "sample_every_n_steps" in settings:
                settings["sample_prompts"] = str(self.folder / "prompts.txt")
            torch.backends.cudnn.allow_tf32 = name != "exact"
            torch.use_deterministic_algorithms(name.startswith("deterministic"), warn_only=True)
            with (
                patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"} if name == "cpu" else {}),
                patch.object(loop, "_optimizer_step", unwaited if name.startswith("unwaited") else STEP),
            ):
                self._train(out, settings.pop("method", "network"), settings)
        return out

    def _train(self, out: Path, method: Any, settings: dict[str, Any]) -> None:
        facts, files = families.facts(self.case.family), self.files
        # T5 is not among what these runs train.
        own = {name: value for name, value in self.case.options.items() if name != "train_t5xxl"}
        options = facts.options(**{**files.options, **own})
        model = {"pretrained_model_name_or_path": str(files.model), "vae": files.vae, "output_dir": str(out)}
        data = DatasetConfig(subsets=(SubsetConfig(image_dir=str(self.images)),), resolution=(128, 64), batch_size=1)
        run.train(config(**{**COMMON, **facts.defaults, **model, **settings}, family=options), method, (data,))

    def losses(self, name: str) -> list[float]:
        """Of each step."""
        return [json.loads(line)["loss"] for line in (self[name] / "out.jsonl").read_text("utf-8").splitlines()]

    def apart(self, one: str, other: str) -> float:
        """The largest difference of two runs' losses, as a share."""
        pairs = zip(self.losses(one), self.losses(other), strict=True)
        return max(abs(a - b) / abs(b) for a, b in pairs)

    def same(self, one: str, other: str) -> dict[str, Any]:
        """Whether two runs gave the same result, bit for bit."""
        a, b = (load(self[name] / "out.safetensors") for name in (one, other))
        differ = [name for name in a if not torch.equal(a[name], b[name])]
        largest = max((float((a[n].float() - b[n].float()).abs().max()) for n in differ), default=0.0)
        return {"pass": a.keys() == b.keys() and not differ, "differ": len(differ), "of": len(a), "largest": largest}

    def ends(self, name: str) -> dict[str, Any]:
        """Whether a run comes to its end; losses that are not finite end it before."""
        losses = self.losses(name)
        return {"pass": len(losses) == STEPS, "losses": losses}


def close(one: str, other: str, bound: float = BOUND) -> Callable[[Runs], dict[str, Any]]:
    """A check that two runs have about the same losses."""

    def check(runs: Runs) -> dict[str, Any]:
        apart = runs.apart(one, other)
        return {"pass": apart <= bound, "apart": apart, one: runs.losses(one), other: runs.losses(other)}

    return check


def same(one: str) -> Callable[[Runs], dict[str, Any]]:
    """A check that the resumed run gave what the unbroken one did."""
    return lambda runs: runs.same(f"{one} resumed", one)


def samples(runs: Runs) -> dict[str, Any]:
    """One image, which is not of a single colour."""
    made = sorted((runs["bf16"] / "sample").glob("*.png"))
    spread = [float(np.asarray(Image.open(path)).std()) for path in made]
    return {"pass": len(made) == 1 and min(spread) > 0, "images": len(made), "spread": spread}


def loads(runs: Runs) -> dict[str, Any]:
    """Every layer that the file has changes something, but for those that nothing can change."""
    models = runs.case.models(runs.files)
    nets = models.nets()
    network = from_state(nets, read_adapter(models, runs["checkpointing"] / "out.safetensors")).by_path()
    still = [
        f"{component}.{path}"
        for (component, path), adapter in network.items()
        if not adapter.delta_weight(nets[component].get_submodule(path).weight.detach()).any()
    ]
    wrong = [path for path in still if not re.fullmatch(runs.case.unmoved, f"{path}.weight")]
    return {"pass": bool(network) and not wrong, "layers": len(network), "unchanged": wrong}


CHECKS: dict[str, Callable[[Runs], dict[str, Any]]] = {
    "losses in fp32 are the CPU's": close("exact", "cpu"),
    "losses in fp32 are the CPU's, convolutions in TF32": close("fp32", "cpu"),
    "the same run twice is the same, bit for bit": lambda runs: runs.same("fp32 again", "fp32"),
    "resumed equals unbroken, fp32": same("fp32"),
    "resumed equals unbroken, bf16": same("bf16"),
    "resumed equals unbroken, bf16 and checkpointing": same("checkpointing"),
    "resumed equals unbroken, bf16, deterministic algorithms": same("deterministic"),
    "losses in bf16 are near those in fp32": close("bf16", "fp32", 0.03),
    "checkpointing changes no loss": close("checkpointing", "bf16"),
    "text encoders read block by block change no loss": close("streamed", "bf16"),
    "sampling in bf16 gives an image": samples,
    "the adapter's file loads": loads,
    "fp16 ends": lambda runs: runs.ends("fp16"),
    "text encoders train, nothing cached": lambda runs: runs.ends("uncached"),
    "full_bf16 ends": lambda runs: runs.ends("full_bf16"),
    "resumed equals unbroken, full_bf16": same("full_bf16"),
    "streamed blocks change no loss": close("swapped", "checkpointing"),
    "streamed blocks change no loss, without checkpointing": close("swapped, plain", "bf16"),
    "kept activations change no loss": close("offloaded", "checkpointing"),
    "a fused step changes no loss": close("fused", "bf16"),
    "a fused step with its state on the host changes no loss": close("whole, on the host", "whole"),
    "streamed weights that train change no loss": close("whole, swapped", "whole"),
    "losses on int8 are near": close("int8", "bf16", 0.1),
    "losses on nf4 are near": close("nf4", "bf16", 0.3),
    "losses on fp8 are near": close("fp8", "bf16", 0.1),
    "no step waits for the card, streamed": lambda runs: runs.ends("unwaited, swapped"),
    "no step waits for the card": lambda runs: runs.ends("unwaited"),
    "no step waits for the card, nothing cached": lambda runs: runs.ends("unwaited, uncached"),
    "no step waits for the card, a whole model": lambda runs: runs.ends("unwaited, whole"),
}


def isolated(limit: float, figures: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `figures` finds, or its error: a check that fails leaves the next ones alone. `limit`: in seconds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        with at_most(limit):
            return figures()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0][:300]}"}


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Errors: `TimeoutError` in what takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def record(out: Path | None, section: str, content: Mapping[str, Any]) -> None:
    """Write one section of a file of results; the others stay."""
    if out is not None:
        sections = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        sections |= {section: {"machine": machine(), "command": shlex.join(sys.argv), **content}}
        out.write_text(json.dumps(sections, indent=1) + "\n", encoding="utf-8")


def report(name: str, limit: float) -> dict[str, Any]:
    """Every check of the tiny model of this name, in a process of its own; an error is a check that fails."""
    warnings.simplefilter("ignore")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        runs = Runs(next(case for case in cases() if case.name == name), Path(folder))
        checks = {n: {"pass": False, **isolated(limit, lambda c=c: c(runs))} for n, c in CHECKS.items()}  # type: ignore[misc]
    return {"seconds": round(time.monotonic() - began, 1), "checks": checks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in cases()]
    parser.add_argument("--cases", nargs="*", default=names, choices=names)
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--limit", type=float, default=60, help="seconds that one check may take")
    parser.add_argument("--out", type=Path, help="the JSON file that gets the section `truth`")
    args = parser.parse_args()
    found = dict[str, dict[str, Any]]()
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        reports = {pool.submit(report, name, args.limit): name for name in args.cases}
        for future in as_completed(reports):
            name = reports[future]
            if error := future.exception():
                found[name] = {"error": repr(error)}
                print(f"{name}: {error!r}", flush=True)
            else:
                found[name] = future.result()
                show(name, found[name])
            record(args.out, "truth", {"steps": STEPS, "bound": BOUND, "models": found})


def show(name: str, found: Mapping[str, Any]) -> None:
    """Print how many checks passed, and those that did not."""
    failed = {check: figures for check, figures in found["checks"].items() if not figures["pass"]}
    print(f"{name}: {len(CHECKS) - len(failed)} of {len(CHECKS)} in {found['seconds']} s", flush=True)
    for check, figures in failed.items():
        print(f"  FAILED {check}: {figures}", flush=True)


if __name__ == "__main__":
    main()
