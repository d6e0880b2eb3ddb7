"""What one run is told, apart from its images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sfumato.config.data import DataConfig

Method = Literal["network", "full"]
"""What is trained: an adapter, or the whole model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The checkpoint to start from."""

    pretrained_model_name_or_path: str = ""
    """Base model: a .safetensors or .ckpt file, a diffusers folder, or a hub id."""
    vae: str | None = None
    """A VAE to use in place of the checkpoint's own: file, folder or hub id."""
    tokenizer: str | None = None
    """Tokenizer folder; default: `tokenizer` beside the checkpoint if there is one, else the CLIP vocabulary that comes
    with sfumato."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """Where results go, when they are saved and what is written into them."""

    output_dir: str = "output"
    """Folder for the results."""
    output_name: str = "last"
    """Name of the result, without its ending."""
    save_model_as: Literal["ckpt", "pt", "safetensors", "diffusers", "diffusers_safetensors"] | None = None
    """Format of the result; default: safetensors for adapters, the base model's own layout for whole models."""
    save_precision: Literal["float", "fp16", "bf16"] | None = None
    """Number format of the saved weights; default: the format they are trained in."""
    save_every_n_epochs: int | None = None
    """Save the result every n epochs."""
    save_every_n_steps: int | None = None
    """Save the result every n optimizer steps."""
    save_n_epoch_ratio: int | None = None
    """Save about n results in all, evenly over the epochs."""
    save_last_n_epochs: int | None = None
    """Of the results saved by epoch, keep the last n: a number of results, as in sd-scripts."""
    save_last_n_steps: int | None = None
    """Of the results saved by step, keep those that are at most n optimizer steps old: a span, not a number of results,
    as in sd-scripts (save_every_n_steps 10 and 30 here keep four)."""
    save_last_n_epochs_state: int | None = None
    """Of the run states saved by epoch, keep the last n; default: as save_last_n_epochs."""
    save_last_n_steps_state: int | None = None
    """Of the run states saved by step, keep those that are at most n optimizer steps old; default: as
    save_last_n_steps."""
    save_state: bool = False
    """Save the whole state of the run beside each result, to resume from."""
    save_state_on_train_end: bool = False
    """Save the whole state of the run when training ends."""
    resume: str | None = None
    """Resume from this state folder (`NAME-state`), or `auto` for the newest in output_dir."""
    dialect: Literal["kohya", "comfy", "peft"] = "kohya"
    """Key names of a saved adapter; `kohya` loads in ComfyUI, Forge and diffusers."""
    no_metadata: bool = False
    """Write only the metadata that loaders need."""
    training_comment: str | None = None
    """Free text kept in the metadata."""
    metadata_title: str | None = None
    """modelspec: title; default: output_name."""
    metadata_author: str | None = None
    """modelspec: author."""
    metadata_description: str | None = None
    """modelspec: description."""
    metadata_license: str | None = None
    """modelspec: licence."""
    metadata_tags: str | None = None
    """modelspec: tags, separated by commas."""
    metadata_usage_hint: str | None = None
    """modelspec: how to use the file."""
    metadata_trigger_phrase: str | None = None
    """modelspec: the phrase that calls the trained thing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning rates."""

    optimizer_type: str = "AdamW"
    """AdamW, AdamW8bit, Lion, Prodigy, AdaFactor, SGDNesterov, DAdaptAdam, AdamWScheduleFree ..., or `module.Class`."""
    optimizer_args: tuple[str, ...] = ()
    """Arguments of the optimizer, as `key=value`."""
    learning_rate: float = 1e-4
    """Learning rate of everything that has no rate of its own."""
    unet_lr: float | None = None
    """Learning rate of the denoiser (U-Net or transformer) when adapters are trained."""
    text_encoder_lr: tuple[float, ...] = ()
    """Learning rate of the text encoder when adapters are trained; several values for several encoders; 0 freezes."""
    learning_rate_te: float | None = None
    """Learning rate of the text encoder when whole models are trained."""
    max_grad_norm: float = 1.0
    """Clip the norm of all gradients together to this; 0: no clipping."""
    lr_scheduler: Literal[
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
    ] = "constant"
    """How the learning rate moves over the run."""
    lr_scheduler_type: str | None = None
    """A scheduler class of your own, `module.Class`, in place of lr_scheduler."""
    lr_scheduler_args: tuple[str, ...] = ()
    """Arguments of the scheduler, as `key=value`."""
    lr_warmup_steps: int | float | str = 0
    """Optimizer steps of warm-up: a number, a share of the run below 1, or a percentage such as "10%"."""
    lr_decay_steps: int | float | str = 0
    """Optimizer steps of decay, for warmup_stable_decay: as lr_warmup_steps."""
    lr_scheduler_num_cycles: int = 1
    """Restarts of cosine_with_restarts."""
    lr_scheduler_power: float = 1.0
    """Power of polynomial."""
    lr_scheduler_timescale: int | None = None
    """Time scale of inverse_sqrt; default: the warm-up steps."""
    lr_scheduler_min_lr_ratio: float | None = None
    """Floor of cosine_with_min_lr and warmup_stable_decay, as a share of the learning rate."""
    ema_decay: float | None = None
    """Keep a moving average of the trained weights with this decay (such as 0.999) and save that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long and how training runs."""

    max_train_steps: int | None = None
    """Optimizer steps in all, a resumed run's earlier ones included; default: 1600, unless max_train_epochs is set."""
    max_train_epochs: int | None = None
    """Epochs in all; overrides max_train_steps."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are averaged for one optimizer step."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Number format of the computation; default: what `accelerate launch` says, else no."""
    full_bf16: bool = False
    """Hold the trained weights themselves in bf16, updated with stochastic rounding."""
    seed: int = 42
    """Number from which all randomness of the run follows."""
    train_text_encoder: bool = False
    """Train the text encoder as well, when a whole model is trained."""
    stop_text_encoder_training: int | None = None
    """Freeze the text encoder after this many optimizer steps (0: do not train it)."""
    max_data_loader_n_workers: int = 0
    """Worker processes that read images; 0: read in the main process. Results do not depend on it."""
    persistent_data_loader_workers: bool = False
    """Keep the worker processes between epochs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """What is spent to fit the card."""

    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    sdpa: bool = False
    """Use PyTorch's attention (what sfumato does anyway)."""
    xformers: bool = False
    """Use xformers' attention, if it is installed."""
    no_half_vae: bool = False
    """Run the VAE in fp32 even when the computation is in fp16 or bf16."""
    vae_batch_size: int = 1
    """Images that the VAE encodes at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseConfig:
    """Noise and timesteps."""

    noise_offset: float | None = None
    """Add a random brightness of this strength to the noise of each channel (about 0.05 to 0.1)."""
    noise_offset_random_strength: bool = False
    """Draw the strength of noise_offset evenly between 0 and its value."""
    adaptive_noise_scale: float | None = None
    """Add this times the latent's mean magnitude to noise_offset."""
    multires_noise_iterations: int | None = None
    """Layers of multi-resolution (pyramid) noise."""
    multires_noise_discount: float = 0.3
    """Strength of each further layer of multi-resolution noise."""
    ip_noise_gamma: float | None = None
    """Extra noise on the input only, not on the target (input perturbation, about 0.1)."""
    ip_noise_gamma_random_strength: bool = False
    """Draw ip_noise_gamma evenly between 0 and its value."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last timestep is pure noise (needs v prediction)."""
    min_timestep: int | None = None
    """Lowest timestep drawn; default 0."""
    max_timestep: int | None = None
    """Timesteps are drawn below this; default 1000."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """The loss and its weights."""

    loss_type: Literal["l1", "l2", "huber", "smooth_l1"] = "l2"
    """The loss of a pixel of the latent."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How the Huber threshold follows the timestep."""
    huber_c: float = 0.1
    """Threshold of the Huber losses, where they pass from squared to absolute."""
    huber_scale: float = 1.0
    """Factor on the Huber threshold."""
    min_snr_gamma: float | None = None
    """Min-SNR weighting with this gamma (5 in the paper, arXiv:2303.09556)."""
    scale_v_pred_loss_like_noise_pred: bool = False
    """Weigh a v-prediction loss as a noise-prediction loss would be."""
    v_pred_like_loss: float | None = None
    """Add this share of a v-prediction-like weighting to a noise-prediction loss."""
    debiased_estimation_loss: bool = False
    """Debiased estimation weighting (arXiv:2310.08442)."""
    masked_loss: bool = False
    """Weigh the loss by each image's mask (its alpha channel or a mask image)."""
    prior_loss_weight: float = 1.0
    """Weight of regularisation images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """The adapter, when one is trained."""

    network_module: str = "lora"
    """Kind of adapter: lora (kohya's `networks.lora` means the same)."""
    network_dim: int | None = None
    """Rank of the adapter; default 4."""
    network_alpha: float | None = None
    """The change is scaled by alpha / rank; 0 means the rank; default 1."""
    network_dropout: float | None = None
    """Chance that a neuron of the adapter is dropped in a step."""
    network_args: tuple[str, ...] = ()
    """Further arguments of the adapter, as `key=value`: conv_dim, conv_alpha, rank_dropout, module_dropout,
    loraplus_lr_ratio ..."""
    network_weights: str | None = None
    """Start from this adapter file."""
    dim_from_weights: bool = False
    """Take ranks and alphas from network_weights."""
    network_train_unet_only: bool = False
    """Put adapters on the denoiser only."""
    network_train_text_encoder_only: bool = False
    """Put adapters on the text encoder only."""
    scale_weight_norms: float | None = None
    """Keep the norm of each layer's change below this (max-norm regularisation)."""
    base_weights: tuple[str, ...] = ()
    """Adapter files merged into the base model before training."""
    base_weights_multiplier: tuple[float, ...] = ()
    """Strengths of base_weights; default 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig:
    """Images drawn while training."""

    sample_every_n_steps: int | None = None
    """Draw the sample prompts every n optimizer steps."""
    sample_every_n_epochs: int | None = None
    """Draw the sample prompts every n epochs."""
    sample_at_first: bool = False
    """Draw the sample prompts before the first step."""
    sample_prompts: str | None = None
    """File of prompts: .txt (one a line, with `--w --h --d --s --l --n`), .toml or .json. One without a size is drawn
    at the resolution of the run, by `sfumato sample` at the one that the file says it was trained at."""
    sample_sampler: str = "ddim"
    """ddim, pndm, lms, euler, euler_a, heun, dpm_2, dpm_2_a, dpmsolver, dpmsolver++, dpmsingle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """What is written down while training; `LOG.jsonl` beside the result always is."""

    logging_dir: str | None = None
    """Folder for tensorboard; default `logs` in output_dir."""
    log_with: Literal["tensorboard", "wandb", "all"] | None = None
    """Further places for the log."""
    log_prefix: str | None = None
    """Put before the name of the log folder."""
    log_tracker_name: str | None = None
    """Project name for wandb; default: sfumato."""
    wandb_run_name: str | None = None
    """Run name for wandb; default: output_name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything a run is told. `family` holds the family's own options (`families/NAME/facts.py: Options`)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    log: LogConfig = field(default_factory=LogConfig)
    family: object = None
