"""kohya's command lines for Chroma, under the launchers that it shares with FLUX.1."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import launch
from tinies.chroma import native, write
from torch import Tensor, equal

from sfumato.formats.files import load

COMMON = """
    --model_type chroma --apply_t5_attn_mask --guidance_scale 0.0 --timestep_sampling sigmoid --sigmoid_scale 1.0 --model_prediction_type raw
    --loss_type l2 --save_model_as safetensors --sdpa --max_data_loader_n_workers 1 --persistent_data_loader_workers --seed 42
    --gradient_checkpointing --cache_latents --cache_text_encoder_outputs --max_train_steps 2 --lr_scheduler constant
    --sample_every_n_steps 2
"""


def trained(script: str, folder: Path, images: Path, *command: str) -> tuple[dict[str, Tensor], str]:
    """Run a launcher; what it saved, and what it printed."""
    files = write(folder)
    (folder / "data.toml").write_text(
        f'[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = "{images}"\n'
    )
    (folder / "prompts.txt").write_text("a cat --n dull --w 64 --h 32 --d 1 --s 2 --l 4.0 --g 0.0\n")
    named = f"""
        --pretrained_model_name_or_path {files.model} --t5xxl {files.options["t5xxl"]} --ae {files.vae} --dataset_config {folder / "data.toml"}
        --output_dir {folder / "out"} --output_name out --sample_prompts {folder / "prompts.txt"}
    """
    settings = [*named.split(), *COMMON.split(), *command]
    text = launch(script, settings, folder)
    assert len(list((folder / "out" / "sample").glob("*.png"))) == 1
    return load(folder / "out" / "out.safetensors"), text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


def test_an_adapter(folder: Path, images: Path) -> None:
    """CLIP-L is named out of habit, and is not read."""
    clip_l = images.parent / "clip_l.safetensors"
    clip_l.touch()
    network = "--network_module networks.lora_flux --network_dim 2 --network_alpha 1 --network_train_unet_only --optimizer_type AdamW"
    saved, text = trained(
        "flux_train_network", folder, images, *network.split(), "--learning_rate", "5e-4", "--clip_l", str(clip_l)
    )
    assert "--clip_l: accepted, no effect" in text
    assert {name.rpartition(".lora_")[0].partition("blocks_")[0] for name in saved if ".lora_up" in name} == {
        "lora_unet_double_",
        "lora_unet_single_",
    }
    assert all(t.any() for t in saved.values())


def test_a_whole_model(folder: Path, images: Path) -> None:
    adafactor = (
        "--optimizer_type adafactor --optimizer_args relative_step=False scale_parameter=False warmup_init=False"
    )
    full = f"{adafactor} --learning_rate 1e-2 --mixed_precision bf16 --save_precision float --mem_eff_save"
    saved, _ = trained("flux_train", folder, images, *full.split())
    before = native()
    assert saved.keys() == before.keys()
    changed = {name for name, t in before.items() if not equal(saved[name], t)}
    assert changed == {name for name in before if "distilled_guidance_layer" not in name}
