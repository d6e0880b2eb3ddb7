"""kohya's command lines for Lumina Image 2.0 train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import launch
from tinies import lumina2
from tinies.cases import Files

from sfumato.families.detect import identify
from sfumato.families.lumina2.names import UNUSED
from sfumato.formats.files import load, read_header

COMMON = """
    --output_name out --save_model_as safetensors --sdpa --persistent_data_loader_workers --max_data_loader_n_workers 1 --seed 42
    --gradient_checkpointing --mixed_precision bf16 --max_train_steps 2 --lr_scheduler constant --timestep_sampling nextdit_shift
    --discrete_flow_shift 6.0 --model_prediction_type raw --gemma2_max_token_length 64 --use_flash_attn --cache_latents
    --sample_every_n_steps 2 --sample_batch_size 1 --caption_extension .txt
"""


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return lumina2.write(tmp_path / "model")


def trained(script: str, files: Files, images: Path, command: str) -> Path:
    """Run a launcher in the folder of the model; returns the folder of the results."""
    folder = files.model.parent
    (folder / "data.toml").write_text(
        f'[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = "{images}"\n'
    )
    (folder / "prompts.txt").write_text(
        "a cat --n dull --w 64 --h 32 --d 1 --s 4 --l 3.5 --ctr 0.5 --rcfg 1.0 --fs 6\n"
    )
    named = f"--pretrained_model_name_or_path {files.model} --gemma2 {files.options['gemma2']} --ae {files.vae} --output_dir {folder / 'out'}"
    settings = (
        f"{named} --dataset_config {folder / 'data.toml'} --sample_prompts {folder / 'prompts.txt'} {COMMON} {command}"
    )
    launch(script, [*settings.split(), "--system_prompt", "a photo of"], folder)
    assert len(list((folder / "out" / "sample").glob("*.png"))) == 1
    return folder / "out"


def test_an_adapter_with_its_text_encoder(files: Files, images: Path) -> None:
    command = """
        --network_module networks.lora_lumina --network_dim 2 --network_alpha 1 --optimizer_type AdamW --learning_rate 1e-3
        --text_encoder_lr 5e-4 --network_args attn_dim=4 refiner_dim=0 embedder_dims=[2,0,2]
    """
    out = trained("lumina_train_network", files, images, command)
    saved, header = load(out / "out.safetensors"), read_header(out / "out.safetensors")
    starts = {name.partition("_layers_")[0].partition(".")[0] for name in saved if "final_layer" not in name}
    assert starts == {"lora_unet", "lora_te", "lora_unet_x_embedder", "lora_unet_cap_embedder_1"}
    assert saved["lora_unet_layers_0_attention_qkv.lora_down.weight"].shape == (4, 96)
    # The last layer of Gemma is not used.
    assert not [name for name, t in saved.items() if not t.any() and not name.startswith("lora_te_layers_3_")]
    meta = header.metadata
    found = identify({name: info.shape for name, info in header.tensors.items()}, meta)
    assert found is not None and (found.family, found.kind, found.dialect) == ("lumina2", "adapter", "kohya")
    assert (meta["modelspec.architecture"], meta["ss_base_model_version"]) == ("lumina-2/lora", "lumina2")
    assert (meta["ss_system_prompt"], meta["ss_timestep_sampling"]) == ("a photo of", "nextdit_shift")


def test_a_whole_model(files: Files, images: Path) -> None:
    command = """
        --learning_rate 1e-2 --save_precision float --mem_eff_save --skip_latents_validity_check --cache_text_encoder_outputs
        --optimizer_type adafactor --optimizer_args relative_step=False scale_parameter=False warmup_init=False
    """
    out = trained("lumina_train", files, images, command)
    before, after = load(files.model), load(out / "out.safetensors")
    assert before.keys() == after.keys()
    assert {name for name in before if torch.equal(before[name], after[name])} == {UNUSED}
    assert not list(out.glob("out_*"))
    assert read_header(out / "out.safetensors").metadata["modelspec.architecture"] == "lumina-2"
