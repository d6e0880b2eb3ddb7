"""kohya's command lines train under the launchers that people use, and several processes give what one gives."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import launching
import pytest
import torch

from sfumato.formats.files import load
from sfumato.train.log import read

ROOT = Path(__file__).parents[2]


def launch(launcher: list[str], model: Path, images: Path, out: Path, *flags: str) -> dict[str, torch.Tensor]:
    """Run scripts/train_network.py with the flags of a usual command line, under torchrun with these words, or without it; returns the
    adapter."""
    dataset = images.parent / "data.toml"
    dataset.write_text(
        f'[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = "{images}"\n'
    )
    command = f"""
        --pretrained_model_name_or_path {model} --dataset_config {dataset} --output_dir {out} --output_name out
        --save_model_as safetensors --save_precision float --prior_loss_weight 1.0 --max_train_steps 3 --learning_rate 1e-3 --unet_lr 1e-3
        --text_encoder_lr 5e-4 --optimizer_type AdamW --optimizer_args weight_decay=0.01 --lr_scheduler constant_with_warmup
        --lr_warmup_steps 1 --network_module networks.lora --network_dim 2 --network_alpha 1 --network_args conv_dim=2 conv_alpha=1
        --network_dropout 0.1 --cache_latents --clip_skip 2 --max_token_length 150 --seed 5 --min_snr_gamma 5 --noise_offset 0.05
        --max_grad_norm 1.0 --gradient_checkpointing --gradient_accumulation_steps 1 --max_data_loader_n_workers 1
        --persistent_data_loader_workers --xformers --save_every_n_epochs 1 --training_comment test --loss_type l2
    """.split()
    words = [*command, *flags]
    if launcher:
        assert launching.forked(launching.torchrun, launcher, "train_network", words, images.parent) == 0
    else:
        launching.launch("train_network", words, images.parent)
    return load(out / "out.safetensors")


@pytest.fixture(scope="module")
def lone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Five images and the adapter that is trained on them without a launcher."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("set") / "images"
    folder.mkdir()
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"image {i}")
    return folder, launch([], model, folder, folder.parent / "alone")


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_each_script_runs_the_command_lines_of_its_own_name(script: Path) -> None:
    first = "sdxl_minimal_inference" if script.stem.endswith("_minimal_inference") else "train_network"
    pattern = (ROOT / "scripts" / f"{first}.py").read_text(encoding="utf-8")
    assert script.read_text(encoding="utf-8") == pattern.replace(first, script.stem)


def test_accelerate_launch(
    lone: tuple[Path, dict[str, torch.Tensor]], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what `accelerate launch` sets for the process that it starts, which is one of this Python and the script."""
    from accelerate.commands import launch as accelerate
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    folder, alone = lone
    words = (
        "--cpu --mixed_precision no --num_processes 1 --num_machines 1 --dynamo_backend no train_network.py --seed 5"
    )
    args, *_ = accelerate._validate_launch_command(accelerate.launch_command_parser().parse_args(words.split()))
    command, env = prepare_simple_launcher_cmd_env(args)
    assert command == [sys.executable, "train_network.py", "--seed", "5"] and env["ACCELERATE_USE_CPU"] == "True"
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = launch([], model, folder, folder.parent / "accelerate")
    assert found.keys() == alone.keys()
    assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_two_processes_do_the_steps_of_one_that_accumulates(
    lone: tuple[Path, dict[str, torch.Tensor]], model: Path
) -> None:
    """Randomness goes by the sample and every sample weighs the same, so only the order of sums differs."""
    folder, _ = lone
    # Not Adam: it would blow up differences of gradients near zero.
    plain = [
        "--optimizer_type",
        "SGDNesterov",
        "--optimizer_args",
        "momentum=0.5",
        "--learning_rate",
        "1",
        "--unet_lr",
        "1",
        "--text_encoder_lr",
        "1",
        "--validation_split",
        "0.4",
    ]
    one = launch([], model, folder, folder.parent / "one", "--gradient_accumulation_steps", "2", *plain)
    run = ["--nproc_per_node", "2", "--master_port", str(20000 + os.getpid() % 20000)]
    two = launch(run, model, folder, folder.parent / "two", *plain)
    assert one.keys() == two.keys()
    assert max(t.abs().max() for name, t in one.items() if name.endswith("lora_up.weight")) > 1e-3
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-5, msg=name)
    measured = [read(folder.parent / name / "out.jsonl")["loss/validation/mean"] for name in ("one", "two")]
    assert [step for step, _ in measured[0]] == [0, 1, 2, 3]
    for (step, a), (other, b) in zip(*measured, strict=True):
        assert step == other and a == pytest.approx(b, abs=2e-5)
