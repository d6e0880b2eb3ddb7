"""`lycoris.kohya`'s presets choose the layers that LyCORIS chooses, on a tiny model whose parts bear sd-scripts' class
names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from adapted import places, plan_of
from lycoris.kohya import LycorisNetworkKohya, create_network
from tinies import sdxl

from sfumato.adapters.insert import TargetLayer
from sfumato.errors import UserError
from sfumato.families.sdxl.facts import Options
from sfumato.families.sdxl.family import FAMILY
from sfumato.models.base import Models
from sfumato.models.loading import load

KOHYAS = {
    "Block": "TimestepEmbedSequential",
    "ResBlock": "ResnetBlock2D",
    "Transformer": "Transformer2DModel",
    "Attention": "CrossAttention",
    "Downsample": "Downsample2D",
    "Upsample": "Upsample2D",
}
"""Our classes -> sd-scripts'."""
ENCODERS = ("clip_l", "clip_g")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    made = load(FAMILY, str(sdxl.write(tmp_path_factory.mktemp("model")).model), Options())
    for part in made.denoiser.modules():
        if name := KOHYAS.get(type(part).__name__):
            part.__class__ = type(name, (type(part),), {})
    return made


@pytest.fixture
def theirs() -> Iterator[type]:
    """LyCORIS keeps what a preset says in its class."""
    before = {name: value for name, value in vars(LycorisNetworkKohya).items() if name.isupper()}
    yield LycorisNetworkKohya
    for name, value in before.items():
        setattr(LycorisNetworkKohya, name, value)


def ours(models: Models, *args: str, **more: object) -> dict[str, TargetLayer]:
    """Name in kohya's files -> the layer that gets an adapter."""
    plan = plan_of("sdxl", *args, network_module="lycoris.kohya", **more)
    kohya = models.dialects["kohya"]
    return {
        kohya.names((component, place.path))[0][0]: place
        for component in ("denoiser", *ENCODERS)
        if plan.sets(component, FAMILY.targets[component])
        for place in places(models, plan, component)
    }


def lycoris(models: Models, **args: object) -> dict[str, object]:
    encoders = [models.encoders[name] for name in ENCODERS]
    network = create_network(1.0, 4, 1.0, None, encoders, models.denoiser, warn_on_unmatched=False, **args)
    return {each.lora_name: each for each in network.loras}


@pytest.mark.parametrize(
    "preset",
    ["full", "full-lin", "attn-mlp", "unet-only", "unet-transformer-only", "unet-convblock-only", "attn-only"],
)
def test_presets_choose_the_same_layers(models: Models, theirs: type, preset: str) -> None:
    found = ours(models, f"preset={preset}")
    wanted = lycoris(models, preset=preset)
    assert len(wanted) > 20
    assert found.keys() == wanted.keys()


@pytest.mark.parametrize("args", [{}, {"conv_dim": "2"}, {"conv_dim": "2", "conv_alpha": "3"}, {"conv_dim": "0"}])
def test_ranks_and_alphas_are_the_same(models: Models, theirs: type, args: dict[str, str]) -> None:
    """With LyCORIS, convolutions have adapters unless told otherwise, of network_dim and network_alpha."""
    found = ours(models, *(f"{name}={value}" for name, value in args.items()))
    wanted = lycoris(models, **args)
    assert found.keys() == wanted.keys()
    for name, theirs_ in wanted.items():
        options = found[name].options
        assert (options.rank, options.scale) == (theirs_.lora_dim, theirs_.scale), name


FILE = """
enable_conv = true
unet_target_module = ["CrossAttention", "ResnetBlock2D"]
unet_target_name = ["input_blocks.0.0", "out.2"]
text_encoder_target_module = ["CLIPMLP"]
exclude_name = ["middle_block.1", "text_model.encoder.layers.1."]
[module_algo_map.CrossAttention]
dim = 2
[name_algo_map."out.2"]
algo = "loha"
dim = 3
"""


@pytest.mark.parametrize("globs", [False, True])
def test_a_file_is_read_as_lycoris_reads_it(models: Models, theirs: type, tmp_path: Path, globs: bool) -> None:
    path = tmp_path / "preset.toml"
    head = 'use_fnmatch = true\nexclude_name = ["middle_block.1", "*.mlp.fc1"]'
    path.write_text(
        FILE if not globs else FILE.replace('exclude_name = ["middle_block.1", "text_model.encoder.layers.1."]', head)
    )
    found, wanted = ours(models, f"preset={path}"), lycoris(models, preset=str(path))
    assert found.keys() == wanted.keys() and len(found) > 20
    for name, theirs_ in wanted.items():
        place = found[name]
        assert place.options.rank == theirs_.lora_dim, name
        assert (place.kind.__name__ == "LoHa") == (type(theirs_).__name__ == "LohaModule")


def test_the_preset_of_ia3_is_on_keys_values_and_the_second_layer_of_the_mlp(models: Models) -> None:
    """LyCORIS means these layers; its own search finds none, as it looks for them at the beginning of a path."""
    ends = {place.path.partition(".transformer_blocks.")[2] for place in ours(models, "preset=ia3").values()}
    assert {end.split(".", 1)[-1] for end in ends} - {""} == {
        *(f"attn{i}.to_{part}" for i in (1, 2) for part in "kv"),
        "ff.net.2",
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("unet_target = []", "'unet_target' is not known; did you mean 'unet_target_name'"),
        ("target_module = ['X']", "target_module: LyCORIS reads it outside of kohya's trainer alone"),
        ("enable_conv = 'yes'", "enable_conv: expected true or false"),
        ("exclude_name = 3", "exclude_name: expected a list of names"),
        ("[module_algo_map.X]\nalgo = 'lorra'", "algo=lorra is not known"),
        ("[name_algo_map.X]\nfactr = 3", "name_algo_map.X: factr has no meaning"),
        ("[name_algo_map.X]\nfactor = 3", "name_algo_map.X: factor has no meaning for LoRA"),
        ("[name_algo_map.X]\nalgo = 'oft'\ndropout = 0.1", "name_algo_map.X: dropout has no meaning for OFT"),
        ("[name_algo_map.X]\ndropout = 2.0", "name_algo_map.X: dropout=2.0: expected 0 or more and below 1"),
        ("[name_algo_map.X]\ninit = 'best'", "name_algo_map.X: init=best: expected default, pissa or olora"),
        ("[name_algo_map.X]\ndim = -1", "name_algo_map.X: dim=-1: expected 0 or more"),
        ("[name_algo_map.X]\ndim = 4.5", "dim=4.5: expected int"),
        ("[name_algo_map.X]\nalpha = nan", "alpha=nan: expected a finite number"),
        ("[name_algo_map.'(']", r"preset=.*: '\(' is no regular expression: "),
        ("exclude_name = ['(']", r"preset=.*: '\(' is no regular expression: "),
        ("no toml", r"preset=.*preset\.toml:1: is not TOML"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "preset.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        plan_of("sdxl", f"preset={path}", network_module="lycoris.kohya")


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UserError, match=r"preset=atn-mlp: expected full, .*did you mean 'attn-mlp'"):
        plan_of("sdxl", "preset=atn-mlp", network_module="lycoris.kohya")
