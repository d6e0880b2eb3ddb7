"""Flags and network_args -> a plan."""

from __future__ import annotations

import pytest

from sfumato.adapters import kind, kinds, parse
from sfumato.adapters.lora import LoRA
from sfumato.config import NetworkConfig
from sfumato.errors import UserError


def test_defaults_are_kohyas():
    plan = parse(NetworkConfig())
    assert (plan.kind, plan.rank, plan.alpha, plan.conv_rank) == (LoRA, 4, 1.0, None)
    assert plan.loraplus_ratio("denoiser") is None


def test_all_args():
    args = (
        "conv_dim=8",
        "conv_alpha=4",
        "rank_dropout=0.1",
        "module_dropout=0.2",
        "loraplus_lr_ratio=16",
        "loraplus_text_encoder_lr_ratio=4",
    )
    plan = parse(
        NetworkConfig(
            network_module="networks.lora", network_dim=32, network_alpha=16, network_dropout=0.3, network_args=args
        )
    )
    options, conv = plan.options(conv=False), plan.options(conv=True)
    assert (options.rank, options.alpha, options.dropout, options.rank_dropout, options.module_dropout) == (
        32,
        16,
        0.3,
        0.1,
        0.2,
    )
    assert (conv.rank, conv.alpha, conv.dropout) == (8, 4.0, 0.3)
    assert (plan.loraplus_ratio("denoiser"), plan.loraplus_ratio("clip_l")) == (16.0, 4.0)


@pytest.mark.parametrize("name", ["dora_wd", "weight_decompose"])
def test_dora(name):
    plan = parse(NetworkConfig(network_args=(f"{name}=True", "wd_on_out=False")))
    assert plan.more == {"dora_wd": True, "wd_on_out": False}


def test_conv_alpha_defaults_to_one():
    assert parse(NetworkConfig(network_alpha=16, network_args=("conv_dim=8",))).options(conv=True).alpha == 1.0


@pytest.mark.parametrize("name", ["lora", "networks.lora", "networks.lora_flux", "networks.lora_sd3"])
def test_kohyas_names(name):
    assert kind(name) is LoRA


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("networks.lorra", "did you mean 'lora'"),
        ("lycoris.kohya", "name the algorithm itself"),
        ("base", "is not known"),
    ],
)
def test_unknown_kinds(name, says):
    with pytest.raises(UserError, match=says):
        kind(name)


def test_helpers_are_no_kinds():
    assert "lora" in kinds()
    assert not {"base", "insert", "__init__"} & set(kinds())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"network_args": ("conv_dims=8",)}, "did you mean 'conv_dim'"),
        ({"network_args": ("conv_dim=eight",)}, "network_args conv_dim=eight: expected int"),
        ({"network_args": ("conv_dim",)}, "expected key=value"),
        ({"network_args": ("block_dims=1,2",)}, "block_dims: not supported yet"),
        ({"network_args": ("conv_alpha=1",)}, "conv_alpha does nothing without conv_dim"),
        ({"network_args": ("rank_dropout=1.0",)}, "rank_dropout 1.0: expected a chance"),
        ({"network_args": ("dropout=0.1",), "network_dropout": 0.2}, "set twice"),
        ({"network_dim": 0}, "network_dim: expected 1 or more, found 0"),
    ],
)
def test_mistakes(fields, says):
    with pytest.raises(UserError, match=says):
        parse(NetworkConfig(**fields))


def test_all_mistakes_at_once():
    with pytest.raises(UserError) as e:
        parse(NetworkConfig(network_args=("x=1", "conv_dim=z", "conv_alpha=1")))
    assert len(e.value.messages) == 3
