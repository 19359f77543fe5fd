# SPDX-License-Identifier: Apache-2.0
"""Refusals that no clause of SPEC.md asks for by name: each tells what was found, and what to do."""

import copy

import pytest
import torch
from torch import nn

from impl import ChainedOptimizer, Layout, Muon, Section, param_groups


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


def tied(first: nn.Module, second: nn.Module) -> nn.Sequential:
    second.weight = first.weight
    return nn.Sequential(first, second)


def declaring(module: nn.Module, layout: Layout) -> nn.Module:
    module.muon_layout = {"weight": layout}
    return module


def two_layouts_for_one() -> nn.Module:
    layer = declaring(nn.Linear(4, 4, bias=False), Layout(blocks=2))
    layer.weight.muon_layout = Layout(blocks=4)
    return layer


def test_a_chain_has_optimizers_and_a_process_group_for_each():
    with pytest.raises(ValueError, match="found 0 optimizers and 0 process groups"):
        ChainedOptimizer([])
    with pytest.raises(ValueError, match="found 1 optimizers and 2 process groups"):
        ChainedOptimizer([Muon([weight(2, 3)])], process_groups=[None, None])


@pytest.mark.parametrize("layout", [7, {"block": 2}, {"sections": [{"row": 2}]}], ids=str)
def test_a_layout_is_one_or_its_fields(layout):
    with pytest.raises(ValueError, match="layout should be a Layout or a dict of its fields but is: "):
        Muon([weight(2, 3)], layout=layout)


@pytest.mark.parametrize("mode", ["distributed", "blockwise"])
def test_normuon_needs_whole_matrices(mode):
    with pytest.raises(ValueError, match=f"normuon_beta2 needs whole matrices, with shard_mode='owned', but that is '{mode}'"):
        Muon([weight(2, 3)], normuon_beta2=0.9, shard_mode=mode)


def test_a_parameter_of_integers_cannot_be_stepped():
    with pytest.raises(ValueError, match=r"parameter 0\.0 should be floating point but is torch\.int64"):
        Muon([torch.ones(2, 3, dtype=torch.int64)])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3)), "0.weight has no shape yet; run the model once"),
        (
            lambda: tied(
                declaring(nn.Linear(4, 4, bias=False), Layout(blocks=2)),
                declaring(nn.Linear(4, 4, bias=False), Layout(blocks=4)),
            ),
            "is tied and has several layouts",
        ),
        (
            lambda: tied(nn.Conv1d(4, 4, 1, bias=False), nn.Conv1d(8, 4, 1, groups=2, bias=False)),
            "is tied and has several meanings",
        ),
        (two_layouts_for_one, "weight has one layout, .*, and its module another for it"),
    ],
    ids=["no shape", "several layouts", "several meanings", "one layout and another"],
)
def test_a_model_that_cannot_be_routed(model, message):
    with pytest.raises(ValueError, match=message):
        param_groups(model(), head=())


def test_vectors_of_attention_are_adamws():
    groups = param_groups(nn.MultiheadAttention(8, 2, add_bias_kv=True), head=())
    of = {name: group["algorithm"] for group in groups for name, _ in group["params"]}
    assert of["bias_k"] == of["bias_v"] == "adamw" and of["in_proj_weight"] == "muon"


def test_a_state_dict_has_a_name_for_every_parameter():
    optimizer = Muon([("w", weight(2, 3)), ("v", weight(3, 2))])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["param_names"].pop()
    with pytest.raises(ValueError, match="group 0 of the state dict has another number of names than of parameters"):
        optimizer.load_state_dict(saved)


def test_sections_are_told_by_their_type():
    assert Layout.of({"sections": [{"rows": 2}, Section(4)]}) == Layout(sections=(Section(2), Section(4)))
