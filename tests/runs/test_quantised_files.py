"""A run on files in fewer bits is the run on the numbers that they mean."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from formats import gguf_files
from run_fixtures import make_images
from tinies import flux, quantised
from tinies.cases import Files
from training import config

from sfumato.config import DatasetConfig, SubsetConfig
from sfumato.families.flux.facts import Options
from sfumato.formats.files import load, save
from sfumato.memory.quantise import stored_layers
from sfumato.train import dist, loop, run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return flux.write(True, tmp_path_factory.mktemp("model"))


def adapter(files: Files, model: Path, t5: Path, out: Path, *, coded: bool) -> dict[str, torch.Tensor]:
    """A LoRA trained for two steps."""
    made = config(
        pretrained_model_name_or_path=str(model), vae=files.vae, output_dir=str(out), output_name="out",
        max_train_steps=2, learning_rate=1e-3, network_dim=2, seed=7, cache_text_encoder_outputs=True,
        network_train_unet_only=True, family=Options(**{**files.options, "t5xxl": str(t5)}),
    )  # fmt: skip
    out.mkdir()
    images = str(make_images(out))
    data = DatasetConfig(subsets=(SubsetConfig(image_dir=images),), resolution=(64, 64), batch_size=2)
    a_run = run.prepare(made, "network", (data,), dist.world(), 0.0)
    with a_run.log or torch.no_grad():
        loop.train(a_run)
    a_run.save_result(out / "out.safetensors", 2, 0)
    stored = [stored_layers(net) for net in a_run.trainable.models.nets().values()]
    assert [bool(layers) for layers in stored] == [coded, False, coded]
    return load(out / "out.safetensors")


def test_a_run_is_that_of_the_numbers(files: Files, tmp_path: Path) -> None:
    parts = flux.parts()
    folder = files.model.parent  # where the tokenizers are
    base, exact = quantised.gguf(folder, "base", parts["transformer"])
    save(folder / "wide.safetensors", exact)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 8)
    names = {key: table.get_name(key, try_suffixes=(".weight",)) for key in parts["t5xxl"]}
    means = gguf_files.write(tmp_path / "t5.gguf", {names[k]: t for k, t in parts["t5xxl"].items()}, arch="t5encoder")
    save(tmp_path / "t5.safetensors", {key: means[names[key]] for key in names})
    found = adapter(files, base, tmp_path / "t5.gguf", tmp_path / "a", coded=True)
    wanted = adapter(files, folder / "wide.safetensors", tmp_path / "t5.safetensors", tmp_path / "b", coded=False)
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        torch.testing.assert_close(found[name], t, rtol=1e-3, atol=1e-6)
