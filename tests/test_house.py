"""The house's own rules: sizes of files and functions, family names kept in their folders, edges between families."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from sfumato import families

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "sfumato").rglob("*.py"))
SHARED_NETS: set[tuple[str, str]] = {("sdxl", "sd"), ("chroma", "flux")}
"""(family, family whose modules it may import)."""


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All of a file's syntax, the module first."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_a_file_fits_its_budget(path: Path) -> None:
    limit = 700 if path.name == "net.py" else 500
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_functions_fit_a_screen(path: Path) -> None:
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in nodes(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > 60
    ]
    assert not long


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_a_file_says_what_it_is_for(path: Path) -> None:
    module = nodes(path)[0]
    assert isinstance(module, ast.Module) and ast.get_docstring(module)


@pytest.mark.parametrize("path", [p for p in FILES if "families" not in p.parts], ids=ids)
def test_no_family_is_named_outside_its_folder(path: Path) -> None:
    """`family.name == "..."` and imports of `sfumato.families.<name>` stand nowhere but in families/."""
    names = set(families.names())
    for node in nodes(path):
        if isinstance(node, ast.Compare):
            constants = {c.value for c in [node.left, *node.comparators] if isinstance(c, ast.Constant)}
            assert not (constants & names), f"line {node.lineno} compares with a family's name"
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            assert not (parts[:2] == ["sfumato", "families"] and len(parts) > 2 and parts[2] in names), (
                f"line {node.lineno} imports a family"
            )


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.parent.name == "families"], ids=ids)
def test_families_import_one_another_only_where_allowed(path: Path) -> None:
    own, names = path.parent.name, set(families.names())
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sfumato.families."):
            other = node.module.split(".")[2]
            assert other == own or other not in names or (own, other) in SHARED_NETS


def test_the_device_layer_is_one_module() -> None:
    """`torch.cuda` is named in train/dist.py and tools/doctor.py alone (and memory/, which measures it)."""
    allowed = {"train/dist.py", "tools/doctor.py"}
    named = {p.relative_to(ROOT / "sfumato").as_posix() for p in FILES if "torch.cuda" in p.read_text(encoding="utf-8")}
    assert named <= allowed
