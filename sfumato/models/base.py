"""The record of a family and a loaded model. Everything else is written once and applied to them from outside."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor, nn

from sfumato.adapters import AdapterPlan
from sfumato.adapters.insert import TargetLayer
from sfumato.config import FamilyOptions, LossConfig, NoiseConfig
from sfumato.data.batch import Cond, Tokens
from sfumato.data.strategies import (
    LatentsCachingStrategy,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
)
from sfumato.errors import UserError
from sfumato.formats.dialect import Dialect, ModulePath, with_aliases
from sfumato.formats.planned import Writable
from sfumato.models.autoencoders import on, scaled, scaling_of, unscale
from sfumato.models.components import Checkpoint, Component, Scaling
from sfumato.models.control import ControlSpec, Follower
from sfumato.models.detection import Shapes
from sfumato.models.encoders.tokenizers import MERGES
from sfumato.models.lllite import LiteSpec
from sfumato.models.locate import INDEX
from sfumato.models.ondemand import OnDemand
from sfumato.models.tiles import in_tiles
from sfumato.tensors.guidance import ClassifierFree, Guidance, GuidanceInfo
from sfumato.tensors.noise import Drawn, NoiseProcess
from sfumato.tensors.random import SampleRandom

T_NEXT = "t_next"
"""In a sampler's cond: (b,) the t of its next step, 0 in the last, fp32, for nets that predict the mean velocity until
then."""
_TOKENIZING = Lock()
"""transformers' tokenizers are set up anew by each call."""
IN_MEMORY = Checkpoint(path=Path("a model made in memory"), components={})


