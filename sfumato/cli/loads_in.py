"""Prints docs/loads-in.md, the page of what other programs load of our adapter files: `python -m
sfumato.cli.loads_in`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sfumato import families
from sfumato.formats.clients import CLIENTS, KINDS, Client, Names, runs

HEAD = """# What loads where

Made by `python -m sfumato.cli.loads_in > docs/loads-in.md` from the data in `sfumato/formats/clients.py` and
`sfumato/families/*/clients.py`; do not edit.

A program loads a layer of an adapter where it knows both the layer's name and the kind of adapter. `sfumato plan` says
before a training what each program will load of its result, the training says it after each save, and `sfumato show`
of any adapter file: always by the keys of the file itself.

`tests/families/test_loads_in.py` holds ComfyUI's column against tables of all keys of a denoiser that it takes, and
`tests/parity/test_loads_in_diffusers.py` has diffusers load a file of every cell. The rest was read in the sources.
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD, *_sources(), *_kinds()]
    for name in families.names():
        if rows := families.facts(name).loads_in:
            parts += _family(name, rows)
    return "\n".join(parts)


def _sources() -> Iterator[str]:
    yield "## The programs\n"
    for client in CLIENTS:
        yield f"- **{client.name}** {client.source}." + _rules(client)
    yield ""


def _rules(client: Client) -> str:
    """What makes a program load nothing of a file."""
    if client.tolerates < float("inf"):
        return f" Of a file with more than {client.tolerates} tensors that it does not know it loads nothing."
    return " Of a file with a kind that it does not know it loads nothing." if client.stops else ""


def _kinds() -> Iterator[str]:
    yield "## Kinds of adapters\n"
    yield from _table(
        "kind", CLIENTS, ((kind.title, [_kind(client, of) for client in CLIENTS]) for of, kind in KINDS.items())
    )


def _kind(client: Client, kind: str) -> str:
    if kind in client.kinds:
        return client.kinds[kind] or "yes"
    return client.misreads.get(kind, "-")


def _family(family: str, rows: Sequence[Names]) -> Iterator[str]:
    clients = [client for client in CLIENTS if runs(client, rows)]
    yield f"## {family}\n"
    others = [client.name for client in CLIENTS if client not in clients]
    if others:
        yield f"{', '.join(others)} does not run these models.\n"
    cells = (
        (f"{row.dialect}, {row.component}: `{row.names}`", [_names(client, row) for client in clients]) for row in rows
    )
    yield from _table("names of layers", clients, cells)


def _names(client: Client, row: Names) -> str:
    if part := row.partly.get(client.name):
        return f"without the {part.lacks}"
    return "all" if client.name in row.known_to else "refuses the file" if client.name in row.refused_by else "-"


def _table(first: str, clients: Sequence[Client], rows: Iterator[tuple[str, list[str]]]) -> Iterator[str]:
    yield f"| {first} | {' | '.join(client.name for client in clients)} |"
    yield f"|---{'|---' * len(clients)}|"
    for title, cells in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in (title, *cells)) + " |"
    yield ""


if __name__ == "__main__":
    print(page(), end="")
