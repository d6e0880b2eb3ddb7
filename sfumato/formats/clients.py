"""Which programs load an adapter file, and how much of it: what each takes, as data with its source, and the answer on
a file's own keys.

What the layers are called is a family's part (`Facts.loads_in`), what stands in them is every family's: a layer is
loaded where a program knows both its name and all kinds of tensors that it has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

Shape = tuple[int, ...]


# --- what stands in a layer ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of adapter, or what may stand beside one, by the tensors that only it has."""

    title: str
    tensors: str
    """Pattern of what follows a layer's name."""
    fits: Callable[[Shape], bool] = lambda shape: True
    """Whether a tensor of this shape is of this kind."""


_LORA = r"lora_(down|up|mid)\.weight|lora_[AB](\.default)?\.weight|lora\.(down|up)\.weight"
WORDS = "bundle_emb."
"""What stands before the names of words that are kept beside an adapter (textual inversion)."""
KINDS = {
    "lora": Kind(title="LoRA", tensors=_LORA),
    "dora": Kind(
        title="DoRA, a magnitude per input", tensors="dora_scale", fits=lambda shape: len(shape) < 2 or shape[0] == 1
    ),
    "dora_rows": Kind(
        title="DoRA, a magnitude per output", tensors="dora_scale", fits=lambda shape: len(shape) > 1 and shape[0] != 1
    ),
    "dora_peft": Kind(title="DoRA in PEFT's names", tensors=r"lora_magnitude_vector(\.default)?(\.weight)?"),
    "loha": Kind(title="LoHa", tensors=r"hada_(w[12]_[ab]|t[12])"),
    "lokr": Kind(title="LoKr", tensors=r"lokr_(w[12](_[ab])?|t[12])"),
    "oft": Kind(title="OFT", tensors="oft_blocks", fits=lambda shape: len(shape) != 4),
    "boft": Kind(title="BOFT", tensors="oft_blocks", fits=lambda shape: len(shape) == 4),
    "oft_diag": Kind(title="OFT of LyCORIS 2", tensors="oft_diag"),
    "oft_peft": Kind(title="OFT on inputs (PEFT)", tensors=r"oft_R(\.\w+)*"),
    "ia3": Kind(title="(IA)3", tensors=r"weight|on_input"),
    "ia3_peft": Kind(title="(IA)3 in PEFT's names", tensors=r"ia3_l(\.default)?"),
    "glora": Kind(title="GLoRA", tensors=r"[ab][12]\.weight"),
    "diff": Kind(title="full difference", tensors=r"diff(_b)?|[wb]_norm"),
}
_OTHER = r"alpha|scale|rescale|bias"
"""What stands in layers of several kinds."""
_KEY = re.compile(rf"(.+?)\.({'|'.join((*(kind.tensors for kind in KINDS.values()), _OTHER))})")


def _layers(shapes: Mapping[str, Shape]) -> dict[str, tuple[frozenset[str], int]]:
    """Name of a layer -> the kinds of its tensors, and how many tensors it has. A tensor of no kind stands alone."""
    kinds: dict[str, set[str]] = {}
    tensors: dict[str, int] = {}
    for key, shape in shapes.items():
        match = _KEY.fullmatch(key)
        name, leaf = (match[1], match[2]) if match else (key, "")
        found = {of for of, kind in KINDS.items() if re.fullmatch(kind.tensors, leaf) and kind.fits(shape)}
        kinds.setdefault(name, set()).update(found or ({"unknown"} if not re.fullmatch(_OTHER, leaf) else ()))
        tensors[name] = tensors.get(name, 0) + 1
    return {name: (frozenset(found), tensors[name]) for name, found in kinds.items()}


# --- the programs ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A program that people load adapters in."""

    name: str
    source: str
    """What the data rests on: its version, and the files that were run or read."""
    kinds: Mapping[str, str]
    """Kind that it takes -> what it makes of it, where that is not quite what is meant; else ""."""
    misreads: Mapping[str, str] = field(default_factory=dict)
    """Kind that it takes for another, which is another change of the layer -> what it does."""
    tolerates: float = float("inf")
    """Tensors that it may not know in a file; of a file with more of them it loads nothing."""
    stops: bool = False
    """Whether it loads nothing of a file where a layer that it knows by name holds a kind that it does not know."""
    of_words: str = ""
    """What it makes of words beside the adapter, where it does not just read them."""


