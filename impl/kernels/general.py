# SPDX-License-Identifier: Apache-2.0
"""The product of a square and a wide matrix, D = alpha A X: float16 in and out, float32 sums."""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from impl.kernels.launch import describe, launch, processors, tiles, tiles_for


@triton.jit(do_not_specialize=["batch", "m", "n"])
def general_kernel(
    a, x, d, alphas, largest, batch, m, n,
    LARGEST: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One program computes every `num_programs`-th tile, matrix by matrix and down the columns."""
    down = m // ROWS
    tiles = down * tl.cdiv(n, COLUMNS)
    # Flattened, so that the next tile's loads are under way while this one is stored.
    for tile in tl.range(tl.program_id(0), batch * tiles, tl.num_programs(0), flatten=True):
        matrix = tile // tiles
        t = tile % tiles
        row = t % down * ROWS
        column = t // down * COLUMNS
        top = matrix * m
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, m, DEPTH):
            sums = tl.dot(a.load([top + row, k]), x.load([top + k, column]), sums)
        D = sums * tl.load(alphas + matrix)
        if LARGEST:
            # The magnitude's bits order as the magnitudes do, with infinity and NaN above all.
            bits = D.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            tl.atomic_max(largest + matrix, tl.max(tl.reshape(bits, (ROWS * COLUMNS,)), 0), sem="relaxed")
        # In two halves: a whole tile in float16 would not fit beside the tiles that are being loaded.
        left, right = D.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
        if TRANSPOSED:
            d.store([matrix * n + column, row], left.to(d.dtype).T)
            d.store([matrix * n + column + COLUMNS // 2, row], right.to(d.dtype).T)
        else:
            d.store([top + row, column], left.to(d.dtype))
            d.store([top + row, column + COLUMNS // 2], right.to(d.dtype))


def general(A: Tensor, X: Tensor, D: Tensor, alphas: Tensor, largest: Tensor | None = None) -> Callable[[], None]:
    """A launch of D = alpha A X.

    Args:
        A: (B, m, m) float16, m a multiple of UNIT.
        X, D: (B, m, n) float16, in different memory; rows 16 bytes apart or a multiple of that. D is written whole,
            and its rows to the next multiple of 16 bytes.
        alphas: (B,) float32, what each product is multiplied with.
        largest: (B,) int32, raised to the bits of D's largest magnitude in float32; not finite if an entry is not.
    """
    batch, m, n = X.shape
    tile = tiles_for(X.device).general
    transposed = (batch, n, m) == D.shape != X.shape
    shape = (tile.rows, tile.columns // 2)
    arguments = dict(
        a=describe(A, tile.rows, tile.depth),
        x=describe(X, tile.depth, tile.columns),
        d=describe(D, *(shape[::-1] if transposed else shape)),
        alphas=alphas,
        largest=alphas if largest is None else largest,
        batch=batch,
        m=m,
        n=n,
        LARGEST=largest is not None,
        TRANSPOSED=transposed,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
    )
    programs = min(batch * (m // tile.rows) * tiles(n, tile.columns), processors(X.device))
    return launch(general_kernel, programs, arguments, num_warps=tile.warps, num_stages=tile.stages)


def oracle(A: Tensor, X: Tensor, alpha: Tensor) -> Tensor:
    """The same in float32."""
    return A.float() @ X.float() * alpha[:, None, None]
