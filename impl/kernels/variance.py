# SPDX-License-Identifier: Apache-2.0
"""NorMuon: what each row of an orthogonalized matrix is to be multiplied with.   [SPEC: VAR-1]"""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from impl.kernels.apply import update
from impl.kernels.launch import launch, tiles
from impl.kernels.places import eights, rows_of, tile_of, within
from impl.stages import VARIANCE_FLOOR

BLOCK, SIDE = 1024, 64


@triton.jit(do_not_specialize=["rows", "columns", "height", "stride"])
def squares_kernel(O, squares, rows, columns, height, stride, SIDE: tl.constexpr, TALL: tl.constexpr):
    """The sums of squares of SIDE rows of a matrix."""
    matrix, r, _ = tile_of(tl.program_id(0), rows, 1, SIDE, 1)
    stride = eights(stride)
    O += matrix.to(tl.int64) * height * stride
    total = tl.zeros((SIDE,), tl.float32)
    for start in range(0, columns, SIDE):
        c = start + tl.arange(0, SIDE)
        D = update(O, height, stride, r, c, within(r, c, rows, columns, False), TALL)
        total += tl.sum(D * D, 1)
    tl.store(squares + matrix.to(tl.int64) * rows + r, total, mask=r < rows)


@triton.jit(do_not_specialize=["parameters", "rows", "columns"])
def variance_kernel(
    places, pointers, code, squares, row_scale, beta, rest, floor, parameters, rows, columns, BLOCK: tl.constexpr
):  # fmt: skip
    """All rows of one matrix, twice: new averages and the norms, then the factors."""
    if tl.load(code) == 0:
        matrix = tl.program_id(0)
        index = tl.load(places + matrix.to(tl.int64) * 5)
        V = tl.load(pointers + 3 * parameters + index).to(tl.pointer_type(tl.float32))
        present = tl.where(tl.load(pointers + 2 * parameters + index) != 0, rows, 0)
        first = matrix.to(tl.int64) * rows
        before = tl.zeros((BLOCK,), tl.float32)
        after = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, rows, BLOCK):
            r = start + tl.arange(0, BLOCK)
            inside = r < present
            at = rows_of(places, matrix, r, False)
            square = tl.load(squares + first + r, mask=inside, other=0.0)
            v = tl.load(V + at, mask=inside, other=0.0) * beta + square / columns * rest
            tl.store(V + at, v, mask=inside)
            factor = tl.div_rn(tl.full((BLOCK,), 1.0, tl.float32), tl.sqrt_rn(v) + floor)
            tl.store(row_scale + first + r, factor, mask=inside)
            before += square
            after += square * factor * factor
        size = tl.sum(after, 0)
        kept = tl.where(size == 0.0, 0.0, tl.sqrt_rn(tl.div_rn(tl.sum(before, 0), size)))
        tl.debug_barrier()
        for start in range(0, rows, BLOCK):
            r = start + tl.arange(0, BLOCK)
            inside = r < present
            tl.store(row_scale + first + r, tl.load(row_scale + first + r, mask=inside, other=0.0) * kept, mask=inside)


def variance(
    O: Tensor, rows: int, columns: int, places: Tensor, pointers: Tensor, parameters: int, code: Tensor, beta2: float,
    squares: Tensor, row_scale: Tensor,
) -> list[Callable[[], None]]:  # fmt: skip
    """Launches that bring the averages up to date and leave in `row_scale` what rows are to be multiplied with.

    Args:
        O: (B, m, n) float16 as in `apply`.
        places: of V, whose matrices are (rows, 1).
        squares, row_scale: (B, rows) float32, to be written.
    """
    shape = dict(rows=rows, columns=columns)
    first = dict(O=O, squares=squares, **shape, height=O.shape[1], stride=O.stride(1), SIDE=SIDE, TALL=rows > columns)
    second = dict(
        places=places, pointers=pointers, code=code, squares=squares, row_scale=row_scale, beta=beta2, rest=1 - beta2,
        floor=VARIANCE_FLOOR, parameters=parameters, **shape, BLOCK=BLOCK,
    )  # fmt: skip
    return [
        launch(squares_kernel, len(O) * tiles(rows, SIDE), first, num_warps=8),
        launch(variance_kernel, len(O), second, num_warps=8, enable_fp_fusion=False),
    ]