_ROWS = (
    "divides by the norm of the layer before the change, so that its effect is a little stronger or weaker "
    "(wd_on_out=False is exact there)"
)
_CONSTRAINT = "takes an alpha above 0 for the constraint as it is"
_DROPS = "drops the magnitudes of DoRA"
_ALIKE = dict.fromkeys(("lora", "dora", "loha", "lokr", "glora", "diff"), "")
"""What programs with LyCORIS' kinds take."""
CLIENTS = (
    Client(
        name="ComfyUI",
        source="0.3.64, run on files of each family and dialect; comfy/lora.py, comfy/weight_adapter/",
        kinds={
            **_ALIKE,
            "dora_rows": _ROWS,
            "oft": f"squares a strength other than 1.0, leaves rescale out, and {_CONSTRAINT}",
            "boft": f"leaves a layer without alpha out, and {_CONSTRAINT}",
        },
        misreads={"dora_peft": f"{_DROPS}, which it knows in kohya's names"},
    ),
    Client(
        name="Forge",
        source="2025-07; packages_3rdparty/comfyui_lora_collection/lora.py, backend/patcher/lora.py, "
        "extensions-builtin/sd_forge_lora/networks.py",
        kinds={**_ALIKE, "dora_rows": _ROWS},
        misreads={"dora_peft": f"{_DROPS}, which it knows in kohya's names"},
        tolerates=12,
    ),
    Client(
        name="diffusers",
        source="0.42.1, run on files of each family and dialect (tests/parity/test_loads_in_diffusers.py)",
        kinds={"lora": "", "dora_peft": ""},
        misreads=dict.fromkeys(("dora", "dora_rows"), f"{_DROPS}, which it knows in PEFT's names"),
        stops=True,
        of_words="for most families it refuses a file with words in it: `sfumato convert --to diffusers` omits them",
    ),
    Client(
        name="A1111",
        source="1.10; extensions-builtin/Lora/networks.py and network_*.py, modules/models/sd3/sd3_model.py",
        kinds={
            **_ALIKE,
            **dict.fromkeys(("oft", "boft", "oft_diag", "ia3"), ""),
        },
        misreads={
            "dora_rows": "takes DoRA's magnitudes of outputs for those of inputs (wd_on_out=False is right there)"
        },
        stops=True,
    ),
)
"""In the order in which they are reported."""


# --- what layers are called ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some of the layers of a component."""

    names: str
    """Pattern of the names that are known."""
    lacks: str
    """The others, in words: "attention"."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Names:
    """How one dialect calls the layers of one component, and which programs know them by it.

    A program that none of a family's records names does not run the family at all.
    """

    dialect: str
    component: str
    """In words that are the same for all dialects: "denoiser", "t5xxl"."""
    names: str
    """Pattern of the names of layers, without what follows for the tensor."""
    known_to: tuple[str, ...] = ()
    """Names of `CLIENTS`."""
    partly: Mapping[str, Part] = field(default_factory=dict)
    """Client -> what it knows of them."""
    refused_by: tuple[str, ...] = ()
    """Clients that load nothing of a file with such names."""
    written: bool = True
    """Whether the dialect is written here, not only read."""

    def knows(self, client: str, name: str) -> bool:
        """Whether a program knows the layer of this name."""
        part = self.partly.get(client)
        return client in self.known_to or (part is not None and re.fullmatch(part.names, name) is not None)


# --- the answer ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What one program loads of a file."""

    client: str
    loaded: int
    layers: int
    """All of them, as the file names them: a layer that is fused in the net may be several."""
    why: tuple[str, ...] = ()
    """What the program does not know, where that is not all."""
    dialect: str = ""
    """Another one in which it loads more; empty: there is none, or no need of one."""
    without: tuple[str, ...] = ()
    """Components that it loads in no dialect, where they stand in the way."""
    remarks: tuple[str, ...] = ()
    """What the program makes of the layers, where that is not what is meant."""

    def text(self, cure: str = "choose --dialect {}") -> str:
        """One line. `cure`: what is to be done for another dialect."""
        line = f"{self.client}: {f'{self.loaded:,}' if self.loaded else 'none'} of {self.layers:,} layers"
        if self.why:
            line += f"; it {', '.join(self.why)}"
        if self.dialect or self.without:
            cures = [cure.format(self.dialect)] if self.dialect else []
            cures += [f"leave {', '.join(self.without)} untrained"] if self.without else []
            line += f": {' and '.join(cures)}"
        return "; ".join((line, *self.remarks))


def together(programs: Iterable[Loaded]) -> list[str]:
    """A line for all programs of which the same is to be said."""
    same: dict[str, list[str]] = {}
    for each in programs:
        same.setdefault(each.text().removeprefix(f"{each.client}: "), []).append(each.client)
    return [f"{', '.join(clients)}: {what}" for what, clients in same.items()]


