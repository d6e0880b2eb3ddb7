"""Nets without values, on the meta device: all that shapes say, before anything is read or drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

STARTS = frozenset(getattr(nn.init, f"{name}_") for name in ("kaiming_uniform", "uniform", "normal", "zeros", "ones"))


@contextmanager
def without_values() -> Iterator[None]:
    """Nets made within are on the meta device, and the start values that their layers would draw there are left out: a
    third of the time that it takes to make one."""
    with torch.device("meta"), _NoStarts():
        yield


class _NoStarts(TorchFunctionMode):  # type: ignore[no-untyped-call]
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in STARTS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))
