"""Every setting that spares memory or time: tests that hold for all of them go through this table."""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
}
"""Name -> the settings of a config."""