def loads_in(shapes: Mapping[str, Shape], family: Sequence[Names]) -> list[Loaded]:
    """What each program loads of an adapter file with tensors of these names and shapes. `family`: its
    `Facts.loads_in`."""
    words = any(name.startswith(WORDS) for name in shapes)
    layers = _layers({name: shape for name, shape in shapes.items() if not name.startswith(WORDS)})
    rows = {name: next((row for row in family if re.fullmatch(row.names, name)), None) for name in layers}
    found = [(client.of_words, _loaded(client, layers, rows, family)) for client in CLIENTS if runs(client, family)]
    return [replace(each, remarks=(*each.remarks, said)) if words and said else each for said, each in found]


def runs(client: Client, family: Sequence[Names]) -> bool:
    """Whether a program runs the models of a family."""
    return any(client.name in (*names.known_to, *names.partly) for names in family)


def _loaded(
    client: Client,
    layers: Mapping[str, tuple[frozenset[str], int]],
    rows: Mapping[str, Names | None],
    family: Sequence[Names],
) -> Loaded:
    nameless = {name for name, row in rows.items() if row is None or not row.knows(client.name, name)}
    # What is misread has another name in another dialect, so it does not matter where the layer's name is unknown.
    strange = {
        name: kinds - client.kinds.keys() - (client.misreads.keys() if name in nameless else set())
        for name, (kinds, _) in layers.items()
    }
    lost = nameless | {name for name, kinds in strange.items() if kinds}
    whole = (
        any(row and client.name in row.refused_by for row in rows.values())
        or (client.stops and any(strange[name] - client.misreads.keys() for name in lost - nameless))
        or sum(layers[name][1] for name in lost) > client.tolerates
    )
    loaded = [] if whole else [name for name in layers if name not in lost]
    unknown_kinds = frozenset[str]().union(*strange.values())
    why = [*_unknown_names(client, [rows[name] for name in nameless], family), *_unknown_kinds(client, unknown_kinds)]
    if whole and len(lost) < len(layers):
        why.append("and then loads nothing of the file")
    helps = nameless and not unknown_kinds
    dialect, without = _better(client, _among(rows.values(), family), family, whole) if helps else ("", ())
    return Loaded(
        client=client.name,
        loaded=len(loaded),
        layers=len(layers),
        why=tuple(why),
        dialect=dialect,
        without=without,
        remarks=tuple(_remarks(client, frozenset[str]().union(*(layers[name][0] for name in loaded)))),
    )


def _among(rows: Collection[Names | None], family: Sequence[Names]) -> list[Names]:
    """Those of a family's records that are among these, in their order."""
    return [row for row in family if any(row is each for each in rows)]


def _unknown_kinds(client: Client, kinds: frozenset[str]) -> Iterator[str]:
    for kind in sorted(kinds):
        title = KINDS[kind].title if kind in KINDS else "some of its tensors"
        yield client.misreads.get(kind) or f"does not know {title}"


def _unknown_names(client: Client, rows: Collection[Names | None], family: Sequence[Names]) -> Iterator[str]:
    """What a program does not know of these: parts of components, and whole components, by dialect."""
    dialects: dict[str, list[str]] = {}
    for row in _among(rows, family):
        part = row.partly.get(client.name)
        dialects.setdefault(row.dialect, []).append(f"the {part.lacks} of {row.component}" if part else row.component)
    for dialect, components in dialects.items():
        yield f"does not know {', '.join(components)} in {dialect} names"
    if None in rows:
        yield "does not know some names"


def _better(
    client: Client, found: Sequence[Names], family: Sequence[Names], whole: bool
) -> tuple[str, tuple[str, ...]]:
    """The dialect in which a program knows most of the components of a file, and those that it does not know there.

    Nothing where the file's own dialect is as good, or none is known. `whole`: it loads nothing of the file as it is.
    """
    if not found:
        return "", ()
    components = list(dict.fromkeys(row.component for row in found))
    known: dict[str, set[str]] = {row.dialect: set() for row in found}
    for row in family:
        if row.written and client.name in row.known_to:
            known.setdefault(row.dialect, set()).add(row.component)
    best = max(known, key=lambda dialect: len(known[dialect].intersection(components)), default="")
    without = tuple(component for component in components if component not in known.get(best, ()))
    if not known.get(best) or (not whole and best == found[0].dialect):
        return "", ()
    return ("" if best == found[0].dialect else best), without


def _remarks(client: Client, kinds: frozenset[str]) -> Iterator[str]:
    for kind in sorted(kinds):
        if remark := client.kinds.get(kind):
            yield f"{KINDS[kind].title}: it {remark}"
