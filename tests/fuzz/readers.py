"""Every reader of files and words that a user gives, with good inputs to break: a new reader joins by a line in `READERS`."""

from __future__ import annotations

import io
import json
import random
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from formats import gguf_files
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from PIL import Image

from fuzz.inputs import tree, turned, written
from sfumato import adapters, families
from sfumato.adapters import files as adapter_files
from sfumato.adapters.insert import from_state
from sfumato.cli import flags, kohya, toml
from sfumato.config import DatasetConfig, NetworkConfig, OptimizerConfig, SubsetConfig
from sfumato.data import captions, scan
from sfumato.data.entries import facts
from sfumato.data.store import FileIndex, TensorStore, why
from sfumato.errors import UserError
from sfumato.families import detect
from sfumato.formats import dialect, files, metadata, run
from sfumato.formats.files import stamp
from sfumato.formats.lazy import Lazy
from sfumato.models.base import Models
from sfumato.models.loading import outline
from sfumato.optim import arguments, build
from sfumato.optim.groups import Group
from sfumato.sampling import prompts
from sfumato.tools import show
from sfumato.train import log
from sfumato.train.trainables import read_adapter


@dataclass(frozen=True)
class Stage:
    """Where readers are tried: a folder of their own, and good files that are only read."""

    folder: Path
    base: Path
    """A base model of a few tensors, as far as a header goes."""
    model: Path
    """A tiny model of Stable Diffusion 1.x."""
    images: Path

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path


@dataclass(frozen=True)
class Reader:
    """A reader, and what it is given."""

    name: str
    inputs: Callable[[Stage], SearchStrategy[Any]]
    read: Callable[[Stage, Any], object]
    examples: int = 200


# --- weight files ---

HEADER = {
    "__metadata__": {"format": "pt", "ss_network_dim": "4"},
    "a.lora_down.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "a.lora_up.weight": {"dtype": "F16", "shape": [3, 2], "data_offsets": [24, 36]},
    "a.alpha": {"dtype": "BF16", "shape": [], "data_offsets": [36, 38]},
}


def safetensors(text: bytes, size: int = 38) -> bytes:
    """A file with this header and `size` bytes of zeros."""
    return len(text).to_bytes(8, "little") + text + bytes(size)


def _header(stage: Stage, text: bytes) -> None:
    path = stage.file("x.safetensors", safetensors(text))
    show.text(show.describe(path))
    files.load(path)


def _weights(suffix: str, stage: Stage, content: bytes) -> None:
    path = stage.file(f"x{suffix}", content)
    show.text(show.describe(path))
    files.check_finite(files.load(path), "x")


@cache
def _gguf_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        gguf_files.write(path, {"a.weight": torch.ones(2, 64), "b": torch.ones(3)})
        return path.read_bytes()


def _gguf(stage: Stage, content: bytes) -> None:
    path = stage.file("x.gguf", content)
    show.text(show.describe(path))
    files.check_finite(Lazy.of([path]), "x")


