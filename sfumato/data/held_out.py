"""What is measured of a plan: images that are held out of training, and as many that are not."""

from __future__ import annotations

from dataclasses import replace

from sfumato.data import captions
from sfumato.data.plan import Plan
from sfumato.tensors.random import python_random


def evaluation(plan: Plan, most: int | None = None) -> Plan | None:
    """What is measured: the images that a plan holds out (at most `most` batches of them; also its `held_out`), and
    behind them as many of those that are trained on; each once, with its whole caption. None: it holds none out."""
    if not plan.held_out:
        return None
    datasets = tuple(
        replace(dataset, subsets=tuple(map(captions.unvaried, dataset.subsets))) for dataset in plan.datasets
    )
    seed = noise_seed(plan)
    whole = replace(plan, datasets=datasets, items=plan.held_out)
    held = [plan.held_out[i] for i in sorted(ref.item for batch in whole.batches(0, seed)[:most] for ref in batch)]
    seen = [replace(item, repeats=1) for item in plan.items if plan.subset(item).learnt]
    python_random(seed, "trained images that are measured").shuffle(seen)
    return replace(whole, items=(*held, *seen[: len(held)]), held_out=tuple(held))


def noise_seed(plan: Plan) -> int:
    """What the noise follows from on which a plan's held-out images are measured."""
    return plan.subset(plan.held_out[0]).validation_seed
