# SPDX-License-Identifier: Apache-2.0
"""Products that are symmetric: half of the tiles are computed, the others are their transposes.

    D = alpha A B^T + beta A + gamma I

Either A = B is any X (B, m, n), which gives the Gram matrix X X^T, or A and B are polynomials of one symmetric matrix, so
that they commute. float16 in and out, float32 sums.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from impl.kernels.launch import describe, launch, processors, tiles_for, triangle


@triton.jit
def place(t, FIRST: tl.constexpr):
    """Row and column of tile t above the diagonal, counted down the columns; FIRST is 0 to count those on it too."""
    # Column j begins with tile j (j + 1) / 2, or j (j - 1) / 2 without the diagonal; the root may be off by one.
    j = ((tl.sqrt((8 * t + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > t, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= t, j + 1, j)
    return t - j * (j + 1) // 2, j + FIRST


@triton.jit
def accumulate(a, b, top, row, column, depth, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """A tile of A B^T."""
    sums = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, depth, DEPTH):
        sums = tl.dot(a.load([top + row, k]), b.load([top + column, k]).T, sums)
    return sums


@triton.jit(do_not_specialize=["batch", "m", "depth"])
def square_kernel(
    a, c, d, alphas, betas, shares, alpha, beta, gamma, batch, m, depth,
    QUADRATIC: tl.constexpr, SQUARES: tl.constexpr, TRACE: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """B = A: one program computes every `num_programs`-th tile on or above the diagonal, matrix by matrix."""
    strips = m // TILE
    tiles = strips * (strips + 1) // 2
    inside = tl.arange(0, TILE)
    # Flattened, so that the next tile's loads are under way while this one is stored.
    for tile in tl.range(tl.program_id(0), batch * tiles, tl.num_programs(0), flatten=True):
        matrix = tile // tiles
        i, j = place(tile % tiles, 0)
        top = matrix * m
        row = i * TILE
        column = j * TILE
        D = accumulate(a, a, top, row, column, depth, TILE, DEPTH) * (alpha * tl.load(alphas + matrix))
        if QUADRATIC:
            D += c.load([top + row, column]).to(tl.float32) * (beta * tl.load(betas + matrix))
            D += tl.where(inside[:, None] == inside[None, :], tl.where(i == j, gamma, 0.0), 0.0)
        if SQUARES:
            tl.store(shares + tile, tl.sum(tl.reshape(D * D, (TILE * TILE,)), 0) * tl.where(i == j, 1.0, 2.0))
        if TRACE:
            trace = tl.sum(tl.reshape(tl.where(inside[:, None] == inside[None, :], D, 0.0), (TILE * TILE,)), 0)
            tl.store(shares + tile, tl.where(i == j, trace, 0.0))
        D16 = D.to(tl.float16)
        d.store([top + row, column], D16)
        # Beyond the last column nothing is written: a tile on the diagonal is its own mirror image.
        d.store([top + column, tl.where(i == j, m, row)], D16.T)


@triton.jit(do_not_specialize=["batch", "m"])
def product_kernel(
    a, b, d, alphas, batch, m, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """B unlike A: first the tiles above the diagonals, then those on them."""
    strips = m // TILE
    above = strips * (strips - 1) // 2
    inside = tl.arange(0, TILE)
    programs = tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), batch * above, programs, flatten=True):
        matrix = tile // above
        i, j = place(tile % above, 1)
        top = matrix * m
        D = accumulate(a, b, top, i * TILE, j * TILE, m, TILE, DEPTH) * tl.load(alphas + matrix)
        D16 = D.to(tl.float16)
        d.store([top + i * TILE, j * TILE], D16)
        d.store([top + j * TILE, i * TILE], D16.T)
    # The programs that have had a tile less go first.
    for tile in range((tl.program_id(0) + programs - batch * above % programs) % programs, batch * strips, programs):
        matrix = tile // strips
        top = matrix * m
        row = tile % strips * TILE
        D = accumulate(a, b, top, row, row, m, TILE, DEPTH) * tl.load(alphas + matrix)
        D16 = D.to(tl.float16)
        # The two halves differ by roundings, which would grow from product to product.
        d.store([top + row, row], tl.where(inside[:, None] <= inside[None, :], D16, D16.T))


def options(
    alphas: Tensor,
    alpha: float = 1.0,
    quadratic: tuple[Tensor, float, float] | None = None,
    squares: Tensor | None = None,
    trace: Tensor | None = None,
) -> dict[str, Any]:
    """What a kernel is told of the arguments of `square`, beside the matrices."""
    betas, beta, gamma = quadratic or (alphas, 0.0, 0.0)
    shares = next((T for T in (squares, trace) if T is not None), alphas)
    which = dict(QUADRATIC=quadratic is not None, SQUARES=squares is not None, TRACE=trace is not None)
    return dict(alphas=alphas, betas=betas, shares=shares, alpha=alpha, beta=beta, gamma=gamma, **which)


def square(
    A: Tensor,
    D: Tensor,
    alphas: Tensor,
    alpha: float = 1.0,
    quadratic: tuple[Tensor, float, float] | None = None,
    squares: Tensor | None = None,
    trace: Tensor | None = None,
) -> Callable[[], None]:
    """A launch of D = alpha A A^T, plus beta A + gamma I with `quadratic`, for symmetric A.

    Args:
        A: (B, m, k) float16, m a multiple of UNIT; rows 16 bytes apart or a multiple of that.
        D: (B, m, m) float16, in other memory than A; every entry is written.
        alphas: (B,) float32, multiplies `alpha`.
        quadratic: (betas, beta, gamma), betas (B,) float32, multiplies `beta`.
        squares, trace: (B, t) float32, where to put each computed tile's share of D's sum of squares, or of its trace;
            t = s (s + 1) / 2 for s tiles below each other.
    """
    tile = tiles_for(D.device).quadratic if quadratic else tiles_for(D.device).product
    arguments = dict(
        **options(alphas, alpha, quadratic, squares, trace),
        a=describe(A, tile.rows, tile.depth),
        c=describe(A, tile.rows, tile.rows) if quadratic else None,
        d=describe(D, tile.rows, tile.rows),
        batch=len(D),
        m=D.shape[1],
        depth=A.shape[2],
        TILE=tile.rows,
        DEPTH=tile.depth,
    )
    programs = min(len(D) * triangle(D.shape[1], tile.rows), processors(D.device))
    return launch(square_kernel, programs, arguments, num_warps=tile.warps, num_stages=tile.stages)


def product(A: Tensor, B: Tensor, D: Tensor, alphas: Tensor) -> Callable[[], None]:
    """A launch of D = alpha A B for symmetric A and B that commute; shapes and arguments as in `square`."""
    tile = tiles_for(D.device).product
    arguments = dict(
        a=describe(A, tile.rows, tile.depth),
        b=describe(B, tile.rows, tile.depth),
        d=describe(D, tile.rows, tile.rows),
        alphas=alphas,
        batch=len(D),
        m=D.shape[1],
        TILE=tile.rows,
        DEPTH=tile.depth,
    )
    programs = min(len(D) * triangle(D.shape[1], tile.rows), processors(D.device))
    return launch(product_kernel, programs, arguments, num_warps=tile.warps, num_stages=tile.stages)


def oracle(A: Tensor, B: Tensor, alpha: Tensor, beta: Tensor, gamma: float) -> Tensor:
    """The same in float32, for matrices B and coefficients (B,)."""
    D = A.float() @ B.float().mT * alpha[:, None, None]
    if A.shape != D.shape:
        return D
    return D + A.float() * beta[:, None, None] + gamma * torch.eye(A.shape[-1], device=A.device)
