# SPDX-License-Identifier: Apache-2.0
"""SKIP-8: all ranks decide alike, in real processes.

The four processes are started once. In groups of 1 to 4 ranks every subset of ranks is struck in every way; each rank
writes down what became of its weights, its momentum and its counters, and the parent compares.
"""

import itertools
import warnings
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from conformance import accept
from conformance.steps import parameters, take
from conformance.strategies import HYPER, tensor
from conformance.target import Target, Unsupported, load

WORLD = 4
PATIENCE = timedelta(seconds=30)  # with a rank that does not take part
NAN = float("nan")
# The later one in this order outweighs the earlier.
REASONS = ("orthogonalization", "gradient", "found_inf")


def cases(size: int) -> list[tuple[str | None, ...]]:
    """What strikes each of `size` ranks: every subset by each reason, and pairs of reasons."""
    subsets = [
        tuple(reason if rank in struck else None for rank in range(size))
        for reason in REASONS
        for count in range(size + 1)
        for struck in itertools.combinations(range(size), count)
    ]
    mixed = [(a, b, *[None] * (size - 2)) for a, b in itertools.permutations(REASONS, 2)] if size > 1 else []
    return subsets + mixed


def outcome(target: Target, group: Any, rank: int, case: tuple[str | None, ...], missing: int | None) -> dict[str, Any]:
    """One step of this rank; a rank `missing` has no gradients in it."""
    struck = case[rank]
    named = parameters([tensor((4, 6), rank), tensor((5, 3), 10 + rank)])
    optimizer = target.optimizer(named, HYPER, group)
    optimizer.found_inf = torch.tensor(float(struck == "found_inf"))
    before = [p.detach().clone() for _, p in named]
    G = torch.full((4, 6), NAN) if struck == "gradient" else tensor((4, 6), 20 + rank)
    with (
        target.orthogonalizing(NAN if struck == "orthogonalization" else None),
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        take(optimizer, named, [None, None] if missing == rank else [G, tensor((5, 3), 30 + rank)])
        optimizer.state_dict()
    return {
        "moved": any(not torch.equal(p, old) for (_, p), old in zip(named, before, strict=True)),
        "averaged": any(bool(state["momentum_buffer"].any()) for state in optimizer.state.values()),
        "skipped": [reason for reason, count in target.skipped(optimizer).items() if count],
        "bytes": [call.args[0].nbytes for call in reduce.call_args_list],
        "warned": sum("skipped" in str(w.message) for w in caught),
    }


def process(rank: int, path: str, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", PATIENCE, rank=rank, world_size=WORLD)
    target, results = load(path), {}
    for size in range(1, WORLD + 1):
        group = dist.new_group(list(range(size)), PATIENCE)
        if rank < size:
            for case, missing in itertools.product(cases(size), (None, size - 1)):
                results[case, missing] = outcome(target, group, rank, case, missing)
    torch.save(results, f"{store}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(target: Target, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    if not target.skips or target.name == "reference":
        raise Unsupported("it cannot skip a step on several ranks")
    store = str(tmp_path_factory.mktemp("ranks") / "store")
    mp.spawn(process, (request.config.getoption("--target"), store), nprocs=WORLD)  # type: ignore[attr-defined]
    return [torch.load(f"{store}.{rank}", weights_only=True) for rank in range(WORLD)]


def strikes(case: tuple[str | None, ...], missing: int | None) -> list[str]:
    """What happens at all: a rank without gradients orthogonalizes nothing and has none that are not finite."""
    return [reason for rank, reason in enumerate(case) if reason and (rank != missing or reason == "found_inf")]


@pytest.mark.clause("SKIP-8")
@pytest.mark.parametrize("missing", [False, True], ids=["all gradients", "a rank without gradients"])
@pytest.mark.parametrize("size", range(1, WORLD + 1))
def test_all_ranks_take_the_same_decision(results, size, missing):
    absent = size - 1 if missing else None
    for case in cases(size):
        reasons = strikes(case, absent)
        decision = max(reasons, key=REASONS.index, default=None)
        for rank in range(size):
            found = results[rank][case, absent]
            present = rank != absent
            assert found["skipped"] == ([decision] if decision else []), (case, rank)
            assert found["moved"] == (decision is None and present), (case, rank)
            assert found["averaged"] == (decision in (None, "orthogonalization") and present), (case, rank)


@pytest.mark.clause("SKIP-8")
@pytest.mark.parametrize("size", range(1, WORLD + 1))
def test_a_step_sends_one_byte_once(results, size):
    for case, missing in itertools.product(cases(size), (None, size - 1)):
        for rank in range(size):
            assert accept.equal(results[rank][case, missing]["bytes"], [1])


@pytest.mark.clause("SKIP-5", "SKIP-8")
def test_the_first_rank_warns_for_all(results):
    for case in cases(WORLD):
        decision = max(strikes(case, None), key=REASONS.index, default=None)
        heard = [results[rank][case, None]["warned"] for rank in range(WORLD)]
        assert heard == [int(decision in ("gradient", "orthogonalization")), *[0] * (WORLD - 1)], case
