# SPDX-License-Identifier: Apache-2.0
"""Batches of matrices orthogonalized by ours and by the others, with the error beside the time."""

import statistics
import traceback
from functools import lru_cache

import pytest
import torch

from benchmarks import accuracy, peers, shapes, timing

CASES = {True: shapes.BATCHES, False: shapes.TINY_BATCHES}
MAKERS = peers.ORTHOGONALIZERS

# A peer's compiler warns about much that is not ours to mend.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.benchmark(timer=timing.clock)]


@lru_cache
def measure(case: str, names: tuple[str, ...], device: torch.device) -> dict[str, tuple[list[float], float] | str]:
    """Milliseconds and error of each implementation, or the traceback of what it raised.

    The error is that of the first matrix: eigenvalues in float64 of all would take longer than all measurements.
    """
    torch.compiler.reset()  # each shape is the first that a peer's compiler sees, as its recompilation is limited
    inputs = timing.input_sets(CASES[device.type == "cuda"][case], device)
    polar = accuracy.polar_factor(inputs[0][0])
    calls, found = {}, {}
    for name in names:
        try:
            orthogonalize = MAKERS[name]()
            O = orthogonalize(inputs[0])
            assert O.shape == inputs[0].shape, f"{name} returned {tuple(O.shape)}"
            found[name] = accuracy.relative_error(O[0], polar)
            calls[name] = lambda i, run=orthogonalize: run(inputs[i % len(inputs)])
            del O
        except Exception:
            found[name] = traceback.format_exc()
    times = timing.interleave(calls, 30 if device.type == "cuda" else 5, device)
    return {name: (times[name], e) if name in calls else e for name, e in found.items()}


def test_orthogonalize(benchmark, case, implementation, together, device):
    times, error = peers.measured(measure(case, together, device)[implementation], implementation, case)
    benchmark.group = case
    timing.replay(benchmark, times)

    batch = CASES[device.type == "cuda"][case]
    steps = 4 if implementation == "ours-4" else 5
    effective = shapes.dense_operations(batch) / (1e-3 * statistics.median(times))
    benchmark.extra_info |= {
        "error": error,
        "effective_tflops": effective / 1e12,
        "of_cublas": effective / timing.product_rate(device),
        "operations_floor_ms": 1e3 * shapes.operations_floor([batch], timing.product_rate(device), steps),
        "bytes_floor_ms": 1e3 * shapes.bytes_floor(shapes.entries(batch), shapes.BYTES_PER_ENTRY, timing.copy_rate(device)),
        "parameters": shapes.entries(batch),
    }
    assert error < accuracy.bound(implementation)
