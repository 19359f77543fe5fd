# SPDX-License-Identifier: Apache-2.0
"""Strike ranks in every way and see what the others do: `python -m conformance.campaign_ranks [--target=module:Name]`.

A gradient is poisoned on every subset of ranks, in every kind of placement; a rank dies before, or is late for, each
collective of two steps, or dies after the last. A fault is answered if all ranks take the same decision and hold the state
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
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from conformance import accept
from conformance.ranks import MESHES, Case, Outcome, Weight, together
from conformance.strategies import HYPER
from conformance.target import Target, Unsupported, load
from conformance.worlds import processes, threads

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


def poisonings() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every mesh with every subset of its ranks, none included."""
    for mesh in POISONED:
        ranks = range(math.prod(MESHES[mesh][0]))
        yield from ((mesh, struck) for n in range(len(ranks) + 1) for struck in itertools.combinations(ranks, n))


def poisoned(target: Target, mesh: str, struck: tuple[int, ...], mode: str = "owned", device: str = "cpu") -> None:
    """Poison a gradient of the second step of three on these ranks; AssertionError unless that step is skipped by all."""
    shape, placements = MESHES[mesh]
    clean = Case(shape, placements, WEIGHTS, replace(HYPER, shard_mode=mode), steps=3)
    if struck:
        without = frozenset((1, rank, i) for rank in range(clean.size) for i in range(len(WEIGHTS)))
        should = replace(clean, missing=without)
    else:
        should = clean
    case = replace(clean, poison=frozenset((1, rank, (rank + len(struck)) % len(WEIGHTS)) for rank in struck))
    found, right = (threads(case.size, together, target, each, device) for each in (case, should))
    for each, other in zip(found, right, strict=True):
        assert accept.equal(each.skipped, {**other.skipped, "gradient": int(bool(struck))}), each.skipped
        for name, (T, _) in other.parts.items():
            accept.same_bits(actual=each.parts[name][0], expected=T)


class Strike(TorchDispatchMode):
    """Has something happen before collective number `point`."""

    def __init__(self, point: int, happens: Callable[[], Any]) -> None:
        super().__init__()
        self.left, self.happens = point, happens

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional"):
            self.left -= 1
            if self.left == -1:
                self.happens()
        return func(*args, **(kwargs or {}))


def struck(rank: int, path: str, device: str, case: Case, victim: int, point: int, delay: float | None) -> Outcome:
    """The case, in which one rank dies, or is late, before its collective number `point`."""
    happens = partial(os._exit, 1) if delay is None else partial(time.sleep, delay)
    with Strike(point, happens) if rank == victim else nullcontext():
        return together(rank, load(path), case, device)


def dead(path: str, folder: Path, point: int, ranks: int = RANKS, device: str = "cpu") -> None:
    """Let a rank die; AssertionError unless the others fail, TimeoutError if one of them hangs."""
    found = processes(ranks, folder, device, struck, path, device, Case((ranks,), ("S0",), WEIGHTS), 1, point, None)
    if any(isinstance(text, str) and "target.Unsupported" in text for text in found):
        raise Unsupported("it does not step these parameters on several ranks")
    assert found[1] is None, f"the rank did not come to its collective number {point}"
    for text in found[:1] + found[2:]:
        # NCCL's watchdog may end a process that does not look at its collectives itself.
        assert (text is None and device == "cuda") or (isinstance(text, str) and "Error" in text), f"a rank went on: {text}"


def late(path: str, folder: Path, point: int, ranks: int = RANKS, device: str = "cpu") -> None:
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
        todo = [(lambda m=m, s=s: poisoned(target, m, s), f"poisoned, {m}: {s}") for m, s in poisonings()]
        todo += [(lambda n=n: dead(path, Path(folder), n), f"rank 1 of {RANKS} dies, collective {n}") for n in range(POINTS)]
        todo += [(lambda n=n: late(path, Path(folder), n), f"rank 0 of {RANKS} is late, collective {n}") for n in range(POINTS)]
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
