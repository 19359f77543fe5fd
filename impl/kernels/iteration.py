# SPDX-License-Identifier: Apache-2.0
"""The launches that orthogonalize a batch, and the memory that they need.

A square matrix is iterated as it stands: X <- (a I + b A + c A^2) X with A = X X^T. For a wide one it is cheaper to
iterate its Gram matrix: with Q = a I + b R + c R^2, the Gram matrix of Q X is R Q^2, and the factors Q of several steps
are collected before X is multiplied (gram-newton-schulz, Dao-AILab 2025). R's rounding errors grow from step to step, so X
is multiplied and R made from it again after every 2 steps; the last 3 may go together, where singular values are close.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from impl.kernels import scales as scale
from impl.kernels.launch import UNIT, tiles, tiles_for, triangle
from impl.kernels.products import Products, products
from impl.schedules import Quintic, Schedule

Launches = list[Callable[[], None]]
SCRATCH = 2**30  # bytes


def padded(m: int) -> int:
    """The rows that a matrix of m rows takes in a batch; those beyond m are zero throughout."""
    return tiles(m, UNIT) * UNIT


def stride(m: int, n: int) -> int:
    """The distance of rows in a batch: a multiple of 16 bytes, and enough for m x m matrices to fit in its memory."""
    return max(tiles(n, 8) * 8, padded(m))


def batch_numbers(m: int, n: int) -> int:
    """The float16 numbers that a matrix takes in a batch."""
    return padded(m) * stride(m, n)


def batch(memory: Tensor, B: int, m: int, n: int) -> Tensor:
    """B matrices, m <= n, in float16 memory: (B, padded(m), n)."""
    return memory[: B * batch_numbers(m, n)].view(B, padded(m), stride(m, n))[:, :, :n]


def direct(out: Tensor) -> bool:
    """Whether the last product can write to whole, contiguous matrices (B, rows, columns)."""
    _, rows, columns = out.shape
    fits = rows % (2 * UNIT) == columns % UNIT == 0 if rows > columns else rows % UNIT == 0
    return fits and columns * out.element_size() % 16 == 0


def segments(coefficients: tuple[Quintic, ...], square: bool) -> list[tuple[Quintic, ...]]:
    """The quintics between two products with X."""
    steps, length = len(coefficients), 1 if square else 2
    runs = [coefficients[i : i + length] for i in range(0, steps, length)]
    if not square and steps % 2 and steps >= 5:
        runs[-2:] = [coefficients[-3:]]
    return runs


def scratch_numbers(m: int, n: int) -> int:
    """The float16 numbers that an iteration works in for each matrix, beside the batch in which it ends."""
    return batch_numbers(m, n) + (1 if m == n else 3) * padded(m) ** 2


def chunk(B: int, m: int, n: int) -> int:
    """How many of B matrices are iterated together: few launches, within SCRATCH if that is enough for one matrix."""
    at_most = max(1, SCRATCH // 2 // scratch_numbers(m, n))
    return -(-B // -(-B // at_most))


def norms(B: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for the norms of B Gram matrices, by tile, and for what comes of them: `shares` and `scales`."""
    squares = triangle(padded(m), tiles_for(device).product.rows)
    shares = torch.empty(B, squares, dtype=torch.float32, device=device)
    return shares, torch.ones(scale.ROWS, B, dtype=torch.float32, device=device)


def iteration(
    O: Tensor,
    m: int,
    schedule: Schedule,
    eps: float,
    memory: Tensor,
    shares: Tensor,
    scales: Tensor,
    largest: Tensor,
    finite: Tensor,
    out: Tensor | None = None,
) -> tuple[Tensor, Launches, Tensor]:
    """Where the matrices are to be put, the launches that leave them orthogonalized in O, and the last one's left factor.

    [SPEC: ORTH]

    Args:
        O: (B, padded(m), n) float16, a part of a batch.
        memory: `scratch_numbers` float16 for each matrix.
        shares, scales: from `norms`.
        largest: (B,) int32, the bits of the matrices' largest magnitudes, which brought them to [2^13, 2^14).
        finite: (B,) int32, zeros; raised to the bits of the largest magnitudes in O.
        out: where they are to go instead of O, if it is what `direct` asks for.
    """
    B, M, n = O.shape
    plain = m == n
    make = products(O.device)
    spare = batch(memory, B, m, n)
    rest = memory[B * batch_numbers(m, n) :]
    squares = [rest[i * B * M * M : (i + 1) * B * M * M].view(B, M, M) for i in range(1 if plain else 3)]
    runs = segments(schedule.coefficients, plain)
    # Every run takes X from one batch to the other.
    X, other = (spare, O) if len(runs) % 2 else (O, spare)
    begin = X
    Q, P, R = (*squares, None, None)[:3]
    norm = {"squares" if schedule.norm == "schatten4" else "trace": shares}
    gram = 2.0 ** -(13 + math.ceil(math.log2(n)))  # so that no entry of the Gram matrix exceeds 2^15
    launches: Launches = []
    for r, run in enumerate(runs):
        first, last = r == 0, r == len(runs) - 1
        # Until this run ends, the other batch's memory is free for a square matrix: A here, or else factors.
        free = other.as_strided((B, M, M), (M * M, M, 1))
        A = free if R is None else R
        if first:
            launches.append(make.square(X, A, scales[scale.ONE], gram, **norm))
            launches.append(scale.scales(shares, largest, scales, gram, schedule.margin, eps, "squares" in norm))
        else:
            launches.append(make.square(X, A, scales[scale.ONE]))
        Q, P = _factor(make, launches, run, A, Q, P, free, scales, first)
        k = {(True, True): scale.UNIT_T, (True, False): scale.UNIT, (False, True): scale.T}.get((first, last), scale.ONE)
        target = out if last and out is not None else other
        launches.append(make.general(Q, X, target, scales[k], finite if last else None))
        X, other = other, X
    return begin, launches, Q


def _factor(
    make: Products,
    launches: Launches,
    run: tuple[Quintic, ...],
    A: Tensor,
    Q: Tensor,
    P: Tensor | None,
    free: Tensor,
    scales: Tensor,
    first: bool,
) -> tuple[Tensor, Tensor | None]:
    """Append what makes in Q the product of a run's factors, and in A the Gram matrix before the last one."""
    for i, (a, b, c) in enumerate(run):
        raw = first and i == 0  # A is not normalised yet
        alphas, betas = (scale.GRAM2_T4, scale.GRAM_T2) if raw else (scale.T4, scale.T2)
        Z = free if i else Q
        launches.append(make.square(A, Z, scales[alphas], c, quadratic=(scales[betas], b, a)))
        if P is None:
            continue
        if i:
            launches.append(make.product(Q, Z, P, scales[scale.ONE]))
            Q, P = P, Q
        if i < len(run) - 1:
            launches.append(make.product(A, Z, P, scales[scale.GRAM if raw else scale.ONE]))
            launches.append(make.product(P, Z, A, scales[scale.ONE]))
    return Q, P
