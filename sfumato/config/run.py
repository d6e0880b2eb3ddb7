"""The settings of one run, apart from its images."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from annotated_types import Interval

from sfumato.config.control import ControlConfig
from sfumato.config.data import DataConfig
from sfumato.config.embedding import EmbeddingConfig
from sfumato.config.hub import HubConfig
from sfumato.config.memory import MemoryConfig
from sfumato.config.metadata import MetadataConfig
from sfumato.config.rules import (
    Amount,
    Chance,
    Count,
    CountOrOff,
    Excludes,
    File,
    Folder,
    Must,
    Natural,
    NaturalOrOff,
    Needs,
    NewFolder,
    NumberOrOff,
    Only,
    PathTo,
    Positive,
    Rate,
    Record,
    Share,
    Steps,
    Weights,
    ZeroIsOff,
)
from sfumato.config.validation import ValidationConfig

Method = Literal["network", "full", "embedding", "controlnet", "lllite"]
"""What is trained: an adapter, the whole model, words of a text encoder (textual inversion), a net that makes images
follow others (ControlNet), or small ones on its layers that do (ControlNet-LLLite)."""
FOLLOWING: frozenset[Method] = frozenset({"controlnet", "lllite"})
"""Those whose images follow others: what `conditioning_data_dir` holds is no mask there."""
Scheduler = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "piecewise_constant",
    "adafactor",
]


# --- rules that several settings have --------------------------------------------------------------


def _of(*schedulers: Scheduler) -> Needs:
    """A setting that only some schedulers have."""
    return Needs("lr_scheduler", among=schedulers, why=f"only lr_scheduler {' and '.join(schedulers)} has it")


_OWN_ARGS = Excludes("lr_scheduler_type", why="a scheduler class of your own has its own arguments, lr_scheduler_args")
_NO_WARMUP: tuple[Scheduler, ...] = ("constant", "piecewise_constant", "adafactor")
_WARMED_UP = Excludes(
    "lr_scheduler", among=_NO_WARMUP, why="this lr_scheduler has no warm-up; constant_with_warmup has"
)
_EVERY_EPOCHS = Needs("save_every_n_epochs", "save_n_epoch_ratio")
_RATIO = "save_n_epoch_ratio decides when results are saved"
_ADAPTERS = Only("network", why="only `train network` trains an adapter")
_SMALL_NETS = Only("network", "lllite", why="only `train network` and `train lllite` train small nets on its layers")
_LITE = Only("lllite", why="only `train lllite` trains a ControlNet-LLLite")
OF_NEW_LITE = Excludes("network_weights", why="that ControlNet-LLLite is as it is")
"""For settings of what a new ControlNet-LLLite is made of."""
_SMALL = Only("network", "embedding", why="only files of adapters and embeddings have several")
_OWN_PRIOR = Only("network", why="only an adapter can be left out to see what the model predicted before")
_ADAPTER_RATES = Only("network", why="only `train network` has it; all else goes by learning_rate")
_WHOLE = Only("full", why="an adapter's text encoder goes by text_encoder_lr and network_train_unet_only")
_FUSED = Needs("fused_backward_pass", "fused_optimizer_groups", "blockwise_fused_optimizers")
_DENOISER = Excludes("network_train_text_encoder_only", why="network_train_text_encoder_only leaves the denoiser alone")
_HUBER = ("huber", "smooth_l1")
_THRESHOLD = Needs("loss_type", among=_HUBER, why=f"only loss_type {' and '.join(_HUBER)} have a threshold")
_OF_STATES = Excludes("resume", why="a state says itself where its run goes on")
_SAMPLED = Needs("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")
_TENSORBOARD = Needs("log_with", among=("tensorboard", "all"), why="it needs log_with tensorboard")
_WANDB = Needs("log_with", among=("wandb", "all"), why="it needs log_with wandb")

_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\.|$)", re.IGNORECASE)
_LONGEST = 180
"""Bytes of a name: 255 less what step, component, process and ending add while a file is written."""
Channels = Annotated[int, Interval(ge=2, le=4096)]
FileName = Annotated[
    str,
    Must(re.compile(r"[^/\\]+", re.DOTALL).fullmatch, "a file name without folders; the folder is output_dir"),
    Must(
        lambda name: not _RESERVED.match(name) and name[-1:] not in (".", " "),
        "a name that Windows takes too: not CON, NUL, COM1 or the like, and no dot or blank at the end",
    ),
    Must(
        re.compile(r'[^<>:"|?*\x00-\x1f\ud800-\udfff]*').fullmatch,
        'a name that Windows takes too: without < > : " | ? * and control characters',
    ),
    Must(
        lambda name: len(name.encode(errors="surrogatepass")) <= _LONGEST,
        f"at most {_LONGEST} bytes: step and ending are put behind it, and no file system takes longer names",
    ),
]


# --- the records -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Record):
    """The checkpoint to start from."""

    pretrained_model_name_or_path: Annotated[str, PathTo("weights")] = ""
    """Base model: a .safetensors or .ckpt file, a diffusers folder, or a hub id."""
    vae: Weights = None
    """A VAE to use in place of the checkpoint's own: file, folder or hub id."""
    tokenizer: Folder = None
    """Tokenizer folder; default: `tokenizer` beside the checkpoint if there is one, else the CLIP vocabulary that comes
    with sfumato."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig(Record):
    """Where results go and when they are saved."""

    output_dir: Annotated[str, PathTo("new folder")] = "output"
    """Folder for the results."""
    output_name: FileName = "last"
    """Name of the result, without its ending."""
    save_model_as: Literal["ckpt", "pt", "safetensors", "diffusers", "diffusers_safetensors"] | None = None
    """Format of the result; default: safetensors for adapters, the base model's own layout for whole models."""
    save_precision: Literal["float", "fp16", "bf16"] | None = None
    """Number format of the saved weights; default: the format they are trained in."""
    save_every_n_epochs: Annotated[CountOrOff, Excludes("save_n_epoch_ratio", why=_RATIO)] = None
    """Save the result every n epochs."""
    save_every_n_steps: CountOrOff = None
    """Save the result every n optimizer steps."""
    save_n_epoch_ratio: CountOrOff = None
    """Save about n results in all, evenly over the epochs."""
    save_last_n_epochs: Annotated[CountOrOff, _EVERY_EPOCHS] = None
    """Of the results saved by epoch, keep the last n: a number of results, as in sd-scripts."""
    save_last_n_steps: Annotated[CountOrOff, Needs("save_every_n_steps")] = None
    """Of the results saved by step, keep those that are at most n optimizer steps old: a span, not a number of results,
    as in sd-scripts (save_every_n_steps 10 and 30 here keep four)."""
    save_last_n_epochs_state: Annotated[NaturalOrOff, Needs("save_state"), _EVERY_EPOCHS] = None
    """Of the run states saved by epoch, keep the last n; default: as save_last_n_epochs."""
    save_last_n_steps_state: Annotated[NaturalOrOff, Needs("save_state"), Needs("save_every_n_steps")] = None
    """Of the run states saved by step, keep those that are at most n optimizer steps old; default: as
    save_last_n_steps."""
    save_state: bool = False
    """Save the whole state of the run beside each result, to resume from."""
    save_state_on_train_end: Annotated[
        bool, Excludes("save_state", why="save_state saves the state at the end as well")
    ] = False
    """Save the whole state of the run when training ends."""
    resume: Annotated[str | None, PathTo("state")] = None
    """Resume from this state folder (`NAME-state`), or `auto` for the newest in output_dir."""
    dialect: Annotated[Literal["kohya", "comfy", "peft", "diffusers", "lycoris"], _SMALL] = "kohya"
    """Key names of a saved adapter; `kohya`, which LyCORIS' files have too, loads in ComfyUI, Forge and diffusers;
    `diffusers` and `peft` are one. A saved embedding of one encoder is called by its word in these two, and
    `emb_params` else."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Record):
    """The optimizer and its learning rates."""

    optimizer_type: str = "AdamW"
    """AdamW, AdamW8bit, Lion, Prodigy, AdaFactor, SGDNesterov, DAdaptAdam, AdamWScheduleFree ..., or `module.Class`."""
    optimizer_args: tuple[str, ...] = ()
    """Arguments of the optimizer, as `key=value`."""
    learning_rate: Rate = 1e-4
    """Learning rate of everything that has no rate of its own."""
    unet_lr: Annotated[Rate | None, _ADAPTER_RATES, _DENOISER] = None
    """Learning rate of the denoiser (U-Net or transformer) when adapters are trained."""
    text_encoder_lr: Annotated[tuple[Rate, ...], _ADAPTER_RATES] = ()
    """Learning rate of the text encoder when adapters are trained; several values for several encoders; 0 freezes."""
    learning_rate_te: Annotated[Rate | None, _WHOLE, Needs("train_text_encoder")] = None
    """Learning rate of the text encoder when whole models are trained."""
    max_grad_norm: Amount = 1.0
    """Clip the norm of all gradients together to this; 0: no clipping."""
    fused_backward_pass: Annotated[
        bool,
        Excludes("fused_optimizer_groups", "blockwise_fused_optimizers", why="what steps together is named beside it"),
    ] = False
    """Let weights step as soon as their gradients are there, in the backward pass, and free these at once: the numbers
    are the same, and the gradients of all weights are never on the device together."""
    fused_optimizer_groups: Annotated[
        CountOrOff, Excludes("blockwise_fused_optimizers", why="blockwise_fused_optimizers decides what steps together")
    ] = None
    """As fused_backward_pass, with the weights in this many groups that each step at once."""
    blockwise_fused_optimizers: bool = False
    """As fused_backward_pass, with the weights of a block stepping at once."""
    fused_clipping: Annotated[Literal["host", "two_passes", "delayed"], _FUSED] = "host"
    """How max_grad_norm acts beside fused_backward_pass, as it needs all gradients before the first weight steps: they
    wait in the CPU's memory (host); or forward and backward are done twice (two_passes); or the norm is that of the
    step before (delayed), which is not exact, and costs nothing."""
    optimizer_state_on_cpu: bool = False
    """Keep what the optimizer remembers of each weight, and ema_decay's average, in the CPU's memory; it comes to the
    device for the weight's step."""
    lr_scheduler: Annotated[Scheduler, Excludes("lr_scheduler_type")] = "constant"
    """How the learning rate moves over the run."""
    lr_scheduler_type: str | None = None
    """A scheduler class of your own, `module.Class`, in place of lr_scheduler."""
    lr_scheduler_args: tuple[str, ...] = ()
    """Arguments of the scheduler, as `key=value`."""
    lr_warmup_steps: Annotated[Steps, _OWN_ARGS, _WARMED_UP] = 0
    """Optimizer steps of warm-up: a number, a share of the run below 1, or a percentage such as "10%"."""
    lr_decay_steps: Annotated[Steps, _OWN_ARGS, _of("warmup_stable_decay")] = 0
    """Optimizer steps of decay, for warmup_stable_decay: as lr_warmup_steps."""
    lr_scheduler_num_cycles: Annotated[
        Count, _OWN_ARGS, _of("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay")
    ] = 1
    """Restarts of cosine_with_restarts."""
    lr_scheduler_power: Annotated[float, _OWN_ARGS, _of("polynomial")] = 1.0
    """Power of polynomial."""
    lr_scheduler_timescale: Annotated[int | None, _OWN_ARGS, _of("inverse_sqrt")] = None
    """Time scale of inverse_sqrt; default: the warm-up steps."""
    lr_scheduler_min_lr_ratio: Annotated[Share | None, _OWN_ARGS, _of("cosine_with_min_lr", "warmup_stable_decay")] = (
        None
    )
    """Floor of cosine_with_min_lr and warmup_stable_decay, as a share of the learning rate."""
    ema_decay: Share | None = None
    """Keep a moving average of the trained weights with this decay (such as 0.999) and save that."""

    @property
    def fused(self) -> bool:
        """Whether weights step in the backward pass."""
        return bool(self.fused_backward_pass or self.fused_optimizer_groups or self.blockwise_fused_optimizers)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Record):
    """How long and how training runs."""

    max_train_steps: Annotated[
        Count | None, Excludes("max_train_epochs", why="max_train_epochs decides how long training takes")
    ] = None
    """Optimizer steps in all, a resumed run's earlier ones included; default: 1600, unless max_train_epochs is set."""
    max_train_epochs: CountOrOff = None
    """Epochs in all; overrides max_train_steps."""
    initial_step: Annotated[NaturalOrOff, _OF_STATES] = None
    """Count this many optimizer steps as done: a run that has weights (network_weights, a saved model) but no state
    goes on with the images, the schedule and the names of results from there. The optimizer starts anew."""
    initial_epoch: Annotated[
        CountOrOff, _OF_STATES, Excludes("initial_step", why="initial_step says it by the step")
    ] = None
    """The same by epochs: begin with this one, counted from 1."""
    gradient_accumulation_steps: Count = 1
    """Batches whose gradients are averaged for one optimizer step."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Number format of the computation; default: what `accelerate launch` says, else no."""
    full_bf16: bool = False
    """Hold the trained weights themselves in bf16, updated with stochastic rounding."""
    kahan_summation: Annotated[bool, Needs("full_bf16")] = False
    """Keep what full_bf16 rounds away and add it at the next step (Kahan), in place of stochastic rounding; takes as
    much memory as the weights once more."""
    seed: Natural = 42
    """Number from which all randomness of the run follows."""
    train_text_encoder: Annotated[bool, _WHOLE] = False
    """Train the text encoder as well, when a whole model is trained."""
    num_last_block_to_freeze: Annotated[
        CountOrOff, Only("full", why="network_args train_block_indices chooses the blocks that get adapters")
    ] = None
    """Leave the last n blocks of the denoiser as they are, when a whole model is trained."""
    stop_text_encoder_training: Natural | None = None
    """Freeze the text encoder after this many optimizer steps (0: do not train it)."""
    max_data_loader_n_workers: Natural = 0
    """Worker processes that read images; 0: a thread reads them ahead where an accelerator trains. Results do not
    depend on it."""
    persistent_data_loader_workers: Annotated[bool, Needs("max_data_loader_n_workers")] = False
    """Keep the worker processes between epochs."""