@dataclass(slots=True)
class Models:
    """A loaded checkpoint. Nets are in eval mode and frozen; trainables thaw what they train."""

    family: Family
    options: FamilyOptions
    """The family's `facts.Options`, completed by what the file holds (v prediction, for example)."""
    denoiser: nn.Module
    encoders: Mapping[str, nn.Module]
    """By name: {"clip_l": ...}; module paths are the names that files use."""
    tokenizers: Mapping[str, Any]
    vaes: OnDemand[nn.Module] | nn.Module | None
    """The VAE, or {"vae": one that is made when it is asked for}; see `vae`."""
    source: Checkpoint = IN_MEMORY
    """What it was read from; what was not trained is copied from there."""
    dtypes: Mapping[str, torch.dtype | None] = field(default_factory=dict)
    """Number format of each component's weights; None: as in its file."""
    streamed: frozenset[str] = frozenset()
    """Frozen text encoders that `streaming.encode_each` reads block by block when it needs them; they have no values
    otherwise."""

    noise: NoiseConfig | None = None
    """What the whole model is trained with, as far as its files have to say so."""
    _dialects: Mapping[str, Dialect] | None = field(default=None, init=False, repr=False, compare=False)
    _scaling: dict[torch.device, Scaling] = field(default_factory=dict, init=False, repr=False, compare=False)
    followers: list[Follower] = field(default_factory=list)
    """What makes the denoiser follow images when it samples."""
    tile: int | None = None
    """Side of the tiles, in pixels, in which larger pictures pass through the VAE; None: they pass whole."""

    def tokenize(self, captions: Sequence[str], *, negative: bool = False, training: bool = False) -> Tokens:
        """b captions, or `negative` prompts -> named tensors whose first dimension is b, on the CPU. `training`: for a
        step, where nothing is cached. From any thread."""
        f = self.family
        other = f.tokenize_negative if negative else f.tokenize_training if training else None
        with _TOKENIZING:
            return (other(self) if other else self.tokenize_strategy).tokenize(captions)

    def encode(self, tokens: Tokens) -> Cond:
        """Tokens -> the outputs of the text encoders, by name, on the encoders' device. Differentiable."""
        return self.encode_strategy.encode(self.encoders, tokens)

    def condition(self, cond: Cond, info: SampleInfo) -> Cond:
        """The outputs of the text encoders -> all that `predict` takes besides x and t."""
        return self.family.condition(self, cond, info)

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x (b, c, h, w), t (b,), cond of `condition` -> the denoiser's prediction, shaped as x."""
        return self.family.predict(self.denoiser, x, t, cond)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """(b, 3, H, W) in [-1, 1] -> raw latents (b, c, h, w), fp32 on the VAE's device.

        The VAE runs in its own number format, under autocast too. Errors: as `vae`.
        """
        device, dtype = device_and_dtype(self.vae)
        with torch.autocast(device.type, enabled=False):
            return self._in_tiles(self.family.latents.encode, pixels.to(device, dtype), into=self.family.latents.stride)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The denoiser's latents (b, c, h, w) -> (b, 3, H, W), fp32, in [-1, 1] but for overshoot; the VAE runs as in
        `encode_images`."""
        device, dtype = device_and_dtype(self.vae)
        with torch.autocast(device.type, enabled=False):
            raw = unscale(self.vae, latents.to(device, torch.float32))
            return self._in_tiles(self.family.latents.decode, raw.to(dtype), out=self.family.latents.stride)

    def _in_tiles(self, half: Callable[[nn.Module, Tensor], Tensor], x: Tensor, into: int = 1, out: int = 1) -> Tensor:
        """One half of the VAE, in tiles where the picture is larger than one; fp32."""
        net = partial(half, self.vae)
        return (in_tiles(net, x, self.tile // (into * out), into, out) if self.tile else net(x)).float()

    def process(self, noise: NoiseConfig, loss: LossConfig) -> NoiseProcess:
        """How latents are noised, what the prediction should be, and what an error weighs."""
        return self.family.process(self, noise, loss)

    @property
    def tokenize_strategy(self) -> TokenizeStrategy:
        """For its settings and limits; it holds no net."""
        return self.family.tokenize(self)

    @property
    def encode_strategy(self) -> TextEncodingStrategy:
        """For its settings."""
        return self.family.encode(self)

    @property
    def outputs(self) -> TextEncoderOutputsCachingStrategy:
        """How the outputs of the text encoders are cached."""
        return self.family.outputs(self)

    @property
    def dialects(self) -> Mapping[str, Dialect]:
        """Adapter key names: "kohya", "comfy", "peft", and what others call these. Made once: they follow from the
        names of the nets' tensors, which stay."""
        if self._dialects is None:
            self._dialects = with_aliases(self.family.dialects(self))
        return self._dialects

    @property
    def vae(self) -> nn.Module:
        """The VAE, made now if it was not needed before. Errors: `UserError` when the checkpoint came without one and
        none was given."""
        if self.vaes is None:
            raise UserError(f"{self.source.path} has no VAE, which images must pass through; give one with --vae")
        return self.vaes["vae"] if isinstance(self.vaes, OnDemand) else self.vaes

    def scaled(self, latents: Tensor) -> Tensor:
        """Raw latents -> those of the denoiser. If the VAE's config is known, no VAE is made for it."""
        if latents.device not in self._scaling:  # kept, so that no step waits for a copy of it
            weights = self.source.components.get("vae")
            known = None if weights is None else weights.component.scaling
            scaling = known(weights.config) if weights and known else scaling_of(self.vae)
            self._scaling[latents.device] = on(latents.device, scaling)
        return scaled(latents, self._scaling[latents.device])

    def nets(self) -> Mapping[str, nn.Module]:
        """What can be trained, by component name: the denoiser and the encoders."""
        encoders = {name: partial(self.encoders.__getitem__, name) for name in self.encoders}
        return OnDemand({"denoiser": lambda: self.denoiser, **encoders})

    def encodes(self) -> bool:
        """Whether the VAE is needed for what the denoiser follows."""
        return any(follower.takes_latents for follower in self.followers)

    def denoising(self) -> list[nn.Module]:
        """The denoiser, and what makes it follow images."""
        return [self.denoiser, *(follower.net for follower in self.followers)]

    def make(self, names: Iterable[str]) -> None:
        """Have these nets made, of those that are made when they are asked for."""
        for name in names:
            assert self.vae if name == "vae" else self.nets()[name]

    def made(self) -> dict[str, nn.Module]:
        """The nets and the VAE as far as they were needed until now."""
        encoders = self.encoders.made() if isinstance(self.encoders, OnDemand) else self.encoders
        vaes = self.vaes.made() if isinstance(self.vaes, OnDemand) else {"vae": self.vaes} if self.vaes else {}
        return {"denoiser": self.denoiser, **encoders, **vaes}


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleInfo:
    """What conditions b samples besides their captions."""

    sizes: Tensor
    """(b, 6) original height and width, crop top and left, target height and width, in pixels."""
    guidance: Tensor | None = None
    """(b,) guidance, the input of a distilled model; None: the family's own for training."""
    drawn: Drawn = field(default_factory=dict)
    """What `Family.draw` drew for them in training; nothing when sampling."""


