"""What every adapter file must be, whatever its dialect and kind: tensors that have values, and those sound."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats.files import all_finite

_SHOWN = 5


def check_adapter(tensors: Mapping[str, Tensor], what: str) -> None:
    """Errors: one `UserError` naming the file (`what`) and the tensors that no adapter can have."""
    if not tensors:
        raise UserError(f"{what} holds no tensors: it is not an adapter, or was saved empty")
    found = {name: wrong for name, tensor in tensors.items() if (wrong := _wrong(name, tensor))}
    if found:
        more = [f"{what}: {len(found) - _SHOWN} more tensors are like that"] if len(found) > _SHOWN else []
        raise UserError(*(f"{what}: {name} {wrong}" for name, wrong in list(found.items())[:_SHOWN]), *more)


def _wrong(name: str, tensor: Tensor) -> str:
    """What is wrong with a tensor, or nothing."""
    if name.endswith(("alpha", "on_input", "scaled_oft")):
        if tensor.numel() != 1:
            return f"holds {tensor.numel()} numbers; expected one"
    elif not tensor.numel():
        return f"is empty (shape {list(tensor.shape)}); expected a rank of 1 or more"
    elif tensor.ndim < 2 and name.endswith(("lora_down.weight", "lora_up.weight", "lora_A.weight", "lora_B.weight")):
        return f"has shape {list(tensor.shape)}; expected a matrix"
    elif not tensor.is_floating_point():
        return f"holds {str(tensor.dtype).removeprefix('torch.')}; expected floating-point numbers"
    if tensor.is_floating_point() and not all_finite(tensor):
        return "holds NaN or infinity: the file is damaged, or its training had failed"
    return ""
