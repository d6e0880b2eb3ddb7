"""The command lines that sd-scripts documents for its trainers, in our own words: each is a config of ours."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_kohya_flags import family_of, place

from sfumato.cli import kohya
from sfumato.cli.flags import Resolved
from sfumato.errors import UserError

BASE = "--pretrained_model_name_or_path=base.safetensors --dataset_config=data.toml --output_dir=out --output_name=mine"
USUAL = "--save_model_as=safetensors --learning_rate=1e-4 --max_train_epochs=10 --save_every_n_epochs=1 --seed 42"
FILES = ("clip_l", "clip_g", "t5xxl", "ae", "vae", "gemma2", "qwen", "byt5", "qwen3", "earlier", "state")
ADAFACTOR = (
    "--optimizer_type adafactor --optimizer_args relative_step=False scale_parameter=False warmup_init=False "
    "--lr_scheduler constant_with_warmup --lr_warmup_steps 100 --max_grad_norm 0.0"
)
FLUX = "--clip_l=clip_l.safetensors --t5xxl=t5xxl.safetensors --ae=ae.safetensors --sdpa --mixed_precision bf16"
SD3 = "--clip_l=clip_l.safetensors --clip_g=clip_g.safetensors --t5xxl=t5xxl.safetensors --sdpa --mixed_precision=fp16"
LUMINA = "--gemma2=gemma2.safetensors --ae=ae.safetensors --timestep_sampling=nextdit_shift --discrete_flow_shift=6.0"
HUNYUAN = "--text_encoder=qwen.safetensors --byt5=byt5.safetensors --vae=vae.safetensors --mixed_precision=bf16"
ANIMA = "--qwen3=qwen3.safetensors --vae=vae.safetensors --mixed_precision=bf16 --vae_chunk_size=64 --vae_disable_cache"
WORD = "--token_string=mychar --init_word=girl --num_vectors_per_token=4 --max_train_steps=1600 --learning_rate=1e-6"

LINES = {
    "fine_tune": (
        "--learning_rate=5e-6 --max_train_steps=10000 --use_8bit_adam --xformers --gradient_checkpointing --mixed_precision=fp16",
        "--train_text_encoder --learning_rate_te 1e-6 --clip_skip 2 --max_token_length 225 --save_every_n_epochs=4 --save_state",
        "--diffusers_xformers --use_safetensors --v2 --v_parameterization",
    ),
    "train_db": (
        "--prior_loss_weight=1.0 --max_train_steps=1600 --learning_rate=1e-6 --optimizer_type=AdamW8bit --xformers "
        "--mixed_precision=fp16 --cache_latents --gradient_checkpointing --save_model_as=safetensors",
        "--stop_text_encoder_training=500 --learning_rate=1e-6 --lr_scheduler=cosine --lr_warmup_steps=0.05 --no_token_padding",
        "--train_data_dir=images --reg_data_dir=classes --resolution=512 --enable_bucket --shuffle_caption --keep_tokens 1",
    ),
    "train_network": (
        f"{USUAL} --network_module=networks.lora --prior_loss_weight=1.0 --optimizer_type=AdamW8bit --xformers "
        "--mixed_precision=fp16 --cache_latents --gradient_checkpointing",
        f"{USUAL} --network_module=networks.lora --network_dim=16 --network_alpha=8 --unet_lr=1e-4 --text_encoder_lr=5e-5 "
        "--network_args conv_dim=4 conv_alpha=1 loraplus_lr_ratio=16 --clip_skip=2 --max_token_length=150 --sdpa --noise_offset=0.1",
        f"{USUAL} --network_module=networks.dylora --network_dim=16 --network_args unit=4 --scale_weight_norms 1.0",
        f"{USUAL} --network_module=networks.lora --network_weights=earlier.safetensors --dim_from_weights --base_weights earlier.safetensors",
        f"{USUAL} --network_module=networks.lora --network_args down_lr_weight=sine mid_lr_weight=1.0 up_lr_weight=cosine",
        f"{USUAL} --network_module=networks.lora --loss_type smooth_l1 --huber_schedule snr --huber_c 0.1 --min_snr_gamma 5",
        f"{USUAL} --network_module=networks.lora --masked_loss --alpha_mask --ip_noise_gamma 0.1 --ip_noise_gamma_random_strength",
        f"{USUAL} --network_module=networks.lora --optimizer_type=Prodigy --optimizer_args weight_decay=0.01 d_coef=2 --lr_scheduler cosine",
        f"{USUAL} --network_module=networks.lora --network_weights=earlier.safetensors --initial_epoch 3 --skip_until_initial_step",
        f"{USUAL} --network_module=networks.lora --resume state --skip_until_initial_step",
        f"{USUAL} --network_module=networks.lora --deepspeed --zero_stage 2 --offload_optimizer_device cpu --ddp_timeout 30",
        f"{USUAL} --network_module=networks.lora --huggingface_repo_id me/mine --huggingface_repo_visibility private --async_upload "
        "--huggingface_path_in_repo runs --save_state --save_state_to_huggingface",
        f"{USUAL} --network_module=networks.lora --validation_split=0.1 --validation_seed=42 --validate_every_n_steps=100 "
        "--validate_every_n_epochs=1 --max_validation_steps=10",
        f"{USUAL} --network_module=networks.lora --sample_prompts=file.txt --sample_every_n_epochs=1 --sample_sampler=euler_a --sample_at_first",
        f"{USUAL} --network_module=networks.lora --save_last_n_epochs=3 --save_last_n_epochs_state=1 --save_state --training_comment=note",
        f"{USUAL} --network_module=networks.lora --logging_dir=logs --log_with=all --log_prefix=a --log_config --wandb_run_name=b",
    ),
    "sdxl_train": (
        f"{ADAFACTOR} --learning_rate 4e-7 --cache_text_encoder_outputs --cache_latents --gradient_checkpointing --no_half_vae "
        "--full_bf16 --mixed_precision bf16 --save_precision bf16 --fused_backward_pass",
        "--train_text_encoder --learning_rate=1e-5 --learning_rate_te1=1e-6 --learning_rate_te2=5e-7 --sdpa --mixed_precision=bf16",
        f"--learning_rate=1e-5 --optimizer_type=AdamW --fused_optimizer_groups=10 --block_lr={','.join(['1e-5'] * 23)}",
        "--train_data_dir=images --in_json=meta.json --resolution=1024,1024 --learning_rate=1e-5 --bucket_no_upscale",
    ),
    "sdxl_train_network": (
        f"{USUAL} --network_module=networks.lora --network_dim=32 --network_alpha=16 --network_train_unet_only --sdpa "
        "--optimizer_type=AdamW8bit --lr_scheduler=constant --mixed_precision=bf16 --gradient_checkpointing "
        "--cache_text_encoder_outputs --cache_text_encoder_outputs_to_disk --cache_latents --cache_latents_to_disk",
        f"{USUAL} --network_module=networks.oft --network_dim=2 --network_alpha=1e-4 --fp8_base --no_half_vae --noise_offset=0.0357",
        f"{USUAL} --network_module=networks.loha --network_dim=8 --network_alpha=4 --network_args conv_dim=4",
        f"{USUAL} --network_module=networks.lokr --network_dim=8 --network_args factor=4 use_tucker=False",
        f"{USUAL} --network_module=networks.lora --unet_lr=1e-4 --text_encoder_lr 5e-5 1e-5 --fp8_base_unet --cache_info",
    ),
    "sd3_train_network": (
        f"{USUAL} {SD3} --network_module=networks.lora --network_dim=16 --network_alpha=1 --optimizer_type=AdamW8bit "
        "--lr_scheduler=constant --gradient_checkpointing --weighting_scheme=sigma_sqrt --blocks_to_swap=32",
        f"{USUAL} {SD3} --network_module networks.lora_sd3 --network_train_unet_only --cache_text_encoder_outputs --fp8_base --highvram",
        f"{USUAL} {SD3} --network_module networks.lora_sd3 --network_args context_attn_dim=2 x_mlp_dim=6 emb_dims=[2,3,4,5,6,7] "
        "train_block_indices=1,2,6-8 verbose=True --t5xxl_max_token_length 256 --apply_lg_attn_mask --apply_t5_attn_mask",
    ),
    "sd3_train": (
        f"{SD3} {ADAFACTOR} --learning_rate 5e-6 --fused_backward_pass --full_bf16 --mixed_precision bf16 --save_precision bf16 "
        "--pos_emb_random_crop_rate=0.1 --enable_scaled_pos_embed --clip_l_dropout_rate 0.1 --num_last_block_to_freeze 2",
        f"{SD3} --train_text_encoder --learning_rate 5e-6 --learning_rate_te1 1e-6 --learning_rate_te2 1e-6 --use_t5xxl_cache_only "
        "--save_clip --save_t5xxl --t5xxl_device cpu --t5xxl_dtype fp16 --training_shift 3.0",
        f"{SD3} --blockwise_fused_optimizers --blocks_to_swap 12 --learning_rate 1e-5 --skip_latents_validity_check",
    ),
    "flux_train_network": (
        f"{USUAL} {FLUX} --network_module=networks.lora_flux --network_dim=16 --network_alpha=1 --optimizer_type=AdamW8bit "
        "--lr_scheduler=constant --gradient_checkpointing --guidance_scale=1.0 --timestep_sampling=flux_shift "
        "--model_prediction_type=raw --blocks_to_swap=18 --cache_text_encoder_outputs --cache_latents",
        f"{USUAL} {FLUX} --network_module networks.lora_flux --network_dim 4 --network_train_unet_only --fp8_base --highvram "
        "--persistent_data_loader_workers --max_data_loader_n_workers 2 --cache_latents_to_disk --save_precision bf16 "
        "--timestep_sampling shift --discrete_flow_shift 3.1582 --model_prediction_type raw --guidance_scale 1.0",
        f"{USUAL} {FLUX} {ADAFACTOR} --split_mode --network_args train_blocks=single --network_module networks.lora_flux",
        f"{USUAL} {FLUX} --network_module networks.lora_flux --network_args train_t5xxl=True img_attn_dim=4 single_dim=8 in_dims=[4,2,2,2,4] "
        "train_double_block_indices=none train_single_block_indices=0-5,10 split_qkv=True --text_encoder_lr 1e-5 1e-6",
        f"{USUAL} {FLUX} --network_module networks.lora_flux --apply_t5_attn_mask --t5xxl_max_token_length 256 --fp8_base_unet",
        f"{USUAL} {FLUX} --network_module networks.oft_flux --cpu_offload_checkpointing --gradient_checkpointing",
    ),
    "flux_train": (
        f"{FLUX} {ADAFACTOR} --learning_rate 5e-5 --fused_backward_pass --blocks_to_swap 8 --full_bf16 --mem_eff_save "
        "--cache_latents_to_disk --cache_text_encoder_outputs_to_disk --gradient_checkpointing --save_precision bf16 "
        "--timestep_sampling shift --discrete_flow_shift 3.1582 --model_prediction_type raw --guidance_scale 1.0",
        f"{FLUX} --blockwise_fused_optimizers --double_blocks_to_swap 6 --single_blocks_to_swap 12 --learning_rate 1e-5",
        f"{FLUX} --learning_rate 1e-5 --cpu_offload_checkpointing --gradient_checkpointing --skip_cache_check",
    ),
    "lumina_train_network": (
        f"{USUAL} {LUMINA} --network_module=networks.lora_lumina --network_dim=8 --network_alpha=8 --model_prediction_type=raw "
        "--system_prompt='You draw what you are told.' --mixed_precision=bf16 --gradient_checkpointing --cache_latents "
        "--cache_text_encoder_outputs --optimizer_type=AdamW --lr_scheduler=constant",
        f"{USUAL} {LUMINA} --network_module=networks.lora_lumina --network_args attn_dim=4 mlp_dim=4 mod_dim=4 refiner_dim=4 "
        "embedder_dims=[4,4,4] --use_flash_attn --sigmoid_scale=1.0 --gemma2_max_token_length=256 --fp8_base --sample_batch_size=1",
    ),
    "lumina_train": (
        f"{LUMINA} {ADAFACTOR} --learning_rate 5e-6 --fused_backward_pass --blocks_to_swap 8 --mixed_precision bf16 --mem_eff_save",
        f"{LUMINA} --learning_rate 1e-5 --blockwise_fused_optimizers --use_sage_attn --cpu_offload_checkpointing --gradient_checkpointing",
    ),
    "hunyuan_image_train_network": (
        f"{USUAL} {HUNYUAN} --network_module=networks.lora_hunyuan_image --network_dim=16 --network_alpha=1 --attn_mode=torch "
        "--split_attn --optimizer_type=AdamW8bit --lr_scheduler=constant --gradient_checkpointing --model_prediction_type=raw "
        "--discrete_flow_shift=5.0 --blocks_to_swap=18 --cache_text_encoder_outputs --cache_latents",
        f"{USUAL} {HUNYUAN} {ADAFACTOR} --network_module=networks.lora_hunyuan_image --fp8_scaled --fp8_vl --text_encoder_cpu "
        "--vae_chunk_size=16 --blocks_to_swap 37 --network_args network_reg_dims=.*img_attn.*=4 network_reg_lrs=.*txt.*=1e-4",
    ),
    "anima_train_network": (
        f"{USUAL} {ANIMA} --network_module=networks.lora_anima --network_dim=8 --optimizer_type=AdamW8bit --lr_scheduler=constant "
        "--timestep_sampling=sigmoid --discrete_flow_shift=1.0 --gradient_checkpointing --cache_latents --cache_text_encoder_outputs",
        f"{USUAL} {ANIMA} --network_module=networks.lora_anima --unsloth_offload_checkpointing --gradient_checkpointing --attn_mode=flash "
        "--split_attn --qwen3_max_token_length=512 --t5_max_token_length=512 --t5_tokenizer_path=folder --sigmoid_scale=1.0",
    ),
    "anima_train": (
        f"{ANIMA} {ADAFACTOR} --learning_rate=1e-5 --self_attn_lr=1e-5 --cross_attn_lr=2e-5 --mlp_lr=1e-5 --mod_lr=0 --llm_adapter_lr=0 "
        "--timestep_sampling=shift --discrete_flow_shift=3.0 --gradient_checkpointing --cache_latents",
    ),
    "train_textual_inversion": (
        f"{WORD} --optimizer_type=AdamW8bit --mixed_precision=fp16 --cache_latents --sdpa --save_model_as=safetensors",
        f"{WORD} --use_object_template --weights=earlier.safetensors --save_model_as=pt --xformers --prior_loss_weight=1.0",
    ),
    "train_textual_inversion_XTI": (f"{WORD} --use_style_template --save_model_as=safetensors --mixed_precision=fp16",),
    "sdxl_train_textual_inversion": (
        f"{WORD} --optimizer_type=AdamW8bit --mixed_precision=fp16 --cache_latents --sdpa --save_model_as=safetensors",
    ),
    "train_control_net": (
        f"{USUAL} --mixed_precision=fp16 --gradient_checkpointing --cache_latents --xformers --train_batch_size=4",
        f"{USUAL} --controlnet_model_name_or_path=earlier.safetensors",
    ),
    "train_controlnet": (f"{USUAL} --mixed_precision=fp16",),
    "sdxl_train_control_net": (
        f"{USUAL} --control_net_lr=1e-5 --mixed_precision=bf16 --cache_text_encoder_outputs --cache_latents --no_half_vae",
    ),
    "sdxl_train_control_net_lllite": (
        f"{USUAL} --cond_emb_dim=32 --network_dim=64 --optimizer_type=AdamW8bit --cache_latents_to_disk --mixed_precision=bf16 "
        "--cache_text_encoder_outputs_to_disk --gradient_checkpointing --xformers --max_data_loader_n_workers=4 --full_bf16",
    ),
    "sdxl_train_control_net_lllite_old": (f"{USUAL} --cond_emb_dim=32 --network_dim=64 --mixed_precision=bf16 --no_half_vae",),
    "anima_train_control_net_lllite": (
        f"{USUAL} {ANIMA} --cond_emb_dim=32 --lllite_mlp_dim=64 --lllite_cond_dim=64 --lllite_target_layers=self_attn_q "
        "--timestep_sampling=shift --discrete_flow_shift=3.0 --gradient_checkpointing --cache_latents --cache_text_encoder_outputs",
        f"{USUAL} {ANIMA} --lllite_cond_resblocks=2 --lllite_use_aspp --lllite_dropout=0.1 --network_weights=earlier.safetensors",
    ),
    "flux_train_control_net": (
        f"{FLUX} {ADAFACTOR} --learning_rate 1e-5 --timestep_sampling shift --discrete_flow_shift 3.1582 --guidance_scale 1.0 "
        "--model_prediction_type raw --blocks_to_swap 8 --mem_eff_save --cache_latents_to_disk --cache_text_encoder_outputs",
    ),
}  # fmt: skip
CHROMA = (
    f"{USUAL} --model_type=chroma --t5xxl=t5xxl.safetensors --ae=ae.safetensors --guidance_scale=0.0 --mixed_precision=bf16 "
    "--timestep_sampling=sigmoid --apply_t5_attn_mask --model_prediction_type=raw --network_module=networks.lora_flux"
)
CONTROLLED = ("control_net", "controlnet")


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("there")
    with place(folder):
        for name in FILES:
            (folder / f"{name}.safetensors").write_bytes(b"")
        (folder / "state").mkdir()
        yield folder


def resolved(script: str, family: str, line: str, monkeypatch: pytest.MonkeyPatch) -> Resolved:
    monkeypatch.setattr("sfumato.families.detect.detect_file", lambda _: SimpleNamespace(family=family))
    words = shlex.split(f"{BASE} {line}")
    if "--train_data_dir" in line:
        words.remove("--dataset_config=data.toml")
    if any(name in script for name in CONTROLLED):
        words = [word.replace("data.toml", "pairs.toml") for word in words]
    return kohya.resolve(script, words)


@pytest.mark.parametrize("script", LINES)
def test_a_documented_line_resolves(script: str, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in LINES[script]:
        found = resolved(script, family_of(script), line, monkeypatch)
        assert found.config.output.output_name == "mine" and found.datasets


def test_a_documented_line_of_chroma_resolves(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolved("flux_train_network", "chroma", CHROMA, monkeypatch).config.family.family == "chroma"


def test_every_trainer_has_a_line() -> None:
    assert LINES.keys() == kohya.scripts().keys() - {"hunyuan_image_train"}  # which sd-scripts does not have


def test_what_is_refused_of_documented_lines_says_what_to_do(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="use full_bf16, or mixed_precision fp16"):
        resolved("train_network", "sd", "--full_fp16 --mixed_precision fp16", monkeypatch)
    with pytest.raises(UserError, match="use `wandb login`"):
        resolved("train_network", "sd", "--log_with wandb --wandb_api_key=abc", monkeypatch)
