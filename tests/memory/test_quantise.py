"""Layers whose weight is stored in fewer bits."""

from __future__ import annotations

import copy

import comfy_kitchen  # noqa: F401  its operators
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from sfumato.adapters.base import device_of
from sfumato.adapters.dora import DoRA, DoRAOptions
from sfumato.memory.checkpoint import checkpoint_blocks
from sfumato.memory.formats import int8_kernel
from sfumato.memory.quantise import Stored, store, stored_layers
from sfumato.models.layers import WideLinear
from sfumato.tensors.stored import FP8, NF4, Format, Int8, widened

FORMATS = [FP8(), Int8(64), NF4()]
SIZE = 128


class Block(nn.Module):
    """A layer of each class, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(SIZE, 2 * SIZE)
        self.down = WideLinear(2 * SIZE, SIZE)
        self.conv = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(x)))
        return F.pixel_shuffle(self.conv(y.view(-1, 8, 4, 4)), 2).flatten(1)


def block(format: Format | None = None) -> Block:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Block().requires_grad_(False)
    if format:
        for layer in (made.up, made.down):
            store(layer, format)
        store(made.conv, Int8())
    return made


def wide(stored: Block) -> Block:
    """The same layers, with the weights that are stored there."""
    made = block()
    for path, layer in stored_layers(stored).items():
        made.get_submodule(path).weight.copy_(layer.weight)
    return made


def inputs() -> Tensor:
    return torch.randn(5, SIZE, generator=torch.Generator().manual_seed(1)).requires_grad_()


def passed(net: nn.Module) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input."""
    x = inputs()
    y = net(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    return y, x.grad


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_computes_as_the_weight_that_it_gives(format: Format) -> None:
    stored = block(format)
    exact = wide(stored)
    torch.testing.assert_close(passed(stored), passed(exact))
    for dtype in (torch.bfloat16, torch.float16):  # in fp16 the wide layer gives fp32
        with torch.autocast("cpu", dtype):
            for a, b in zip(passed(stored), passed(exact), strict=True):
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)
    expected = passed(exact)
    checkpointed = checkpoint_blocks([stored])
    torch.testing.assert_close(passed(stored), expected)
    checkpointed.remove()
    torch.testing.assert_close(passed(torch.compile(stored, fullgraph=True, backend="aot_eager")), expected)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_no_wide_weight_is_kept_for_the_backward_pass(format: Format) -> None:
    net, kept = block(format), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        net(inputs())
    stored = {b.data_ptr() for b in net.buffers()}
    activations = [t for t in kept if t.data_ptr() not in stored]
    assert len(activations) < len(kept) and max(t.numel() for t in activations) <= 5 * 2 * SIZE


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_others_see_the_layer_that_it_was(format: Format) -> None:
    plain, net = block(), block(format)
    assert {n: t.shape for n, t in net.state_dict().items()} == {n: t.shape for n, t in plain.state_dict().items()}
    assert isinstance(net.up, nn.Linear) and isinstance(net.down, WideLinear) and isinstance(net.conv, nn.Conv2d)
    assert device_of(net.conv) == torch.device("cpu") and net.up.weight.dtype == torch.float32
    error = (net.up.weight - plain.up.weight).norm() / plain.up.weight.norm()
    assert isinstance(net.up, Stored) and net.up.error is not None and 0.001 < error < 0.12
    torch.testing.assert_close(net.up.error, error)

    before = net(inputs())
    net.load_state_dict({name: t.to("meta") for name, t in net.state_dict().items()}, assign=True)
    assert all(b.is_meta for b in net.buffers())
    net.load_state_dict(plain.state_dict(), assign=True)
    assert torch.equal(net(inputs()), before)


@pytest.mark.parametrize("kernel", ["torch", "comfy"])
def test_multiplied_in_int8(kernel: str) -> None:
    """Forward and backward against the wide weight in fp64: what is lost is what 8 bits of a row lose."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(512, 256).requires_grad_(False)
    layer.weight.copy_(torch.randn(256, 512, generator=generator))
    layer.weight[:, ::97] *= 8
    x, dy = torch.randn(4, 32, 512, generator=generator), torch.randn(4, 32, 256, generator=generator)
    x[..., ::53] *= 6  # channels that stick out, as activations have them
    exact = x.double().requires_grad_()
    y = F.linear(exact, layer.weight.double(), layer.bias.double())
    y.backward(dy.double())
    store(layer, Int8.of(layer.weight.shape, kernel))
    for dtype, most in ((torch.float32, 0.013), (torch.bfloat16, 0.014)):
        x8 = x.to(dtype, copy=True).requires_grad_()
        y8 = layer(x8)
        y8.backward(dy.to(dtype))
        for found, wanted in ((y8, y), (x8.grad, exact.grad)):
            assert found.dtype == dtype and 0.005 < (found.double() - wanted).norm() / wanted.norm() < most
    few = x[0, :8]
    wide = F.linear(few, layer.weight, layer.bias)  # for few rows the weight is made wide
    torch.testing.assert_close(layer(few), wide)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_what_multiplies_in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    assert int8_kernel(torch.device("cpu"))[0] == "torch"

    def lacking(*_: object) -> None:
        raise NotImplementedError("no such kernel\nat all")

    monkeypatch.setattr(torch, "_int_mm", lacking)
    assert int8_kernel(torch.device("cpu")) == (
        "",
        "cpu does not multiply in int8 (no such kernel), so weights in it are made wide, which is exact",
    )


def test_without_values() -> None:
    with FakeTensorMode():
        passed(block(FP8()))
    with torch.device("meta"):
        net = Block().requires_grad_(False)
    for layer in (net.up, net.down, net.conv):
        store(layer, Int8())
    assert net(torch.empty(5, SIZE, device="meta")).shape == block()(inputs()).shape


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_looked_up(kind: torch.dtype, dtype: torch.dtype) -> None:
    """Every code, those that are no numbers as well; torch's own conversion is slow on the CPU, and not asked."""
    codes = torch.arange(256, dtype=torch.uint8).view(kind).view(16, 16)
    torch.testing.assert_close(widened(codes, dtype), codes.to(dtype), rtol=0, atol=0, equal_nan=True)
    with torch.profiler.profile() as profile:
        widened(codes, dtype)
    assert "aten::index_select" in {event.name for event in profile.events()}


@pytest.mark.parametrize("on_out", [True, False])
def test_magnitudes_of_dora_are_those_of_the_weight_before(on_out: bool) -> None:
    """Or the adapter would shrink the weight that it is merged into by what was lost."""
    options = DoRAOptions(rank=2, alpha=2.0, wd_on_out=on_out)
    for path, layer in stored_layers(block(NF4())).items():
        found, wanted = (
            DoRA(each, options, torch.Generator().manual_seed(0)).dora_scale
            for each in (layer, block().get_submodule(path))
        )
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_rows_are_quantised_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for format in FORMATS:
        whole = copy.deepcopy(block(format))
        monkeypatch.setattr("sfumato.memory.quantise.PIECE", 7 * SIZE)
        for name, buffer in block(format).named_buffers():
            assert torch.equal(buffer, whole.get_buffer(name))
        monkeypatch.undo()
