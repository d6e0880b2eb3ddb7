"""Starts of a LoRA from the layer's own weight W, while the net's weights stay as they are.

Where others train `R + s * up @ down` with what is left of W, `R = W - s * up0 @ down0`, the change of W is

    s * (up @ down - up0 @ down0)  =  s * ((up - up0) @ down + up0 @ (down - down0))

and the right-hand side is what is trained and saved: a plain LoRA of twice the rank. It holds no large numbers that
cancel, so rounding to 16 bits, in a forward pass or in a file, does it no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from sfumato.errors import UserError
from sfumato.formats.dialect import ALPHA, DOWN, UP, AdapterTensors
from sfumato.tensors.low_rank import truncated

GRID = 2.0**-18
"""`down0` holds multiples of this, so that a file with `down` and `down - down0` gives it back to the last bit."""


def start_factors(
    how: str, weight: Tensor, rank: int, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """up0 (out, rank) and down0 (rank, in) for a weight (out, in), fp32; zeros beyond the rank that it can have.

    "pissa" (arXiv:2404.02948): the largest singular values, shared out over both factors, the scale taken off; "olora"
    (arXiv:2406.01775): the beginning of a QR decomposition; "principal", "middle" and "last" (T-LoRA,
    arXiv:2507.05964): orthonormal rows of these singular vectors, the values in up0.
    """
    if how not in ("pissa", "olora", "principal", "middle", "last"):
        raise ValueError(how)
    most = min(rank, *weight.shape)
    if how == "olora":
        up, _ = torch.linalg.qr(weight[:, :most])
        down = up.T @ weight
    elif how in ("pissa", "principal"):
        largest = truncated(weight, most, generator)
        share = largest.singular[:most].clamp(min=1e-12).sqrt() if how == "principal" else torch.tensor(scale**0.5)
        up, down = largest.up, largest.down / share.to(weight).view(-1, 1)
        up = up * share if how == "principal" else up / share
    else:
        u, values, vh = torch.linalg.svd(weight, full_matrices=False)
        first = len(values) - most if how == "last" else (len(values) - most) // 2
        chosen = slice(first, first + most)
        up, down = u[:, chosen] * values[chosen], vh[chosen]
    missing = rank - most
    return functional.pad(up, (0, missing)), functional.pad((down / GRID).round() * GRID, (0, 0, 0, missing))


def down_at_start(down: Tensor, change: Tensor) -> Tensor:
    """down0, of `down` and `down - down0`: to the last bit, where these were rounded to 32 bits."""
    found = down - change
    exact = (found / GRID).round() * GRID
    return torch.where((found - exact).abs() <= torch.maximum(down.abs(), change.abs()) * 2.0**-22, exact, found)


class Start(nn.Module):
    """What stays of the start: `up0` and `down0`, which are not trained."""

    def __init__(self, up: nn.Linear | nn.Conv2d, up0: Tensor, down0: Tensor) -> None:
        """`up`: a layer without values, in which `up0` goes. Both factors are shaped as those of the LoRA."""
        super().__init__()
        self.up = up
        self.up.weight = nn.Parameter(up0, requires_grad=False)
        self.down = nn.Parameter(down0, requires_grad=False)

    def forward(self, down: nn.Module, x: Tensor, between: Callable[[Tensor], Tensor]) -> Tensor:
        """`up0 @ (down - down0)` on x. `between`: what is done between the factors."""
        weight = down.weight
        assert isinstance(weight, Tensor)
        out: Tensor = self.up(between(functional_call(down, {"weight": weight - self.down}, (x,))))
        return out

    def product(self, down: Tensor) -> Tensor:
        """up0 @ (down - down0), (out, n), fp32."""
        return self.up.weight.float().flatten(1) @ (down.float() - self.down.float()).flatten(1)

    def to_file(self, own: AdapterTensors) -> AdapterTensors:
        """An adapter's own tensors -> those of a plain LoRA of twice the rank."""
        others = {leaf: t for leaf, t in own.items() if not leaf.startswith("start.")}
        return others | {
            DOWN: torch.cat((own[DOWN], own[DOWN] - self.down.detach())),
            UP: torch.cat((own[UP], self.up.weight.detach()), 1),
            ALPHA: own[ALPHA] * 2,
        }

    def from_file(self, tensors: Mapping[str, Tensor]) -> AdapterTensors:
        """The reverse of `to_file`. Errors: `UserError` for another rank."""
        rank, given = len(self.down), dict(tensors)
        down, up = given.get(DOWN), given.get(UP)
        if down is None or up is None or not len(down) == up.shape[1] == 2 * rank:
            raise UserError(
                f"expected a file of rank {2 * rank}, twice that of the run, as a run that starts from the layers' "
                "weights (init, sig_type) writes it"
            )
        alpha = given.get(ALPHA, torch.tensor(2.0 * rank))
        start = {"start.up.weight": up[:, rank:], "start.down": down_at_start(down[:rank], down[rank:])}
        return given | start | {DOWN: down[:rank], UP: up[:, :rank], ALPHA: alpha / 2}