@cache
def _pickle(zipped: bool) -> bytes:
    out = io.BytesIO()
    held = {
        "state_dict": {"a": torch.ones(2, 3), "b": {"c": torch.zeros(4, dtype=torch.float16)}},
        "step": 3,
        "name": "x",
    }
    torch.save(held, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


@cache
def _shapes(name: str) -> dict[str, list[int]]:
    import gzip

    text = gzip.decompress((Path(__file__).parents[1] / "fixtures" / "keys" / f"{name}.json.gz").read_bytes())
    # A few of each, spread over the file: the marks by which families know their files are at both ends and between.
    found = json.loads(text)
    names = list(found)
    return {n: found[n] for n in [*names[:20], *names[20 :: max(1, len(names) // 60)]]}


def _detected(stage: Stage, text: bytes) -> None:
    """Shapes as a header may have them: text to lists of counts."""
    found = json.loads(text)
    if isinstance(found, dict):
        whole = {
            n: tuple(s) for n, s in found.items() if isinstance(s, list) and all(type(i) is int and i >= 0 for i in s)
        }
        detect.identify(whole)
        detect.unknown(whole)


def _kinds() -> list[str]:
    return sorted(
        p.name.removesuffix(".json.gz") for p in (Path(__file__).parents[1] / "fixtures" / "keys").glob("*.gz")
    )


# --- models ---


@cache
def _outline(model: Path) -> Models:
    return outline(families.family("sd"), str(model), families.facts("sd").options())


def _model_header(stage: Stage) -> Any:
    content = stage.model.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def _model(stage: Stage, text: bytes) -> None:
    """A tiny model whose header was changed and laid out anew, so that only names, shapes and formats are odd."""
    try:
        entries = json.loads(text)
        tensors = {
            n: (e["dtype"], tuple(int(i) for i in e["shape"])) for n, e in entries.items() if n != "__metadata__"
        }
        at, laid = 0, {}
        for name, (dtype, shape) in tensors.items():
            size = int(np.prod(shape, dtype=np.int64)) * {"F32": 4, "F16": 2, "I32": 4, "BF16": 2, "I64": 8}[dtype]
            laid[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return
    if not 0 <= at < 1 << 28 or any(i < 0 for _, shape in tensors.values() for i in shape):
        return
    path = stage.folder / "m.safetensors"
    header = json.dumps(laid).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + at)
    detect.detect_file(path)
    outline(families.family("sd"), str(path), families.facts("sd").options())


UNET = {
    "in_channels": 4,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "block_out_channels": [32, 64, 64, 64],
}
CLIP = {"hidden_size": 64, "num_attention_heads": 1, "hidden_act": "quick_gelu"}
VAE = {"scaling_factor": 0.18215, "shift_factor": None, "latent_channels": 4}


def _part(name: str, stage: Stage, text: bytes) -> None:
    """A part of the tiny model with a config.json beside it."""
    source = _outline(stage.model).source
    held = source.components[name]
    from dataclasses import replace

    from sfumato.models.locate import read_json

    replace(held, config=read_json(stage.file("config.json", text))).empty()


INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
}
SHARDS = {"metadata": {"total_size": 38}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}


def _folder(name: str, stage: Stage, text: bytes) -> None:
    folder = stage.file(f"pipeline/{name}", text).parents[name.count("/")]
    for other, content in {
        "model_index.json": json.dumps(INDEX).encode(),
        "unet/model-1.safetensors": safetensors(b"{}", 0),
    }.items():
        if other != name and not (folder / other).exists():
            stage.file(f"pipeline/{other}", content)
    show.text(show.describe(folder))
    detect.detect_file(folder)


ADAPTER = {
    f"{name}.{leaf}": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    for name in (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
    )
    for leaf, shape in {
        "lora_down.weight": [2, 32 if "unet" in name else 64],
        "lora_up.weight": [32 if "unet" in name else 128, 2],
        "alpha": [],
    }.items()
}


def _adapter(stage: Stage, text: bytes) -> None:
    """An adapter of these names and shapes, on the tiny model."""
    try:
        entries = json.loads(text)
        kinds = {"F32": torch.float32, "F16": torch.float16, "I32": torch.int32, "F4": torch.bool}
        tensors = {
            n: torch.ones([int(i) for i in e["shape"] if int(i) < 1000], dtype=kinds[e["dtype"]])
            for n, e in entries.items()
        }
        files.save(stage.folder / "a.safetensors", tensors)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError, RecursionError, UnicodeError):
        return
    models = _outline(stage.model)
    from_state(models.nets(), read_adapter(models, stage.folder / "a.safetensors")).remove()


def _leaves(stage: Stage, drawn: list[tuple[str, list[int]]]) -> None:
    """Tensors of any shapes under an adapter's names."""
    models = _outline(stage.model)
    (text,) = models.encoders.items()
    sites = [(text[0], path) for path, layer in text[1].named_modules() if isinstance(layer, torch.nn.Linear)]
    tensors = {name: torch.ones(shape) for name, shape in drawn}
    from_state(dict([text]), adapter_files.read(_dialects(stage.model), tensors, sites)).remove()


@cache
def _dialects(model: Path) -> list[dialect.Dialect]:
    models = _outline(model)
    return list(models.dialects.values())


# --- words ---

CONFIG = """
[model]
pretrained_model_name_or_path = "{base}"
[training]
learning_rate = 1e-4
max_train_steps = 10
network_args = ["conv_dim=4", "dropout=0.1"]
text_encoder_lr = [1e-5]
lr_scheduler = "cosine"
lr_warmup_steps = 0.1
train_data_dir = '{images}'
output_dir = "out"
save_every_n_steps = 5
resolution = "512,512"
"""
DATASET = """
[general]
shuffle_caption = true
caption_extension = ".txt"
[[datasets]]
resolution = [512, 768]
batch_size = 2
  [[datasets.subsets]]
  image_dir = '{images}'
  num_repeats = 2
  class_tokens = "a cat"
  [[datasets.subsets]]
  image_dir = '{images}'
  is_reg = true
"""
DATASET_JSON = {
    "general": {"shuffle_caption": True},
    "datasets": [
        {"resolution": [512, 768], "batch_size": 2, "subsets": [{"image_dir": "p", "num_repeats": 2, "is_reg": False}]}
    ],
}
PROMPTS = "# two\na cat --w 512 --h 768 --d 1 --s 20 --l 7.5 --n blurry, dull --ss euler\n(a dog:1.2), [red] --g 3.5\n"
PROMPTS_TOML = '[prompt]\nwidth = 512\nsample_steps = 20\n[[prompt.subset]]\nprompt = "a cat"\nseed = 1\n[[prompt.subset]]\nprompt = "b"\n'
PROMPTS_JSON = [{"prompt": "a cat", "width": 512, "scale": 7.5, "seed": 1, "sample_sampler": "euler"}, "a dog --w 256"]
COMMAND = (
    "--learning_rate=1e-4 --network_dim 8 --network_args conv_dim=4 dropout=0.1 --text_encoder_lr 1e-5 --cache_latents "
    "--resolution 512,512 --max_train_steps 10 --optimizer_args weight_decay=0.1 --output_name x --sample_sampler euler"
)
NETWORK_ARGS = (
    "conv_dim=4",
    "conv_alpha=1.0",
    "dropout=0.1",
    "loraplus_lr_ratio=4",
    "train_block_indices=0-5,8",
    "emb_dims=[4,0,0,0,0,4]",
)
OPTIMIZER_ARGS = ("weight_decay=0.1", "betas=(0.9, 0.99)", "fused=True", "eps=1e-8", "foreach=None")
OPTIMIZERS = ("AdamW", "Lion", "Prodigy", "AdaFactor", "SGDNesterov", "AdamWScheduleFree", "DAdaptation", "Adagrad")


def _placed(text: str, stage: Stage) -> str:
    return text.replace("{base}", stage.base.as_posix()).replace("{images}", stage.images.as_posix())


def _config(stage: Stage, text: str) -> None:
    flags.resolve_all(["--config", str(stage.file("x.toml", text))], "network")


def _base_words(stage: Stage) -> list[str]:
    return ["--pretrained_model_name_or_path", str(stage.base), "--train_data_dir", str(stage.images)]


def _datasets(suffix: str, stage: Stage, text: bytes | str) -> None:
    words = [
        "--pretrained_model_name_or_path",
        str(stage.base),
        "--dataset_config",
        str(stage.file(f"d{suffix}", text)),
    ]
    flags.resolve_all(words, "network")


def _command(stage: Stage, text: str) -> None:
    flags.resolve_all([*_base_words(stage), *text.split(" ")], "network")


def _kohya(stage: Stage, text: str) -> None:
    kohya.resolve("train_network", [*_base_words(stage), *text.split(" ")])


def _network_args(stage: Stage, args: list[str]) -> None:
    for family in families.names():
        try:
            adapters.parse(NetworkConfig(network_args=tuple(args)), families.facts(family).network_args)
        except UserError as error:
            last = error
    raise last


def _optimizer(stage: Stage, drawn: tuple[str, str]) -> None:
    kind, arg = drawn
    build.optimizer(
        OptimizerConfig(optimizer_type=kind, optimizer_args=(arg,)),
        [Group(name="x", lr=1e-4, parameters=[torch.nn.Parameter(torch.ones(2, 2))])],
    )


# --- states, caches, logs ---


def _state(stage: Stage) -> Path:
    folder = stage.folder / "x-state"
    if not folder.exists():
        packed, tensors = run.pack(
            {"state": {0: {"step": 3, "m": torch.ones(2)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.99)}]}
        )
        run.save_run(folder, {"optimizer": tensors}, {"step": 3, "optimizer": packed})
    return folder


def _manifest(stage: Stage) -> Any:
    return json.loads((_state(stage) / "manifest.json").read_text(encoding="utf-8"))


def _resumed(stage: Stage, text: bytes) -> None:
    folder = _state(stage)
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()
    try:
        manifest.write_bytes(text)
        run.newest(folder.parent, "x-state")
        run.load_run(folder)
    finally:
        manifest.write_bytes(whole)


PACKED = {
    "state": {"$dict": [[0, {"m": {"$tensor": "m"}, "s": {"$float": "nan"}}]]},
    "groups": [{"betas": {"$tuple": [0.9, 0.99]}}],
}


def _unpacked(stage: Stage, text: bytes) -> None:
    try:
        packed = json.loads(text)
    except (ValueError, RecursionError):
        return
    run.unpack(packed, {"m": torch.ones(2)})


@cache
def _entry() -> bytes:
    tensors = {"latents": torch.ones(4, 2, 2, dtype=torch.float16)}
    return b"".join(files.serialise(tensors, facts("ab" * 20, tensors)))


def _cached(stage: Stage, content: bytes) -> None:
    store = TensorStore(stage.folder / "cache")
    path = store.path("ab" * 20)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    store.get("ab" * 20)


ROW = {"stamp": "@stamp@", "width": 8, "height": 8, "digest": "ab"}


def _row(stage: Stage, text: bytes) -> None:
    """What the index says of an image, of any shape: it is worked out again."""
    image = min(stage.images.rglob("*.png"))
    index = FileIndex(stage.folder / "index")
    index.write("picture", {str(image.absolute()): ROW})
    value = text.replace(b'"@stamp@"', json.dumps(stamp(image)).encode())
    with closing(sqlite3.connect(stage.folder / "index" / "index.sqlite")) as connection, connection:
        connection.execute(
            "UPDATE known SET value = ?", (value if text[:1] < b"Z" else value.decode("utf-8", "replace"),)
        )
    found = scan.examine([image], index)[image]
    assert type(found.width) is int and found.width > 0 and isinstance(found.digest, str)
    assert why(index.read("picture", [str(image.absolute())]).get(str(image.absolute())), {"picture": "x"})


def _index_file(stage: Stage, content: bytes) -> None:
    index = FileIndex(stage.folder / "damaged")
    stage.file("damaged/index.sqlite", content)
    index.read("picture", ["a", "b"])
    index.write("picture", {"a": [1]})


@cache
def _sqlite() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        FileIndex(Path(folder)).write("picture", {"a": ROW, "b": 3})
        return (Path(folder) / "index.sqlite").read_bytes()


def _log(stage: Stage, content: bytes) -> None:
    path = stage.file("x.jsonl", content)
    log.Lines(path, 5).close()
    log.read(path)


def _memo(stage: Stage, text: bytes) -> None:
    metadata.model_hash(stage.base, stage.file("hashes.json", text))


def _known(stage: Stage) -> Any:
    status = stage.base.stat()
    return {str(stage.base): [status.st_size, status.st_mtime_ns, "ab"]}


# --- images and captions ---


@cache
def _images() -> tuple[bytes, ...]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    out = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        stream = io.BytesIO()
        image.save(stream, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
        out.append(stream.getvalue())
    return tuple(out)


def _image(stage: Stage, content: bytes) -> None:
    for suffix in (".png", ".jpg"):
        path = stage.file(f"x{suffix}", content)
        scan._examine(path)
    scan.open_image(path)


CAPTION = "a {red|blue} cat, sitting ||| tree, {{x}}, (bold:1.2)\nsecond line, [dull]\n"


def _caption(stage: Stage, content: bytes) -> None:
    image = stage.file("c/x.png", _images()[0])
    stage.file("c/x.txt", content)
    subset = SubsetConfig(
        image_dir=str(image.parent),
        shuffle_caption=True,
        keep_tokens_separator="|||",
        enable_wildcard=True,
        caption_tag_dropout_rate=0.5,
    )
    found = scan.scan(DatasetConfig(subsets=(subset,)), FileIndex())
    for each in found.images:
        captions.vary(each.captions, subset, random.Random(0), epoch=1, step=0)
        captions.every(each.captions, subset)


def _prompts(suffix: str, stage: Stage, text: bytes | str) -> None:
    prompts.read_prompts(stage.file(f"p{suffix}", text))


def _toml(stage: Stage, content: bytes) -> None:
    toml.read(stage.file("t.toml", content))


def _any_leaves() -> SearchStrategy[list[tuple[str, list[int]]]]:
    own = [name for name in ADAPTER if name.startswith("lora_te")]
    names = st.sampled_from([*own, *(n.replace(".lora_down.weight", ".hada_w1_a") for n in own)])
    return st.lists(st.tuples(names, st.lists(st.integers(0, 65), max_size=4)), min_size=1, max_size=5)


READERS: tuple[Reader, ...] = (
    Reader("header of a weight file", lambda stage: tree(HEADER), _header, 450),
    Reader(
        "safetensors",
        lambda stage: turned(safetensors(json.dumps(HEADER).encode())),
        partial(_weights, ".safetensors"),
        300,
    ),
    Reader("GGUF", lambda stage: turned(_gguf_file()), _gguf, 100),
    Reader("pickle", lambda stage: turned(_pickle(True), _pickle(False)), partial(_weights, ".ckpt"), 250),
    *(Reader(f"detected {kind}", lambda stage, kind=kind: tree(_shapes(kind)), _detected, 24) for kind in _kinds()),  # type: ignore[misc]
    Reader("model", lambda stage: tree(_model_header(stage)), _model, 6),
    Reader("config of a U-Net", lambda stage: tree(UNET), partial(_part, "denoiser"), 8),
    Reader("config of a text encoder", lambda stage: tree(CLIP), partial(_part, "clip_l"), 60),
    Reader("config of a VAE", lambda stage: tree(VAE), partial(_part, "vae"), 20),
    Reader("index of a folder", lambda stage: tree(INDEX), partial(_folder, "model_index.json"), 100),
    Reader("index of shards", lambda stage: tree(SHARDS), partial(_folder, "unet/x.safetensors.index.json"), 100),
    Reader("adapter", lambda stage: tree(ADAPTER), _adapter, 25),
    Reader("shapes of an adapter", lambda stage: _any_leaves(), _leaves, 150),
    Reader("config file", lambda stage: written(_placed(CONFIG, stage)), _config, 60),
    Reader("bytes of a TOML file", lambda stage: turned(_placed(DATASET, stage).encode()), _toml, 150),
    Reader("dataset file", lambda stage: written(_placed(DATASET, stage)), partial(_datasets, ".toml"), 70),
    Reader("dataset file in JSON", lambda stage: tree(DATASET_JSON), partial(_datasets, ".json"), 80),
    Reader("prompt lines", lambda stage: written(PROMPTS), partial(_prompts, ".txt"), 250),
    Reader("bytes of a prompt file", lambda stage: turned(PROMPTS.encode()), partial(_prompts, ".txt"), 100),
    Reader("prompts in TOML", lambda stage: written(PROMPTS_TOML), partial(_prompts, ".toml")),
    Reader("prompts in JSON", lambda stage: tree(PROMPTS_JSON), partial(_prompts, ".json"), 200),
    Reader("command line", lambda stage: written(COMMAND), _command, 50),
    Reader("kohya's command line", lambda stage: written(COMMAND), _kohya, 40),
    Reader("network_args", lambda stage: st.lists(written(*NETWORK_ARGS), min_size=1, max_size=3), _network_args, 150),
    Reader(
        "optimizer_args",
        lambda stage: written(*OPTIMIZER_ARGS).map(lambda text: [text]),
        lambda stage, args: arguments.literals("x", args),
        300,
    ),
    Reader(
        "optimizer",
        lambda stage: st.tuples(written(*OPTIMIZERS) | st.sampled_from(OPTIMIZERS), written(*OPTIMIZER_ARGS)),
        _optimizer,
        150,
    ),
    Reader("manifest of a state", lambda stage: tree(_manifest(stage)), _resumed),
    Reader("values of a state", lambda stage: tree(PACKED), _unpacked, 250),
    Reader("entry of a cache", lambda stage: turned(_entry()), _cached),
    Reader("row of the index", lambda stage: tree(ROW) | st.binary(max_size=9), _row, 50),
    Reader("file of the index", lambda stage: turned(_sqlite()), _index_file, 100),
    Reader("log", lambda stage: turned(b'{"step": 4, "loss": 0.5}\n{"step": 6, "loss": NaN, "lr/x": 1}\n'), _log, 150),
    Reader("remembered hashes", lambda stage: tree(_known(stage)), _memo, 100),
    Reader("image", lambda stage: turned(*_images()), _image, 450),
    Reader(
        "caption",
        lambda stage: turned(CAPTION.encode()) | written(CAPTION).map(lambda t: t.encode("utf-8", "surrogatepass")),
        _caption,
    ),
)
