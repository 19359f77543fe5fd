# SPDX-License-Identifier: Apache-2.0
"""A step of weights that lie on ranks in different ways: what one process makes of them, and what is left behind."""

import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from conformance import accept
from conformance.ranks import Outcome, assemble, outcome, spread
from conformance.strategies import MIXED, tensor
from conformance.targets.impl import Target
from conformance.worlds import threads
from impl import Muon

Make = Callable[[bool], Sequence[nn.Parameter]]  # a rank's weights, or those of one process


def weight(
    seed: int, mesh: DeviceMesh | None, *placements: Placement, shape: tuple[int, ...] = (8, 12), dtype: Any = torch.float32
) -> nn.Parameter:
    """One with its gradient: a rank's part, or without a mesh the whole."""
    W, G = (tensor(shape, each, dtype) for each in (seed, 100 + seed))
    p = nn.Parameter(W if mesh is None else spread(W, mesh, list(placements)))
    p.grad = G if mesh is None else spread(G, mesh, list(placements))
    return p


def line(ranks: int, divided: bool = True) -> DeviceMesh | None:
    return DeviceMesh("cpu", list(range(ranks))) if divided else None


def pairs(divided: bool = True) -> DeviceMesh | None:
    """Ranks 0 and 1, or 2 and 3."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "rank"))["rank"] if divided else None


def step(divided: bool, make: Make, options: dict[str, Any]) -> Outcome:
    parameters = make(divided)
    optimizer = Muon(parameters, lr=0.1, **options)
    optimizer.step()
    return outcome(Target(), list(parameters), optimizer, [])


def accept_one_process(size: int, make: Make, **options: Any) -> None:
    """Weights and states of all ranks are those of one process: to the bit, unless Gram matrices are summed."""
    __tracebackhide__ = True
    found, one = threads(size, lambda rank: step(True, make, options)), step(False, make, options)
    for name, (T, _) in one.parts.items():
        whole = assemble(found, name, T.shape)
        if options.get("shard_mode") == "distributed" and "." not in name:
            before = make(False)[int(name[1:])].detach()
            accept.step(before=before, actual=whole, expected=T, precision=torch.float32)
        else:
            accept.same_bits(actual=whole, expected=T)
    assert all(each.parts.keys() == one.parts.keys() for each in found)


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_weights_of_several_dtypes(algorithm):
    dtypes = (torch.float32, torch.float64)
    accept_one_process(
        2, lambda divided: [weight(i, line(2, divided), Shard(0), dtype=dtypes[i]) for i in (0, 1)], algorithm=algorithm
    )


@pytest.mark.parametrize(
    ("dtype", "factors"),
    [
        (torch.float32, (1.0, 2.0**20, 2.0**-20, 2.0**120, 2.0**-138, 0.0)),
        (torch.float64, (1.0, 2.0**400, 2.0**-400)),
    ],
    ids=str,
)
def test_parts_of_any_magnitude(dtype, factors):
    """Also where an epsilon is above the norm, subnormal numbers and zeros."""

    def make(divided: bool) -> list[nn.Parameter]:
        made = [weight(i, line(2, divided), Shard(1), dtype=dtype) for i in range(len(factors))]
        for p, factor in zip(made, factors, strict=True):
            p.grad *= factor
        return made

    for eps in (0.0, 1.0):
        accept_one_process(2, make, shard_mode="distributed", eps=eps)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_rank_may_have_nothing_of_a_matrix_that_is_cut(dim):
    shape = (2, 5) if dim == 0 else (5, 2)
    for each in (shape, (2, 2)):
        accept_one_process(
            3, lambda divided, each=each: [weight(0, line(3, divided), Shard(dim), shape=each)], shard_mode="distributed"
        )


def test_normuon_without_memory():
    accept_one_process(2, lambda divided: [weight(0, line(2, divided), Shard(0))], normuon_beta2=0.0)


def test_a_frozen_weight_takes_no_part():
    def make(divided: bool) -> list[nn.Parameter]:
        p, frozen = (weight(seed, line(2, divided), Shard(0)) for seed in range(2))
        frozen.grad = frozen.requires_grad_(False).grad = None
        return [p, frozen]

    accept_one_process(2, make)


def test_weights_on_a_mesh_each():
    """Also where the first one's ranks are some of the second one's, with which they decide."""
    accept_one_process(4, lambda divided: [weight(0, pairs(divided), Shard(0)), weight(1, line(4, divided), Shard(0))])


def test_a_mesh_of_two_dimensions_over_some_of_the_ranks():
    def make(divided: bool) -> list[nn.Parameter]:
        names = ("stage", "copy", "row")
        mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=names)["copy", "row"] if divided else None
        return [weight(0, mesh, Replicate(), Shard(0))]

    accept_one_process(4, make)


def test_sections_for_adamw_on_every_pair():
    shape, layout = MIXED["gated delta net"]
    accept_one_process(4, lambda divided: [weight(0, pairs(divided), Shard(0), shape=shape)], layout=layout)


@pytest.mark.parametrize("mode", ["owned", "duplicated", "distributed"])
def test_weights_of_one_shape_and_several_placements(mode):
    places = ((Replicate(), Shard(0)), (Shard(0), Replicate()), (Replicate(), Shard(1)))

    def make(divided: bool) -> list[nn.Parameter]:
        mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2)) if divided else None
        return [weight(i, mesh, *place) for i, place in enumerate(places)]

    accept_one_process(4, make, shard_mode=mode)


@pytest.mark.parametrize(
    ("shape", "dim", "layout", "of_half"),
    [
        ((6, 40), 0, {"columns": 4}, {"columns": 4}),
        ((4, 6, 10), 0, {"blocks": 4}, {"blocks": 2}),
        ((4, 6, 10), 1, {"blocks": 4}, {"blocks": 4}),
        ((4, 6, 10), 2, {"blocks": 4}, {"blocks": 4}),
    ],
)
def test_blockwise_parts_step_as_weights_of_their_own(shape, dim, layout, of_half):
    def part(rank: int) -> torch.Tensor:
        p = weight(0, line(2), Shard(dim), shape=shape)
        Muon([p], lr=0.1, layout=layout, shard_mode="blockwise").step()
        return p.detach().to_local()

    whole = weight(0, None, shape=shape)
    for actual, W, G in zip(threads(2, part), whole.detach().chunk(2, dim), whole.grad.chunk(2, dim), strict=True):
        p = nn.Parameter(W.contiguous())
        p.grad = G
        Muon([p], lr=0.1, layout=of_half).step()
        accept.same_bits(actual=actual, expected=p.detach())


def test_blockwise_parts_may_be_cut_in_both_dimensions():
    def part(rank: int) -> torch.Tensor:
        p = weight(0, DeviceMesh("cpu", torch.arange(4).view(2, 2)), Shard(0), Shard(1), shape=(8, 12))
        Muon([p], lr=0.1, shard_mode="blockwise").step()
        return p.detach().to_local()

    whole = weight(0, None, shape=(8, 12))
    for rank, actual in enumerate(threads(4, part)):
        W, G = (T.detach().chunk(2)[rank // 2].chunk(2, 1)[rank % 2].contiguous() for T in (whole, whole.grad))
        p = nn.Parameter(W)
        p.grad = G
        Muon([p], lr=0.1).step()
        accept.same_bits(actual=actual, expected=p.detach())


def test_a_part_that_lies_across_may_have_no_gradient():
    def part(rank: int) -> torch.Tensor:
        own = tensor((2, 6, 10), rank)
        p = nn.Parameter(DTensor.from_local(own.clone().mT, line(2), [Shard(0)], run_check=False))
        p.grad = DTensor.from_local(tensor((2, 10, 6), 2), line(2), [Shard(0)], run_check=False) if rank == 0 else None
        Muon([p], lr=0.1, weight_decay=0.0, layout={"blocks": 4}).step()
        return (p.detach().to_local() != own.mT).any((1, 2))

    assert [moved.tolist() for moved in threads(2, part)] == [[True, True], [False, False]]


@pytest.mark.parametrize("placement", [Replicate(), Shard(1)], ids=str)
def test_a_gradient_may_be_placed_otherwise_than_its_weight(placement):
    def make(divided: bool) -> list[nn.Parameter]:
        p = weight(0, line(2, divided), Shard(0))
        if divided:
            p.grad = spread(tensor((8, 12), 100), line(2), [placement])
        return [p]

    accept_one_process(2, make)


def test_groups_may_have_a_shard_mode_each():
    def steps(rank: int, divided: bool) -> Outcome:
        parameters = [weight(i, line(2, divided), Shard(0)) for i in range(3)]
        modes = ("distributed", "owned", "duplicated")
        groups = [{"params": [p], "shard_mode": mode} for p, mode in zip(parameters, modes, strict=True)]
        optimizer = Muon(groups, lr=0.1)
        optimizer.step()
        return outcome(Target(), parameters, optimizer, [])

    found, one = threads(2, steps, True), steps(0, False)
    for name in ("w1", "w2"):
        accept.same_bits(actual=assemble(found, name, (8, 12)), expected=one.parts[name][0])
    before = weight(0, None).detach()
    actual, expected = assemble(found, "w0", (8, 12)), one.parts["w0"][0]
    accept.step(before=before, actual=actual, expected=expected, precision=torch.float32)


def test_a_shard_mode_may_change_between_steps():
    def modes(rank: int) -> set[str]:
        optimizer = Muon([weight(0, line(2), Shard(0))])
        optimizer.step()
        optimizer.param_groups[0]["shard_mode"] = "blockwise"
        optimizer.step()
        (sharded,) = optimizer.plans.values()
        return {each.key.mode for each in sharded.parts.rounds}

    assert threads(2, modes) == [{"blockwise"}] * 2


def test_weights_that_are_frozen_in_turn():
    def steps(rank: int, divided: bool) -> Outcome:
        parameters = [weight(i, line(2, divided), Shard(0)) for i in range(2)]
        optimizer, gradients = Muon(parameters, lr=0.1), [p.grad for p in parameters]
        for frozen in range(2):
            for i, p in enumerate(parameters):
                p.requires_grad_(i != frozen)
                p.grad = None if i == frozen else gradients[i]
            optimizer.step()
        return outcome(Target(), parameters, optimizer, [])

    found, one = threads(2, steps, True), steps(0, False)
    for name, (T, _) in one.parts.items():
        accept.same_bits(actual=assemble(found, name, T.shape), expected=T)


@pytest.mark.filterwarnings("ignore:Muon has skipped:RuntimeWarning")
def test_a_momentum_that_is_not_finite_on_one_rank_stops_all():
    def spoilt(rank: int) -> dict[str, int]:
        p = weight(0, line(2), Shard(0))
        optimizer = Muon([p], lr=0.1)
        optimizer.step()
        M = optimizer.state[p]["momentum_buffer"].to_local()
        M[0, 0] = float("nan") if rank == 1 else M[0, 0]
        before = M.clone()
        optimizer.step()
        assert torch.equal(M.nan_to_num(7.0), before.nan_to_num(7.0))
        return {reason: int(count) for reason, count in optimizer.skipped.items() if count}

    assert threads(2, spoilt) == [{"gradient": 1}] * 2


@pytest.mark.filterwarnings("ignore:Muon has skipped:RuntimeWarning")
@pytest.mark.parametrize("told", [0, 1])
def test_what_one_rank_is_told_stops_all(told):
    def steps(rank: int) -> dict[str, int]:
        parameters = [weight(i, line(2), Shard(0)) for i in range(2)]
        groups = [{"params": parameters[:1]}, {"params": parameters[1:], "algorithm": "adamw"}]
        optimizer = Muon(groups, lr=0.1, normuon_beta2=0.9)
        optimizer.step()
        before = outcome(Target(), parameters, optimizer, [])
        optimizer.found_inf = torch.tensor(float(rank == told))
        optimizer.step()
        for name, (T, _) in outcome(Target(), parameters, optimizer, []).parts.items():
            accept.same_bits(actual=T, expected=before.parts[name][0])
        return {reason: int(count) for reason, count in optimizer.skipped.items() if count}

    assert threads(2, steps) == [{"found_inf": 1}] * 2


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("across", [False, True], ids=["as the weight", "across"])
def test_convolutions_of_one_dimension(dim, across):
    """Their gradients may have strides of their own."""

    def make(divided: bool) -> list[nn.Parameter]:
        p = weight(0, line(2, divided), Shard(dim), shape=(8, 4, 3))
        if divided and across:
            p.grad = DTensor.from_local(p.grad.to_local().mT.contiguous().mT, p.device_mesh, p.placements)
        return [p]

    accept_one_process(2, make, layout={"blocks": 2, "flatten": True})


def test_autocast_does_not_reach_the_iteration():
    def part(rank: int, cast: bool) -> torch.Tensor:
        p = weight(0, line(2), Shard(1))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            Muon([p], lr=0.1, shard_mode="distributed").step()
        return p.detach().to_local()

    for actual, expected in zip(threads(2, part, True), threads(2, part, False), strict=True):
        accept.same_bits(actual=actual, expected=expected)


def test_a_weight_that_was_frozen_after_its_gradient_is_stepped():
    def make(divided: bool) -> list[nn.Parameter]:
        p, frozen = (weight(seed, line(2, divided), Shard(0)) for seed in range(2))
        return [p, frozen.requires_grad_(False)]

    accept_one_process(2, make)


def test_a_capture_is_refused(monkeypatch):
    def captured(rank: int) -> None:
        optimizer = Muon([weight(0, line(1), Shard(0))])
        optimizer.step()
        (sharded,) = optimizer.plans.values()
        sharded.device = SimpleNamespace(type="cuda")
        told = "a step of parameters that lie on several ranks cannot be captured in a CUDA graph; take it outside"
        with pytest.raises(RuntimeError, match=told):
            optimizer.step()

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    threads(1, captured)


def test_what_travels_does_so_while_others_are_orthogonalized():
    """Both ways; and small rounds are first and last, beside which nothing is orthogonalized."""

    def works(rank: int) -> tuple[list[bool], list[int]]:
        shapes = [(8, 12), (8, 16), (16, 16), (16, 32)]
        optimizer = Muon([weight(i, line(2), Shard(0), shape=shape) for i, shape in enumerate(shapes)])
        optimizer.step()
        (sharded,) = optimizer.plans.values()
        rounds = sharded.parts.rounds
        there = [each.send(torch.zeros(each.held.size))[1] for each in rounds]
        back = [each.give(torch.zeros(each.given.size), torch.zeros(each.held.size)) for each in rounds]
        for work in (*there, *back):
            work.wait()
        return [work is not None for work in (*there, *back)], [each.key.m * each.key.n for each in rounds]

    assert threads(2, works) == [([True] * 8, [96, 256, 512, 128])] * 2


def test_a_step_keeps_no_memory():
    def left(rank: int) -> list[Any]:
        optimizer = Muon([weight(i, line(2), Shard(0)) for i in range(2)])
        optimizer.step()
        (sharded,) = optimizer.plans.values()
        mine = (sharded.gradients, sharded.directions, sharded.returning, sharded.weights)
        return [each for some in (*mine, sharded.parts.buffers, sharded.parts.momenta) for each in some]

    assert threads(2, left) == [[], []]


def test_a_step_keeps_no_gradient():
    def freed(rank: int) -> bool:
        p = weight(0, line(2), Shard(0))
        optimizer, kept = Muon([p]), weakref.ref(p.grad._local_tensor)
        optimizer.step()
        optimizer.zero_grad()
        return kept() is None

    assert threads(2, freed) == [True, True]


def test_a_tall_matrix_is_as_much_work_as_a_wide_one():
    def owned(rank: int) -> int:
        optimizer = Muon([weight(i, line(2), Shard(0), shape=shape) for i, shape in enumerate([(64, 4), *[(4, 64)] * 3])])
        optimizer.step()
        (sharded,) = optimizer.plans.values()
        return sum(len(each.mine) for each in sharded.parts.rounds)

    assert threads(2, owned) == [2, 2]


def test_an_owner_gets_the_parts_of_its_own_replica():
    def sent(rank: int) -> list[bool]:
        mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2))
        optimizer = Muon([weight(i, mesh, Replicate(), Shard(0)) for i in range(4)])
        optimizer.step()
        (sharded,) = optimizer.plans.values()
        return [size > 0 for size in sharded.parts.rounds[0].sent.sizes]

    assert threads(4, sent) == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2
