"""Several tensors in one run of bytes."""

from __future__ import annotations

import torch

from sfumato.tensors.packed import ALIGNMENT, Layout


def test_what_was_packed_is_there_again():
    tensors = {
        "a": torch.randn(3, 5),
        "codes": torch.arange(7, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "number": torch.tensor(2.5, dtype=torch.bfloat16),
        "turned": torch.randn(4, 3).t(),
    }
    layout = Layout.of(tensors)
    flat = torch.empty(layout.nbytes + 100, dtype=torch.uint8)
    layout.pack(tensors, flat)
    found = layout.views(flat)
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in tensors.items())
    assert all(place.start % ALIGNMENT == 0 for place in layout.places.values())
    found["a"].zero_()
    assert not layout.views(flat)["a"].any()  # views, not copies
