"""Adapter files that no program could have meant."""

from __future__ import annotations

import pytest
import torch

from sfumato.errors import UserError
from sfumato.formats.adapter_check import check_adapter

DOWN, UP, ALPHA = "lora_te3_x.lora_down.weight", "lora_te3_x.lora_up.weight", "lora_te3_x.alpha"
SOUND = {DOWN: torch.ones(2, 4), UP: torch.ones(4, 2), ALPHA: torch.tensor(2.0)}


@pytest.mark.parametrize("alpha", [torch.tensor(2), torch.tensor([2.0]), torch.tensor(2.0, dtype=torch.bfloat16)])
def test_sound_ones_pass(alpha: torch.Tensor) -> None:
    check_adapter({**SOUND, ALPHA: alpha}, "network_weights a.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({DOWN: torch.ones(0, 4)}, r"lora_down.weight is empty \(shape \[0, 4\]\); expected a rank of 1 or more"),
        ({ALPHA: torch.ones(2)}, "alpha holds 2 numbers; expected one"),
        ({UP: torch.full((4, 2), torch.nan)}, "lora_up.weight holds NaN or infinity"),
        ({UP: torch.full((4, 2), torch.inf, dtype=torch.float16)}, "lora_up.weight holds NaN or infinity"),
        ({ALPHA: torch.tensor(torch.nan)}, "alpha holds NaN"),
        ({DOWN: torch.tensor(1.0)}, "expected a matrix"),
        ({DOWN: torch.ones(2, 4, dtype=torch.int32)}, "holds int32; expected floating-point numbers"),
    ],
)
def test_each_fault_is_reported_by_file_and_layer(change: dict[str, torch.Tensor], says: str) -> None:
    with pytest.raises(
        UserError, match=rf"^network_weights a\.safetensors: lora_te3_x\..*{says.partition('.')[2] or says}"
    ) as error:
        check_adapter({**SOUND, **change}, "network_weights a.safetensors")
    assert len(error.value.messages) == 1


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(UserError, match=r"network_weights a\.safetensors holds no tensors"):
        check_adapter({}, "network_weights a.safetensors")


def test_many_faults_are_not_all_listed() -> None:
    with pytest.raises(UserError) as error:
        check_adapter({f"{i}.alpha": torch.ones(2) for i in range(20)}, "base_weights a.safetensors")
    assert len(error.value.messages) == 6 and "15 more" in error.value.messages[-1]
