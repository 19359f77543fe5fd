# SPDX-License-Identifier: Apache-2.0
"""From gradients and momenta to matrices ready for orthogonalization.

Float16 needs a scale that is known only when everything has been read: each matrix's update direction is written, as one wide
matrix of a batch, with its largest magnitude brought by a power of two to [2^13, 2^14). A first launch does so with the
power that the last call found, and finds the right one; a second launch does those matrices again that needed another.
Momenta are not written: whether the step is taken is not known yet, and `apply` can make them again.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from impl.kernels.launch import launch
from impl.kernels.places import TILE, array, eights, programs, rows_of, tile_of, within

STRIPS = 32  # programs for a matrix whose scale was guessed wrong
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Source(NamedTuple):
    """Matrices of one shape from parameters of one group; see `places.py` for the tables.

    `hyper` is (4,) float64: the group's lr, weight_decay, momentum, and 1 or -1 for the sign of the gradient;
    `grad_scale` is a float32 that gradients are divided by, or None.
    """

    places: Tensor
    pointers: Tensor
    parameters: int
    rows: int
    columns: int
    weight: torch.dtype
    gradient: torch.dtype
    tall: bool  # whether columns are laid out as rows
    momentum: bool  # False: the gradient is what is to be orthogonalized
    nesterov: bool
    aligned: bool  # rows and columns are multiples of 8, and every row begins at a multiple of 16 bytes and of 8 entries
    hyper: Tensor
    grad_scale: Tensor | None

    def arguments(self) -> dict:
        """What the kernels have in common."""
        return dict(
            places=self.places,
            pointers=self.pointers,
            hyper=self.hyper,
            grad_scale=self.hyper if self.grad_scale is None else self.grad_scale,
            parameters=self.parameters,
            rows=self.rows,
            columns=self.columns,
            GRADIENT=DTYPES[self.gradient],
            SCALED=self.grad_scale is not None,
            MOMENTUM=self.momentum,
            NESTEROV=self.nesterov,
            ALIGNED=self.aligned,
        )


@triton.jit
def direction(
    G, M, at, inside, hyper, grad_scale,
    SCALED: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
):  # fmt: skip
    """The new momentum and the update direction of a tile, in float32.   [SPEC: MOM-1, MOM-2, SKIP-9]

    Nothing is fused (enable_fp_fusion=False), so both passes and `apply` see the same bits.
    """
    G = tl.load(G + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        G = tl.div_rn(G, tl.load(grad_scale) + tl.zeros_like(G))
    M_new = G
    U = G
    if MOMENTUM:
        beta = tl.load(hyper + 2)
        new = G * ((1.0 - beta) * tl.load(hyper + 3)).to(tl.float32)
        M_new = tl.load(M + at, mask=inside, other=0.0) * beta.to(tl.float32) + new
        U = M_new
        if NESTEROV:
            U = new + M_new * beta.to(tl.float32)
    return M_new, U


@triton.jit
def shift(bits):
    """The power of two that brings a float32, given by its bits, to [2^13, 2^14): float16 has 29 orders below that."""
    lifted = (bits.to(tl.float32, bitcast=True) * 18446744073709551616.0).to(tl.int32, bitcast=True)  # by 2^64
    exponent = tl.where(bits < 0x00800000, (lifted >> 23) - 64, bits >> 23) - 127
    return 13 - exponent


@triton.jit
def power(x, exponent):
    """x times 2^exponent, up to 252 either way: as two factors, because a single one might not be a normal number."""
    half = exponent >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    return x * first * ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def prepare_tile(
    matrix, t, exponent, places, pointers, hyper, grad_scale, X, parameters, rows, columns, height, stride,
    GRADIENT: tl.constexpr, SCALED: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """Write tile t of a matrix, times 2^exponent; the bits of its largest magnitude, infinity and NaN above all."""
    below, beside = (rows, height) if TALL else (height, columns)
    _, r, c = tile_of(t, below, beside, DOWN, ACROSS)
    index = tl.load(places + matrix.to(tl.int64) * 5)
    address = tl.load(pointers + 2 * parameters + index)
    G = array(address, GRADIENT, ALIGNED)
    M = array(tl.load(pointers + parameters + index), tl.float32, ALIGNED)
    at = rows_of(places, matrix, r, ALIGNED)[:, None] + c[None, :]
    inside = within(r, c, tl.where(address != 0, rows, 0), columns, ALIGNED)
    _, U = direction(G, M, at, inside, hyper, grad_scale, SCALED, MOMENTUM, NESTEROV)
    largest = tl.max(tl.max(U.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1), 0)
    U = power(U, exponent).to(tl.float16)
    stride = eights(stride)
    X += matrix.to(tl.int64) * height * stride
    written = within(r, c, below, beside, ALIGNED)
    if TALL:
        tl.store(X + c[:, None].to(tl.int64) * stride + r[None, :], U.T, mask=written.T)
    else:
        tl.store(X + r[:, None].to(tl.int64) * stride + c[None, :], U, mask=written)
    return largest


@triton.jit(do_not_specialize=["parameters", "rows", "columns", "height", "stride", "tiles"])
def prepare_kernel(
    places, pointers, hyper, grad_scale, largest, guess, X, parameters, rows, columns, height, stride, tiles,
    GRADIENT: tl.constexpr, SCALED: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """One program writes a tile of X, scaled as `guess` says, and raises the matrix's `largest`."""
    matrix = tl.program_id(0) // tiles
    found = prepare_tile(
        matrix, tl.program_id(0) % tiles, shift(tl.load(guess + matrix)), places, pointers, hyper, grad_scale, X,
        parameters, rows, columns, height, stride,
        GRADIENT, SCALED, MOMENTUM, NESTEROV, ALIGNED, DOWN, ACROSS, TALL,
    )  # fmt: skip
    tl.atomic_max(largest + matrix, found, sem="relaxed")


