# SPDX-License-Identifier: Apache-2.0
"""The orthogonalization of a batch of matrices by itself, without an optimizer."""

import threading
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from impl.kernels import iteration, places
from impl.kernels.apply import unpack
from impl.kernels.prepare import Source, prepare, renew
from impl.layout import Section
from impl.schedules import Schedule


class Batch(NamedTuple):
    """Everything but the data: the launches, and the memory that they use, which is empty between calls."""

    arena: Tensor
    pointers: Tensor  # says where X is
    flags: Tensor
    outs: list[tuple[slice, Tensor]]  # parts of the result, whose memory they share during a call
    launches: iteration.Launches


@lru_cache(maxsize=16)
def batch(
    shape: torch.Size, dtype: torch.dtype, schedule: Schedule, eps: float, device: torch.device, aligned: bool, caller: tuple
) -> Batch:
    """The launches for `caller`, a thread and a stream, who alone may use them."""
    B, rows, columns = shape
    m, n = min(rows, columns), max(rows, columns)
    chunk = iteration.chunk(B, m, n)
    sizes = [B * iteration.batch_numbers(m, n), chunk * iteration.scratch_numbers(m, n)]
    arena = torch.empty(sum(sizes), dtype=torch.float16, device=device)
    memory, scratch = arena.split(sizes)
    pointers = torch.zeros(places.POINTERS, dtype=torch.int64, device=device)
    flags = torch.zeros(3, B, dtype=torch.int32, device=device)
    O = iteration.batch(memory, B, m, n)
    view = torch.empty(shape, device="meta").view(B, 1, 1, rows, columns)
    aligned = aligned and places.aligned(view, rows)
    table = places.places(0, Section(rows), view, device)
    hyper = torch.zeros(4, dtype=torch.float64, device=device)
    form = (rows, columns, dtype, dtype, rows > columns)
    launches: iteration.Launches = []
    outs = []
    for first in range(0, B, chunk):
        here = slice(first, min(first + chunk, B))
        norms = iteration.norms(here.stop - first, m, device)
        source = Source(table[here], pointers, 1, *form, False, False, aligned, hyper, None)
        out = torch.empty(here.stop - first, rows, columns, dtype=dtype, device=device)
        outs.append((here, out))
        direct = out if iteration.direct(out) else None
        largest, finite, guess = flags[:, here]
        X, each, _ = iteration.iteration(O[here], m, schedule, eps, scratch, *norms, largest, finite, out=direct)
        launches += [*prepare(source, largest, guess, X), *each]
        launches += [] if direct is not None else [unpack(O[here], out)]
    return Batch(arena, pointers, flags, outs, launches)


def orthogonalize(X: Tensor, schedule: Schedule, eps: float) -> Tensor:
    """ORTH on (B, m, n) float32, bfloat16 or float16, on a GPU."""
    X = X.contiguous()
    out = torch.empty_like(X)
    with torch.cuda.device(X.device):
        caller = (threading.get_ident(), torch.cuda.current_stream().cuda_stream)
        # What a capture makes is filled by the graph's replays, so nobody else may find it in the cache.
        make = batch.__wrapped__ if torch.cuda.is_current_stream_capturing() else batch
        these = make(X.shape, X.dtype, schedule, eps, X.device, X.data_ptr() % 16 == 0, caller)
        these.arena.untyped_storage().resize_(2 * these.arena.numel())
        for here, part in these.outs:
            part.set_(out[here])
        places.point(these.pointers, [], [0, 0, X.data_ptr()])
        renew(these.flags)
        for run in these.launches:
            run()
        for _, part in these.outs:
            part.set_()
        these.arena.untyped_storage().resize_(0)
    return out
