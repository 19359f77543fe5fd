# SPDX-License-Identifier: Apache-2.0
"""DIST on threads: every placement steps as one process that holds everything does."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from conformance import accept
from conformance.ranks import Case, Weight, alone, assemble, construct, gradient, spread, threads, together, weight
from conformance.steps import expected
from conformance.strategies import HYPER, LAYOUTS, MIXED, seeds, tensor
from conformance.target import Target

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore:.*skipped:RuntimeWarning")]

MESHES = {
    "1 rank": ((1,), ("S0",)),
    "2 by rows": ((2,), ("S0",)),
    "2 by columns": ((2,), ("S1",)),
    "3 by rows": ((3,), ("S0",)),
    "3 by columns": ((3,), ("S1",)),
    "4 by rows": ((4,), ("S0",)),
    "4 by columns": ((4,), ("S1",)),
    "4 copies": ((4,), ("R",)),
    "4 replicas": ((4,), ()),
    "8 by rows": ((8,), ("S0",)),
    "2x2 by rows, copied": ((2, 2), ("R", "S0")),
    "2x2 by rows and columns": ((2, 2), ("S0", "S1")),
    "2x2 by columns and rows": ((2, 2), ("S1", "S0")),
    "2x2 by rows twice": ((2, 2), ("S0", "S0")),
    "2x3 by columns, copied": ((2, 3), ("R", "S1")),
    "2x2x2 by rows, copied, by columns": ((2, 2, 2), ("S0", "R", "S1")),
}
SHAPES = [(1, 9), (9, 1), (1, 1), (3, 40), (7, 7), (18, 6), (6, 18), (8, 12), (12, 8), (16, 16), (33, 5), (2, 31)]
FUSED = {**LAYOUTS, **MIXED}
meshes = st.sampled_from(list(MESHES.values()))


def accept_as_alone(target: Target, device: torch.device, case: Case, bits: bool) -> None:
    """All ranks' parts together are what one process has: to the bit, states included, or as far as the reference's step."""
    __tracebackhide__ = True
    found = threads(case.size, together, target, case, device.type)
    one = alone(target, case, device)
    for name, (T, _) in one.parts.items():
        whole = assemble(found, name, T.shape)
        if bits:
            accept.same_bits(actual=whole, expected=T)
        elif "." not in name:
            i = int(name[1:])
            before, precision = weight(case, i), target.precision(case.dtype, device)
            steps = [[gradient(case, step, i)] for step in range(case.steps)]
            hyper = replace(case.hyper, layout=case.weights[i].layout, algorithm=case.weights[i].algorithm)
            accept.step(before=before, actual=whole, expected=expected([before], steps, hyper)[0], precision=precision)


@pytest.mark.clause("DIST-1", "DIST-4")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_placement_steps_as_the_reference(target: Target, device, mesh, shape):
    accept_as_alone(target, device, Case(*MESHES[mesh], (Weight(shape),)), bits=False)


@pytest.mark.clause("DIST-2", "DIST-4")
@pytest.mark.parametrize("normuon_beta2", [None, 0.9])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_placement_has_the_bits_of_one_process(target: Target, device, mesh, normuon_beta2):
    weights = (*map(Weight, SHAPES), Weight((5,), None, "adamw"), Weight((8, 12), None, "adamw"), Weight((0, 4)), Weight((4, 0)))
    if MESHES[mesh][1].count("S1"):
        weights = tuple(each for each in weights if len(each.shape) == 2)
    case = Case(*MESHES[mesh], weights, replace(HYPER, normuon_beta2=normuon_beta2))
    accept_as_alone(target, device, case, bits=True)


@pytest.mark.clause("DIST-2", "DIST-4", "SCALE-3")
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


@pytest.mark.clause("DIST-2", "DIST-4")
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("experts", range(1, 9))
def test_experts_over_ranks_that_do_not_divide_them(target: Target, device, experts, ranks):
    stacked, apart = ((experts * 6, 10), {"blocks": experts}), ((experts, 6, 10), {"blocks": experts})
    accept_as_alone(target, device, Case((ranks,), ("S0",), (Weight(*stacked), Weight(*apart))), bits=True)
    accept_as_alone(target, device, Case((ranks,), ("S2",), (Weight(*apart),)), bits=True)


@pytest.mark.clause("DIST-1")
@given(
    mesh=st.sampled_from([m for m in MESHES.values() if sum(p.startswith("S") for p in m[1]) <= 1]),
    shape=st.sampled_from(SHAPES),
    schedule=st.sampled_from([("jordan", 5), ("polar_express_s4", 4), ("you", 5)]),
    eps=st.sampled_from([0.0, 1e-3]),
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
            (p,), optimizer = construct(target, replace(case, weights=(Weight(tuple(own.shape)),)), [weight(case, i)[at].to(device)])
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


@pytest.mark.clause("DIST-5")
@pytest.mark.parametrize("mesh", [((2,), ("R",)), ((2, 2), ("S0", "R"))], ids=["2", "2x2"])
def test_a_gradient_that_has_to_be_summed(target: Target, device, mesh):
    accept_as_alone(target, device, Case(*mesh, (Weight((8, 12)), Weight((12, 8))), partial=True), bits=True)


@pytest.mark.clause("DIST-6", "SKIP-1", "SKIP-8")
@pytest.mark.parametrize(
    "mesh, mode",
    [
        *[(mesh, "owned") for mesh in ("2 by rows", "3 by columns", "4 by rows", "4 copies", "4 replicas", "2x2 by rows, copied")],
        *[("2 by rows", mode) for mode in ("duplicated", "distributed", "blockwise")],
    ],
)
def test_a_poisoned_rank_stops_all(skipping: Target, device, mesh, mode):
    """Every subset of ranks is struck."""
    shape, placements = MESHES[mesh]
    size = Case(shape, placements, ()).size
    weights = (Weight((8, 12)), Weight((12, 8), None, "adamw"), Weight((6, 6)))
    clean = Case(shape, placements, weights, replace(HYPER, shard_mode=mode), steps=3)
    without = replace(clean, missing=frozenset((1, rank, i) for rank in range(size) for i in range(3)))
    should = {struck: threads(size, together, skipping, each, device.type) for struck, each in ((False, clean), (True, without))}
    for count in range(size + 1):
        for struck in itertools.combinations(range(size), count):
            case = replace(clean, poison=frozenset((1, rank, (rank + count) % 3) for rank in struck))
            found = threads(size, together, skipping, case, device.type)
            for each, other in zip(found, should[bool(struck)], strict=True):
                assert accept.equal(each.skipped, {**other.skipped, "gradient": int(bool(struck))})
                for name, (T, _) in other.parts.items():
                    accept.same_bits(actual=each.parts[name][0], expected=T)


@pytest.mark.clause("DIST-6", "SKIP-2")
@pytest.mark.parametrize("mesh", ["2 by rows", "4 by columns", "4 replicas", "2x2 by rows, copied"])
def test_an_orthogonalization_that_fails_stops_all(skipping: Target, device, mesh):
    case = Case(*MESHES[mesh], (Weight((8, 12)), Weight((6, 6)), Weight((5, 3), None, "adamw")), steps=1)
    with skipping.orthogonalizing(float("nan")):
        found = threads(case.size, together, skipping, case, device.type)
        one = alone(skipping, case, device)
    for name, (T, _) in one.parts.items():
        accept.same_bits(actual=assemble(found, name, T.shape), expected=T)
    assert accept.equal([each.skipped for each in found], [one.skipped] * case.size)


@pytest.mark.clause("DIST-10")
def test_what_cannot_be_stepped_is_refused(validating: Target, device):
    def build(rank: int, kind: str) -> None:
        mesh = DeviceMesh(device.type, torch.arange(4).view(2, 2), mesh_dim_names=("a", "b"))
        if kind == "partial":
            p = DTensor.from_local(torch.zeros(4, 6, device=device), mesh, [Shard(0), Partial()], run_check=False)
            accept.refuses(lambda: construct(validating, Case((), (), (Weight((4, 6)),)), [p]), ValueError, "w0", "sum")
            return
        p = spread(tensor((4, 6), 0), mesh, [Shard(0), Shard(1)])
        if kind == "cut in two":
            case = Case((), (), (Weight((4, 6)),), replace(HYPER, shard_mode="distributed"))
            accept.refuses(lambda: construct(validating, case, [p]), ValueError, "w0", "distributed")
        if kind == "convolution":
            q = spread(tensor((4, 3, 2, 2), 0), mesh, [Shard(0), Shard(2)])
            case = Case((), (), (Weight((4, 3, 2, 2), {"flatten": True}),))
            accept.refuses(lambda: construct(validating, case, [q]), ValueError, "w0", "flatten")
        if kind == "outside":
            mine = mesh["a"].get_group()
            accept.refuses(lambda: validating.optimizer([("w0", torch.nn.Parameter(p))], HYPER, mine), ValueError, "process_group")

    for kind in ("partial", "cut in two", "convolution", "outside"):
        threads(4, build, kind)
