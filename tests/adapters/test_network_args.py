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


def test_kinds_whose_files_are_plain_lora():
    for name in ("tlora", "dylora", "lora_fa", "networks.lora_fa", "networks.dylora", "lora", "dora", "loha"):
        found = kind(name).file_kind()
        assert found == (name if name in ("dora", "loha") else "lora")


@pytest.mark.parametrize("name", ["dora_wd", "weight_decompose"])
def test_dora(name):
    plan = parse(NetworkConfig(network_args=(f"{name}=True", "wd_on_out=False")))
    assert plan.more == {"dora_wd": True, "wd_on_out": False}
    assert parse(NetworkConfig(network_module="dora", network_args=("wd_on_out=False",))).more == {"wd_on_out": False}


def test_conv_alpha_defaults_to_one():
    assert parse(NetworkConfig(network_alpha=16, network_args=("conv_dim=8",))).options(conv=True).alpha == 1.0


@pytest.mark.parametrize("name", ["lora", "networks.lora", "networks.lora_flux", "networks.lora_sd3"])
def test_kohyas_names(name):
    assert kind(name) is LoRA


@pytest.mark.parametrize("name", kinds())
def test_a_kind_has_kohyas_names_and_lycoris(name):
    """`networks.KIND_ANYTHING` and `algo=KIND`, without a line for any of them."""
    own = kind(name)
    assert kind(f"networks.{name}") is kind(f"networks.{name}_anything") is own
    for algo in (name, *vars(own).get("aliases", ())):
        assert kind("lycoris.kohya", algo) is own


def test_the_longest_name_is_meant(monkeypatch):
    from sfumato.adapters import find

    monkeypatch.setattr(find, "kinds", lambda: ("lora", "lora_fa"))
    monkeypatch.setattr(find, "_load", lambda name: name)
    monkeypatch.setattr(find, "_aliases", lambda: {"locon": "lora"})
    assert [kind(n) for n in ("networks.lora_fa_flux", "networks.lora_fast", "locon_x")] == ["lora_fa", "lora", "lora"]


def test_front_ends_write_what_is_off():
    """bmaltais' writes all of LyCORIS' arguments, most of them switched off."""
    off = ("rank_dropout_scale=False", "train_norm=False", "use_scalar=False", "factor=-1", "bypass_mode=False")
    plan = parse(NetworkConfig(network_module="lycoris.kohya", network_args=("algo=locon", "preset=full", *off)))
    assert plan.kind is LoRA
    assert plan.notices == () and plan.more == {}


@pytest.mark.parametrize(
    ("args", "targets"),
    [
        ((), ("attention",)),
        (("enable_all_linear=False", "enable_conv=False"), ("attention",)),
        (("enable_all_linear=True",), ("linear",)),
        (("enable_all_linear=True", "enable_conv=True"), ("linear", "conv")),
        (("target=mlp",), ("mlp",)),
    ],
)
def test_kohyas_oft(args, targets):
    """Of blocks counted by network_dim, limited by network_alpha, on attention unless told otherwise; "False" means
    False."""
    for module in ("networks.oft", "networks.oft_flux"):
        plan = parse(NetworkConfig(network_module=module, network_dim=8, network_alpha=1e-3, network_args=args))
        assert plan.more == {"count_blocks": True, "constraint": 1e-3} and plan.targets == targets
        assert plan.notices == ()
    own = parse(NetworkConfig(network_module="oft", network_alpha=1.0))
    assert own.more == {} and own.targets == ()
    assert own.notices == ("network_alpha: accepted, no effect: OFT has no alpha",)


def test_a_rank_that_means_nothing_is_stated():
    plan = parse(NetworkConfig(network_module="lycoris.kohya", network_dim=8, network_args=("algo=ia3", "preset=ia3")))
    assert plan.notices == ("network_dim: accepted, no effect: IA3 has no rank",)


def test_other_programs_names_of_options():
    plan = parse(NetworkConfig(network_module="loha", network_args=("use_cp=True", "conv_dim=4")))
    assert plan.more == {"use_tucker": True}
    with pytest.raises(UserError, match="decompose_both: has no meaning for LoRA, as it is for lokr"):
        parse(NetworkConfig(network_args=("decompose_both=True",)))


def test_patterns_with_commas_and_equals():
    args = (r"network_reg_dims=blocks_\d{1,2}_(a|b)=8, .*x=.*=4", "network_reg_lrs=.*=1e-4")
    plan = parse(NetworkConfig(network_args=args))
    assert [(r.pattern.pattern, r.rank, r.rate) for r in plan.rules] == [
        (r"blocks_\d{1,2}_(a|b)", 8, None),
        (".*x=.*", 4, None),
        (".*", None, 1e-4),
    ]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("networks.lorra", "did you mean 'lora'"),
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
        ({"network_args": ("dropout=nan",)}, "network_args dropout=nan: expected a finite number"),
        ({"network_args": ("network_reg_lrs=.*=1e400",)}, "network_reg_lrs=.* expected patterns with their numbers"),
        ({"network_args": ("loraplus_lr_ratio=-2",)}, "loraplus_lr_ratio=-2.0: expected above 0, found -2"),
        ({"network_module": "oft", "network_args": ("constraint=-1",)}, "constraint=-1.0: expected 0 or more"),
        ({"network_args": ("conv_dim",)}, "expected key=value"),
        ({"network_args": ("train_norm=True",)}, "train_norm: has no meaning for LoRA, layers of normalisation"),
        ({"network_args": ("conv_alpha=1",)}, "conv_alpha does nothing without conv_dim"),
        ({"network_args": ("use_tucker=True",)}, "use_tucker does nothing without conv_dim"),
        (
            {"network_module": "lokr", "network_args": ("full_matrix=True", "decompose_both=True")},
            "full_matrix, decompose_both: one wants whole factors",
        ),
        ({"network_args": ("wd_on_out=False",)}, "wd_on_out does nothing without dora_wd"),
        ({"network_args": ("rank_dropout=1.0",)}, "rank_dropout=1.0: expected 0 or more and below 1, found 1"),
        ({"network_args": ("dropout=0.1",), "network_dropout": 0.2}, "set twice"),
        ({"network_dropout": 1.0}, "network_dropout: expected 0 or more and below 1, found 1"),
        ({"network_args": ("algo=loha",)}, r"algo: is for lycoris\.kohya; name the kind in network_module"),
        ({"network_args": ("preset=full",)}, r"preset: is for lycoris\.kohya; use target"),
        (
            {"network_args": ("enable_conv=True",)},
            r"enable_conv: is for networks\.oft, which is on attention alone; use target",
        ),
        ({"network_args": ("colour=3",)}, "'colour' is not known"),
        ({"network_args": ("network_reg_dims=a",)}, "network_reg_dims=a: expected patterns with their ranks"),
        ({"network_args": ("network_reg_dims=a=0.5",)}, "network_reg_dims=a=0.5: expected patterns with their ranks"),
        ({"network_args": ("network_reg_lrs=(=1",)}, "network_reg_lrs=.* expected patterns with their numbers"),
        ({"network_args": ("exclude_patterns=['(']",)}, "exclude_patterns=.* expected a list of patterns"),
        ({"network_module": "lycoris.kohya", "network_args": ("algo=lorra",)}, "algo=lorra is not known; known: "),
        (
            {"network_module": "lycoris.kohya", "network_args": ("preset=full", "target=all")},
            "preset, target: both say what gets adapters",
        ),
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