@dataclass(frozen=True, kw_only=True)
class NoiseConfig(Record):
    """Noise and timesteps."""

    noise_offset: NumberOrOff = None
    """Add a random brightness of this strength to the noise of each channel (about 0.05 to 0.1)."""
    noise_offset_random_strength: Annotated[bool, Needs("noise_offset")] = False
    """Choose the strength of noise_offset at random, evenly between 0 and its value."""
    adaptive_noise_scale: Annotated[NumberOrOff, Needs("noise_offset")] = None
    """Add this times the latent's mean magnitude to noise_offset."""
    multires_noise_iterations: CountOrOff = None
    """Layers of multi-resolution (pyramid) noise."""
    multires_noise_discount: Annotated[Share, Needs("multires_noise_iterations")] = 0.3
    """Strength of each further layer of multi-resolution noise."""
    ip_noise_gamma: NumberOrOff = None
    """Extra noise on the input only, not on the target (input perturbation, about 0.1)."""
    ip_noise_gamma_random_strength: Annotated[bool, Needs("ip_noise_gamma")] = False
    """Choose the strength of ip_noise_gamma at random, evenly between 0 and its value."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last timestep is pure noise (needs v prediction)."""
    min_timestep: Annotated[int, Interval(ge=0, le=999)] | None = None
    """Lowest timestep; default 0."""
    max_timestep: Annotated[int, Interval(ge=1, le=1000)] | None = None
    """Timesteps are below this; default 1000."""


