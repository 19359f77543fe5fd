# SPDX-License-Identifier: Apache-2.0
"""Parameters on several ranks where options change, a round is not enough, or a rank's part lies across: one process's bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

import conformance.ranks
import impl.exchange
import impl.parts
from conformance import accept
from conformance.ranks import Case, Outcome, Weight, accept_as_alone, assemble, begin, construct, outcome, take, weight
from conformance.strategies import HYPER
from conformance.targets.impl import Target
from conformance.worlds import threads
from impl import Layout
from impl.placement import assign, work

WEIGHTS = (Weight((8, 12)), Weight((12, 8)), Weight((9,), None, "adamw"))
# What a group is told before each step, and the last one of the same learning rate.
NEWS = (
    {"lr": 0.1, "weight_decay": 0.5},
    {"momentum": 0.3, "maximize": True, "normuon_beta2": 0.5},
    {"eps": 100.0},
    {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
    {"ns_steps": 4},
    {"shard_mode": "duplicated", "normuon_beta2": 0.4},
    {"layout": Layout(blocks=2)},
    {"lr": torch.tensor(0.05), "ns_coefficients": "polar_express_s4"},
)


def told(rank: int, case: Case, device: str, which: int, alone: bool = False) -> Outcome:
    """The case, with the news, on this rank or in one process."""
    if alone:
        parameters, optimizer = construct(Target(), case, [weight(case, i).to(device) for i in range(len(case.weights))])
    else:
        parameters, optimizer = begin(Target(), case, device)
    for step, news in enumerate(NEWS):
        optimizer.param_groups[which].update(news)
        optimizer.param_groups[-1]["lr"] = optimizer.param_groups[which]["lr"]
        optimizer.grad_scale = torch.tensor(2.0**step, device=device)
        take(case, rank, step, parameters, optimizer, 2.0**step * 1.5)
    return outcome(Target(), parameters, optimizer, [])


@pytest.mark.parametrize(("placement", "which"), [("S0", 0), ("S0", 1), ("R", 0)])
def test_options_that_change_between_steps(device, placement, which):
    case = Case((2,), (placement,), WEIGHTS, replace(HYPER, normuon_beta2=0.9, adamw_lr_ratio=0.3))
    found, one = threads(2, told, case, device.type, which), told(0, case, device.type, which, alone=True)
    for name, (T, _) in one.parts.items():
        accept.same_bits(actual=assemble(found, name, T.shape), expected=T)


def test_a_step_that_is_always_taken(device):
    missing = frozenset([(0, 0, 0), (1, 0, 1), (1, 1, 1)])
    case = Case((2,), ("S0",), WEIGHTS, replace(HYPER, skip_nonfinite=False), missing=missing)
    accept_as_alone(Target(), device, case, bits=True)


@pytest.mark.parametrize("entries", [1, 96, 200, 288])
def test_rounds_hold_all_matrices_and_no_more_at_a_time_than_they_should(monkeypatch, entries):
    """Three of eight matrices of 96 are one rank's; kernels are handed the same rounds, though not by this function."""
    orthogonalize, sizes = impl.parts.orthogonalize, []

    def watched(X, *schedule):
        sizes.append(len(X))
        return orthogonalize(X, *schedule)

    monkeypatch.setattr(impl.parts, "orthogonalize", watched)
    monkeypatch.setattr(impl.exchange, "ROUND", entries)
    case = Case((3,), ("S0",), (Weight((8, 12)),) * 7 + (Weight((12, 8)),))
    accept_as_alone(Target(), torch.device("cpu"), case, bits=True)
    assert sizes and max(sizes) <= max(1, entries // 96)


def test_the_work_is_shared_by_what_it_costs():
    """The last one lies nowhere whole; the others do on two of three ranks, which get 4 + 1 and 3 + 2 to do."""
    assert assign([1, 4, 3, 2, 5], [(0, 1)] * 4 + [()], 3) == [0, 0, 1, 1, 2]
    assert assign([1, 1, 2], [()] * 3, 2) == [1, 1, 0], "the largest first"
    assert work(64, 64) > 20 * work(8, 512), "what is square costs more than what is long"


@pytest.mark.parametrize("placement", ["S0", "S1"])
def test_parts_that_lie_across(device, monkeypatch, placement):
    """A weight that was transposed before it was divided is stepped where it lies."""
    straight = conformance.ranks.spread

    def across(*where):
        D = straight(*where)
        own = D.to_local()
        own = own.mT.contiguous().mT if own.ndim == 2 else own
        return DTensor.from_local(own, D.device_mesh, D.placements, run_check=False, shape=D.shape, stride=D.stride())

    monkeypatch.setattr(conformance.ranks, "spread", across)
    accept_as_alone(Target(), device, Case((2,), (placement,), (Weight((8, 12)), Weight((12, 8), None, "adamw"))), bits=True)


def dumped(rank: int, case: Case, device: str, path: Path) -> None:
    parameters, optimizer = begin(Target(), case, device)
    optimizer.guard.dump = path
    take(case, rank, 0, parameters, optimizer)


@pytest.mark.filterwarnings("ignore:Muon has skipped:RuntimeWarning")
def test_a_rank_dumps_its_own_part_of_what_it_found(device, tmp_path):
    """And those that have found nothing, nothing."""
    threads(3, dumped, Case((3,), ("S0",), WEIGHTS, poison=frozenset([(0, 1, 2)])), device.type, tmp_path / "dump")
    assert [path.name for path in tmp_path.iterdir()] == ["dump.rank1"]
    (found,) = torch.load(tmp_path / "dump.rank1", weights_only=True).items()
    assert found[0] == "w2" and {key: tuple(T.shape) for key, T in found[1].items()} == {
        "gradient": (3,), "exp_avg": (3,), "exp_avg_sq": (3,), "step": ()
    }  # fmt: skip
    assert {type(T) for T in found[1].values()} == {torch.Tensor}


@pytest.mark.filterwarnings("ignore:Muon has skipped:RuntimeWarning")
def test_a_dump_has_every_culprit_also_without_a_gradient(device, tmp_path):
    """Of each weight one rank has a gradient, which is not finite, and one none."""
    weights, missing, poison = (Weight((4, 6)),) * 2, frozenset([(0, 0, 0), (0, 1, 1)]), frozenset([(0, 1, 0), (0, 0, 1)])
    threads(2, dumped, Case((2,), ("S0",), weights, missing=missing, poison=poison), device.type, tmp_path / "dump")
    for rank in range(2):
        found = torch.load(tmp_path / f"dump.rank{rank}", weights_only=True)
        assert [("gradient" in found[f"w{i}"], found[f"w{i}"]["momentum_buffer"].shape) for i in range(2)] == [
            (rank == 1, (2, 6)), (rank == 0, (2, 6))
        ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Muon has skipped:RuntimeWarning")
def test_owners_dump_what_they_could_not_orthogonalize(device, tmp_path):
    with Target().orthogonalizing(float("nan")):
        threads(2, dumped, Case((2,), ("S0",), WEIGHTS), device.type, tmp_path / "dump")
    assert sorted(name for path in tmp_path.iterdir() for name in torch.load(path, weights_only=True)) == ["w0", "w1"]
