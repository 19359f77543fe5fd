# SPDX-License-Identifier: Apache-2.0
"""Where matrices lie in memory, as tables that kernels read: one launch serves many parameters with any layout.

A row of `places` tells of a matrix: which parameter it is in, the offset of its first entry there, how many rows follow
each other `row_stride` entries apart (a run), and how far apart runs are. `pointers` holds the addresses of all
parameters' weights, then of their momenta, their gradients, and their NorMuon averages; 0 where there is none.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from impl.layout import Section

FIELDS = 5  # in a row of `places`
POINTERS = 8  # written by one launch
TILE = dict(DOWN=32, ACROSS=64)  # of elementwise kernels, for 4 warps: small enough for much to be under way at once


def places(index: int, section: Section, view: Tensor, device: torch.device) -> Tensor:
    """The rows of `places` for the matrices of a section of parameter number `index`.

    Args:
        view: of shape (blocks, columns, groups, rows, n), as from `impl.layout.cut`, with n contiguous; only its shape and
            strides count.

    Returns:
        (B, FIELDS) int64, in the order of `impl.layout.matrices`; made on the device, without waiting for it.
    """
    blocks, columns, groups, rows, _ = view.shape
    by_block, by_column, by_group, by_row, _ = view.stride()
    steps = [(blocks, by_block), (columns, by_column)]
    run, by_run = rows, by_group
    if section.head_dim is not None:
        steps += [(groups, by_group), (rows // section.head_dim, section.head_dim * by_row)]
        run, by_run = section.head_dim, 0
    offsets = torch.full((1,), view.storage_offset(), dtype=torch.int64, device=device)
    for count, stride in steps:
        offsets = (offsets[:, None] + torch.arange(count, device=device) * stride).flatten()
    fields = [torch.full_like(offsets, value) for value in (index, run, by_run, by_row)]
    return torch.stack([fields[0], offsets, *fields[1:]], dim=1)


def aligned(view: Tensor, rows: int) -> bool:
    """Whether a section's matrices have a multiple of 8 rows and columns, and every row begins at a multiple of 8 entries."""
    return all(number % 8 == 0 for number in (rows, view.shape[-1], *view.stride()[:-1]))  # its offset is a sum of strides


def programs(batch: int, rows: int, columns: int, DOWN: int, ACROSS: int) -> int:
    """One for each tile of each matrix."""
    return batch * -(-rows // DOWN) * -(-columns // ACROSS)


@triton.jit(do_not_specialize=["at", "p0", "p1", "p2", "p3", "p4", "p5", "p6", "p7"])
def point_kernel(
    pointers, at,
    p0: tl.int64, p1: tl.int64, p2: tl.int64, p3: tl.int64, p4: tl.int64, p5: tl.int64, p6: tl.int64, p7: tl.int64,
):  # fmt: skip
    """Write eight addresses."""
    tl.store(pointers + at, p0)
    tl.store(pointers + at + 1, p1)
    tl.store(pointers + at + 2, p2)
    tl.store(pointers + at + 3, p3)
    tl.store(pointers + at + 4, p4)
    tl.store(pointers + at + 5, p5)
    tl.store(pointers + at + 6, p6)
    tl.store(pointers + at + 7, p7)


def point(pointers: Tensor, old: Sequence[int], new: Sequence[int]) -> None:
    """Let `pointers`, which holds the addresses `old`, hold `new`.

    As arguments of a kernel they need no copy from the host's memory, and a CUDA graph keeps them. The length of
    `pointers` is a multiple of POINTERS.
    """
    for at in range(0, len(new), POINTERS):
        block = list(new[at : at + POINTERS])
        if block != list(old[at : at + POINTERS]):
            point_kernel[(1,)](pointers, at, *block, *[0] * (POINTERS - len(block)), num_warps=1)


@triton.jit
def rows_of(places, matrix, r, ALIGNED: tl.constexpr):
    """Where, within its parameter, the rows r of a matrix begin."""
    place = places + matrix.to(tl.int64) * 5
    run = tl.load(place + 2).to(tl.int32)
    rows = tl.load(place + 1) + (r // run) * tl.load(place + 3) + (r % run) * tl.load(place + 4)
    if ALIGNED:
        rows = tl.multiple_of(rows, 8)
    return rows


@triton.jit
def array(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The array at an address from `pointers`."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def tile_of(program, rows, columns, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    """The matrix that a program works on, and its tile's rows and columns."""
    across = tl.cdiv(columns, ACROSS)
    tiles = tl.cdiv(rows, DOWN) * across
    t = program % tiles
    return program // tiles, t // across * DOWN + tl.arange(0, DOWN), t % across * ACROSS + tl.arange(0, ACROSS)


@triton.jit
def eights(x):
    """x, a multiple of 8, in a form that tells so to the compiler, which forgets tl.multiple_of of an argument."""
    return x // 8 * 8


@triton.jit
def within(r, c, rows, columns, ALIGNED: tl.constexpr):
    """Which entries of a tile exist."""
    if ALIGNED:
        rows = eights(rows)
        columns = eights(columns)
    return (r < rows)[:, None] & (c < columns)[None, :]
