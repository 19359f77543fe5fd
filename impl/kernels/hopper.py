# SPDX-License-Identifier: Apache-2.0
"""The products of symmetric.py and general.py on Hopper (sm_90), in Gluon: one tile is multiplied while another is stored.

A program has a loader, one warp, and two consumers of four warps, each of which takes every other tile. All operands go
through one ring of stages, in the order of the tiles, so that one consumer has the tensor cores while the other scales,
rounds and stores its result. Who waits for what (a wait knows only whether a phase is odd or even):

    full[c, s]   the loader tells consumer c that stage s holds its operands; a barrier for each consumer and stage, since
                 a consumer knows only of its own phases
    empty[s]     the consumer that has read stage s tells the loader, which knows of all phases
    arrived[c]   the tile to be added to a quadratic has come into consumer c's buffer, as c has asked
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from impl.kernels.symmetric import place as triangle

# As they are called in Triton 3.9, or else in 3.6; 3.9 has the older names too, but they raise.
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
meet = getattr(gl, "barrier", None) or gl.thread_barrier

SIDE, DEEP = 128, 64  # of a tile, and of the sum at a time
TILE, HALF, DEPTH = gl.constexpr(SIDE), gl.constexpr(SIDE // 2), gl.constexpr(DEEP)
BYTES = gl.constexpr(2 * SIDE * DEEP)  # of an operand in a stage
STAGES = gl.constexpr(5)  # as many as fit beside the results
LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE, 16]))  # of sums in registers
# The registers of a thread, in the second consumer and in the loader: with the first, what a multiprocessor has.
REGISTERS = gl.constexpr([232, 40])


@gluon.jit
def place(tile, m, n, FORM: gl.constexpr):
    """The matrix of a tile, and the tile's row and column in it."""
    if FORM == "general":
        tiles = m // TILE * gl.cdiv(n, TILE)
        i = tile % tiles % (m // TILE)
        j = tile % tiles // (m // TILE)
    else:
        tiles = m // TILE * (m // TILE + 1) // 2
        i, j = triangle(tile % tiles, 0)
    return tile // tiles, i, j


@gluon.jit
def loader(a, b, lefts, rights, full, empty, total, m, n, depth, FORM: gl.constexpr):
    """Load the operands of every tile, in order."""
    stage = 0
    parity = 1  # at first all stages are empty
    consumer = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        matrix, i, j = place(tile, m, n, FORM)
        top = matrix * m
        for k in range(0, depth, DEPTH):
            mbarrier.wait(empty.index(stage), parity)
            bar = full.index(consumer * STAGES + stage)
            mbarrier.expect(bar, 2 * BYTES)
            load(a, [top + i * TILE, k], bar, lefts.index(stage))
            if FORM == "general":
                load(b, [top + k, j * TILE], bar, rights.index(stage))
            else:
                load(b, [top + j * TILE, k], bar, rights.index(stage))
            stage += 1
            parity = gl.where(stage == STAGES, parity ^ 1, parity)
            stage = gl.where(stage == STAGES, 0, stage)
        consumer ^= 1


@gluon.jit
def multiply(lefts, rights, full, empty, stage, parities, steps, WHICH: gl.constexpr, FORM: gl.constexpr):
    """The sums of a tile, from the next `steps` stages; bit s of `parities` is for full[WHICH, s]."""
    D = gl.zeros((TILE, TILE), gl.float32, LAYOUT)
    for k in range(steps):
        mbarrier.wait(full.index(WHICH * STAGES + stage), (parities >> stage) & 1)
        parities ^= 1 << stage
        right = rights.index(stage)
        if FORM != "general":
            right = right.permute((1, 0))
        D = warpgroup_mma(lefts.index(stage), right, D, use_acc=k > 0, is_async=True)
        # All but this have been computed, so that the stage before is free.
        D = warpgroup_mma_wait(1, deps=(D,))
        mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), pred=k > 0)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    D = warpgroup_mma_wait(0, deps=(D,))
    mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)))
    return D, stage, parities


@gluon.jit
def free():
    """Wait until what was stored from a buffer, or read from it, no longer needs it."""
    tma.store_wait(0)
    meet()


@gluon.jit
def put(d, row, column, buffer, D, TRANSPOSED: gl.constexpr):
    """Begin to store a tile."""
    if TRANSPOSED:
        buffer.permute((1, 0)).store(D.to(d.dtype))
    else:
        buffer.store(D.to(d.dtype))
    fence_async_shared()
    meet()
    store(d, [row, column], buffer)


@gluon.jit
def put_general(d, D, matrix, i, j, m, n, buffer, TRANSPOSED: gl.constexpr):
    """Store a tile in two halves, for which a buffer has room in float32 too."""
    left, right = D.reshape((TILE, 2, HALF)).permute((0, 2, 1)).split()
    free()
    if TRANSPOSED:
        put(d, matrix * n + j * TILE, i * TILE, buffer, left, True)
        free()
        put(d, matrix * n + j * TILE + HALF, i * TILE, buffer, right, True)
    else:
        put(d, matrix * m + i * TILE, j * TILE, buffer, left, False)
        free()
        put(d, matrix * m + i * TILE, j * TILE + HALF, buffer, right, False)