def device_and_dtype(net: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and number format of a net."""
    first = next(p for p in net.parameters() if p.is_floating_point())
    return first.device, first.dtype


def check_sizes(models: Models, sizes: Iterable[tuple[str, int, int, str]]) -> None:
    """`sizes`: whose it is, width and height in pixels, what to do. Errors: `UserError` for each that is too large for
    the denoiser."""
    if models.family.largest is None:
        return
    most = models.family.largest(models)
    wrong = [
        f"{whose}: {width} x {height} pixels are too large for this model, which takes at most {most} x {most}; {cure}"
        for whose, width, height, cure in sizes
        if max(width, height) > most
    ]
    if wrong:
        raise UserError(*dict.fromkeys(wrong))


def as_encoded(models: Models, cond: Cond, info: SampleInfo) -> Cond:
    """For `Family.condition`: the denoiser takes what the text encoders give, and nothing else."""
    return cond


ENCODER_RATES = {"clip_l": "learning_rate_te1", "clip_g": "learning_rate_te2", "t5xxl": "learning_rate_te3"}
"""Text encoder -> kohya's numbered flag of its rate, where a family has it among its options."""


def encoder_rate(options: FamilyOptions, component: str, path: str) -> float | None:
    """For `Family.rate`: that of the text encoder's numbered flag; everything else has the common rate."""
    rate: float | None = getattr(options, ENCODER_RATES.get(component, ""), None)
    return rate


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFolder:
    """What a diffusers folder holds besides weights, for a model that did not come as one."""

    index: Mapping[str, Any]
    """model_index.json"""
    index_name: str = INDEX[0]
    """What that file is called: one of `locate.INDEX`."""
    configs: Mapping[str, Mapping[str, Any]]
    """component, or folder of `Component.beside` -> its config.json"""
    scheduler: Mapping[str, Any]
    """scheduler/scheduler_config.json"""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further JSON files, by their paths in the folder."""
    added: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """component -> native tensors that its file lacks and diffusers needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSpec:
    """Where the tokenizer of a text encoder is."""

    folder: str
    """Its folder in a diffusers folder; also looked for beside a single file, and in the folder that the user gives."""
    make: Callable[[Path | None], Any]
    """The tokenizer of a folder; None: the one that every model of this family has. Errors: `UserError`."""
    alone: bool = True
    """Whether the folder that the user gives may be the tokenizer's itself."""
    flag: str = ""
    """The family's option that names its own folder; "": there is none."""
    rows: Callable[[nn.Module], int] = lambda net: cast(Any, net).config.vocab_size
    """Tokens that the net knows, which is its text encoder's, or the denoiser."""
    home: Callable[[], Path] = lambda: MERGES
    """The folder or file of the one that `make(None)` gives. Errors: `UserError` if it cannot be had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWeights:
    """What lists of weights for the blocks of a model are for."""

    block: Callable[[ModulePath], str]
    """The block of a layer; "": none."""
    lists: Mapping[int, tuple[str, ...]]
    """Length of a list -> the blocks that its numbers are for; layers of other blocks are as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family is a record of facts and a few short functions."""

    name: str
    title: str
    """For messages: "Stable Diffusion XL"."""
    components: Sequence[Component]
    """Its nets in files; "denoiser" is what is trained, "vae" the autoencoder, all others are text encoders."""
    optional: frozenset[str] = frozenset()
    """Components that a model may lack."""
    passthrough_keys: re.Pattern[str] = re.compile(r"(?!)")
    """Pattern of full names in single files that belong to no net and are copied on save."""
    complete: Callable[[FamilyOptions, Checkpoint], tuple[FamilyOptions, Checkpoint]] = lambda options, source: (
        options,
        source,
    )
    """(options, source) -> the options completed from the files, and the source without what is not the model's.
    Errors: `UserError` if they contradict."""
    tokenizer_specs: Mapping[str, TokenizerSpec]
    """Text encoder, or the denoiser where that takes tokens itself -> its tokenizer."""
    wordless: frozenset[str] = frozenset()
    """Text encoders that cannot have new words, as they do not read the caption itself."""
    new_folder: Callable[[Models], NewFolder | None] | None = None
    """Its value None: what the folder that the model came from holds is copied. No function: it is saved as a diffusers
    folder only if it came as one."""
    adjust_single_file: Callable[[Models, dict[str, Writable]], dict[str, Writable]] = lambda models, tensors: tensors
    """A last change to the tensors of a single file about to be saved."""
    tokenize: Callable[[Models], TokenizeStrategy]
    """Captions -> tokens."""
    tokenize_negative: Callable[[Models], TokenizeStrategy] | None = None
    """Negative prompts of samples -> tokens; None: as captions."""
    tokenize_training: Callable[[Models], TokenizeStrategy] | None = None
    """Captions of a training step -> tokens; None: as all others."""
    encode: Callable[[Models], TextEncodingStrategy]
    """Tokens -> cond."""
    latents: LatentsCachingStrategy
    """Shape of the latents, and how they are cached."""
    outputs: Callable[[Models], TextEncoderOutputsCachingStrategy]
    """How cond is cached."""
    process: Callable[[Models, NoiseConfig, LossConfig], NoiseProcess]
    """(models, noise config, loss config) -> how latents are noised, the target of the prediction, and the weights of
    the loss."""
    draw: Callable[[Models, Tensor, SampleRandom], Drawn] = lambda models, sizes, rng: {}
    """(models, the `SampleInfo.sizes`, source of chance) -> what chance decides of b samples in training besides noise
    and adapters' dropouts, on the CPU, for `condition`."""
    caption: Callable[[Shapes], Mapping[str, tuple[int, ...]]]
    """The denoiser's tensors -> the outputs of the text encoders for a caption of usual length, without the batch:
    names that end in `_ids` are whole numbers. For what is measured without text encoders."""
    condition: Callable[[Models, Cond, SampleInfo], Cond] = as_encoded
    """(models, output of the text encoders, sample info) -> all inputs of `predict` besides x and t."""
    predict: Callable[[nn.Module, Tensor, Tensor, Cond], Tensor]
    """(denoiser, x (b, c, h, w), t (b,), cond) -> what the denoiser predicts, shaped as x. In cond, while sampling,
    also `T_NEXT`."""
    sigmas: Callable[[Models, int, int, float | None], Tensor] | None = None
    """(models, steps, latent pixels of the image, the prompt's flow_shift) -> (steps + 1,) noise levels from 1 to 0
    that an image is sampled along; None: DDPM. The shift is None where `FACTS.prompt` has none."""
    guidance: Callable[[Models, GuidanceInfo], Guidance] = lambda models, info: ClassifierFree(info.scale)
    """(models, what b images are guided by) -> how their predictions are combined."""
    largest: Callable[[Models], int] | None = None
    """models -> the longest side, in pixels, of an image that the denoiser has positions for; None: any."""
    blocks: Callable[[nn.Module], Sequence[nn.Module]]
    """The denoiser's repeated blocks, in forward order: what checkpointing, swapping and compiling act on."""
    encoder_blocks: Callable[[nn.Module], Sequence[nn.Module]] = lambda net: list(cast(Any, net).layers)
    """The same for a text encoder."""
    dialects: Callable[[Models], Mapping[str, Dialect]]
    """Adapter key names: "kohya", "comfy", "peft"."""
    targets: Mapping[str, Mapping[str, tuple[str, ...]]]
    """component -> layer kind ("linear", "conv") -> path patterns (fnmatch) of the layers that adapters go on. A text
    encoder that is never trained has none."""
    target_layer: Callable[[FamilyOptions, AdapterPlan, TargetLayer], TargetLayer | None] = (
        lambda options, plan, target: target
    )
    """(options, plan, a layer that gets an adapter) -> the same with the options of this layer; None: no
    adapter there."""
    trainable: Callable[[FamilyOptions, AdapterPlan | None], frozenset[str] | None] = lambda options, plan: None
    """(options, the plan of adapters, or None for a whole model) -> the text encoders that training may change; None:
    all."""
    rate: Callable[[FamilyOptions, str, str], float | None] = encoder_rate
    """(options, component, path of a weight) -> its rate when a whole model is trained; None: the common one; 0: it is
    not trained."""
    readers: Callable[[nn.Module], Mapping[str, nn.Module]] | None = None
    """The denoiser's blocks, called with (x, embedding, what the caption says), that read the caption each by itself:
    name -> block, for words that mean something else to each (XTI); None: there are no such words."""
    encoder_lr_order: tuple[str, ...] = ()
    """Encoders in the order of kohya's text_encoder_lr values."""
    block_weights: BlockWeights | None = None
    """What layer-wise weights of an adapter are for; None: there are none for this family."""
    control: ControlSpec | None = None
    """How control nets are put onto the denoiser; None: there are none for this family."""
    lllite: LiteSpec | None = None
    """How ControlNet-LLLites are put onto the denoiser; None: there are none for this family."""
