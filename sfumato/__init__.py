"""sfumato: a trainer for image diffusion models.

A model for notebooks and scripts:

    models = sfumato.load("model.safetensors", device="cuda", dtype=torch.bfloat16)
    cond = models.encode(models.tokenize(["a cat"]))
    latents = models.scaled(models.encode_images(pixels))  # (b, 3, H, W) in [-1, 1] -> those of the denoiser
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from sfumato.models.base import Models

__version__ = "0.1.0"


def load(
    path: str | Path,
    *,
    vae: str | None = None,
    tokenizer: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    embeddings: Sequence[str | Path] = (),
    **options: Any,
) -> Models:
    """A whole model (file, diffusers folder or hub id) of the family that its header shows, frozen and in eval mode.

    `dtype`: of the denoiser and the text encoders; None: as in the file. `embeddings`: files of words that captions may
    have (textual inversion), each called as its file. `options`: the family's own, spelled as its
    flags (`t5xxl`, say). Errors: `UserError` for a file that is not a whole model, or lacks a part.
    """
    from sfumato import families
    from sfumato.families.detect import detect_file
    from sfumato.models import embedding_files, loading
    from sfumato.models.embeddings import Words

    name = detect_file(path).family
    made = families.facts(name).options(**options)
    models = loading.load(
        families.family(name), str(path), made, vae=vae, tokenizer=tokenizer, device=device, dtype=dtype
    )
    for file in embeddings:
        Words(models, embedding_files.read(Path(file), models, "embeddings"))
    return models
