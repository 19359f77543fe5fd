# SPDX-License-Identifier: Apache-2.0
"""Strike ranks in every way and see what the others do: `python -m conformance.campaign_ranks [--target=module:Name]`.

A gradient is poisoned on every subset of ranks, in every kind of placement; a rank dies before, or is late for, each of the
first ten collectives of two steps. A fault is answered if all ranks take the same decision and hold the state
that SPEC.md's DIST asks for, or, where a rank has died, if each of the others ends with an error in time.
"""

import argparse
import itertools
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from conformance import accept
from conformance.ranks import MESHES, Case, Outcome, Weight, together
from conformance.strategies import HYPER
from conformance.target import Target, load
from conformance.worlds import Log, processes, threads

WEIGHTS = (Weight((8, 12)), Weight((12, 8), None, "adamw"), Weight((6, 6)))
POISONED = (
    "2 by rows",
    "3 by columns",
    "4 by rows",
    "4 copies",
    "4 replicas",
    "2x2 by rows, copied",
    "2x2 by rows and columns",
)
RANKS = 3
POINTS = 10


def subsets(mesh: str) -> list[tuple[int, ...]]:
    """Every subset of a mesh's ranks, none of them included."""
    ranks = range(math.prod(MESHES[mesh][0]))
    return [struck for n in range(len(ranks) + 1) for struck in itertools.combinations(ranks, n)]


@lru_cache
def unharmed(target: Target, mesh: str, mode: str, device: str, skipped: bool) -> tuple[Case, list[Outcome]]:
    """Three steps on a mesh without a fault, or without the second step, and what becomes of its ranks."""
    shape, placements = MESHES[mesh]
    case = Case(shape, placements, WEIGHTS, replace(HYPER, shard_mode=mode), steps=3)
    if skipped:
        case = replace(case, missing=frozenset((1, rank, i) for rank in range(case.size) for i in range(len(WEIGHTS))))
    return case, threads(case.size, together, target, case, device)


def accept_poisoned(target: Target, mesh: str, struck: tuple[int, ...], mode: str = "owned", device: str = "cpu") -> None:
    """Poison a gradient of the second step of three on these ranks; AssertionError unless that step is skipped by all."""
    case, right = unharmed(target, mesh, mode, device, bool(struck))
    poison = frozenset((1, rank, (rank + len(struck)) % len(WEIGHTS)) for rank in struck)
    found = threads(case.size, together, target, replace(case, missing=frozenset(), poison=poison), device)
    for each, other in zip(found, right, strict=True):
        assert accept.equal(each.skipped, {**other.skipped, "gradient": int(bool(struck))}), each.skipped
        for name, (T, _) in other.parts.items():
            accept.same_bits(actual=each.parts[name][0], expected=T)


class Strike(Log):
    """Has something happen before collective number `point`."""

    def __init__(self, point: int, happens: Callable[[], Any]) -> None:
        super().__init__()
        self.point, self.happens = point, happens

    def collective(self, name: str, size: int) -> None:
        if len(self.found) == self.point:
            self.happens()
        super().collective(name, size)


def struck(rank: int, path: str, device: str, case: Case, victim: int, point: int, delay: float | None) -> Outcome:
    """The case, in which one rank dies, or is late, before its collective number `point`."""
    happens = partial(os._exit, 1) if delay is None else partial(time.sleep, delay)
    with Strike(point, happens) if rank == victim else nullcontext():
        return together(rank, load(path), case, device)


def accept_dead(path: str, folder: Path, point: int, ranks: int = RANKS, device: str = "cpu") -> None:
    """Let a rank die; AssertionError unless the others fail, TimeoutError if one of them hangs."""
    found = processes(ranks, folder, device, struck, path, device, Case((ranks,), ("S0",), WEIGHTS), 1, point, None)
    assert found[1] is None, f"the rank did not come to its collective number {point}"
    for text in found[:1] + found[2:]:
        # NCCL's watchdog may end a process that does not look at its collectives itself.
        assert (text is None and device == "cuda") or (isinstance(text, str) and "Error" in text), f"a rank went on: {text}"


def accept_late(path: str, folder: Path, point: int, ranks: int = RANKS, device: str = "cpu") -> None:
    """Let a rank be late; AssertionError unless nothing comes of it."""
    case = Case((ranks,), ("S0",), WEIGHTS)
    found = processes(ranks, folder, device, struck, path, device, case, 0, point, 0.3)
    for each, other in zip(found, threads(ranks, together, load(path), case, device), strict=True):
        for name, (T, _) in other.parts.items():
            accept.same_bits(actual=each.parts[name][0], expected=T)


def campaign(path: str) -> tuple[int, int, int]:
    """How many faults were injected, how many were answered, and how many left a rank hanging."""
    target, answers = load(path), []
    with tempfile.TemporaryDirectory() as folder:
        todo = [(partial(accept_poisoned, target, m, s), f"poisoned, {m}: {s}") for m in POISONED for s in subsets(m)]
        for accept_it, what in ((accept_dead, "rank 1 dies before"), (accept_late, "rank 0 is late for")):
            todo += [(partial(accept_it, path, Path(folder), n), f"{what} collective {n}") for n in range(POINTS)]
        for done, (fault, name) in enumerate(todo):
            try:
                fault()
                answers.append("answered")
            except TimeoutError as error:
                answers.append("hung")
                sys.stdout.write(f"{name}: {error}\n")
            except AssertionError as error:
                answers.append("wrong")
                sys.stdout.write(f"{name}: {error}\n")
            if sys.stderr.isatty():
                sys.stderr.write(f"\r{done + 1} of {len(todo)}")
    return len(answers), answers.count("answered"), answers.count("hung")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="conformance.targets.impl:Target")
    warnings.simplefilter("ignore", RuntimeWarning)  # of steps that are skipped
    torch.set_num_threads(1)
    injected, answered, hung = campaign(parser.parse_args().target)
    sys.stdout.write(f"injected, agreed or failed cleanly, hung = {injected}, {answered}, {hung}\n")
    return 0 if answered == injected else 1


if __name__ == "__main__":
    sys.exit(main())
