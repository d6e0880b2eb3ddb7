"""Every setting that spares memory or time: tests that hold for all of them go through this table."""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "every other block": {"gradient_checkpointing": True, "gradient_checkpointing_every": 2},
    "selective": {"gradient_checkpointing": True, "gradient_checkpointing_keep": "costly"},
    "offloaded": {"gradient_checkpointing": True, "cpu_offload_checkpointing": True},
    "fused": {"fused_backward_pass": True, "fused_clipping": "two_passes"},
    "fused, state on host": {"fused_optimizer_groups": 3, "optimizer_state_on_cpu": True},
    "streaming": {"blocks_to_swap": 1, "gradient_checkpointing": True},
    "streaming, fused": {"blocks_to_swap": 2, "blockwise_fused_optimizers": True, "optimizer_state_on_cpu": True},
    "int8": {"quantize": "int8", "int8_matmul": True},
    "nf4": {"quantize": "nf4", "gradient_checkpointing": True},
    "fp8": {"fp8_base": True},
}
"""Name -> the settings of a config."""
