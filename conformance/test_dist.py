# SPDX-License-Identifier: Apache-2.0
"""DIST on threads: every placement steps as one process that holds everything does."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh

from conformance import accept
from conformance.ranks import (
    MESHES,
    Case,
    Outcome,
    Weight,
    accept_as_alone,
    accept_parts,
    assemble,
    begin,
    construct,
    gradient,
    outcome,
    take,
    together,
    weight,
)
from conformance.steps import expected
from conformance.strategies import FUSED, HYPER, seeds
from conformance.target import Target
from conformance.worlds import threads

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore:.*skipped:RuntimeWarning")]

SHAPES = [(1, 9), (9, 1), (1, 1), (3, 40), (7, 7), (18, 6), (6, 18), (8, 12), (12, 8), (16, 16), (33, 5), (2, 31)]

meshes = st.sampled_from(list(MESHES.values()))


@pytest.mark.clause("DIST-1", "DIST-4")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_placement_steps_as_the_reference(target: Target, device, mesh, shape):
    accept_as_alone(target, device, Case(*MESHES[mesh], (Weight(shape),)), bits=False)


@pytest.mark.clause("DIST-2", "DIST-4")
@pytest.mark.parametrize("normuon_beta2", [None, 0.9])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_placement_has_the_bits_of_one_process(target: Target, device, mesh, normuon_beta2):
    weights = (
        *map(Weight, SHAPES),
        Weight((5,), None, "adamw"),
        Weight((8, 12), None, "adamw"),
        Weight((0, 4)),
        Weight((4, 0)),
    )
    if MESHES[mesh][1].count("S1"):
        weights = tuple(each for each in weights if len(each.shape) == 2)
    case = Case(*MESHES[mesh], weights, replace(HYPER, normuon_beta2=normuon_beta2))
    accept_as_alone(target, device, case, bits=True)


def steps_of_a_pair(rank: int, target: Target, cases: list[Case], device: str) -> Outcome:
    """The case of this rank's pair, on a mesh of the two."""
    case, ranks = cases[rank // 2], torch.arange(4).view(2, 2)
    parameters, optimizer = begin(target, case, device, DeviceMesh(device, ranks, mesh_dim_names=("pair", "rank"))["rank"])
    for step in range(case.steps):
        take(case, rank % 2, step, parameters, optimizer)
    return outcome(target, parameters, optimizer, [])


@pytest.mark.clause("DIST-1", "DIST-2")
@pytest.mark.parametrize("placement", ["S0", "S1"])
@pytest.mark.parametrize("mode", ["owned", "duplicated", "distributed"])
def test_every_pair_of_ranks_steps_weights_of_its_own(target: Target, device, mode, placement):
    weights, hyper = (Weight((8, 12)), Weight((12, 8)), Weight((8, 12), None, "adamw")), replace(HYPER, shard_mode=mode)
    cases = [Case((2,), (placement,), weights, hyper, seed=1000 * pair) for pair in range(2)]
    found = threads(4, steps_of_a_pair, target, cases, device.type)
    for case, pair in zip(cases, (found[:2], found[2:]), strict=True):
        accept_parts(target, device, case, pair, bits=mode != "distributed")


@pytest.mark.clause("DIST-2", "DIST-4")
def test_a_mesh_of_another_order_has_the_bits_of_one_process(target: Target, device):
    weights = (Weight((8, 12)), Weight((12, 8)), Weight((5, 7)), Weight((8, 12), None, "adamw"))
    accept_as_alone(target, device, Case((2, 2), ("R", "S0"), weights, order=(3, 0, 2, 1)), bits=True)


@pytest.mark.clause("DIST-2", "DIST-4", "SCALE-3")
@example(MESHES["3 by rows"], list(FUSED), "owned", torch.float32, 0.9, False, 0)
@example(MESHES["2 by columns"], ["gate and up of every expert", "grouped convolution"], "owned", torch.float32, 0.9, False, 0)
@given(
    mesh=meshes,
    kinds=st.lists(st.sampled_from(list(FUSED)), min_size=1, max_size=3),
    mode=st.sampled_from(["owned", "duplicated"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    normuon_beta2=st.sampled_from([None, 0.9]),
    maximize=st.booleans(),
    seed=seeds,
)
def test_layouts_have_the_bits_of_one_process(target: Target, device, mesh, kinds, mode, dtype, normuon_beta2, maximize, seed):
    hyper = replace(HYPER, shard_mode=mode, normuon_beta2=normuon_beta2, maximize=maximize)
    weights = tuple(Weight(*FUSED[kind]) for kind in kinds)
    accept_as_alone(target, device, Case(*mesh, weights, hyper, dtype, seed), bits=True)


@pytest.mark.clause("DIST-1")
@pytest.mark.parametrize("mesh", ["3 by rows", "2 by columns"])
def test_layouts_in_parts_step_as_the_reference(target: Target, device, mesh):
    """No matrix is whole anywhere; interleaved sections are several runs of rows on each rank."""
    weights = tuple(Weight(*case) for case in FUSED.values())
    accept_as_alone(target, device, Case(*MESHES[mesh], weights, replace(HYPER, shard_mode="distributed")), bits=False)


@pytest.mark.clause("DIST-2", "DIST-4")
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("experts", range(1, 9))
def test_experts_over_ranks_that_do_not_divide_them(target: Target, device, experts, ranks):
    stacked, apart = ((experts * 6, 10), {"blocks": experts}), ((experts, 6, 10), {"blocks": experts})
    accept_as_alone(target, device, Case((ranks,), ("S0",), (Weight(*stacked), Weight(*apart))), bits=True)
    accept_as_alone(target, device, Case((ranks,), ("S2",), (Weight(*apart),)), bits=True)
    if ranks == 4:  # and over tensor parallel, which has divided the rows before
        accept_as_alone(target, device, Case((2, 2), ("F0", "S0"), (Weight(*stacked),)), bits=True)


@pytest.mark.clause("DIST-1")
@given(
    mesh=st.sampled_from([m for m in MESHES.values() if sum(p.startswith("S") for p in m[1]) <= 1]),
    shape=st.sampled_from(SHAPES),
    schedule=st.sampled_from([("jordan", 5), ("polar_express", 5), ("polar_express_s4", 4), ("you", 5)]),
    eps=st.sampled_from([0.0, 1e-3, 30.0]),
    exponent=st.integers(-120, 100),
    seed=seeds,
)
def test_no_rank_holds_the_matrix(target: Target, device, mesh, shape, schedule, eps, exponent, seed):
    """Gram matrices, and their norm, are summed over ranks without underflow or overflow."""
    hyper = replace(HYPER, shard_mode="distributed", schedule=schedule[0], steps=schedule[1], eps=eps * 2.0**exponent)
    case = Case(*mesh, (Weight(shape),), hyper, seed=seed)
    found = threads(case.size, together, target, case, device.type, 2.0**exponent)
    before, steps = weight(case, 0), [[gradient(case, step, 0) * 2.0**exponent] for step in range(case.steps)]
    whole, precision = assemble(found, "w0", before.shape), target.precision(case.dtype, device)
    accept.step(before=before, actual=whole, expected=expected([before], steps, hyper)[0], precision=precision)


@pytest.mark.clause("DIST-3")
@pytest.mark.parametrize("normalization", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("placement", ["S0", "S1"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_blocks_step_as_parameters(target: Target, device, ranks, placement, normalization):
    hyper = replace(HYPER, shard_mode="blockwise", adjust_lr_fn=normalization)
    case = Case((ranks,), (placement,), tuple(map(Weight, [(8, 12), (12, 8), (7, 5)])), hyper)
    for each in threads(ranks, together, target, case, device.type):
        for i in range(len(case.weights)):
            own, at = each.parts[f"w{i}"]
            one = replace(case, weights=(Weight(tuple(own.shape)),))
            (p,), optimizer = construct(target, one, [weight(case, i)[at].to(device)])
            for step in range(case.steps):
                p.grad = gradient(case, step, i)[at].to(device)
                optimizer.step()
            accept.same_bits(actual=own, expected=p)


@pytest.mark.clause("DIST-2", "LAYOUT-2")
@pytest.mark.parametrize("ranks", [2, 4])
def test_sections_that_are_each_sharded(target: Target, device, ranks):
    """A tensor-parallel projection: rows of q, of k and of v on every rank, one below the other."""
    layout = {"groups": ranks, "sections": ({"rows": 4}, {"rows": 2}, {"rows": 2})}
    accept_as_alone(target, device, Case((ranks,), ("S0",), (Weight((8 * ranks, 9), layout),)), bits=True)
