# SPDX-License-Identifier: Apache-2.0
"""Parameters on several ranks, stepped by kernels: the bits of one process that steps them by kernels; see conftest.py."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

import impl.batches
import impl.sharded
from conformance import accept
from conformance.ranks import (
    Case,
    Outcome,
    Weight,
    alone,
    assemble,
    begin,
    construct,
    give,
    outcome,
    spread,
    take,
    together,
    weight,
)
from conformance.strategies import FUSED, HYPER
from conformance.targets.impl import Target
from conformance.worlds import processes, threads
from tests.poison import INTERPRETED

pytestmark = pytest.mark.filterwarnings("ignore:Muon has skipped:RuntimeWarning")
STEPS = 1 if INTERPRETED else 5
SHORT = replace(HYPER, steps=STEPS)
NORMUON = replace(SHORT, normuon_beta2=0.9)
PLAIN = tuple(map(Weight, [(24, 40), (40, 24), (16, 16), (7, 9), (1, 9), (9, 1)]))
EXPERTS = tuple(Weight(*FUSED[name]) for name in ("experts in three dimensions", "gated delta net", "heads in groups"))
CASES = {
    "by rows": Case((2,), ("S0",), PLAIN, SHORT),
    "by columns": Case((2,), ("S1",), PLAIN, NORMUON),
    "copies": Case((2,), ("R",), PLAIN[:4], NORMUON),
    "replicas": Case((2,), (), PLAIN[:3], replace(SHORT, eps=2.0)),  # more than the norm of the last
    "layouts": Case((2,), ("S0",), EXPERTS, NORMUON),
    "bfloat16": Case((2,), ("S0",), PLAIN[:3], SHORT, torch.bfloat16),
    # Rows of 12 bfloat16 of which a matrix has 8: nothing begins at a multiple of 16 bytes but the first.
    "blocks of columns": Case((2,), ("S1",), (Weight((24, 24), {"columns": 3}),), SHORT, torch.bfloat16),
    "missing": Case((2,), ("S0",), PLAIN[:3], NORMUON, missing=frozenset([(0, 0, 0), (1, 0, 1), (1, 1, 1), (0, 1, 2)])),
    "poisoned": Case((2,), ("S0",), PLAIN[:3], NORMUON, steps=3, poison=frozenset([(1, 0, 1)])),
    "duplicated": Case((2,), ("S0",), (*PLAIN[:3], PLAIN[0]), replace(NORMUON, shard_mode="duplicated")),
    "hybrid": Case((2, 2), ("R", "S0"), PLAIN[:4], NORMUON),
    "tensor parallel": Case((2, 2), ("F0", "S0"), (*PLAIN[:3], EXPERTS[1]), NORMUON),
    "in turn": Case((2,), (), (Weight((6, 10)),) * 8, SHORT, steps=1),
    "beside AdamW": Case((2,), ("S0",), (*PLAIN[2:4], Weight((9,), None, "adamw")), SHORT, steps=1),
    "more experts than ranks": Case((4,), ("S0",), (Weight((5 * 6, 10), {"blocks": 5}),), SHORT),
}


def interpret() -> None:
    """Use the kernels where there is no GPU, and answer without one what they ask of it."""
    here, stream = mock.Mock(side_effect=lambda device: nullcontext()), SimpleNamespace(cuda_stream=0)
    answers = {"current_stream": mock.Mock(return_value=stream), "is_current_stream_capturing": mock.Mock(return_value=False)}
    mock.patch.multiple(torch.cuda, device=here, **answers).start()
    for module in (impl.sharded, impl.batches):
        mock.patch.object(module, "usable", return_value=True).start()


def walk(rank: int, device: str, size: int) -> dict[str, Outcome]:
    if INTERPRETED:
        interpret()
    cases = [(name, in_turn if name == "in turn" else together, case) for name, case in CASES.items() if case.size == size]
    return {name: step(rank, Target(), case, device) for name, step, case in cases}


def in_turn(rank: int, target: Target, case: Case, device: str) -> Outcome:
    """Two of the case's matrices are divided by rows, then two by columns, and so on."""
    mesh = DeviceMesh(device, [0, 1], mesh_dim_names=("a",))
    values = [spread(weight(case, i), mesh, [Shard(i // 2 % 2)]) for i in range(len(case.weights))]
    parameters, optimizer = construct(target, case, values)
    take(case, rank, 0, parameters, optimizer)
    return outcome(target, parameters, optimizer, [])


@pytest.fixture(scope="module")
def walked(device, tmp_path_factory) -> dict[int, list[dict[str, Outcome]]]:
    """What became of each rank, by their number: processes, or threads where they have to share a GPU."""
    found, folder = {}, Path(tmp_path_factory.mktemp("ranks"))
    for size in sorted({case.size for case in CASES.values()}):
        if device.type == "cuda" and torch.cuda.device_count() < size:
            found[size] = threads(size, walk, "cuda", size)
        else:
            found[size] = processes(size, folder, device.type, walk, device.type, size)
        assert not (failed := [text for text in found[size] if not isinstance(text, dict)]), "\n".join(map(str, failed))
    return found


@pytest.mark.parametrize("name", CASES)
def test_ranks_have_the_bits_of_one_process(device, walked, name, monkeypatch):
    monkeypatch.setattr(impl.batches, "usable", lambda device: True)
    one, here = alone(Target(), CASES[name], device), [each[name] for each in walked[CASES[name].size]]
    assert [each.skipped for each in here] == [one.skipped] * len(here)
    for key, (T, _) in one.parts.items():
        accept.same_bits(actual=assemble(here, key, T.shape), expected=T)


CHANGING = Case((1,), ("S0",), (Weight((7, 9)), Weight((9, 7))), SHORT, missing=frozenset([(3, 0, 1)]))


def changed(rank: int, device: str, one: bool) -> Outcome:
    """Steps of CHANGING, by the sharded plan or by one process's: where scale, an option and gradients change."""
    if one:
        parameters, optimizer = construct(Target(), CHANGING, [weight(CHANGING, i).to(device) for i in range(2)])
    else:
        parameters, optimizer = begin(Target(), CHANGING, device)
    changes = [
        (None, "original"),
        (4.0, "original"),
        (4.0, "match_rms_adamw"),
        (2.0, "match_rms_adamw"),
        (8.0, "match_rms_adamw"),
    ]
    for step, (scale, function) in enumerate(changes):
        optimizer.grad_scale = None if scale is None else torch.tensor(scale, device=device)
        for group in optimizer.param_groups:
            group["adjust_lr_fn"] = function
        give(CHANGING, rank, step, parameters, scale or 1.0)
        optimizer.step()
    return outcome(Target(), parameters, optimizer, [])


def test_what_changes_between_steps(device, monkeypatch):
    """Gradients come in the same memory in every step, as an allocator may have it."""
    monkeypatch.setattr(impl.batches, "usable", lambda device: True)
    monkeypatch.setattr(impl.sharded, "usable", lambda device: True)
    straight, memory = impl.sharded.Sharded._gradient, {}

    def same_place(self, p):
        G = straight(self, p)
        return memory.setdefault(p, torch.empty_like(G)).copy_(G)

    monkeypatch.setattr(impl.sharded.Sharded, "_gradient", same_place)
    one, here = changed(0, device.type, True), threads(1, changed, device.type, False)
    for key, (T, _) in one.parts.items():
        accept.same_bits(actual=assemble(here, key, T.shape), expected=T)


def test_launches_are_made_again_where_a_gradient_lies_elsewhere(device, monkeypatch):
    """At a multiple of 16 bytes, then not."""
    monkeypatch.setattr(impl.sharded, "usable", lambda device: True)
    straight, offset = impl.sharded.Sharded._gradient, []

    def misplaced(self, p):
        G = straight(self, p)
        return G.new_empty(G.numel() + 8)[offset[-1] :][: G.numel()].view(G.shape).copy_(G)

    def built(rank: int) -> list[bool]:
        case, kept = replace(CHANGING, weights=(Weight((8, 16)), Weight((16, 8)))), []
        parameters, optimizer = begin(Target(), case, device.type)
        for step in range(3):
            offset.append(step % 2)
            give(case, rank, step, parameters)
            optimizer.step()
            kept.extend(sharded.plan.operands for sharded in optimizer.plans.values())
        return [a is b for a, b in pairwise(kept)]

    monkeypatch.setattr(impl.sharded.Sharded, "_gradient", misplaced)
    assert threads(1, built) == [[False, False]]


def test_kernels_run_on_their_own_device(device, monkeypatch):
    monkeypatch.setattr(impl.sharded, "usable", lambda device: True)
    inside, ran = [], []

    class On:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            inside.append(self.device)

        def __exit__(self, *error):
            inside.pop()

    def watched(run):
        return lambda: ran.append(list(inside)) or run()

    def steps(rank: int) -> torch.device:
        parameters, optimizer = begin(Target(), CHANGING, device.type)
        take(CHANGING, rank, 0, parameters, optimizer)
        (sharded,) = optimizer.plans.values()
        plan = sharded.plan
        plan.prepares = [tuple(map(watched, each)) for each in plan.prepares]
        plan.applies = [watched(run) for run in plan.applies]
        for owned in plan.owned:
            owned.launches = [watched(run) for run in owned.launches]
        monkeypatch.setattr(torch.cuda, "device", On)
        take(CHANGING, rank, 1, parameters, optimizer)
        return plan.device

    (own,) = threads(1, steps)
    assert len(ran) > 4 and all(each == [own] for each in ran)


def beside(rank: int, device: str) -> Outcome:
    """A step of CHANGING, whose first matrix no kernel steps."""
    parameters, optimizer = begin(Target(), CHANGING, device)
    optimizer.param_groups[0]["shard_mode"] = "distributed"
    take(CHANGING, rank, 0, parameters, optimizer)
    return outcome(Target(), parameters, optimizer, [])


def test_kernels_beside_matrices_that_they_do_not_step(device, monkeypatch):
    monkeypatch.setattr(impl.batches, "usable", lambda device: True)
    monkeypatch.setattr(impl.sharded, "usable", lambda device: True)
    one, here = alone(Target(), replace(CHANGING, steps=1), device), threads(1, beside, device.type)
    for key in ("w1", "w1.momentum_buffer"):
        accept.same_bits(actual=assemble(here, key, one.parts[key][0].shape), expected=one.parts[key][0])


def test_kernels_leave_float64_alone(device, monkeypatch):
    monkeypatch.setattr(impl.sharded, "usable", lambda device: True)
    case = replace(CHANGING, steps=1, dtype=torch.float64)
    one, here = alone(Target(), case, device), threads(1, together, Target(), case, device.type)
    for key, (T, _) in one.parts.items():
        accept.same_bits(actual=assemble(here, key, T.shape), expected=T)


def dumped(rank: int, device: str, path: Path) -> None:
    case = replace(CHANGING, weights=(Weight((8, 9), {"blocks": 2}), Weight((9, 7))))
    parameters, optimizer = begin(Target(), case, device)
    optimizer.guard.dump = path
    give(case, rank, 0, parameters)
    parameters[1].grad.to_local()[2, 3] = float("nan")
    optimizer.step()


def test_the_culprit_is_known(device, tmp_path, monkeypatch):
    monkeypatch.setattr(impl.sharded, "usable", lambda device: True)
    threads(1, dumped, device.type, tmp_path / "dump")
    (path,) = tmp_path.iterdir()
    found = torch.load(path, weights_only=True)
    assert list(found) == ["w1"] and int(found["w1"]["gradient"].isnan().sum()) == 1


def updated(rank: int, device: str, one: bool, change: Callable[[Any, int], None], case: Case = CHANGING) -> Outcome:
    """Steps of a case of two weights, by the sharded plan or by one process's, with a change before each."""
    if one:
        parameters, optimizer = construct(Target(), case, [weight(case, i).to(device) for i in range(2)])
    else:
        parameters, optimizer = begin(Target(), case, device)
    for step in range(2):
        give(case, rank, step, parameters)
        change(optimizer, step)
        optimizer.step()
    return outcome(Target(), parameters, optimizer, [])


def of_groups(optimizer: Any, step: int) -> None:
    first, second = optimizer.param_groups
    first.update(lr=0.1, weight_decay=0.3)
    second.update(maximize=True, momentum=0.5)


def nesterov(optimizer: Any, step: int) -> None:
    optimizer.param_groups[1]["nesterov"] = step == 0


def eps(optimizer: Any, step: int) -> None:
    optimizer.param_groups[0]["eps"] = 10.0


def told_once(optimizer: Any, step: int) -> None:
    optimizer.guard.skip_nonfinite = False
    optimizer.found_inf = torch.ones((), device=optimizer.param_groups[0]["params"][0].device) if step == 0 else None


ALIKE = replace(CHANGING, weights=(Weight((7, 9)), Weight((7, 9))))  # so that one launch could step both


@pytest.mark.parametrize(
    ("change", "case"),
    [(of_groups, ALIKE), (nesterov, ALIKE), (eps, CHANGING), (told_once, CHANGING)],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_a_step_is_told(device, monkeypatch, change, case):
    monkeypatch.setattr(impl.batches, "usable", lambda device: True)
    monkeypatch.setattr(impl.sharded, "usable", lambda device: True)
    one, here = updated(0, device.type, True, change, case), threads(1, updated, device.type, False, change, case)
    for key, (T, _) in one.parts.items():
        accept.same_bits(actual=assemble(here, key, T.shape), expected=T)


def failed(rank: int, device: str, case: Case, path: Path) -> Outcome:
    parameters, optimizer = begin(Target(), case, device)
    optimizer.guard.dump = path
    take(case, rank, 0, parameters, optimizer)
    return outcome(Target(), parameters, optimizer, [])


@pytest.mark.parametrize("which", [0, 1])
def test_a_failed_orthogonalization_leaves_the_weights(device, tmp_path, monkeypatch, which):
    """Of the matrices of either round; the culprit is known."""
    monkeypatch.setattr(impl.sharded, "usable", lambda device: True)
    straight, rounds = impl.operands.orthogonalize, []

    def fails(launches: Any, Q: torch.Tensor) -> None:
        straight(launches[:-1], Q)
        Q[:, 0, 0] = float("nan") if len(rounds) == which else Q[:, 0, 0]
        rounds.append(launches[-1]())

    monkeypatch.setattr(impl.operands, "orthogonalize", fails)
    case = replace(CHANGING, weights=(Weight((7, 9)), Weight((11, 13))))
    (here,) = threads(1, failed, device.type, case, tmp_path / "dump")
    assert here.skipped == {"gradient": 0, "orthogonalization": 1, "found_inf": 0} and len(rounds) == 2
    (path,) = tmp_path.iterdir()
    assert len(torch.load(path, weights_only=True)) == 1
    for i in range(2):
        accept.same_bits(actual=here.parts[f"w{i}"][0], expected=weight(case, i))
        assert here.parts[f"w{i}.momentum_buffer"][0].any()


def kept(rank: int, device: str) -> list[Any]:
    parameters, optimizer = begin(Target(), CHANGING, device)
    take(CHANGING, rank, 0, parameters, optimizer)
    (sharded,) = optimizer.plans.values()
    return [sharded.plan.arena.untyped_storage().size(), *sharded.plan.gradients]


def test_memory_between_steps(device, monkeypatch):
    monkeypatch.setattr(impl.sharded, "usable", lambda device: True)
    assert threads(1, kept, device.type) == [[0]]
