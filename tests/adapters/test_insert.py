"""Choosing layers and taking in files."""

from __future__ import annotations

import pytest
import torch
from small import TARGETS, insert
from torch import nn

from sfumato.adapters import AdapterPlan, kind
from sfumato.adapters.insert import AdapterNetwork, choose, from_state
from sfumato.errors import UserError

LORA = AdapterPlan(kind=kind("lora"), rank=4, conv_rank=3, conv_alpha=1.5)


def test_ranks_go_by_the_layer(net):
    targets = choose(net, "denoiser", TARGETS, LORA)
    assert {p.path: (p.options.rank, p.options.alpha) for p in targets} == {
        "block.conv1": (3, 1.5),
        "block.conv2": (3, 1.5),
        "block.proj": (4, 1.0),
        "block.to_q": (4, 1.0),
        "block.to_out": (4, 1.0),
    }


def test_no_convolutions_without_a_rank_for_them(net):
    targets = choose(net, "denoiser", TARGETS, AdapterPlan(kind=kind("lora")))
    assert [p.path for p in targets] == ["block.proj", "block.to_q", "block.to_out"]


def test_nothing_to_train_is_an_error(net):
    with pytest.raises(
        UserError, match=r"denoiser: no layer is left to put an adapter on, of those with paths like nothing\.\*"
    ):
        choose(net, "denoiser", {"linear": ("nothing.*",)}, LORA)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (
            AdapterPlan(kind=kind("lora"), rank=1_000_000_000),
            "network_dim 1000000000: no change of denoiser's layers has a rank above",
        ),
        (AdapterPlan(kind=kind("lora"), conv_rank=1_000_000_000), "conv_dim 1000000000: no change"),
    ],
)
def test_a_rank_that_no_layer_can_have_is_refused_before_memory_is_asked_for(net, plan, says):
    with pytest.raises(UserError, match=says):
        choose(net, "denoiser", TARGETS, plan)


def test_several_components(net):
    encoder = nn.Sequential(nn.Linear(4, 4))
    targets = {
        "denoiser": choose(net, "denoiser", TARGETS, LORA),
        "clip_l": choose(encoder, "clip_l", {"linear": ("*",)}, LORA),
    }
    inserted = AdapterNetwork(targets, seed=0)
    assert list(inserted.by_path())[-1] == ("clip_l", "0")
    assert len(list(inserted.parameters())) == 12


def test_load_reports_all_that_is_wrong(net):
    state = insert(net, LORA).state()
    wide = insert(net, AdapterPlan(kind=kind("lora"), rank=8)).state()
    inserted = insert(net, LORA)
    given = {path: tensors for path, tensors in state.items() if "conv1" not in path[1]}
    given["denoiser", "block.to_q"] = wide["denoiser", "block.to_q"]
    given["denoiser", "block.to_z"] = state["denoiser", "block.to_q"]
    with pytest.raises(UserError) as e:
        inserted.load(given)
    text = str(e.value)
    assert "no adapter for denoiser.block.conv1" in text
    assert "denoiser.block.to_z, where this run has none; --dim_from_weights takes the file's layers" in text
    assert "has shape [8, 10], expected [4, 10]" in text
    assert "--dim_from_weights" in text


def test_from_state_takes_dropouts_from_the_plan(net):
    state = insert(net, LORA).state()
    plan = AdapterPlan(kind=kind("lora"), rank=64, more={"dropout": 0.5})
    inserted = from_state({"denoiser": net}, state, plan)
    options = inserted.by_path()["denoiser", "block.conv1"].options
    assert (options.rank, options.alpha, options.dropout) == (3, 1.5, 0.5)


def test_from_state_refuses_layers_that_are_not_there(net):
    state = insert(net, LORA).state()
    with pytest.raises(UserError, match=r"adapters for denoiser\.elsewhere"):
        from_state({"denoiser": net}, {**state, ("denoiser", "elsewhere"): state["denoiser", "block.to_q"]})
    with pytest.raises(UserError, match="holds no adapter"):
        from_state({"denoiser": net}, {})
    with pytest.raises(UserError, match="no kind of adapter has the tensors difference"):
        from_state({"denoiser": net}, {("denoiser", "block.to_q"): {"difference": torch.zeros(3)}})


def test_a_file_of_several_kinds_needs_its_preset(net):
    state = insert(net, LORA).state()
    path = ("denoiser", "block.to_q")
    other = {"hada_w1_a": torch.zeros(3, 1), "hada_w1_b": torch.zeros(1, 3)}
    state[path] = {**other, **{name.replace("w1", "w2"): t for name, t in other.items()}, "alpha": torch.ones(())}
    with pytest.raises(UserError, match="several kinds in one file need the preset file"):
        from_state({"denoiser": net}, state, LORA)


def test_a_multiplier_for_each_sample_cannot_be_merged(net):
    inserted = insert(net, LORA)
    inserted.multiplier = torch.ones(2)
    with pytest.raises(RuntimeError, match="each sample"):
        inserted.merge()


def test_merge_into_bf16_rounds_once(net):
    inserted = insert(net, LORA)
    for p in inserted.parameters():
        nn.init.normal_(p, std=0.1)
    net.bfloat16()
    exact = net.block.to_q.weight.float() + inserted.by_path()["denoiser", "block.to_q"].delta_weight(
        net.block.to_q.weight
    )
    inserted.merge()
    assert torch.equal(net.block.to_q.weight, exact.bfloat16())
