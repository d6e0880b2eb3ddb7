"""Encodes what is not in the store yet, once: the latents of images and the text outputs of captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from typing import TypeVar

import torch
from torch import Tensor

from sfumato.config import DatasetConfig
from sfumato.data import augment, captions, imported
from sfumato.data.batch import Cond
from sfumato.data.claims import shares
from sfumato.data.entries import Damaged
from sfumato.data.many import uncollected
from sfumato.data.plan import Item, Plan
from sfumato.data.store import FileIndex, KeyParts, Keys, Progress, TensorStore, trust, unusable, why, writing
from sfumato.data.strategies import LatentsCachingStrategy, TextEncoderOutputsCachingStrategy
from sfumato.errors import UserError
from sfumato.formats.paths import absolute

VERSION = 2
"""Raised whenever the same image or caption would give other numbers than before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedEntries:
    """What a cache holds for a plan."""

    store: TensorStore
    keys: Mapping[Hashable, str]
    """Image or caption -> key in the store."""
    found: int = 0
    """Entries that were there."""
    encoded: int = 0
    """Entries that were made now."""
    changed: Sequence[tuple[str, str]] = field(default_factory=tuple)
    """(image or caption, why it was encoded), for each entry made."""
    imported: int = 0
    """Entries that were taken from files of sd-scripts."""
    refused: str = ""
    """Why none was, where there are such files."""

    @property
    def reasons(self) -> dict[str, int]:
        """Why entries were made -> how many."""
        return dict(Counter(reason for _, reason in self.changed))

    def __str__(self) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.reasons.items())
        imported = f"{self.imported} imported from sd-scripts' files, " if self.imported else ""
        made = f"{self.encoded} encoded" + (f" ({reasons})" if reasons else "")
        return f"{self.found} found, {imported}{made}" + (f"; {self.refused}" if self.refused else "")

    def read(self, name: Hashable, what: str) -> dict[str, Tensor]:
        """The entry of an image or caption. Errors: `UserError` when it is not there any more, or is damaged; `what`
        begins the message."""
        try:
            entry = self.store.get(self.keys[name])
        except Damaged as error:
            raise UserError(f"{what} cannot be used ({error}), and are made anew at the next start") from error
        if entry is None:
            raise UserError(f"{what} are gone, and are made anew at the next start")
        return entry


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedLatents(CachedEntries):
    """The latents of a plan's images, by place in `plan.items`."""

    strategy: LatentsCachingStrategy

    def latents(self, plan: Plan, place: int, *, flip: bool) -> dict[str, Tensor]:
        """The "latents" (c, h, w) of an image, in fp32, and its "mask" if it has one. Errors: as `read`."""
        item = plan.items[place]
        what = f"the cached latents of {item.image.path}"
        entry = self.read(place, what)
        if wrong := latents_mismatch(entry, plan, item, self.strategy):
            raise UserError(f"{what} cannot be used ({wrong}), and are made anew at the next start")
        found = {"latents": entry["latents_flipped" if flip else "latents"].float()}
        if "mask" in entry:
            found["mask"] = entry["mask"].flip(2) if flip else entry["mask"]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedText(CachedEntries):
    """The text outputs of a plan's captions, by caption."""

    strategy: TextEncoderOutputsCachingStrategy

    def cond(self, captions: Sequence[str]) -> Cond:
        """The cond of a batch. Errors: as `read`."""
        return self.strategy.join([self.read(each, f"the cached text outputs of {each!r}") for each in captions])


_Cached = TypeVar("_Cached", CachedLatents, CachedText)


