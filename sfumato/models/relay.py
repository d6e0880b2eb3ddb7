"""Calls that go through the same stages side by side: each stage is entered once, and all calls pass it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
_running = threading.local()


class _Stopped(BaseException):
    """Ends a call that nobody waits for any longer; no `except Exception` on its way holds it up."""


class _Call(Generic[T]):
    """A call in a thread of its own, which runs only while `go` waits for it."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._stopped = False
        self._error: BaseException | None = None
        self._result: list[T] = []
        self.stage = -1
        """The stage that it waits for."""
        self.held = 0
        """Bytes of what it goes on with."""

    @property
    def ended(self) -> bool:
        return bool(self._result)

    @property
    def result(self) -> T:
        return self._result[0]

    def go(self) -> None:
        """On to the next stage, or to the end. Errors: those of the function."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._mine.release()
        self._theirs.acquire()
        if self._error:
            raise self._error

    def stop(self) -> None:
        """End it wherever it is."""
        if self._thread.ident is not None:
            self._stopped = True
            self._mine.release()
            self._thread.join()

    def wait(self, stage: int, held: int) -> None:
        """Called in its own thread: stay until `go`."""
        self.stage, self.held = stage, held
        self._theirs.release()
        self._mine.acquire()
        if self._stopped:
            raise _Stopped

    def _run(self) -> None:
        _running.call = self
        try:
            self._result.append(self._function())
        except BaseException as error:  # handed over to whoever waits in `go`
            self._error = error
        self._theirs.release()


def wait_for(stage: int, held: int) -> None:
    """Within a call of `relay`: go on when this stage is there. `held`: bytes of what the call keeps meanwhile."""
    call: _Call[object] = _running.call
    call.wait(stage, held)


def relay(
    functions: Sequence[Callable[[], T]],
    enter: Callable[[int], None],
    *,
    most: int,
    memory: int,
    passed: Callable[[int, int], None] = lambda call, stage: None,
) -> Iterator[T]:
    """The results of functions that call `wait_for` before each of their stages, in their order.

    `enter(stage)` prepares a stage; the one before is left then. As many calls pass the stages together as may wait at
    once (`most`) and keep no more than `memory` bytes after the first stage; then the next ones start from the first
    stage. `passed`: told when a call (its place) begins a stage. Only one of all these threads ever runs. Errors: those
    of the functions.
    """
    left, begun = list(enumerate(functions)), list[tuple[int, _Call[T]]]()

    def step(place: int, call: _Call[T]) -> None:
        enter(call.stage)
        passed(place, call.stage)
        call.go()

    while left:
        try:
            while left and len(begun) < most and sum(call.held for _, call in begun) < memory:
                place, function = left.pop(0)
                begun.append((place, _Call(function)))
                begun[-1][1].go()
                if not begun[-1][1].ended:
                    step(*begun[-1])
            while waiting := [each for each in begun if not each[1].ended]:
                stage = min(call.stage for _, call in waiting)
                for place, call in waiting:
                    if call.stage == stage:
                        step(place, call)
            yield from (call.result for _, call in begun)
        finally:
            for _, call in begun:
                call.stop()
            begun = []
