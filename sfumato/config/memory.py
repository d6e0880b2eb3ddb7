"""The settings of what is spent to fit the card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from sfumato.config.rules import Count, CountOrOff, Excludes, Must, Needs, Record, Share, ZeroIsOff
from sfumato.config.sizes import size

Memory = Annotated[str, Must(size, "an amount of memory such as 12GB or 8192MB")]
ATTENTION = {"xformers": "xformers", "flash": "flash_attn", "sageattn": "sageattention"}
"""attn_mode -> the library that it needs."""
_CHECKPOINTED = Needs("gradient_checkpointing")
_SWAPPED = Excludes("blocks_to_swap", why="blocks_to_swap counts blocks of all kinds")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(Record):
    """What is spent to fit the card."""

    vram: Memory | None = None
    """The memory that the card has, such as 12GB (1 GB is 2^30 bytes): what is not set of gradient_checkpointing,
    cpu_offload_checkpointing, quantize, blocks_to_swap and micro_batch is chosen so that the training fits and takes
    the least time. `sfumato plan` shows the choice."""
    simulate_vram: Memory | None = None
    """Train as on a card with so little memory, such as 8GB: what needs more fails as it would there."""
    micro_batch: CountOrOff = None
    """Images of a batch that pass the model at once, the others after them: less memory and more time for the same
    step. Default: the whole batch."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    gradient_checkpointing_every: Annotated[Count, _CHECKPOINTED] = 1
    """Recompute every n-th block only: faster, with more memory."""
    gradient_checkpointing_keep: Annotated[Literal["attention", "costly"] | None, _CHECKPOINTED] = None
    """Keep what costs much to recompute for the memory it takes: the results of attention, or (`costly`) of matrix
    products and convolutions with long sums as well."""
    cpu_offload_checkpointing: Annotated[bool, _CHECKPOINTED] = False
    """Keep what each recomputed block was given in the host's memory until its backward pass."""
    blocks_to_swap: CountOrOff = None
    """Blocks of the denoiser for which the card needs no room: they wait in the CPU's memory and come when they are
    used, while others compute. 1 to one less than it has, of whatever kind; more take less memory and more time."""
    double_blocks_to_swap: Annotated[CountOrOff, _SWAPPED] = None
    """The same of blocks with two streams alone, in models that have such (FLUX)."""
    single_blocks_to_swap: Annotated[CountOrOff, _SWAPPED] = None
    """The same of blocks with one stream alone."""
    text_encoder_blocks_to_swap: CountOrOff = None
    """The same of the largest text encoder, where captions are encoded in every step."""
    torch_compile: bool = False
    """Compile the model's blocks: the first steps take minutes, all others less time. What is compiled is kept between
    runs (torch's TORCHINDUCTOR_CACHE_DIR). Dropouts of adapters are drawn between what is compiled and cut blocks into
    many pieces, often too many: those blocks run as they are, which is told."""
    dynamo_backend: str = "inductor"
    """The compiler of torch_compile, of those that torch knows. `accelerate launch --dynamo_backend` asks for one as
    well."""
    attn_mode: Literal["torch", "sdpa", "xformers", "flash", "sageattn"] | None = None
    """What computes attention: PyTorch (torch or sdpa, the default), xformers, flash-attn (flash: version 3 where
    installed and the card has it, else 2) or, for samples alone, sageattn. Masked batches go through flash kernels
    without what is masked."""
    sdpa: bool = False
    """Use PyTorch's attention (what sfumato does anyway)."""
    xformers: bool = False
    """Use xformers' attention, if it is installed."""
    no_half_vae: bool = False
    """Run the VAE in fp32 even when the computation is in fp16 or bf16."""
    vae_batch_size: Annotated[Count, Needs("cache_latents", "cache_latents_to_disk")] = 1
    """Images that the VAE encodes at once."""
    vae_tile_size: Annotated[Annotated[int, Ge(256)] | None, ZeroIsOff()] = None
    """Images with a side of more pixels than this pass through the VAE in overlapping tiles of this size (512, say),
    which needs less memory and changes them a little."""
    stream_text_encoders: Annotated[
        bool | None, Needs("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk")
    ] = None
    """Read text encoders block by block while captions are encoded, so that none is ever in memory whole; the numbers
    are the same. Default: those of more than 4 GiB, unless card and host have half as much again free."""
    quantize: Literal["fp8", "int8", "nf4", "auto"] | None = None
    """Keep the weights of the frozen denoiser's blocks in fewer bits: fp8 with a scale for each 64 inputs (8.5 bits a
    number), int8 in turned groups of inputs (8, and the most exact), nf4 (4.25), or auto: for each layer the smallest
    format within quantize_budget."""
    quantize_text_encoders: Literal["fp8", "int8", "nf4", "auto"] | None = None
    """The same for the text encoders."""
    quantize_budget: Annotated[Share, Needs("quantize", "quantize_text_encoders", among=("auto",))] = 0.1
    """What a format may lose of a layer's weight for auto to take it, as a share of the weight's norm; about 0.09 in
    nf4, 0.02 in fp8, 0.008 in int8. Where none is within it, the layer stays as it is."""
    int8_matmul: Annotated[bool, Needs("quantize", "quantize_text_encoders", among=("int8", "auto"))] = False
    """Multiply in int8 where weights are in it, forward and backward: what comes in and gradients are rounded to 8 bits
    for each token, which is faster on most cards and less exact. Where the device cannot, weights are made wide."""
    fp8_base: bool = False
    """quantize fp8, and quantize_text_encoders fp8 unless fp8_base_unet is set: with scales, which sd-scripts' plain
    cast has not."""
    fp8_base_unet: bool = False
    """quantize fp8: the text encoders stay as they are."""
    fp8_scaled: bool = False
    """quantize fp8."""

    @property
    def attention(self) -> Literal["sdpa", "xformers", "flash", "sageattn"]:
        """What computes attention."""
        if self.attn_mode is None:
            return "xformers" if self.xformers else "sdpa"
        return "sdpa" if self.attn_mode == "torch" else self.attn_mode

    @property
    def denoiser_format(self) -> Literal["fp8", "int8", "nf4", "auto"] | None:
        """What the denoiser's weights are kept in: one of `quantize`."""
        return self.quantize or ("fp8" if self.fp8_base or self.fp8_base_unet or self.fp8_scaled else None)

    @property
    def encoder_format(self) -> Literal["fp8", "int8", "nf4", "auto"] | None:
        """The same of the text encoders."""
        return self.quantize_text_encoders or ("fp8" if self.fp8_base and not self.fp8_base_unet else None)
