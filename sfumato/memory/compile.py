"""Blocks are compiled one by one: those of one kind share what was compiled, and only lengths of sequences are left
open."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.config import MemoryConfig
from sfumato.errors import UserError
from sfumato.memory.checkpoint import Handle

_TORCHS = {
    # Too many variants of a block are a failure that is told, where torch would go on without compiling it.
    ("torch._dynamo.config", "fail_on_recompile_limit_hit"): True,
    # A backward pass that cannot be compiled shows while the forward pass may still be taken back.
    ("torch._functorch.config", "force_non_lazy_backward_lowering"): True,
    # Height and width that happen to be equal, of a square picture, are not taken for one number.
    ("torch.fx.experimental._config", "use_duck_shape"): False,
}
"""Settings of torch; older versions lack some."""
Tell = Callable[[str], None]


def backend_of(config: MemoryConfig) -> str | None:
    """The compiler that the config asks for, or `accelerate launch --dynamo_backend`; None: none."""
    launched = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if config.torch_compile:
        return config.dynamo_backend.lower()
    return None if launched == "no" else launched


def check_backend(config: MemoryConfig) -> None:
    """Errors: `UserError` for a compiler that torch does not know."""
    backend = backend_of(config)
    if backend is None:
        return
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        usual = torch.compiler.list_backends()  # not those that only help to find mistakes
        raise UserError(f"dynamo_backend {backend}: torch knows {', '.join(sorted(usual))}")


@dataclass
class Kind:
    """Blocks that differ in their values alone."""

    name: str
    compiled: Callable[..., Any]
    """Takes the block and its arguments."""
    shapes: tuple[torch.Size, ...] | None = None
    """Of the first call's tensors."""
    is_open: bool = False
    """Whether sequences may have any length, since one of another length came."""
    failed: bool = False

    def open(self, tensors: Sequence[Tensor]) -> None:
        """Leave the lengths open, if they are not those of the first call any more."""
        shapes = tuple(t.shape[1:] for t in tensors)
        if self.shapes is None:
            self.shapes = shapes
        self.is_open = self.is_open or shapes != self.shapes
        if self.is_open:
            for t in tensors:
                dims = [dim for dim in _lengths(t.ndim) if t.shape[dim] > 1]
                torch._dynamo.maybe_mark_dynamic(t, dims)


@dataclass
class Blocks:
    """Compiles blocks, and runs those as they are that it could not compile."""

    backend: Any
    tell: Tell
    kinds: dict[object, Kind] = field(default_factory=dict)

    def forward(self, block: nn.Module) -> Callable[..., Any]:
        """What takes the place of the block's forward."""
        plain, kind = block.forward, self._kind(block)
        succeeded = False

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal succeeded
            if kind.failed and not succeeded:
                return plain(*args, **kwargs)
            kind.open([value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)])
            try:
                out = kind.compiled(block, *args, **kwargs)
            except _failures() as error:
                self._fail(kind, error)
                succeeded = False
                return plain(*args, **kwargs)
            succeeded = True
            return out

        return wrapper

    def _kind(self, block: nn.Module) -> Kind:
        key = _signature(block)
        if key not in self.kinds:
            # What is compiled is found by its code: each kind has its own, or one would displace the other.
            own = _copied(block, f"{type(block).__name__}_{len(self.kinds)}")
            self.kinds[key] = Kind(type(block).__name__, torch.compile(own, backend=self.backend))
        return self.kinds[key]

    def _fail(self, kind: Kind, error: Exception) -> None:
        if not kind.failed:
            self.tell(f"torch_compile: {kind.name} is not compiled, but run as it is: {_reason(error)}")
        kind.failed = True


def compile_blocks(blocks: Sequence[nn.Module], backend: Any, tell: Tell) -> Handle:
    """Wrap the `forward` of each block: compiled when it first runs, for that one size of picture; when another comes,
    once more, for all of them. `tell` hears which kind of block could not be compiled and why; it runs as it is then.

    `backend`: a name that torch knows, or a function as `torch.compile` takes it.
    """
    for (config, name), value in _TORCHS.items():
        if hasattr(module := import_module(config), name):
            setattr(module, name, value)
    # Of what torch itself looks at while it compiles.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed")
    handle, made = Handle(), Blocks(backend, tell)
    for block in blocks:
        handle.wrap(block, made.forward(block))
    return handle


def _lengths(ndim: int) -> tuple[int, ...]:
    """The dimensions along which a tensor is as long as the picture or its text: (b, n, c), (b, c, h, w) or a mask
    (b, 1, n, m), and (..., n, c)."""
    return {3: (1,), 4: (2, 3)}.get(ndim, (ndim - 2,) if ndim > 4 else ())


def _signature(block: nn.Module) -> object:
    """Equal for blocks of the same layers in the same shapes and formats."""
    return type(block), tuple(
        (path, type(module), len(module._forward_hooks), len(module._forward_pre_hooks), *_own_shapes(module))
        for path, module in block.named_modules()
    )


def _own_shapes(module: nn.Module) -> Iterator[object]:
    for name, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield name, t.shape, t.dtype, t.requires_grad


def _copied(block: nn.Module, name: str) -> Callable[..., Any]:
    """The function behind a block's forward, which takes the block first, with code of its own."""
    method = block.forward
    assert isinstance(method, MethodType) and isinstance(method.__func__, FunctionType)
    given = method.__func__
    copied = FunctionType(
        given.__code__.replace(co_name=name), given.__globals__, name, given.__defaults__, given.__closure__
    )
    copied.__kwdefaults__ = given.__kwdefaults__
    return copied


def _failures() -> tuple[type[Exception], ...]:
    """What compiling raises, but not what a block itself does."""
    from torch._dynamo import exc

    return exc.TorchDynamoException, getattr(exc, "FailOnRecompileLimitHit", exc.TorchDynamoException)


def _reason(error: Exception) -> str:
    """The first line of what went wrong."""
    if type(error).__name__ == "FailOnRecompileLimitHit":
        return f"there are more than {torch._dynamo.config.recompile_limit} variants of it"
    lines = str(getattr(error, "inner_exception", error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