@dataclass(slots=True)
class _Counted:
    """Work that is done in several parts."""

    progress: Progress | None
    total: int
    done: int = 0

    def add(self, n: int) -> None:
        self.done += n
        if self.progress:
            self.progress(self.done, self.total)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The entries that a plan needs, in its order."""

    owners: Sequence[str]
    """What each is for."""
    keys: Sequence[str]
    parts: Callable[[int], KeyParts]
    """Place -> what its key was made of."""


@dataclass(frozen=True, slots=True)
class _Job:
    """An entry to be made."""

    key: str
    owner: str
    reason: str
    item: int
    """Its place among those wanted."""


def latent_parts(plan: Plan, item: Item, vae_fingerprint: str, dtype: torch.dtype) -> KeyParts:
    """All that the latents of an image depend on."""
    subset, placement = plan.subset(item), item.placement
    mask = "alpha" if subset.alpha_mask else item.image.mask_digest
    return {
        "version": VERSION,
        "picture": item.image.digest,
        "mask": mask,
        "bucket": list(placement.bucket),
        "resized": list(placement.resized),
        "crop": list(placement.centre),
        "resize_interpolation": subset.resize_interpolation,
        "flip_aug": subset.flip_aug,
        "VAE": vae_fingerprint,
        "dtype": str(dtype).removeprefix("torch."),
        "stride": plan.stride,
    }


@uncollected
def _latent_keys(plan: Plan, parts: Callable[[int], KeyParts]) -> list[str]:
    """The key of each item's latents."""
    alike: dict[Hashable, Keys] = {}
    keys = []
    for i, item in enumerate(plan.items):
        image = item.image
        same = item.dataset, image.subset, item.placement, image.mask_digest
        if (found := alike.get(same)) is None:
            found = alike[same] = Keys("picture", partial(parts, i))
        keys.append(found.of(image.digest))
    return keys


