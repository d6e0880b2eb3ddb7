"""kohya's command lines for Stable Diffusion XL train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import launch
from safetensors import safe_open
from tinies import sdxl

from sfumato.families.sdxl.names import CLIP_G, CLIP_L, VAE
from sfumato.formats.files import load
from sfumato.models.detection import PREFIX

COMMON = """
    --output_name out --save_model_as safetensors --max_train_steps 2 --optimizer_type AdamW --lr_scheduler constant_with_warmup
    --lr_warmup_steps 1 --max_token_length 225 --mixed_precision bf16 --no_half_vae --cache_latents --gradient_checkpointing --sdpa --seed 5
    --min_snr_gamma 5 --noise_offset 0.0357 --max_grad_norm 1.0 --max_data_loader_n_workers 0 --prior_loss_weight 1.0
    --enable_bucket --min_bucket_reso 64 --max_bucket_reso 128 --bucket_reso_steps 32 --resolution 64,64 --train_batch_size 2
    --caption_extension .txt --shuffle_caption --keep_tokens 1
"""
NETWORK = """
    --network_module networks.lora --network_dim 2 --network_alpha 1 --network_args conv_dim=2 conv_alpha=1 --learning_rate 1e-3
    --unet_lr 1e-3 --text_encoder_lr 5e-4 1e-4 --save_precision fp16
"""
FULL = f"""
    --train_text_encoder --learning_rate 1e-4 --learning_rate_te1 0 --learning_rate_te2 1e-4 --block_lr {",".join(["0"] * 22)},1e-3
    --save_precision float --disable_mmap_load_safetensors
"""


@pytest.fixture
def trained(images: Path, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """(the base model, what the script made of it)"""
    script, flags = request.param
    model = sdxl.write(tmp_path / "model").model
    folder = tmp_path / "set"
    folder.mkdir()
    images.rename(folder / "1_images")
    command = f"--pretrained_model_name_or_path {model} --train_data_dir {folder} --output_dir {tmp_path / 'out'} {COMMON} {flags}".split()
    launch(script, command, tmp_path)
    return model, tmp_path / "out" / "out.safetensors"


@pytest.mark.parametrize("trained", [("sdxl_train_network", NETWORK)], indirect=True, ids=["LoCon"])
def test_an_adapter(trained: tuple[Path, Path]) -> None:
    _, result = trained
    tensors = load(result)
    assert {"_".join(name.split("_")[:2]) for name in tensors} == {"lora_unet", "lora_te1", "lora_te2"}
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert any(
        t.any() for name, t in tensors.items() if name.startswith("lora_te2_") and name.endswith("lora_up.weight")
    )
    with safe_open(result, "pt") as file:
        metadata = file.metadata()
    assert (
        metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
        and metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    )
    assert metadata["ss_network_module"] == "networks.lora" and metadata["ss_max_token_length"] == "225"


@pytest.mark.parametrize("trained", [("sdxl_train", FULL)], indirect=True, ids=["full"])
def test_a_whole_model(trained: tuple[Path, Path]) -> None:
    before, after = (load(path) for path in trained)
    assert before.keys() == after.keys()
    moved = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert {name for name in moved if name.startswith(PREFIX)} == {
        f"{PREFIX}out.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")
    }
    assert {name for name in moved if not name.startswith(PREFIX)} == {
        name for name in before if name.startswith(CLIP_G) and not name.endswith("logit_scale")
    }
    assert not [name for name in moved if name.startswith((CLIP_L, VAE))]
