"""kohya's command lines for FLUX.1 train."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from launching import launch
from tinies import flux, headers

from sfumato import __version__
from sfumato.families.flux.facts import SIGNATURE
from sfumato.formats.files import read_header

SHARED = """
    --output_name out --save_model_as safetensors --sdpa --persistent_data_loader_workers --max_data_loader_n_workers 1 --seed 42
    --gradient_checkpointing --mixed_precision bf16 --save_precision bf16 --highvram --max_train_steps 2 --optimizer_type adafactor
    --optimizer_args relative_step=False scale_parameter=False warmup_init=False --lr_scheduler constant_with_warmup --max_grad_norm 0.0
    --lr_warmup_steps 1 --cache_latents_to_disk --cache_text_encoder_outputs --cache_text_encoder_outputs_to_disk
    --timestep_sampling shift --discrete_flow_shift 3.1582 --model_prediction_type raw --loss_type l2
    --sample_prompts PROMPTS --sample_every_n_steps 2
"""
NETWORK = """
    --network_module networks.lora_flux --network_dim 2 --network_train_unet_only --learning_rate 1e-3 --guidance_scale 1.0
    --network_args train_double_block_indices=0 single_mod_dim=0 in_dims=[2,0,0,0,2] split_qkv=True --apply_t5_attn_mask --model_type flux
    --blocks_to_swap 1
"""
CONTROL_NET = "flux_train_control_net"
CONTROL = """
    --learning_rate 2e-5 --guidance_scale 1.0 --double_blocks_to_swap 1 --single_blocks_to_swap 2 --mem_eff_save
    --skip_latents_validity_check --model_type flux
"""
FULL = "--learning_rate 5e-5 --full_bf16 --t5xxl_max_token_length 256 --blocks_to_swap 1 --fused_backward_pass"


@pytest.mark.parametrize(
    ("script", "flags", "guidance"),
    [("flux_train_network", NETWORK, True), ("flux_train", FULL, False)],
    ids=["network", "full"],
)
def test_a_usual_command_line(images: Path, tmp_path: Path, script: str, flags: str, guidance: bool) -> None:
    files, dataset, prompts = flux.write(guidance, tmp_path / "model"), tmp_path / "data.toml", tmp_path / "prompts.txt"
    dataset.write_text(
        f'[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = "{images}"\n'
    )
    prompts.write_text("a cat --w 32 --h 32 --s 2 --d 1 --l 1.0\n")
    named = {
        "pretrained_model_name_or_path": files.model,
        "dataset_config": dataset,
        "output_dir": tmp_path / "out",
        **files.options,
    }
    named |= {"ae": files.vae} if files.vae else {}
    words = [word for name, value in named.items() for word in (f"--{name}", str(value))]
    said = launch(script, [*words, *(SHARED + flags).replace("PROMPTS", str(prompts)).split()], tmp_path)
    assert "--blocks_to_swap 1: 2 of all blocks" in said and "4 of 5 blocks wait in the CPU's memory" in said
    result = tmp_path / "out" / "out.safetensors"
    header = read_header(result)
    found = SIGNATURE.detect({name: info.shape for name, info in header.tensors.items()})
    assert found is not None and found.kind == ("adapter" if script == "flux_train_network" else "checkpoint")
    assert header.metadata["ss_base_model_version"] == "flux1"
    architecture = {"flux_train_network": "flux-1-dev/lora", "flux_train": "flux-1-schnell"}[script]
    assert header.metadata["modelspec.architecture"] == architecture
    # Forge knows adapters of schnell by it; a whole model's says who wrote it, so that a folder is known as ours.
    implementation = "https://github.com/black-forest-labs/flux" if script == "flux_train_network" else "sfumato "
    assert header.metadata["modelspec.implementation"].startswith(implementation)
    assert header.metadata["ss_sfumato_version"] == __version__
    assert header.metadata["ss_timestep_sampling"] == "shift" and header.metadata["ss_discrete_flow_shift"] == "3.1582"
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "out.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)


def test_a_usual_command_line_of_a_control_net(images: Path, tmp_path: Path) -> None:
    """What it writes has the names of sd-scripts' own, and samples follow an image."""
    files, dataset, prompts = flux.write(True, tmp_path / "model"), tmp_path / "data.toml", tmp_path / "prompts.txt"
    follow = tmp_path / "follow"
    shutil.copytree(images, follow, ignore=shutil.ignore_patterns("*.txt"))
    dataset.write_text(
        f'[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\n'
        f'image_dir = "{images}"\nconditioning_data_dir = "{follow}"\n'
    )
    image = next(iter(sorted(follow.glob("*.png"))))
    prompts.write_text(f"a cat --w 32 --h 32 --s 2 --d 1 --l 1.0 --cn {image}\n")
    named = {"pretrained_model_name_or_path": files.model, "dataset_config": dataset, "output_dir": tmp_path / "out"}
    words = [
        word
        for name, value in {**named, **files.options, "ae": files.vae}.items()
        for word in (f"--{name}", str(value))
    ]
    said = launch(CONTROL_NET, [*words, *(SHARED + CONTROL).replace("PROMPTS", str(prompts)).split()], tmp_path)
    assert "5 of 5 blocks wait in the CPU's memory" in said
    header = read_header(tmp_path / "out" / "out.safetensors")
    real = headers.table("flux.controlnet")
    assert header.tensors.keys() == real.keys() and {info.dtype for info in header.tensors.values()} == {"BF16"}
    assert header.metadata["modelspec.architecture"] == "flux-1-dev/controlnet"
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1