def cache_latents(
    plan: Plan,
    store: TensorStore,
    index: FileIndex,
    encode: Callable[[Tensor], Tensor],
    vae_fingerprint: str,
    strategy: LatentsCachingStrategy,
    *,
    unscale: Callable[[Tensor], Tensor] = lambda latents: latents,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> CachedLatents:
    """See that the store holds the latents of every image of the plan; encode those that it lacks.

    `encode`: (b, 3, H, W) in [-1, 1], fp32 on the CPU -> (b, c, h, w) raw latents on any device. `vae_fingerprint`: of
    its weights; `unscale`: latents of the denoiser -> raw ones. Latents that sd-scripts has cached are imported where
    they fit. Raises UserError for options that cached latents cannot follow, for an image that cannot be read any
    more, and for latents that are not finite.
    """
    check_fixed(plan.datasets, latents=True)

    def parts(place: int) -> KeyParts:
        return latent_parts(plan, plan.items[place], vae_fingerprint, strategy.dtype)

    keys = _latent_keys(plan, parts)
    wanted = _Wanted([_owner(item) for item in plan.items], keys, parts)
    places = {name: i for i, name in enumerate(keys)}

    def mismatch(name: str, entry: Mapping[str, Tensor]) -> str:
        return latents_mismatch(entry, plan, plan.items[places[name]], strategy)

    jobs = _missing(store, index, "latents", wanted, mismatch, progress)
    counted = _Counted(progress, len(jobs))

    made: set[str] = set()

    def make(jobs: Sequence[_Job]) -> None:
        portions = list(_portions(plan, jobs, batch_size))
        for share in shares(store, index, portions):
            with writing(store) as put:
                for portion, tensors in _read_ahead(plan, share):
                    for job, entry in zip(portion, _entries(plan, portion, tensors, encode, strategy), strict=True):
                        put(job.key, entry)
                    made.update(job.key for job in portion)
                    counted.add(len(portion))

    shapes = {job.key: (plan.items[job.item], latents_shape(plan, plan.items[job.item], strategy)) for job in jobs}
    read = imported.latent_readers(plan, shapes, strategy, unscale)
    adopted = _adopt(store, jobs, read, make, imported.FARTHEST_LATENTS, counted)
    cached = CachedLatents(store=store, keys=dict(enumerate(keys)), strategy=strategy)
    return _finish(cached, index, "latents", wanted, _done_here(jobs, made, adopted), adopted)


def latents_shape(plan: Plan, item: Item, strategy: LatentsCachingStrategy) -> tuple[int, int, int]:
    """(c, h, w) of an image's latents."""
    width, height = item.placement.bucket
    return strategy.channels, height // plan.stride, width // plan.stride


def latents_mismatch(entry: Mapping[str, Tensor], plan: Plan, item: Item, strategy: LatentsCachingStrategy) -> str:
    """How an entry differs from what is stored of such an image, or nothing."""
    shape, subset = latents_shape(plan, item, strategy), plan.subset(item)
    expected = {"latents": shape}
    if subset.flip_aug:
        expected["latents_flipped"] = shape
    if subset.alpha_mask or item.image.mask_path:
        expected["mask"] = (1, *shape[1:])
    if {name: tuple(t.shape) for name, t in entry.items()} != expected:
        return "its entry is of another shape"
    return "" if entry["latents"].dtype == strategy.dtype else "its entry is of another dtype"


def check_fixed(datasets: Iterable[DatasetConfig], *, latents: bool = False, texts: bool = False) -> None:
    """Errors: `UserError` for options that change each time what is to be cached."""
    wrong: list[str] = []
    for subset in (subset for dataset in datasets for subset in dataset.subsets):
        moving = [
            name for name in ("random_crop", "color_aug", "face_crop_aug_range") if latents and getattr(subset, name)
        ]
        wrong += [
            f"{subset.source}: {name} changes the image each time, so its latents cannot be cached: turn one off"
            for name in moving
        ]
        if texts and (names := captions.endless(subset)):
            wrong.append(
                f"{subset.source}: {', '.join(names)} changes the caption each time, so text outputs cannot be cached"
            )
    if wrong:
        raise UserError(*wrong)


@uncollected
def _missing(
    store: TensorStore,
    index: FileIndex,
    kind: str,
    wanted: _Wanted,
    mismatch: Callable[[str, Mapping[str, Tensor]], str],
    progress: Progress | None,
) -> list[_Job]:
    """The entries that must be made, each key once, with the reason."""
    keys, owners = wanted.keys, wanted.owners
    wrong = unusable(store, index, keys, mismatch, progress)
    lacking = list({keys[i]: i for i in reversed(range(len(keys))) if keys[i] in wrong}.values())[::-1]
    last = index.read(kind, [owners[i] for i in lacking])
    reasons = [wrong[keys[i]] or why(last.get(owners[i]), wanted.parts(i)) for i in lacking]
    return [_Job(keys[i], owners[i], reason, i) for i, reason in zip(lacking, reasons, strict=True)]


def _adopt(
    store: TensorStore,
    jobs: Sequence[_Job],
    read: imported.Readers,
    make: Callable[[Sequence[_Job]], None],
    farthest: float,
    counted: _Counted,
) -> imported.Adopted:
    """Do all jobs: those that have a file of sd-scripts by that if it fits, the others by encoding."""
    by_key = {job.key: job for job in jobs}
    with writing(store) as write:

        def put(key: str, entry: imported.Entry) -> None:
            write(key, entry)
            counted.add(1)

        adopted = imported.adopt(read, lambda keys: make([by_key[k] for k in keys]), store.get, put, farthest)
    done = {*adopted.taken, *adopted.encoded}
    make([job for job in jobs if job.key not in done])
    return adopted


def _done_here(jobs: Sequence[_Job], made: set[str], adopted: imported.Adopted) -> list[_Job]:
    """Without those that another process has made meanwhile."""
    return [job for job in jobs if job.key in made or job.key in adopted.taken]


def _portions(plan: Plan, jobs: Sequence[_Job], batch_size: int) -> Iterator[list[_Job]]:
    """Jobs of the same bucket and mirroring, `batch_size` together."""
    groups: dict[tuple[object, ...], list[_Job]] = {}
    for job in jobs:
        item = plan.items[job.item]
        groups.setdefault((item.placement.bucket, plan.subset(item).flip_aug), []).append(job)
    for members in groups.values():
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _read_ahead(plan: Plan, portions: Iterable[list[_Job]]) -> Iterator[tuple[list[_Job], list[dict[str, Tensor]]]]:
    """Each portion with its images; the next portion's are read while this one's are encoded."""

    def read(job: _Job) -> dict[str, Tensor]:
        item = plan.items[job.item]
        return augment.load(item.image, plan.subset(item), item.placement, item.placement.centre, stride=plan.stride)

    with ThreadPoolExecutor(4) as pool:
        waiting = None
        for portion in portions:
            coming = portion, [pool.submit(read, job) for job in portion]
            if waiting:
                yield waiting[0], [future.result() for future in waiting[1]]
            waiting = coming
        if waiting:
            yield waiting[0], [future.result() for future in waiting[1]]


def _entries(
    plan: Plan,
    portion: Sequence[_Job],
    tensors: Sequence[Mapping[str, Tensor]],
    encode: Callable[[Tensor], Tensor],
    strategy: LatentsCachingStrategy,
) -> list[dict[str, Tensor]]:
    """The entry of each image: latents, those of the mirrored image where images are mirrored, the mask where it has
    one."""
    pixels = torch.stack([t["pixels"] for t in tensors])  # (b, 3, H, W)
    entries = [{"latents": latents} for latents in _encoded(plan, portion, pixels, encode, strategy)]
    if plan.subset(plan.items[portion[0].item]).flip_aug:
        for entry, latents in zip(entries, _encoded(plan, portion, pixels.flip(3), encode, strategy), strict=True):
            entry["latents_flipped"] = latents
    for entry, read in zip(entries, tensors, strict=True):
        entry |= {name: read[name] for name in ("mask",) if name in read}
    return entries


def _encoded(
    plan: Plan,
    portion: Sequence[_Job],
    pixels: Tensor,
    encode: Callable[[Tensor], Tensor],
    strategy: LatentsCachingStrategy,
) -> list[Tensor]:
    """(c, h, w) latents of each image, as they are stored."""
    with torch.no_grad():
        latents = encode(pixels).detach().cpu().to(strategy.dtype)
    for job, latent in zip(portion, latents, strict=True):
        if not torch.isfinite(latent).all():
            raise UserError(
                f"{plan.items[job.item].image.path}: the VAE gives numbers that are not finite; it overflows in half "
                "precision: "
                "use --no_half_vae, or a VAE made for fp16"
            )
    return [latent.clone() for latent in latents]


def cache_texts(
    plan: Plan,
    store: TensorStore,
    index: FileIndex,
    encode: Callable[[Sequence[Sequence[str]]], Iterable[Cond]],
    fingerprint: str,
    strategy: TextEncoderOutputsCachingStrategy,
    *,
    settings: Mapping[str, object],
    batch_size: int = 8,
    progress: Progress | None = None,
) -> CachedText:
    """See that the store holds the text outputs of every caption that the plan can give; encode those that it lacks.

    `encode`: batches of captions -> the cond of each, one after another, without gradients. `fingerprint`: of the
    encoders' weights. `settings`: all that tokens and outputs depend on besides (JSON values). `progress`: of looking
    for entries; `encode` has its own.
    Raises UserError when an option makes captions too many to encode beforehand, and for outputs that are not finite.
    """
    owners = every_caption(plan)
    common = {"version": VERSION, "text encoder": fingerprint, "dtype": str(strategy.dtype).removeprefix("torch.")}
    common |= {f"setting {name}": value for name, value in {**strategy.settings, **settings}.items()}
    texts, of = list(owners.values()), Keys("caption", lambda: common).of
    keys: dict[Hashable, str] = {caption: of(caption) for caption in dict.fromkeys(texts)}
    wanted = _Wanted(list(owners), [keys[text] for text in texts], lambda place: {"caption": texts[place], **common})
    stored = set(strategy.fields) - set(strategy.ragged.values())

    def mismatch(_: str, entry: Mapping[str, Tensor]) -> str:
        if entry.keys() != stored:
            return "its entry holds other fields"
        same = all(t.dtype == strategy.dtype for t in entry.values() if t.is_floating_point())
        return "" if same else "its entry is of another dtype"

    jobs = _missing(store, index, "texts", wanted, mismatch, progress)
    made: set[str] = set()

    def make(jobs: Sequence[_Job]) -> None:
        portions = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
        # In one share: encoders that are read block by block are read once for it.
        for share in shares(store, index, portions, len(jobs)):
            conds = encode([[texts[job.item] for job in portion] for portion in share])
            with writing(store) as put:
                for portion, cond in zip(share, conds, strict=True):
                    for i, job in enumerate(portion):
                        entry = strategy.entry(cond, i)
                        put(job.key, {name: _stored(t, strategy.dtype, texts[job.item]) for name, t in entry.items()})
                    made.update(job.key for job in portion)

    read = imported.text_readers(plan, {texts[job.item]: job.key for job in jobs}, strategy)
    adopted = _adopt(store, jobs, read, make, imported.FARTHEST_TEXTS, _Counted(progress, len(jobs)))
    cached = CachedText(store=store, keys=keys, strategy=strategy)
    return _finish(cached, index, "texts", wanted, _done_here(jobs, made, adopted), adopted)


@uncollected
def every_caption(plan: Plan) -> dict[str, str]:
    """Owner (an image, and the number of its caption) -> caption, for all captions that the plan can give. Errors:
    `UserError`."""
    check_fixed(plan.datasets, texts=True)
    owners: dict[str, str] = {}
    for item in plan.items:
        found = captions.every(item.image.captions, plan.subset(item))
        if found is None:
            raise UserError(
                f"{item.image.path}: its wildcards give too many captions to cache their text outputs: turn that off"
            )
        owners |= {_owner(item) + (f"#{i}" if i else ""): caption for i, caption in enumerate(found)}
    return owners


def _stored(value: Tensor, dtype: torch.dtype, caption: str) -> Tensor:
    value = value.detach().cpu()
    value = value.to(dtype) if value.is_floating_point() else value
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise UserError(
            f"the text encoder's output for {caption!r} is not finite in {dtype}: compute it in bf16 or fp32"
        )
    return value.clone()


def _owner(item: Item) -> str:
    return f"{item.dataset}.{item.image.subset}:{absolute(item.image.path)}"


def _finish(
    cached: _Cached,
    index: FileIndex,
    kind: str,
    wanted: _Wanted,
    jobs: Sequence[_Job],
    adopted: imported.Adopted,
) -> _Cached:
    """The cache with its counts, once `jobs` are made. Remembers what every owner now depends on, those found by
    another's entry too."""
    trust(cached.store, index, [job.key for job in jobs])
    _remember(index, kind, wanted)
    taken = set(adopted.taken)
    changed = tuple((job.owner.partition(":")[2], job.reason) for job in jobs if job.key not in taken)
    found = len(set(cached.keys.values())) - len(jobs)
    return replace(
        cached,
        found=found,
        encoded=len(changed),
        changed=changed,
        imported=len(taken),
        refused=adopted.refused,
    )


@uncollected
def _remember(index: FileIndex, kind: str, wanted: _Wanted) -> None:
    """Note what every owner depends on, unless these very ones were the last that were noted: then nothing is read."""
    pairs = "\n".join(map(" ".join, zip(wanted.keys, wanted.owners, strict=True)))
    now = blake2b(pairs.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
    if index.read(kind, [""]).get("") == now:
        return
    parts = {owner: wanted.parts(i) for i, owner in enumerate(wanted.owners)}
    last = index.read(kind, parts)
    index.write(kind, {owner: p for owner, p in parts.items() if last.get(owner) != p} | {"": now})
