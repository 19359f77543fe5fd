# SPDX-License-Identifier: Apache-2.0
"""From orthogonalized matrices to new weights and momenta, unless the decision on the device says otherwise."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from impl.kernels.launch import launch, tiles
from impl.kernels.places import SIDE, array, offsets, tile_of
from impl.kernels.prepare import DTYPES, Source, direction


@triton.jit
def update(O, matrix, height, stride, r, c, inside, SIDE: tl.constexpr, TALL: tl.constexpr):
    """A tile of the orthogonalized update, in the weight's orientation, float32."""
    stride = tl.multiple_of(stride, 8)
    O += matrix.to(tl.int64) * height * stride
    if TALL:
        tile = tl.load(O + c[:, None].to(tl.int64) * stride + r[None, :], mask=inside.T, other=0.0).T
    else:
        tile = tl.load(O + r[:, None].to(tl.int64) * stride + c[None, :], mask=inside, other=0.0)
    return tile.to(tl.float32)


@triton.jit(do_not_specialize=["parameters", "rows", "columns", "height", "stride"])
def apply_kernel(
    places, pointers, hyper, grad_scale, O, row_scale, code, scale, parameters, rows, columns, height, stride,
    GRADIENT: tl.constexpr, SCALED: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr, SIDE: tl.constexpr, WEIGHT: tl.constexpr, TALL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write a tile of M, unless `code` says that a gradient was at fault, and of W, unless it says anything."""
    down, across = tl.cdiv(rows, SIDE), tl.cdiv(columns, SIDE)
    matrix, r, c, inside = tile_of(tl.program_id(0), rows, columns, down, across, SIDE, ALIGNED)
    index = tl.load(places + matrix.to(tl.int64) * 5)
    inside = inside & (tl.load(pointers + 2 * parameters + index) != 0)
    fault = tl.load(code)
    if fault < 2:
        M, _ = direction(
            places, pointers, hyper, grad_scale, matrix, r, c, inside, parameters, GRADIENT, SCALED, MOMENTUM, NESTEROV, ALIGNED
        )
        at = offsets(places, matrix, r, c, ALIGNED)
        tl.store(array(tl.load(pointers + parameters + index), tl.float32, ALIGNED) + at, M, mask=inside)
        if fault == 0:
            D = update(O, matrix, height, stride, r, c, inside, SIDE, TALL)
            if ROWS:
                D *= tl.load(row_scale + matrix.to(tl.int64) * rows + r, mask=r < rows, other=0.0)[:, None]
            lr = tl.load(hyper)
            kept = (1.0 - lr * tl.load(hyper + 1)).to(tl.float32)
            W = array(tl.load(pointers + index), WEIGHT, ALIGNED) + at
            new = tl.load(W, mask=inside, other=0.0).to(tl.float32) * kept - D * (lr * scale).to(tl.float32)
            tl.store(W, new.to(WEIGHT), mask=inside)


def apply(source: Source, O: Tensor, code: Tensor, scale: float, row_scale: Tensor | None = None) -> Callable[[], None]:
    """A launch of W = (1 - lr weight_decay) W - lr scale O and of the momentum's update.   [SPEC: DECAY-1, MOM-1, SKIP]

    Args:
        O: (B, m, n) float16 as X in `prepare`.
        code: () uint8, what the step has come to.
        scale: what the learning rate is multiplied with.
        row_scale: (B, rows) float32, what rows of O are multiplied with.
    """
    arguments = {
        **source.arguments(),
        "O": O,
        "row_scale": O if row_scale is None else row_scale,
        "code": code,
        "scale": scale,
        "height": O.shape[1],
        "stride": O.stride(1),
        "WEIGHT": DTYPES[source.weight],
        "TALL": source.rows > source.columns,
        "ROWS": row_scale is not None,
    }
    programs = len(source.places) * tiles(source.rows, SIDE) * tiles(source.columns, SIDE)
    names = apply_kernel.arg_names
    return launch(apply_kernel, programs, {n: arguments[n] for n in names}, num_warps=8, enable_fp_fusion=False)


@triton.jit(do_not_specialize=["rows", "columns", "height", "stride"])
def unpack_kernel(O, address, rows, columns, height, stride, DTYPE: tl.constexpr, SIDE: tl.constexpr, TALL: tl.constexpr):
    """Write a tile of O to an array of whole matrices."""
    down, across = tl.cdiv(rows, SIDE), tl.cdiv(columns, SIDE)
    matrix, r, c, inside = tile_of(tl.program_id(0), rows, columns, down, across, SIDE, False)
    D = update(O, matrix, height, stride, r, c, inside, SIDE, TALL)
    out = array(tl.load(address), DTYPE, False) + matrix.to(tl.int64) * rows * columns
    tl.store(out + r[:, None].to(tl.int64) * columns + c[None, :], D.to(DTYPE), mask=inside)


def unpack(O: Tensor, address: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Callable[[], None]:
    """A launch that copies the matrices of O, as in `apply`, to (B, rows, columns), contiguous, of any dtype.

    Args:
        address: () int64, where to.
    """
    arguments = dict(
        O=O,
        address=address,
        rows=rows,
        columns=columns,
        height=O.shape[1],
        stride=O.stride(1),
        DTYPE=DTYPES[dtype],
        SIDE=SIDE,
        TALL=rows > columns,
    )
    return launch(unpack_kernel, len(O) * tiles(rows, SIDE) * tiles(columns, SIDE), arguments, num_warps=8)
