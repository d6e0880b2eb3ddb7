"""The metadata of a result, which says how it was made: modelspec and kohya's `ss_*` fields, gathered from the run."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from sfumato import __version__, families
from sfumato.adapters import AdapterPlan
from sfumato.config import Config
from sfumato.data import captions
from sfumato.data.plan import Plan
from sfumato.formats import metadata
from sfumato.models.base import Models
from sfumato.models.facts import Facts as FamilyFacts
from sfumato.optim.arguments import literals
from sfumato.tensors.random import key
from sfumato.train import dist
from sfumato.train.loop import StepBudget


def now() -> float:
    """Seconds since 1970; SOURCE_DATE_EPOCH if it is set, so that the same run can give the same file, byte for
    byte."""
    return float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())


@dataclass(slots=True)
class Facts:
    """All that a result's metadata is made of."""

    config: Config
    models: Models
    plan: Plan
    budget: StepBudget
    adapter: AdapterPlan | None
    """None when something else is trained."""
    optimizer: type
    """The class of the optimizer."""
    kind: str
    """`Trainable.kind`."""
    started: float = field(default_factory=now)
    _base: dict[str, str] = field(default_factory=dict)
    _datasets: list[metadata.DatasetFacts] = field(default_factory=list)

    def at(self, step: int, epoch: int) -> dict[str, str]:
        """The metadata of a result after `step` optimizer steps, in `epoch` (counted from 0)."""
        spec = self._modelspec()
        self._datasets = self._datasets or datasets(self.plan)  # counting all tags takes a while for many images
        training = metadata.training(self.config, self._run(step, epoch + 1), self._datasets)
        if self.config.metadata.no_metadata:
            return spec | training
        # Hashing the base model reads all of it, once; later runs remember.
        self._base = self._base or self._base_model()
        return spec | training | self._base

    def _family(self) -> FamilyFacts:
        return families.facts(self.models.family.name)

    def _modelspec(self) -> dict[str, str]:
        noise, options, given = self.config.noise, self.models.options, self.config.metadata
        called = given.metadata_trigger_phrase or self.config.embedding.token_string
        return metadata.modelspec(
            self._family().architecture(options),
            replace(given, metadata_trigger_phrase=called),
            title=self.config.output.output_name,
            implementation=(self._family().implementation if self.adapter else "") or f"sfumato {__version__}",
            resolution=self.plan.datasets[0].resolution,
            prediction=self._prediction(),
            date=datetime.fromtimestamp(self.started),
            adapter=self.kind,
            encoder_layer=getattr(options, "clip_skip", None),
            timestep_range=(noise.min_timestep or 0, noise.max_timestep or 1000)
            if noise.min_timestep or noise.max_timestep
            else None,
        )

    def _prediction(self) -> str:
        process = self.models.process(self.config.noise, self.config.loss)
        name = str(process.scheduler_config()["prediction_type"])
        return {"v_prediction": "v"}.get(name, name)

    def _base_model(self) -> dict[str, str]:
        model = self.config.model
        if not self.models.source.in_place():
            return {}  # another file stands there now, whose hash would be wrong
        out = metadata.base_model(model.pretrained_model_name_or_path)
        return out | (metadata.base_model(model.vae, "vae") if model.vae else {})

    def _run(self, step: int, epoch: int) -> metadata.RunFacts:
        options, network = self.models.options, self.config.network
        return metadata.RunFacts(
            sfumato_version=__version__,
            session_id=key(self.config.output.output_name, int(self.started * 1000)),
            training_started_at=self.started,
            training_finished_at=now(),
            base_model_version=self._family().base_model_version(options),
            v2=bool(getattr(options, "v2", False)),
            optimizer=metadata.called(self.optimizer, literals("optimizer_args", self.config.optimizer.optimizer_args)),
            mixed_precision=dist.precision(self.config.train.mixed_precision),
            num_train_images=self.plan.train_samples,
            num_reg_images=self.plan.reg_samples,
            **self._held_out(),
            num_batches_per_epoch=self.budget.batches,
            total_batch_size=self.plan.datasets[0].batch_size * self.budget.accumulation * self.budget.processes,
            num_epochs=self.budget.epochs,
            max_train_steps=self.budget.steps,
            steps=step,
            epoch=epoch,
            clip_skip=getattr(options, "clip_skip", None),
            max_token_length=getattr(options, "max_token_length", None),
            network_module=_as_kohya_calls(network.network_module, self.adapter) if self.adapter else None,
            network_dim=self.adapter.rank if self.adapter else None,
            network_alpha=self.adapter.alpha if self.adapter else None,
            family={name: getattr(options, name) for name in self._family().metadata},
            network_args=dict(text.split("=", 1) for text in network.network_args) if self.adapter else None,
        )

    def _held_out(self) -> dict[str, Any]:
        """Of the first folder that has some, as sd-scripts has one split alone."""
        if not (held := self.plan.held_out):
            return {}
        subset = self.plan.subset(held[0])
        split, seed = subset.validation_split, subset.validation_seed
        return {"num_validation_images": len(held), "validation_split": split, "validation_seed": seed}


def _as_kohya_calls(module: str | None, plan: AdapterPlan) -> str:
    """network_module as given: programs know a file by the names of kohya's modules, to which our short ones belong."""
    return module if module and "." in module else f"networks.{module or plan.kind.__module__.rpartition('.')[2]}"


def datasets(plan: Plan) -> list[metadata.DatasetFacts]:
    """What the scan found, one record per dataset."""
    out, folders = [], plan.folders()
    for d, dataset in enumerate(plan.datasets):
        by_subset = [folders[d, s] for s in range(len(dataset.subsets))]
        items = [item for subset in by_subset for item in subset]
        buckets: Counter[tuple[int, int]] = Counter()
        for item in items:
            buckets[item.placement.bucket] += item.repeats
        errors = [abs(i.image.width / i.image.height - i.placement.bucket[0] / i.placement.bucket[1]) for i in items]
        out.append(
            metadata.DatasetFacts(
                config=dataset,
                images=[len(subset) for subset in by_subset],
                tags=[
                    Counter(tag for i in subset for tag in captions.tags(i.image.captions, plan.subset(i)))
                    for subset in by_subset
                ],
                buckets=buckets,
                mean_ar_error=sum(errors) / max(len(errors), 1),
            )
        )
    return out