@triton.jit(do_not_specialize=["parameters", "rows", "columns", "height", "stride", "tiles", "strips"])
def again_kernel(
    places, pointers, hyper, grad_scale, largest, guess, X, parameters, rows, columns, height, stride, tiles, strips,
    GRADIENT: tl.constexpr, SCALED: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """`strips` programs for a matrix write it again if `guess` was wrong."""
    matrix = tl.program_id(0) // strips
    exponent = shift(tl.load(largest + matrix))
    todo = tl.where(exponent == shift(tl.load(guess + matrix)), 0, tiles)
    for t in tl.range(tl.program_id(0) % strips, todo, strips, num_stages=1):
        prepare_tile(
            matrix, t, exponent, places, pointers, hyper, grad_scale, X, parameters, rows, columns, height, stride,
            GRADIENT, SCALED, MOMENTUM, NESTEROV, ALIGNED, DOWN, ACROSS, TALL,
        )  # fmt: skip


def renew(flags: Tensor) -> None:
    """Make the `largest` of the last call the guess of the next: of flags (3, B), rows are `largest`, `finite`, and `guess`.

    `finite` is what `iteration` takes by that name.
    """
    flags[2].copy_(flags[0])
    flags[:2].zero_()


def prepare(source: Source, largest: Tensor, guess: Tensor, X: Tensor) -> list[Callable[[], None]]:
    """Launches that write the matrices into X.

    Args:
        largest: (B,) int32, zeros; raised to the bits of each matrix's largest magnitude; not finite if an entry is not.
        guess: (B,) int32, any numbers: what `largest` was the last time. It makes a difference to the time only.
        X: (B, m, n) float16 with m >= rows and n = columns; if they are tall, m >= columns and n = rows.
    """
    tall, height = source.tall, X.shape[1]
    tiles = programs(1, *((source.rows, height) if tall else (height, source.columns)), **TILE)
    strips = min(tiles, STRIPS)
    mine = dict(largest=largest, guess=guess, X=X, height=height, stride=X.stride(1), tiles=tiles, strips=strips, TALL=tall)
    arguments = {**source.arguments(), **TILE, **mine}
    warps = 4 if source.grad_scale is None else 8  # a division takes registers
    counts = {prepare_kernel: len(source.places) * tiles, again_kernel: len(source.places) * strips}
    return [launch(each, count, arguments, num_warps=warps, enable_fp_fusion=False) for each, count in counts.items()]
