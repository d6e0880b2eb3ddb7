"""What a run's network_args say of single layers: that they name some, and which rate each has."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import nn

from sfumato.adapters.insert import layer_names
from sfumato.adapters.plan import ALL, DENOISER, NONE, TEXT, AdapterPlan, LayerNames
from sfumato.errors import UserError, nearest
from sfumato.formats.dialect import ModulePath
from sfumato.models.base import Models

Targets = Mapping[str, Mapping[str, tuple[str, ...]]]
"""`Family.targets`"""


def named_layers(models: Models, components: Iterable[str]) -> dict[ModulePath, LayerNames]:
    """Every layer of these components that could have an adapter, and what it is called."""
    nets, kohya = models.nets(), models.dialects["kohya"]
    return {
        (name, path): layer_names(name, path, models.family.targets[name], kohya)
        for name in components
        for path, layer in nets[name].named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def check_sets(targets: Targets, plan: AdapterPlan) -> tuple[str, ...]:
    """Notices of what a preset file names in vain. Errors: `UserError` for sets that no component of the family has."""
    unknown = [name for name in plan.targets if not _exists(name, targets)]
    if plan.targets_from == "preset file" and unknown:
        return (f"network_args preset: this family has no {', '.join(sorted(set(unknown)))}",)
    if plan.targets_from == "target" and unknown:
        known = dict.fromkeys((*targets, TEXT, ALL, *(name for sets in targets.values() for name in sets)))
        raise UserError(
            *(f"network_args target={name}: is not known here{nearest(name, known)}" for name in unknown),
            f"network_args target: this family has {', '.join(known)}",
        )
    return ()


def check_trained(plan: AdapterPlan, trained: Collection[str], layers: Mapping[ModulePath, LayerNames]) -> None:
    """That everything in the plan means some layer. `layers`: of the components that are `trained`. Errors: `UserError`
    for components that are not trained, and for patterns that match nothing."""
    wrong = []
    for name in plan.targets if plan.targets_from == "target" else ():
        where = name.partition(".")[0]
        if (where == TEXT and not {*trained} - {DENOISER}) or (where == DENOISER and where not in trained):
            wrong.append(f"network_args target={name}: does nothing, as nothing of it is trained; leave it out")
    for flag, patterns in (("include_patterns", plan.include), ("exclude_patterns", plan.exclude)):
        wrong += [
            f"network_args {flag}: {pattern.pattern!r} is the whole of no layer's path"
            for pattern in patterns
            if plan.targets_from != "preset file"
            and not any(pattern.fullmatch(path) for names in layers.values() for path in names.paths)
        ]
    wrong += [
        f"network_args network_reg_...: {rule.pattern.pattern!r} matches no layer"
        for rule in plan.rules
        if rule.pattern
        and plan.targets_from != "preset file"
        and not any(rule.matches(names) for names in layers.values())
    ]
    if wrong:
        raise UserError(*dict.fromkeys(wrong))


def _exists(name: str, targets: Targets) -> bool:
    """Whether some component has the layers that this name stands for."""
    where, _, part = name.partition(".")
    if where == TEXT:
        sets = [each for component, own in targets.items() if component != DENOISER for each in own]
    elif where in targets:
        sets = [*targets[where]]
    else:
        sets, part = [each for own in targets.values() for each in own], name
    return part in ("", ALL, NONE, *sets)


def rate(plan: AdapterPlan, path: ModulePath, names: LayerNames, common: float) -> float:
    """The learning rate of a layer. `common`: its component's. 0: it is not trained."""
    own: float | None = plan.own("rate", names)
    if own is not None:
        return own
    if path[0] != DENOISER or plan.family is None:
        return common
    return common * float(plan.family.rate_factor(path[1]))
