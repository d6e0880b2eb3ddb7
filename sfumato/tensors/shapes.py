"""A number per sample, shaped to act on whole tensors of samples."""

from __future__ import annotations

from torch import Tensor


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(b,) -> (b * n, 1, ...), to broadcast over `like` (b * n, ...), on its device.

    A sample may have n rows next to each other, as the chunks of a long caption are.
    """
    rows, odd = divmod(like.shape[0], values.shape[0])
    if odd:
        raise RuntimeError(f"{like.shape[0]} rows do not share out over {values.shape[0]} samples")
    values = values.to(like.device)
    return (values if rows == 1 else values.repeat_interleave(rows)).view(-1, *[1] * (like.ndim - 1))
