# SPDX-License-Identifier: Apache-2.0
"""The orthogonalization of a batch of matrices by itself, without an optimizer."""

import threading
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from impl.kernels import iteration, places, scales
from impl.kernels.apply import unpack
from impl.kernels.prepare import Source, largest, prepare
from impl.layout import Section
from impl.schedules import Schedule


class Batch(NamedTuple):
    """Everything but the data: launches, the memory that they use, empty between calls, and where they look for the data."""

    arena: Tensor
    pointers: Tensor
    flags: Tensor
    launches: iteration.Launches


@lru_cache(maxsize=16)
def batch(
    shape: torch.Size, dtype: torch.dtype, schedule: Schedule, eps: float, device: torch.device, aligned: bool, caller: tuple
) -> Batch:
    """The launches for `caller`, a thread and a stream, who alone may use them."""
    B, rows, columns = shape
    m, n = min(rows, columns), max(rows, columns)
    size, needed = B * iteration.batch_numbers(m, n), B * iteration.scratch_numbers(m, n)
    arena = torch.empty(size + needed, dtype=torch.float16, device=device)
    O, memory = iteration.batch(arena, B, m, n), arena[size:]
    pointers = torch.zeros(places.POINTERS, dtype=torch.int64, device=device)
    flags = torch.zeros(2, B, dtype=torch.int32, device=device)
    ones, shares = torch.ones(scales.ROWS, B, device=device), iteration.shares(B, m, device)
    X, launches, _ = iteration.iteration(O, m, schedule, eps, memory, shares, ones, *flags)
    view = torch.empty(shape, device="meta").view(B, 1, 1, rows, columns)
    aligned = aligned and places.aligned(Section(rows), view)
    table = places.places(0, Section(rows), view, device)
    hyper = torch.zeros(4, dtype=torch.float64, device=device)
    source = Source(table, pointers, 1, rows, columns, dtype, dtype, False, False, aligned, hyper, None)
    before = [largest(source, flags[0]), prepare(source, flags[0], X)]
    return Batch(arena, pointers, flags, [*before, *launches, unpack(O, pointers[0], rows, columns, dtype)])


def orthogonalize(X: Tensor, schedule: Schedule, eps: float) -> Tensor:
    """ORTH on (B, m, n) float32, bfloat16 or float16, on a GPU."""
    X = X.contiguous()
    out = torch.empty_like(X)
    with torch.cuda.device(X.device):
        caller = (threading.get_ident(), torch.cuda.current_stream().cuda_stream)
        these = batch(X.shape, X.dtype, schedule, eps, X.device, X.data_ptr() % 16 == 0, caller)
        these.arena.untyped_storage().resize_(2 * these.arena.numel())
        addresses = [out.data_ptr(), 0, X.data_ptr()]
        places.point(these.pointers, [], addresses)
        these.flags.zero_()
        for run in these.launches:
            run()
        these.arena.untyped_storage().resize_(0)
    return out
