"""Work on very many small records."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def uncollected(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Have Python's collector of cycles rest while the function makes many records that stay: it would look through all
    of them again and again, a third of the time, and find nothing."""

    @wraps(function)
    def rested(*args: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        awake = gc.isenabled()
        gc.disable()
        try:
            return function(*args, **options)
        finally:
            if awake:
                gc.enable()

    return rested
