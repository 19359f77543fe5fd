# SPDX-License-Identifier: Apache-2.0
"""Whole optimizer steps on the hidden matrices of a model: time, first step, memory, and that the update is the right one."""

import gc
import os
import statistics
import traceback
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from torch import nn

from benchmarks import accuracy, peers, shapes, timing

CASES = {True: shapes.MODELS, False: shapes.TINY_MODELS}
MAKERS = peers.OPTIMIZERS

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.benchmark(timer=timing.clock)]


class First(NamedTuple):
    """What the first steps told."""

    seconds: float
    cache_empty: bool
    error: float
    transient_bytes: int | None


def first_steps(optimizer: torch.optim.Optimizer, W: nn.Parameter, device: torch.device) -> First:
    """One step from zero momentum, whose update is the polar factor of the gradient up to scale, and two more."""
    before = (W.detach()[0] if W.ndim == 3 else W.detach()).clone()
    G = W.grad[0] if W.ndim == 3 else W.grad
    polar = accuracy.polar_factor(G)
    empty = nothing_compiled()
    seconds = timing.seconds(optimizer.step, device)
    after = W.detach()[0] if W.ndim == 3 else W.detach()
    error = accuracy.direction_error(before.double() * (1 - peers.LR * peers.DECAY) - after.double(), polar)
    optimizer.step()
    return First(seconds, empty, error, transient_bytes(optimizer, device))


def nothing_compiled() -> bool:
    """Whether Triton's cache is there and empty."""
    folder = os.environ.get("TRITON_CACHE_DIR", "")
    return os.path.isdir(folder) and not os.listdir(folder)


def transient_bytes(optimizer: torch.optim.Optimizer, device: torch.device) -> int | None:
    """The most that a step holds above what is held before it; None where nobody counts."""
    if device.type != "cuda":
        optimizer.step()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    optimizer.step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@lru_cache
def measure(case: str, names: tuple[str, ...], device: torch.device) -> dict[str, tuple[list[float], First] | str]:
    """Milliseconds of each optimizer's step and what its first steps told, or the traceback of what it raised."""
    gc.collect()  # the optimizers of the last model
    torch.compiler.reset()
    model = CASES[device.type == "cuda"][case]
    calls, found = {}, {}
    for name in names:
        try:
            made = peers.weights(model, device)
            optimizer = MAKERS[name]()(made)
            found[name] = first_steps(optimizer, made[0], device)
            calls[name] = lambda i, step=optimizer.step: step()
        except Exception:
            found[name] = traceback.format_exc()
    times = timing.interleave(calls, 20 if device.type == "cuda" else 3, device)
    return {name: (times[name], first) if name in calls else first for name, first in found.items()}


def test_step(benchmark, case, implementation, together, device):
    times, first = peers.measured(measure(case, together, device)[implementation], implementation, case)
    benchmark.group = case
    timing.replay(benchmark, times)

    model = CASES[device.type == "cuda"][case]
    count = shapes.parameters(model)
    floor = shapes.bytes_floor(count, shapes.BYTES_PER_PARAMETER, timing.copy_rate(device))
    todo = list(shapes.batches(model))
    benchmark.extra_info |= {
        "error": first.error,
        "operations_floor_ms": 1e3 * shapes.operations_floor(todo, timing.product_rate(device)),
        "bytes_floor_ms": 1e3 * floor,
        "of_bytes_floor": 1e3 * floor / statistics.median(times),
        "parameters": count,
        "first_step_s": first.seconds,
        "cache_empty": first.cache_empty,
        "transient_bytes_per_parameter": None if first.transient_bytes is None else first.transient_bytes / count,
    }
    assert first.error < accuracy.bound(implementation)
