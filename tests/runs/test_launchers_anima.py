"""kohya's command lines for Anima train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import launch
from tinies import anima
from tinies.cases import Files

from sfumato.families.detect import identify
from sfumato.formats.files import load, read_header

COMMON = """
    --output_name out --save_model_as safetensors --sdpa --persistent_data_loader_workers --max_data_loader_n_workers 1 --seed 42
    --gradient_checkpointing --mixed_precision bf16 --max_train_steps 2 --lr_scheduler constant --timestep_sampling sigmoid
    --discrete_flow_shift 1.0 --qwen3_max_token_length 512 --t5_max_token_length 512 --vae_chunk_size 64 --vae_disable_cache
    --cache_latents --sample_every_n_steps 2 --caption_extension .txt
"""


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return anima.write(tmp_path / "model")


def trained(script: str, files: Files, images: Path, command: str) -> Path:
    """Run a launcher in the folder of the model; returns the folder of the results."""
    folder = files.model.parent
    (folder / "data.toml").write_text(
        f'[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = "{images}"\n'
        "caption_dropout_rate = 0.2\n"
    )
    (folder / "prompts.txt").write_text("a cat --n dull --w 64 --h 32 --d 1 --s 4 --l 3.5 --fs 5\n")
    named = (
        f"--pretrained_model_name_or_path {files.model} --qwen3 {files.options['qwen3']} --vae {files.vae} "
        f"--t5_tokenizer_path {folder / 't5_tokenizer'} --output_dir {folder / 'out'}"
    )
    settings = (
        f"{named} --dataset_config {folder / 'data.toml'} --sample_prompts {folder / 'prompts.txt'} {COMMON} {command}"
    )
    launch(script, settings.split(), folder)
    assert len(list((folder / "out" / "sample").glob("*.png"))) == 1
    return folder / "out"


def test_an_adapter_with_its_text_encoder(files: Files, images: Path) -> None:
    command = """
        --network_module networks.lora_anima --network_dim 2 --network_alpha 1 --optimizer_type AdamW --learning_rate 1e-3
        --text_encoder_lr 5e-4 --network_args train_llm_adapter=True exclude_patterns=['.*cross_attn.*'] network_reg_dims=.*mlp.*=4
    """
    out = trained("anima_train_network", files, images, command)
    saved, header = load(out / "out.safetensors"), read_header(out / "out.safetensors")
    starts = {name.partition("_self_attn")[0].partition("_mlp")[0].rstrip("0123456789") for name in saved}
    assert starts == {"lora_unet_blocks_", "lora_unet_llm_adapter_blocks_", "lora_te_layers_"}
    assert saved["lora_unet_blocks_0_mlp_layer1.lora_down.weight"].shape == (4, 64)
    assert all(t.any() for t in saved.values())
    meta = header.metadata
    found = identify({name: info.shape for name, info in header.tensors.items()}, meta)
    assert found is not None and (found.family, found.kind, found.dialect) == ("anima", "adapter", "kohya")
    assert (meta["modelspec.architecture"], meta["ss_base_model_version"]) == ("anima-preview/lora", "anima")
    assert (meta["ss_timestep_sampling"], meta["ss_qwen3_max_token_length"]) == ("sigmoid", "512")


def test_a_whole_model(files: Files, images: Path) -> None:
    """Without the text adapter, and with text that is kept although captions are dropped."""
    command = """
        --learning_rate 1e-2 --llm_adapter_lr 0 --self_attn_lr 5e-3 --save_precision float --cache_text_encoder_outputs_to_disk
        --optimizer_type adafactor --optimizer_args relative_step=False scale_parameter=False warmup_init=False
    """
    out = trained("anima_train", files, images, command)
    before, after = load(files.model), load(out / "out.safetensors")
    assert before.keys() == after.keys()
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if name.startswith(("net.llm_adapter.", "net.pos_embedder."))}
    assert not list(out.glob("out_*"))
    assert read_header(out / "out.safetensors").metadata["modelspec.architecture"] == "anima-preview"
