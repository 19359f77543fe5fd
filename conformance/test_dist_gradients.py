# SPDX-License-Identifier: Apache-2.0
"""DIST on threads: gradients that are missing, summed, poisoned or clipped, and what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from conformance import accept
from conformance.campaign_ranks import accept_poisoned, subsets
from conformance.ranks import (
    MESHES,
    Case,
    Weight,
    accept_as_alone,
    alone,
    assemble,
    begin,
    clipped,
    construct,
    gradient,
    part,
    spread,
    take,
    together,
    weight,
)
from conformance.strategies import HYPER, MIXED, tensor
from conformance.target import Target
from conformance.worlds import threads

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore:.*skipped:RuntimeWarning")]


@pytest.mark.clause("DIST-5", "STEP-2")
@given(
    mesh=st.sampled_from([((3,), ("S0",)), ((4,), ("S1",)), ((2, 2), ("S0", "S1"))]),
    gone=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 2)), max_size=30),
    everywhere=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=5),
)
def test_a_missing_gradient_is_zero_unless_it_is_missing_everywhere(target: Target, device, mesh, gone, everywhere):
    missing = gone | {(step, rank, i) for step, i in everywhere for rank in range(4)}
    weights = (Weight((8, 12)), Weight((12, 8)), Weight((6, 6), None, "adamw"))
    case = Case(*mesh, weights, steps=3, missing=frozenset(missing))
    accept_as_alone(target, device, case, bits=True)


@pytest.mark.clause("DIST-4", "DIST-5")
@pytest.mark.parametrize("mesh", [((2,), ("R",)), ((2, 2), ("S0", "R"))], ids=["2", "2x2"])
def test_a_gradient_that_has_to_be_summed(target: Target, device, mesh):
    accept_as_alone(target, device, Case(*mesh, (Weight((8, 12)), Weight((12, 8))), partial=True), bits=False)


@pytest.mark.clause("DIST-6", "SKIP-1", "SKIP-8")
@pytest.mark.parametrize(
    "mesh, mode",
    [
        *[(mesh, "owned") for mesh in ("3 by columns", "4 by rows", "4 copies", "4 replicas", "2x2 by rows, copied")],
        *[("2 by rows", mode) for mode in ("owned", "duplicated", "distributed", "blockwise")],
    ],
)
def test_a_poisoned_rank_stops_all(skipping: Target, device, mesh, mode):
    for struck in subsets(mesh):
        accept_poisoned(skipping, mesh, struck, mode, device.type)


@pytest.mark.clause("DIST-6", "SKIP-2", "VAR-6")
@pytest.mark.parametrize("normuon_beta2", [None, 0.9])
@pytest.mark.parametrize("mesh", ["2 by rows", "4 by columns", "4 replicas", "2x2 by rows, copied"])
def test_an_orthogonalization_that_fails_stops_all(skipping: Target, device, mesh, normuon_beta2):
    hyper = replace(HYPER, normuon_beta2=normuon_beta2)
    case = Case(*MESHES[mesh], (Weight((8, 12)), Weight((6, 6)), Weight((5, 3), None, "adamw")), hyper, steps=1)
    with skipping.orthogonalizing(float("nan")):
        found = threads(case.size, together, skipping, case, device.type)
        one = alone(skipping, case, device)
    for name, (T, _) in one.parts.items():
        accept.same_bits(actual=assemble(found, name, T.shape), expected=T)
    assert accept.equal([each.skipped for each in found], [one.skipped] * case.size)


@pytest.mark.clause("DIST-7", "CLIP-4")
@pytest.mark.parametrize("clip_norm", ["own", "global"])
@pytest.mark.parametrize("mesh", [mesh for mesh, (_, placements) in MESHES.items() if placements])
def test_norms_are_of_whole_gradients(target: Target, device, mesh, clip_norm):
    weights = (
        Weight((8, 12), None, "adamw"),
        Weight((3, 5)),
        Weight(*MIXED["gated delta net"]),
        Weight((20, 3), None, "adamw"),
    )
    if set(MESHES[mesh][1]) == {"R"}:  # a single number can be copied, not divided
        weights = (*weights, Weight((), None, "adamw"))
    accept_norms(target, device, Case(*MESHES[mesh], weights), clip_norm)


@pytest.mark.clause("DIST-7", "CLIP-4")
def test_norms_on_a_mesh_of_another_order(target: Target, device):
    case = Case((3,), ("S0",), (Weight(*MIXED["gated delta net"]), Weight((20, 3), None, "adamw")), order=(2, 0, 1))
    accept_norms(target, device, case, "own")


def accept_norms(target: Target, device: torch.device, case: Case, clip_norm: str) -> None:
    """Norms, and clipped gradients, are those of one process."""
    __tracebackhide__ = True
    parameters, optimizer = construct(target, case, [weight(case, i).to(device) for i in range(len(case.weights))])
    for i, p in enumerate(parameters):
        p.grad = gradient(case, 0, i).to(device)
    norms = target.clip(optimizer, 3.0, clip_norm, 0.0)
    for found, parts in threads(case.size, clipped, target, case, device.type, clip_norm):
        for ours, one in zip(found, norms, strict=True):
            accept.close(actual=ours, expected=one, dtype=torch.float32)
        for p, (own, at) in zip(parameters, parts, strict=True):
            accept.close(actual=own, expected=p.grad.cpu()[at], dtype=torch.float32)


@pytest.mark.clause("DIST-7")
@pytest.mark.parametrize("mesh", [((2,), ("R",)), ((2, 2), ("S0", "R"))], ids=["2", "2x2"])
def test_norms_are_of_sums(target: Target, device, mesh):
    case = Case(*mesh, (Weight((8, 12), None, "adamw"), Weight((12, 8))), partial=True)
    own, other = (torch.linalg.vector_norm(gradient(case, 0, i), dtype=torch.float64) for i in range(2))
    for (total, _, threshold), _ in threads(case.size, clipped, target, case, device.type, "own"):
        accept.close(actual=threshold, expected=own, dtype=torch.float32)
        accept.close(actual=total, expected=torch.hypot(own, other), dtype=torch.float32)


@pytest.mark.clause("DIST-10")
def test_what_cannot_be_stepped_is_refused(validating: Target, device):
    def build(rank: int, kind: str) -> None:
        mesh = DeviceMesh(device.type, torch.arange(4).view(2, 2), mesh_dim_names=("a", "b"))
        if kind == "partial":
            p = DTensor.from_local(torch.zeros(4, 6, device=device), mesh, [Shard(0), Partial()], run_check=False)
            for algorithm in ("muon", "adamw"):
                case = Case((), (), (Weight((4, 6), None, algorithm),))
                accept.refuses(lambda case=case: construct(validating, case, [p]), ValueError, "w0", "sum")
            return
        p = spread(tensor((4, 6), 0), mesh, [Shard(0), Shard(1)])
        if kind == "cut in two":
            case = Case((), (), (Weight((4, 6)),), replace(HYPER, shard_mode="distributed"))
            accept.refuses(lambda: construct(validating, case, [p]), ValueError, "w0", "distributed")
        if kind == "convolution":
            q = spread(tensor((4, 3, 2, 2), 0), mesh, [Shard(0), Shard(2)])
            case = Case((), (), (Weight((4, 3, 2, 2), {"flatten": True}),))
            accept.refuses(lambda: construct(validating, case, [q]), ValueError, "w0", "flatten")
        if kind == "a section cut in two":
            q = spread(tensor((8, 6), 0), mesh, [Shard(0), Shard(1)])
            layout = {"sections": [{"rows": 2}, {"rows": 6}]}
            case = Case((), (), (Weight((8, 6), layout),), replace(HYPER, shard_mode="distributed"))
            accept.refuses(lambda: construct(validating, case, [q]), ValueError, "w0", "distributed")
        if kind == "outside":
            mine = mesh["a"].get_group()
            words = "process_group", "[0, 1, 2, 3]", str(dist.get_process_group_ranks(mine))
            accept.refuses(lambda: validating.optimizer([("w0", torch.nn.Parameter(p))], HYPER, mine), ValueError, *words)

    for kind in ("partial", "cut in two", "convolution", "a section cut in two", "outside"):
        threads(4, build, kind)


def _load_otherwise(rank: int, target: Target, case: Case, device: str, key: str, other: str) -> None:
    """Loads a state of which one entry lies otherwise than it should."""
    parameters, optimizer = begin(target, case, device)
    take(case, rank, 0, parameters, optimizer)
    entry = optimizer.state[parameters[0]][key]
    mesh = DeviceMesh(device, torch.tensor([1, 0]))
    T = entry.full_tensor() if isinstance(entry, DTensor) else entry
    changed = {
        "whole": lambda: T,
        "divided": lambda: spread(T, mesh, [Shard(0)]),
        "of another dimension": lambda: spread(T, entry.device_mesh, [Shard(1)]),
        "of other ranks": lambda: spread(T, mesh, list(entry.placements)),
    }[other]()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][key] = changed

    def unchanged():
        return [list(part(T)) for T in (*parameters, *optimizer.state[parameters[0]].values())]

    lies = "plain tensor" if other == "whole" else str(changed.placements)
    accept.refuses(lambda: optimizer.load_state_dict(saved), ValueError, "w0", key, lies, unchanged=unchanged)


@pytest.mark.clause("STATE-4", "DIST-1")
@pytest.mark.parametrize("key", ["momentum_buffer", "variance_buffer"])
@pytest.mark.parametrize("other", ["whole", "divided", "of another dimension", "of other ranks"])
def test_state_that_lies_otherwise_is_refused(validating: Target, device, other, key):
    placements = () if other == "divided" else ("S0",)
    case = Case((2,), placements, (Weight((4, 6)),), replace(HYPER, normuon_beta2=0.9))
    threads(2, _load_otherwise, validating, case, device.type, key, other)
