# SPDX-License-Identifier: Apache-2.0
"""Products that are symmetric: half of the tiles are computed, the others are their transposes.

    D = alpha A B^T + beta A + gamma I

Either A = B is any X (B, m, n), which gives the Gram matrix X X^T, or A and B are polynomials of one symmetric matrix, so
that they commute. float16 in and out, float32 sums.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from impl.kernels.launch import describe, launch, processors

TILE = 128
DEPTH = 64


@triton.jit(do_not_specialize=["batch", "m", "depth"])
def symmetric_kernel(
    a, b, c, d, alphas, betas, shares, alpha, beta, gamma, batch, m, depth,
    QUADRATIC: tl.constexpr, SQUARES: tl.constexpr, TRACE: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One program computes every `num_programs`-th tile on or above the diagonal, matrix by matrix."""
    strips = m // TILE
    tiles = strips * (strips + 1) // 2
    inside = tl.arange(0, TILE)
    for tile in tl.range(tl.program_id(0), batch * tiles, tl.num_programs(0)):
        matrix = tile // tiles
        t = tile % tiles
        # Tile t of the triangle is in row i of column j, where j (j + 1) / 2 <= t; the square root may be off by one.
        j = ((tl.sqrt((8 * t + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
        j = tl.where(j * (j + 1) // 2 > t, j - 1, j)
        j = tl.where((j + 1) * (j + 2) // 2 <= t, j + 1, j)
        i = t - j * (j + 1) // 2
        top = matrix * m
        row = i * TILE
        column = j * TILE
        sums = tl.zeros((TILE, TILE), tl.float32)
        for k in range(0, depth, DEPTH):
            sums = tl.dot(a.load([top + row, k]), b.load([top + column, k]).T, sums)
        D = sums * (alpha * tl.load(alphas + matrix))
        diagonal = (row + inside)[:, None] == (column + inside)[None, :]
        if QUADRATIC:
            D += c.load([top + row, column]).to(tl.float32) * (beta * tl.load(betas + matrix))
            D += tl.where(diagonal, gamma, 0.0)
        if SQUARES:
            tl.store(shares + tile, tl.sum(tl.sum(D * D, 1), 0) * tl.where(i == j, 1.0, 2.0))
        if TRACE:
            tl.store(shares + tile, tl.sum(tl.sum(tl.where(diagonal, D, 0.0), 1), 0))
        D16 = D.to(tl.float16)
        if i == j:
            # Rounding errors that are not symmetric would grow from product to product.
            d.store([top + row, column], tl.where(inside[:, None] <= inside[None, :], D16, D16.T))
        else:
            d.store([top + row, column], D16)
            d.store([top + column, row], D16.T)


def symmetric(
    A: Tensor,
    B: Tensor,
    D: Tensor,
    alphas: Tensor,
    alpha: float = 1.0,
    quadratic: tuple[Tensor, float, float] | None = None,
    squares: Tensor | None = None,
    trace: Tensor | None = None,
) -> Callable[[], None]:
    """A launch of D = alpha A B^T, plus beta A + gamma I with `quadratic`.

    Args:
        A, B: (B, m, k) float16, m a multiple of TILE; rows 16 bytes apart or a multiple of that.
        D: (B, m, m) float16, in other memory than A and B; every entry is written.
        alphas: (B,) float32, multiplies `alpha`.
        quadratic: (betas, beta, gamma), betas (B,) float32.
        squares, trace: (B, m / TILE * (m / TILE + 1) / 2) float32, where to put each computed tile's share of D's sum of
            squares, or of D's trace.
    """
    betas, beta, gamma = quadratic or (alphas, 0.0, 0.0)
    shares = squares if trace is None else trace
    strips = D.shape[1] // TILE
    arguments = dict(
        a=describe(A, TILE, DEPTH),
        b=describe(B, TILE, DEPTH),
        c=describe(A if quadratic else D, TILE, TILE),
        d=describe(D, TILE, TILE),
        alphas=alphas,
        betas=betas,
        shares=alphas if shares is None else shares,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        batch=len(D),
        m=D.shape[1],
        depth=A.shape[2],
        QUADRATIC=quadratic is not None,
        SQUARES=squares is not None,
        TRACE=trace is not None,
        TILE=TILE,
        DEPTH=DEPTH,
    )
    programs = min(len(D) * strips * (strips + 1) // 2, processors(D.device))
    return launch(symmetric_kernel, programs, arguments, num_warps=4, num_stages=4)


def oracle(A: Tensor, B: Tensor, alpha: Tensor, beta: Tensor, gamma: float) -> Tensor:
    """The same in float32, for matrices B and coefficients (B,)."""
    product = A.float() @ B.float().mT * alpha[:, None, None]
    if A.shape != product.shape:
        return product
    return product + A.float() * beta[:, None, None] + gamma * torch.eye(A.shape[-1], device=A.device)
