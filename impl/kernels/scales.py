# SPDX-License-Identifier: Apache-2.0
"""What each matrix of a batch is to be multiplied with, from the norm of its Gram matrix."""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from impl.kernels.launch import launch
from impl.kernels.prepare import power, shift

# Rows of `scales`. With N the norm of X, as stored, and R = gram A the stored Gram matrix's multiple that has the norm 1:
# t says how far the schedule wants singular values below x / N, so that t < 1 for a margin and for an epsilon at work.
ONE, GRAM, GRAM_T2, GRAM2_T4, T2, T4, UNIT, T, UNIT_T = range(9)
ROWS = 9


@triton.jit(do_not_specialize=["batch", "tiles"])
def scales_kernel(sums, largest, scales, batch, tiles, gram, margin, eps, SQUARES: tl.constexpr, BLOCK: tl.constexpr):
    """One program for each matrix; `sums` are its tiles' shares of what SQUARES says."""
    matrix = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tiles, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(sums + matrix.to(tl.int64) * tiles + at, mask=at < tiles, other=0.0)
    norm = tl.sum(total, 0)
    if SQUARES:
        norm = tl.sqrt_rn(norm)
    zero = norm == 0.0
    r = tl.where(zero, 0.0, tl.div_rn(1.0, norm))
    N = tl.sqrt_rn(tl.div_rn(norm, gram))
    floor = tl.maximum(N, power(eps, shift(tl.load(largest + matrix))), propagate_nan=tl.PropagateNan.ALL)
    t = tl.where(zero, 0.0, tl.div_rn(N, margin * floor))
    k = tl.where(zero, 0.0, tl.div_rn(1.0, N))
    tl.store(scales + 1 * batch + matrix, r)
    tl.store(scales + 2 * batch + matrix, r * t * t)
    tl.store(scales + 3 * batch + matrix, r * t * t * r * t * t)
    tl.store(scales + 4 * batch + matrix, t * t)
    tl.store(scales + 5 * batch + matrix, t * t * t * t)
    tl.store(scales + 6 * batch + matrix, k)
    tl.store(scales + 7 * batch + matrix, t)
    tl.store(scales + 8 * batch + matrix, k * t)


def scales(
    sums: Tensor, largest: Tensor, out: Tensor, gram: float, margin: float, eps: float, squares: bool
) -> Callable[[], None]:
    """A launch that writes all rows of `out` (ROWS, B) float32 but the first, which is to hold ones.

    Args:
        sums: (B, tiles) float32, adding up to the sum of squares of A, or to its trace; A = gram X X^T.
        largest: (B,) int32, by which X was scaled; `eps` is in the unit that X had before.
        squares: whether N(X) is the Schatten-4 norm, rather than Frobenius'.
    """
    arguments = dict(
        sums=sums,
        largest=largest,
        scales=out,
        batch=len(sums),
        tiles=sums.shape[1],
        gram=gram,
        margin=margin,
        eps=eps,
        SQUARES=squares,
        BLOCK=256,
    )
    return launch(scales_kernel, len(sums), arguments, num_warps=4, enable_fp_fusion=False)
