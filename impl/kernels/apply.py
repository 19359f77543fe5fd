# SPDX-License-Identifier: Apache-2.0
"""From orthogonalized matrices to new weights and momenta, unless the decision on the device says otherwise."""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from impl.kernels.launch import launch
from impl.kernels.places import TILE, array, eights, programs, rows_of, tile_of, within
from impl.kernels.prepare import DTYPES, Source, direction


@triton.jit
def update(O, height, stride, r, c, inside, TALL: tl.constexpr):
    """A tile of a matrix in O, in the weight's orientation, float32."""
    if TALL:
        tile = tl.load(O + c[:, None].to(tl.int64) * stride + r[None, :], mask=inside.T, other=0.0).T
    else:
        tile = tl.load(O + r[:, None].to(tl.int64) * stride + c[None, :], mask=inside, other=0.0)
    return tile.to(tl.float32)


@triton.jit(do_not_specialize=["parameters", "rows", "columns", "height", "stride"])
def apply_kernel(
    places, pointers, hyper, grad_scale, O, row_scale, code, scale, parameters, rows, columns, height, stride,
    GRADIENT: tl.constexpr, SCALED: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, WEIGHT: tl.constexpr, TALL: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Write a tile of M, unless `code` says that a gradient was at fault, and of W, unless it says anything."""
    matrix, r, c = tile_of(tl.program_id(0), rows, columns, DOWN, ACROSS)
    index = tl.load(places + matrix.to(tl.int64) * 5)
    address = tl.load(pointers + 2 * parameters + index)
    fault = tl.load(code)
    if (fault < 2) & (address != 0):
        G = array(address, GRADIENT, ALIGNED)
        M = array(tl.load(pointers + parameters + index), tl.float32, ALIGNED)
        W = array(tl.load(pointers + index), WEIGHT, ALIGNED)
        at = rows_of(places, matrix, r, ALIGNED)[:, None] + c[None, :]
        lr = tl.load(hyper)
        kept = (1.0 - lr * tl.load(hyper + 1)).to(tl.float32)
        step = (lr * scale).to(tl.float32)
        stride = eights(stride)
        O += matrix.to(tl.int64) * height * stride
        inside = within(r, c, rows, columns, ALIGNED)
        M_new, _ = direction(G, M, at, inside, hyper, grad_scale, SCALED, MOMENTUM, NESTEROV)
        tl.store(M + at, M_new, mask=inside)
        if fault == 0:
            D = update(O, height, stride, r, c, inside, TALL)
            if ROWS:
                D *= tl.load(row_scale + matrix.to(tl.int64) * rows + r, mask=r < rows, other=0.0)[:, None]
            new = tl.load(W + at, mask=inside, other=0.0).to(tl.float32) * kept - D * step
            tl.store(W + at, new.to(WEIGHT), mask=inside)


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
        **TILE,
        "O": O,
        "row_scale": O if row_scale is None else row_scale,
        "code": code,
        "scale": scale,
        "height": O.shape[1],
        "stride": O.stride(1),
        "WEIGHT": DTYPES[source.weight],
        "TALL": source.tall,
        "ROWS": row_scale is not None,
    }
    number = programs(len(source.places), source.rows, source.columns, **TILE)
    return launch(apply_kernel, number, arguments, num_warps=4, enable_fp_fusion=False)


@triton.jit(do_not_specialize=["rows", "columns", "height", "stride"])
def unpack_kernel(
    O, out, rows, columns, height, stride,
    ALIGNED: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """Write a tile of O to an array of whole matrices."""
    matrix, r, c = tile_of(tl.program_id(0), rows, columns, DOWN, ACROSS)
    stride = eights(stride)
    O += matrix.to(tl.int64) * height * stride
    out += matrix.to(tl.int64) * rows * columns
    if ALIGNED:
        columns = eights(columns)
    inside = within(r, c, rows, columns, ALIGNED)
    D = update(O, height, stride, r, c, inside, TALL)
    tl.store(out + r[:, None].to(tl.int64) * columns + c[None, :], D.to(out.dtype.element_ty), mask=inside)


def unpack(O: Tensor, out: Tensor) -> Callable[[], None]:
    """A launch that copies the matrices of O, as in `apply`, to `out` (B, rows, columns), contiguous, of any dtype."""
    batch, rows, columns = out.shape
    arguments = dict(
        O=O,
        out=out,
        rows=rows,
        columns=columns,
        height=O.shape[1],
        stride=O.stride(1),
        ALIGNED=rows % 8 == columns % 8 == 0,
        **TILE,
        TALL=rows > columns,
    )
    return launch(unpack_kernel, programs(batch, rows, columns, **TILE), arguments, num_warps=4)