@gluon.jit
def put_symmetric(d, D, top, i, j, buffer, upper, FORM: gl.constexpr):
    """Store a tile and its mirror image."""
    D16 = D.to(gl.float16)
    free()
    if FORM == "product" and i == j:
        # The two halves differ by roundings, which would grow from product to product.
        buffer.store(D16)
        meet()
        mirror = buffer.permute((1, 0)).load(LAYOUT)
        meet()
        D16 = gl.where(upper, D16, mirror)
    put(d, top + i * TILE, j * TILE, buffer, D16, False)
    if i != j:
        free()
        put(d, top + j * TILE, i * TILE, buffer, D16, True)


@gluon.jit
def consumer(
    WHICH: gl.constexpr, c, d, lefts, rights, full, empty, arrived, buffers, alphas, betas, shares, largest,
    alpha, beta, gamma, total, m, n, depth,
    FORM: gl.constexpr, QUADRATIC: gl.constexpr, SQUARES: gl.constexpr, TRACE: gl.constexpr, LARGEST: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """Compute every other tile."""
    down = gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT))[:, None]
    across = gl.arange(0, TILE, gl.SliceLayout(0, LAYOUT))[None, :]
    buffer = buffers.index(WHICH)
    steps = gl.cdiv(depth, DEPTH)
    stage = WHICH * steps % STAGES
    parities = 0
    parity = 0  # for arrived[WHICH]
    programs = gl.num_programs(0)
    for tile in range(gl.program_id(0) + WHICH * programs, total, 2 * programs):
        matrix, i, j = place(tile, m, n, FORM)
        top = matrix * m
        if QUADRATIC:
            free()
            mbarrier.expect(arrived.index(WHICH), 2 * BYTES)
            load(c, [top + i * TILE, j * TILE], arrived.index(WHICH), buffer)
        D, stage, parities = multiply(lefts, rights, full, empty, stage, parities, steps, WHICH, FORM)
        stage = (stage + steps) % STAGES  # past the other consumer's tile
        D *= alpha * gl.load(alphas + matrix)
        if QUADRATIC:
            mbarrier.wait(arrived.index(WHICH), parity)
            parity ^= 1
            D += buffer.load(LAYOUT).to(gl.float32) * (beta * gl.load(betas + matrix))
            D += gl.where(down == across, gl.where(i == j, gamma, 0.0), 0.0)
        if SQUARES:
            gl.store(shares + tile, gl.sum(gl.sum(D * D, 1), 0) * gl.where(i == j, 1.0, 2.0))
        if TRACE:
            trace = gl.sum(gl.sum(gl.where(down == across, D, 0.0), 1), 0)
            gl.store(shares + tile, gl.where(i == j, trace, 0.0))
        if LARGEST:
            # The magnitude's bits order as the magnitudes do, with infinity and NaN above all.
            bits = D.to(gl.int32, bitcast=True) & 0x7FFFFFFF
            gl.atomic_max(largest + matrix, gl.max(gl.max(bits, 1), 0), sem="relaxed")
        if FORM == "general":
            put_general(d, D, matrix, i, j, m, n, buffer, TRANSPOSED)
        else:
            put_symmetric(d, D, top, i, j, buffer, down <= across, FORM)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["total", "m", "n", "depth"])
def hopper_kernel(
    a, b, c, d, alphas, betas, shares, largest, alpha, beta, gamma, total, m, n, depth,
    FORM: gl.constexpr, QUADRATIC: gl.constexpr, SQUARES: gl.constexpr, TRACE: gl.constexpr, LARGEST: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """FORM is "square" (b is a), "product" or "general"; the flags' meaning is in symmetric.py and general.py."""
    lefts = gl.allocate_shared_memory(gl.float16, [STAGES, a.block_shape[0], a.block_shape[1]], a.layout)
    rights = gl.allocate_shared_memory(gl.float16, [STAGES, b.block_shape[0], b.block_shape[1]], b.layout)
    buffers = gl.allocate_shared_memory(d.dtype, [2, d.block_shape[0], d.block_shape[1]], d.layout)
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    arrived = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(full.index(STAGES + s), count=1)
        mbarrier.init(empty.index(s), count=1)
    mbarrier.init(arrived.index(0), count=1)
    mbarrier.init(arrived.index(1), count=1)
    fence_async_shared()
    meet()
    gl.warp_specialize(
        [
            (consumer, (0, c, d, lefts, rights, full, empty, arrived, buffers, alphas, betas, shares, largest, alpha, beta,
                        gamma, total, m, n, depth, FORM, QUADRATIC, SQUARES, TRACE, LARGEST, TRANSPOSED)),
            (consumer, (1, c, d, lefts, rights, full, empty, arrived, buffers, alphas, betas, shares, largest, alpha, beta,
                        gamma, total, m, n, depth, FORM, QUADRATIC, SQUARES, TRACE, LARGEST, TRANSPOSED)),
            (loader, (a, b, lefts, rights, full, empty, total, m, n, depth, FORM)),
        ],
        [4, 1],
        REGISTERS,
    )  # fmt: skip


def describe(X: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """As in launch.py, with the layout in shared memory that the tensor cores read."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.float32 if X.dtype == torch.float32 else gl.float16)
    return TensorDescriptor(X, [X.shape[0] * X.shape[1], X.shape[2]], [X.stride(1), 1], [rows, columns], layout)
