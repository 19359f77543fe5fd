# SPDX-License-Identifier: Apache-2.0
"""Refusals that no clause of SPEC.md asks for by name: each tells what was found, and what to do."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from conformance.worlds import threads
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


@pytest.mark.parametrize("beta2", [0.9, 0.0])
@pytest.mark.parametrize("mode", ["distributed", "blockwise"])
def test_normuon_needs_whole_matrices(mode, beta2):
    with pytest.raises(ValueError, match=f"normuon_beta2 needs whole matrices, with shard_mode='owned', but that is '{mode}'"):
        Muon([weight(2, 3)], normuon_beta2=beta2, shard_mode=mode)


def test_a_parameter_of_integers_cannot_be_stepped():
    with pytest.raises(ValueError, match=r"parameter 0\.0 should be floating point but is torch\.int64"):
        Muon([torch.ones(2, 3, dtype=torch.int64)])


def in_stripes(rank: int) -> str:
    """What is said of a weight of which each rank has every other third of the rows; AdamW does not mind."""
    mesh, stripes = init_device_mesh("cpu", (2,)), [_StridedShard(0, split_factor=3)]
    own = DTensor.from_local(torch.ones(6, 4), mesh, stripes, run_check=False, shape=torch.Size((12, 4)), stride=(4, 1))
    Muon([nn.Parameter(own)], algorithm="adamw")
    with pytest.raises(ValueError, match="gaps") as error:
        Muon([nn.Parameter(own)])
    return str(error.value)


def test_a_part_with_gaps_is_refused():
    for told in threads(2, in_stripes):
        assert told.startswith("parameter 0.0 of shape (12, 4) cannot be stepped where it lies")
        assert told.endswith("leave gaps in a rank's part of dimension 0")


def misplaced(rank: int) -> list[str]:
    """What is said of states that lie otherwise than their weights."""
    mesh, whole = init_device_mesh("cpu", (1,)), torch.ones(4, 6)
    rows, copies = (DTensor.from_local(whole, mesh, [place], run_check=False) for place in (Shard(0), Replicate()))
    messages = []
    for p, M in ((rows, whole), (whole, rows), (rows, copies)):
        optimizer = Muon([nn.Parameter(p)])
        saved = {"state": {0: {"momentum_buffer": M}}, "param_groups": optimizer.state_dict()["param_groups"]}
        with pytest.raises(ValueError, match="momentum_buffer") as caught:
            optimizer.load_state_dict(saved)
        messages.append(str(caught.value))
    return messages


def test_a_state_that_lies_otherwise_than_its_weight():
    rows, copies = "a DTensor on ranks [0] placed as (Shard(dim=0),)", "a DTensor on ranks [0] placed as (Replicate(),)"
    pairs = (rows, "a plain tensor"), ("a plain tensor", rows), (rows, copies)
    told = "state 'momentum_buffer' of parameter 0.0 should be {}, as the parameter is, but is {}; redistribute() it, or let "
    advice = "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict divide a whole state"
    assert threads(1, misplaced) == [[told.format(*pair) + advice for pair in pairs]]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3)), "0.weight has no shape yet; run the model once"),
        (
            lambda: tied(
                declaring(nn.Linear(4, 4, bias=False), Layout(blocks=2)),
                declaring(nn.Linear(4, 4, bias=False), Layout(blocks=4)),
            ),
            r"parameter \['0.weight', '1.weight'\] has several layouts",
        ),
        (
            lambda: tied(nn.Conv1d(4, 4, 1, bias=False), nn.Conv1d(8, 4, 1, groups=2, bias=False)),
            "is tied and has several meanings",
        ),
        (two_layouts_for_one, r"parameter \['weight'\] has several layouts"),
    ],
    ids=["no shape", "several layouts", "several meanings", "one layout and another"],
)
def test_a_model_that_cannot_be_routed(model, message):
    with pytest.raises(ValueError, match=message):
        param_groups(model(), head=())


def test_a_state_dict_has_a_name_for_every_parameter():
    optimizer = Muon([("w", weight(2, 3)), ("v", weight(3, 2))])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["param_names"].pop()
    with pytest.raises(ValueError, match="group 0 of the state dict has another number of names than of parameters"):
        optimizer.load_state_dict(saved)


BAD = [
    ({"lr": torch.tensor(-0.1)}, "Learning rate should be >= 0 but is: -0.1"),
    ({"lr": torch.tensor(float("nan"))}, "Learning rate should be >= 0 but is: nan"),
    ({"lr": torch.tensor(1j)}, "Learning rate should be >= 0 but is: "),
    ({"weight_decay": torch.tensor(-0.1)}, "weight decay should be >= 0 but is: -0.1"),
    ({"momentum": torch.tensor(1.0)}, "momentum should be < 1 but is: "),
    ({"ns_coefficients": 7}, "ns_coefficients should be a name, a quintic .* but is: 7"),
    ({"ns_coefficients": ()}, r"ns_coefficients should be a name, a quintic .* but is: \(\)"),
    ({"ns_coefficients": (1.5, float("inf"), 0.0)}, "Coefficients must be finite numbers, found"),
    ({"ns_coefficients": (1.5, "a", 0.0)}, "Coefficients must be finite numbers, found"),
    ({"ns_coefficients": [(1.5, -0.5, 0.0)]}, "1 quintics but ns_steps is 5; say ns_steps=1"),
    ({"ns_coefficients": [(1.5, -0.5, 0.0)] * 4, "ns_steps": 2}, "4 quintics but ns_steps is 2; say ns_steps=4"),
    ({"ns_coefficients": [(1.5, -0.5, 0.0), (0.6, 0.5, 0.0)], "ns_steps": 2}, "shrinks? small singular values"),
    ({"ns_coefficients": (1.0, -0.2, 0.0), "ns_steps": 1}, "shrinks? large singular values"),  # 1/2 to 0.475, 0.6 to 0.56
    ({"ns_coefficients": (1.5, -1.05, 0.0), "ns_steps": 1}, "shrinks? large singular values"),  # 1 to 0.45
    ({"ns_coefficients": "polar_express", "ns_steps": 4}, "polar_express"),
    ({"ns_coefficients": "polar_express_s4", "ns_steps": 7}, "polar_express_s4"),
    ({"ns_coefficients": "jordan", "ns_steps": True}, "ns_steps should be an integer >= 1 but is: True"),
    *[
        ({"adamw_betas": betas}, "adamw_betas should be two numbers in ")
        for betas in [(-0.1, 0.95), (0.9, -0.1), (1.0, 0.95), (0.9, float("nan")), (0.9, 0.95, 0.99), ("0.9", 0.95), 0.9]
    ],
    ({"layout": Layout(sections=(Section(4), Section(4)))}, "4.*8"),
    ({"layout": Layout(sections=(Section(0), Section(4)))}, "rows of a section should be an integer >= 1 but is 0"),
    ({"layout": Layout(sections=(Section(5), Section(-1)))}, "rows of a section should be an integer >= 1 but is -1"),
    ({"layout": Layout(sections=(Section(4, head_dim=0),))}, "head_dim should be an integer >= 1 but is 0"),
    ({"layout": Layout(groups=2, sections=(Section(2, head_dim=4),))}, "head_dim"),
    ({"weight_decay": torch.ones(2)}, "weight decay should be >= 0 but is: "),
    ({"momentum": torch.full((2,), 0.5)}, "momentum should be >= 0 but is: "),
    *[
        ({option: torch.tensor(0.5)}, rf"{option} should be a number but is: tensor\(0.5")
        for option in ("eps", "adamw_eps", "adamw_lr_ratio")
    ],
    ({"shard_mode": "owner"}, "shard_mode should be one of .* but is: 'owner'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_an_option_that_is_no_number_of_its_kind_is_refused_by_constructor_and_checkpoint(options, message):
    with pytest.raises(ValueError, match=message):
        Muon([weight(4, 6)], **options)
    optimizer = Muon([weight(4, 6)])
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(options)
    with pytest.raises(ValueError, match=message if "layout" not in options else "layout"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(("option", "bad", "good"), [("lr", -1.0, 0.1), ("ns_steps", 0, 5), ("adamw_eps", 0.0, 1e-8)])
def test_a_default_is_checked_also_where_every_group_has_its_own(option, bad, good):
    with pytest.raises(ValueError, match=f"but is: {bad}"):
        Muon([{"params": [weight(4, 6)], option: good}], **{option: bad})


def test_a_group_that_is_refused_for_whatever_reason_does_not_stay():
    optimizer = Muon([weight(4, 6)])
    for lr in (-1.0, torch.empty((), device="meta")):
        with pytest.raises((ValueError, RuntimeError)):
            optimizer.add_param_group({"params": [weight(4, 6)], "lr": lr})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("policy", [{"clip_grad": 0.0}, {"grad_norm_skip_threshold": 0.0}], ids=str)
def test_a_chain_inside_another_has_no_policy_not_even_one_of_zero(policy):
    with pytest.raises(ValueError, match="a chain inside another should have neither clip_grad nor grad_norm_skip_threshold"):
        ChainedOptimizer([ChainedOptimizer([Muon([weight(4, 6)])], **policy)])


def test_a_checkpoint_may_not_combine_what_the_constructor_refuses_together():
    optimizer = Muon([weight(4, 6)], normuon_beta2=0.9)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["shard_mode"] = "distributed"
    with pytest.raises(
        ValueError, match="normuon_beta2 needs whole matrices, with shard_mode='owned', but that is 'distributed'"
    ):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["shard_mode"] == "owned"


def test_a_vector_cannot_be_flattened_to_a_matrix():
    with pytest.raises(ValueError, match="two dimensions"):
        Muon([weight(12)], layout=Layout(flatten=True))


def test_an_exemption_from_clipping_is_a_flag():
    with pytest.raises(ValueError, match="skip_grad_norm_clip should be True or False but is: 'no'"):
        Muon([{"params": [weight(3)], "algorithm": "adamw", "skip_grad_norm_clip": "no"}])


def test_sections_are_not_numbers():
    with pytest.raises(ValueError, match=r"sections should be Section\(rows, algorithm in .*, found 2"):
        Muon([weight(4, 6)], layout=Layout(sections=(2, 2)))