@dataclass(frozen=True, kw_only=True)
class LossConfig(Record):
    """The loss and its weights."""

    loss_type: Literal["l1", "l2", "huber", "smooth_l1"] = "l2"
    """The loss of a pixel of the latent."""
    huber_schedule: Annotated[Literal["constant", "exponential", "snr"], _THRESHOLD] = "snr"
    """How the Huber threshold follows the timestep."""
    huber_c: Annotated[Positive, _THRESHOLD] = 0.1
    """Threshold of the Huber losses, where they pass from squared to absolute."""
    huber_scale: Annotated[float, _THRESHOLD] = 1.0
    """Factor on the Huber threshold."""
    min_snr_gamma: Annotated[Positive | None, ZeroIsOff()] = None
    """Min-SNR weighting with this gamma (5 in the paper, arXiv:2303.09556)."""
    scale_v_pred_loss_like_noise_pred: bool = False
    """Weigh a v-prediction loss as a noise-prediction loss would be."""
    v_pred_like_loss: NumberOrOff = None
    """Add this share of a v-prediction-like weighting to a noise-prediction loss."""
    debiased_estimation_loss: bool = False
    """Debiased estimation weighting (arXiv:2310.08442)."""
    masked_loss: bool = False
    """Weigh the loss by each image's mask (its alpha channel or a mask image)."""
    prior_loss_weight: Amount = 1.0
    """Weight of regularisation images."""
    prior_preservation_class: Annotated[str | None, _OWN_PRIOR] = None
    """Keep what the model makes of this caption (such as `person`), without class images: each image is shown once more
    with it, and has to give what the model predicts without the adapter; weighed by prior_loss_weight."""
    masked_prior_weight: Annotated[Amount, _OWN_PRIOR, Needs("masked_loss")] = 0.0
    """Where masks take weight from an image, put this share of it on staying with what the model predicts without the
    adapter."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(Record):
    """The adapter, or the ControlNet-LLLite, when one is trained."""

    RULES = (_SMALL_NETS,)

    network_module: Annotated[str | None, _ADAPTERS] = None
    """Kind of adapter: {kinds}. kohya's names (`networks.lora`, `networks.lora_flux`) mean the same, and so does
    `lycoris.kohya` with `algo=KIND` in network_args. Default: as network_weights says, else lora."""
    network_dim: Count | None = None
    """Rank of the adapter; default 4. Width of the nets of a ControlNet-LLLite; default 64."""
    network_alpha: Annotated[Amount | None, _ADAPTERS] = None
    """The change is scaled by alpha / rank; 0 means the rank; default 1."""
    network_dropout: Annotated[Chance | None, ZeroIsOff()] = None
    """Chance that a neuron of the adapter is dropped in a step."""
    network_args: Annotated[tuple[str, ...], _ADAPTERS] = ()
    """Further arguments of the adapter, as `key=value`: what gets adapters (`target=attention,mlp`), ranks and rates by
    layer, and the kind's and the family's own, all in docs/adapters.md: {arguments}."""
    network_weights: File = None
    """Start from this file of an adapter, or of a ControlNet-LLLite, whose sizes are then the file's."""
    dim_from_weights: Annotated[bool, _ADAPTERS, Needs("network_weights")] = False
    """Take ranks and alphas from network_weights."""
    network_train_unet_only: Annotated[bool, _ADAPTERS] = False
    """Put adapters on the denoiser only."""
    network_train_text_encoder_only: Annotated[bool, _ADAPTERS] = False
    """Put adapters on the text encoder only."""
    cond_emb_dim: Annotated[Channels, _LITE, OF_NEW_LITE] = 32
    """Channels that the image to be followed becomes for each layer of a ControlNet-LLLite."""
    scale_weight_norms: Annotated[Amount | None, ZeroIsOff(), _ADAPTERS] = None
    """Keep the norm of each layer's change below this (max-norm regularisation)."""
    base_weights: Annotated[tuple[str, ...], PathTo("file")] = ()
    """Adapter files merged into the base model before training."""
    base_weights_multiplier: Annotated[tuple[float, ...], Needs("base_weights")] = ()
    """Strengths of base_weights; default 1."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Record):
    """Sample images made while training."""

    sample_every_n_steps: Annotated[CountOrOff, Needs("sample_prompts")] = None
    """Sample the prompts every n optimizer steps."""
    sample_every_n_epochs: Annotated[CountOrOff, Needs("sample_prompts")] = None
    """Sample the prompts every n epochs."""
    sample_at_first: Annotated[bool, Needs("sample_prompts")] = False
    """Sample the prompts before the first step."""
    sample_prompts: Annotated[File, _SAMPLED] = None
    """File of prompts: .txt (one per line, with options such as `--w --h --d --s --l --n`), .toml or .json. One without
    a size is sampled at the resolution of the run, by `sfumato sample` at the resolution that the file was trained
    at."""
    sample_sampler: Annotated[str, _SAMPLED] = "ddim"
    """ddim, pndm, lms, euler, euler_a, heun, dpm_2, dpm_2_a, dpmsolver, dpmsolver++, dpmsingle."""


@dataclass(frozen=True, kw_only=True)
class LogConfig(Record):
    """What is written down while training; `LOG.jsonl` beside the result always is."""

    logging_dir: Annotated[NewFolder, _TENSORBOARD] = None
    """Folder for tensorboard; default `logs` in output_dir."""
    log_with: Literal["tensorboard", "wandb", "all"] | None = None
    """Further places for the log."""
    log_prefix: Annotated[str | None, _TENSORBOARD] = None
    """Put before the name of the log folder."""
    log_tracker_name: Annotated[str | None, _WANDB] = None
    """Project name for wandb; default: sfumato."""
    wandb_run_name: Annotated[str | None, _WANDB] = None
    """Run name for wandb; default: output_name."""
    log_tracker_config: Annotated[File, Needs("log_with")] = None
    """TOML file of what else the trackers are started with: `[wandb]` for wandb.init (entity, tags ...),
    `[tensorboard]` for its SummaryWriter."""


Own = TypeVar("Own", bound="FamilyOptions")


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyOptions(Record):
    """The settings of one family alone (`families/NAME/facts.py: Options`)."""

    family: ClassVar[str] = ""
    """The family's name."""

    @classmethod
    def of(cls: type[Own], options: FamilyOptions) -> Own:
        """Options of which the caller knows that they are of this class. Errors: `TypeError` if they are not."""
        if not isinstance(options, cls):
            raise TypeError(f"{cls.__module__}.{cls.__qualname__} was expected, not {type(options).__qualname__}")
        return options


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    metadata: MetadataConfig = field(default_factory=MetadataConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    log: LogConfig = field(default_factory=LogConfig)
    family: FamilyOptions = field(default_factory=FamilyOptions)


@dataclass(frozen=True, kw_only=True)
class Settings(
    ModelConfig,
    DataConfig,
    OutputConfig,
    MetadataConfig,
    HubConfig,
    OptimizerConfig,
    TrainConfig,
    MemoryConfig,
    NoiseConfig,
    LossConfig,
    NetworkConfig,
    ControlConfig,
    EmbeddingConfig,
    SampleConfig,
    ValidationConfig,
    LogConfig,
):
    """All settings of a run side by side, as rules read them."""

    method: Method = "network"
    family: FamilyOptions = field(default_factory=FamilyOptions)

    @classmethod
    def of(cls, config: Config, method: Method) -> Settings:
        """The settings of a config."""
        records = [getattr(config, f.name) for f in fields(config)][:-1]
        values = {f.name: getattr(record, f.name) for record in records for f in fields(record)}
        return cls(**values, method=method, family=config.family)

    def value(self, name: str) -> Any:
        """A setting by its name, the family's own included."""
        return getattr(self if hasattr(self, name) else self.family, name)
