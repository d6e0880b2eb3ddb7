"""Imports all of sfumato and trains one step as on Windows: without POSIX's modules, with data loader workers that are spawned.

Run by `test_anywhere.py` in a fork of its own: MODEL PICTURES OUT.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Mapping
from typing import Any

POSIX = ("fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "spwd", "syslog", "termios", "tty")
anything = builtins.__import__


def as_on_windows(name: str, names: Mapping[str, Any] | None = None, *rest: Any, **named: Any) -> Any:
    """`import`, but POSIX's modules are not there for sfumato; other libraries know themselves where they run."""
    if name in POSIX and str((names or {}).get("__name__")).split(".")[0] == "sfumato":
        raise ImportError(name)
    return anything(name, names, *rest, **named)


builtins.__import__ = as_on_windows  # here, so that it is done in workers too, which import this file


def main(model: str, images: str, out: str) -> None:
    """See the module."""
    import multiprocessing
    import pkgutil
    from importlib import import_module

    import sfumato

    for module in pkgutil.walk_packages(sfumato.__path__, "sfumato."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    multiprocessing.set_start_method("spawn", force=True)
    from sfumato.cli.main import main as run

    words = (
        f"train network --pretrained_model_name_or_path={model} --output_dir={out} --output_name=out --max_train_steps=1 --network_dim=1 "
        "--resolution=64,64 --max_data_loader_n_workers=1"
    )
    raise SystemExit(run([*words.split(), f"--train_data_dir={images}"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
