"""Nets without values, on the meta device: all that shapes say, before anything is read or drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils._device import DeviceContext

STARTS = frozenset(getattr(nn.init, f"{name}_") for name in ("kaiming_uniform", "uniform", "normal", "zeros", "ones"))


@contextmanager
def without_values() -> Iterator[None]:
    """Nets made within are on the meta device, and the start values that their layers would draw there are left out: a
    third of the time that it takes to make one."""
    with _NoStarts("meta"):
        yield


class _NoStarts(DeviceContext):  # type: ignore[misc]
    """What `torch.device` is as a context; one mode is half as slow as two."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in STARTS:
            return args[0] if args else kwargs["tensor"]
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
