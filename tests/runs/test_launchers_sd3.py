"""kohya's command lines for Stable Diffusion 3 train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import launch
from tinies import sd3
from tinies.cases import Files

from sfumato.families.detect import identify
from sfumato.formats.files import load, read_header

COMMON = """
    --output_name out --save_model_as safetensors --sdpa --persistent_data_loader_workers --max_data_loader_n_workers 1 --seed 42
    --gradient_checkpointing --mixed_precision bf16 --max_train_steps 2 --lr_scheduler constant --weighting_scheme uniform
    --training_shift 3.0 --t5xxl_max_token_length 128 --t5xxl_dtype bf16 --apply_lg_attn_mask --apply_t5_attn_mask
    --clip_l_dropout_rate 0.1 --clip_g_dropout_rate 0.1 --t5_dropout_rate 0.1 --pos_emb_random_crop_rate 0.2
    --disable_mmap_load_safetensors --highvram --cache_latents --sample_every_n_steps 2
"""


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return sd3.write("3.5_medium", tmp_path / "model")


def trained(script: str, files: Files, images: Path, command: str) -> Path:
    """Run a launcher in the folder of the model; returns the folder of the results."""
    folder = files.model.parent
    (folder / "data.toml").write_text(
        f'[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = "{images}"\n'
    )
    (folder / "prompts.txt").write_text("a cat --n dull --w 64 --h 32 --d 1 --s 2 --l 4.0\n")
    encoders = " ".join(f"--{name} {path}" for name, path in files.options.items())
    named = f"--pretrained_model_name_or_path {files.model} {encoders} --dataset_config {folder / 'data.toml'} --output_dir {folder / 'out'}"
    settings = f"{named} --sample_prompts {folder / 'prompts.txt'} {COMMON} {command}".split()
    launch(script, settings, folder)
    assert len(list((folder / "out" / "sample").glob("*.png"))) == 1
    return folder / "out"


def test_an_adapter_with_its_text_encoders(files: Files, images: Path) -> None:
    command = """
        --network_module networks.lora_sd3 --network_dim 2 --network_alpha 1 --optimizer_type AdamW --learning_rate 1e-3
        --text_encoder_lr 5e-4 2e-4 --network_args x_attn_dim=4 emb_dims=[2,0,0,0,0,2] train_block_indices=0-1 split_qkv=True
    """
    out = trained("sd3_train_network", files, images, command)
    saved, header = load(out / "out.safetensors"), read_header(out / "out.safetensors")
    found = identify({name: info.shape for name, info in header.tensors.items()})
    assert found is not None and (found.family, found.kind, found.dialect) == ("sd3", "adapter", "kohya")
    starts = {name.partition("_joint_blocks_")[0].partition("_text_model_")[0].partition(".")[0] for name in saved}
    assert starts == {"lora_unet", "lora_te1", "lora_te2", "lora_unet_context_embedder", "lora_unet_final_layer_linear"}
    assert saved["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"].shape == (12, 128)
    assert not [name for name in saved if "joint_blocks_2_" in name]
    assert not [name for name, t in saved.items() if not t.any()]
    meta = header.metadata
    assert meta["modelspec.architecture"] == "stable-diffusion-3.5-medium/lora"
    assert (meta["ss_base_model_version"], meta["ss_weighting_scheme"], meta["ss_apply_t5_attn_mask"]) == (
        "sd3.5_m",
        "uniform",
        "True",
    )


def test_a_whole_model_with_its_text_encoders(files: Files, images: Path) -> None:
    command = """
        --train_text_encoder --learning_rate_te1 1e-3 --learning_rate_te2 0 --learning_rate 1e-2 --save_precision float --save_clip
        --optimizer_type adafactor --optimizer_args relative_step=False scale_parameter=False warmup_init=False
    """
    out = trained("sd3_train", files, images, command)
    before, after = load(files.model), load(out / "out.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    still = {
        name
        for name in before
        if name.startswith("first_stage_model.") or name.endswith((".pos_embed", "2.context_block.attn.ln_q.weight"))
    }
    assert changed == before.keys() - still
    old, new = load(Path(files.options["clip_l"])), load(out / "out_clip_l.safetensors")
    assert any(not torch.equal(old[name], t) for name, t in new.items())
    assert not (out / "out_t5xxl.safetensors").exists()
    assert read_header(out / "out.safetensors").metadata["modelspec.architecture"] == "stable-diffusion-3.5-medium"
