# SPDX-License-Identifier: Apache-2.0
"""Times by CUDA events, taken in turns, and the rates of the machine that they are held against.

Every timed call follows a large product, as an optimizer's step follows a backward pass: the GPU is busy while the host
launches, its clock is the sustained one, and its cache holds nothing of ours.
"""

import statistics
import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

Call = Callable[[int], object]
WARM_UP = 3


def interleave(
    calls: dict[str, Call], rounds: int, device: torch.device, lead: Callable[[], object] | None = None
) -> dict[str, list[float]]:
    """Milliseconds of `rounds` calls of each, one of each per round, so that all meet the same clock and temperature.

    A call is given its round, by which it picks its input. The order turns, so that nobody always follows the same one.
    On a GPU each follows `lead`, by default one large product.
    """
    for call in calls.values():
        for i in range(WARM_UP):
            call(i)
    time_call = _event_times(lead or large_product(device)) if device.type == "cuda" else _host_times
    names = list(calls)
    pending = {name: [] for name in names}
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            pending[name].append(time_call(calls[name], i))
    return {name: [read() for read in reads] for name, reads in pending.items()}


def _event_times(lead: Callable[[], object]) -> Callable[[Call, int], Callable[[], float]]:
    """A function that queues a call between two events and returns how to read, later, the milliseconds between them."""

    def queue(call: Call, i: int) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        lead()
        start.record()
        call(i)
        end.record()

        def read() -> float:
            end.synchronize()
            return start.elapsed_time(end)

        return read

    return queue


def _host_times(call: Call, i: int) -> Callable[[], float]:
    start = time.perf_counter()
    call(i)
    milliseconds = 1e3 * (time.perf_counter() - start)
    return lambda: milliseconds


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """One call on the host's clock, with whatever it compiles, until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def input_sets(shape: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """Normal data of fresh seeds, in as many sets as exceed twice the L2 cache, at most 8."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    one = torch.empty(shape, device=device)
    count = min(8, max(1, -(-2 * cache // one.nbytes)))
    generator = torch.Generator(device)
    generator.seed()
    return [torch.randn(shape, generator=generator, device=device) for _ in range(count)]


def _side(device: torch.device) -> int:
    return 8192 if device.type == "cuda" else 256


@lru_cache
def large_product(device: torch.device) -> Callable[[], object]:
    """A float16 product of random matrices, 8192 x 8192; a small one in float32 without a GPU."""
    n = _side(device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    A, B, C = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    return lambda: torch.mm(A, B, out=C)


@lru_cache
def product_rate(device: torch.device) -> float:
    """Operations a second of the vendor's float16 product, 8192 x 8192 on random data, median of 20."""
    product = large_product(device)
    times = interleave({"product": lambda i: product()}, 20, device)["product"]
    return 2 * _side(device) ** 3 / (1e-3 * statistics.median(times))


@lru_cache
def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy on the device, median of 20; 4 GiB where there is a GPU."""
    source = torch.zeros(2**32 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda i: target.copy_(source)}, 20, device)["copy"]
    return 2 * source.nbytes / (1e-3 * statistics.median(times))


_elapsed = [0.0]


def clock() -> float:
    """A timer for pytest-benchmark that moves only as `replay` says."""
    return _elapsed[0]


def replay(benchmark, milliseconds: list[float]) -> None:
    """Hand to pytest-benchmark, whose timer is `clock`, times that were taken together with those of others."""
    times = iter(milliseconds)

    def play() -> None:
        _elapsed[0] += 1e-3 * next(times)

    benchmark.pedantic(play, rounds=len(milliseconds))
