"""What the lists of `key=value` have in common: optimizer_args, lr_scheduler_args, network_args."""

from __future__ import annotations

import re

_NEXT = re.compile(r"[\s,;]+(?=[A-Za-z_]\w*\s*=)")


def several(text: str) -> str:
    """What is wrong with several arguments in one string, or nothing: `"a=1 b=2"` in place of `a=1 b=2`."""
    parts = [part for part in _NEXT.split(text) if part]
    if len(parts) < 2:
        return ""
    words, strings = " ".join(parts), ", ".join(f'"{part}"' for part in parts)
    return f"several arguments in one string; each needs its own: {words} on the command line, [{strings}] in a file"
