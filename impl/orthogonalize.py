# SPDX-License-Identifier: Apache-2.0
"""The orthogonalization of SPEC.md, ORTH: matrix polynomials only, exact under scaling by powers of two.

X is m x n with m <= n (a tall matrix is transposed first); A = X X^T is its Gram matrix.
"""

import torch
from torch import Tensor

from impl.batches import DTYPES, usable
from impl.schedules import Coefficients, Quintic, Schedule, schedule


def orthogonalize(X: Tensor, ns_coefficients: Coefficients = "polar_express_s4", ns_steps: int = 5, eps: float = 0.0) -> Tensor:
    """Map every singular value s of X to p(s / N(X)), close to 1.   [SPEC: ORTH-1 to ORTH-13]

    The result does not depend on the scale of X: bit for bit for powers of two, over the whole range of its dtype.

    On a CPU, and for float64 anywhere, it is computed in X's precision, at least float32. On a GPU of compute capability 8
    and more, Triton kernels (kernels/) keep matrices in float16 and sum in float32, which moves it by about 0.02 of its norm.

    Args:
        X: (m, n), or (B, m, n) for B independent matrices; any floating-point dtype. It is not written to.
        ns_coefficients: a schedule's name, a quintic (a, b, c), or a sequence of `ns_steps` quintics.
        ns_steps: number of quintics.
        eps: floor under the norm N(X), in the units of X; 0 for none.

    Returns:
        A tensor of X's shape and dtype. Zero for zero; NaN where the matrix holds a NaN or an infinity.

    Raises:
        ValueError: X has neither 2 nor 3 dimensions, or the schedule is refused.
        TypeError: X is not real floating point.

    Source: Newton-Schulz for Muon, K. Jordan 2024; minimax coefficients, Amsel et al. 2025, arXiv:2505.16932.
    """
    plan = schedule(ns_coefficients, ns_steps)
    if X.ndim not in (2, 3):
        raise ValueError(f"X should be (m, n) or (B, m, n) but has shape {tuple(X.shape)}")
    if not X.is_floating_point():
        raise TypeError(f"X should be real floating point but is {X.dtype}")
    if X.numel() == 0:
        return X.clone()
    return orthogonalize_batch(X.detach() if X.ndim == 3 else X.detach()[None], plan, eps).view(X.shape)


def orthogonalize_batch(X: Tensor, plan: Schedule, eps: float) -> Tensor:
    """ORTH on (B, m, n) that is not empty, by kernels where they run."""
    if usable(X.device) and X.dtype in DTYPES:
        from impl.kernels.orthogonalize import orthogonalize as fast

        return fast(X, plan, float(eps))
    with torch.no_grad(), torch.autocast(X.device.type, enabled=False):
        return _orthogonalize(X, plan, eps).to(X.dtype)


def _orthogonalize(X: Tensor, plan: Schedule, eps: float) -> Tensor:
    """The same in float32, or in float64 for float64, by products alone."""
    tall = X.shape[-2] > X.shape[-1]
    X = (X.mT if tall else X).to(torch.float64 if X.dtype == torch.float64 else torch.float32)
    lift, factor = unit_scale(X.abs().amax(dim=(-2, -1), keepdim=True))
    X = (X * lift) * factor
    # One by one, each in memory of its own: a library picks the kernel of a batched product by the batch's size, and a
    # matrix inside a batch is aligned otherwise than alone, so its bits would depend on its company (ORTH-7).
    alone = [x.clone(memory_format=torch.contiguous_format) for x in X]
    gram = [x @ x.mT for x in alone]
    if plan.norm == "schatten4":
        norm = torch.stack([torch.linalg.vector_norm(A) for A in gram]).sqrt()
    else:
        norm = torch.stack([torch.linalg.vector_norm(x) for x in alone])
    norm = (norm.maximum((eps * lift * factor).flatten()) if eps else norm) * plan.margin
    # A norm of NaN stays NaN, and with it the matrix: it must not come out as a harmless zero.
    k = torch.where(norm == 0, norm, 1 / norm)
    done = [iterate(x * k, A * (k * k), plan.coefficients) for x, A, k in zip(alone, gram, k, strict=True)]
    return torch.stack([x.mT for x in done] if tall else done)


def iterate(X: Tensor, A: Tensor, coefficients: tuple[Quintic, ...]) -> Tensor:
    """Apply the quintics, first to last, to X (m, n), whose Gram matrix is A."""
    for step, (a, b, c) in enumerate(coefficients):
        if step:
            A = X @ X.mT
        B = torch.addmm(A, A, A, beta=b, alpha=c)
        X = torch.addmm(X, B, X, beta=a)
    return X


def unit_scale(largest: Tensor) -> tuple[Tensor, Tensor]:
    """A power of two, as two factors, that brings matrices of these largest magnitudes to where theirs are in [2, 4).

    Both factors are needed: the inverse of a subnormal scale overflows, so small matrices are lifted first. Every entry
    is rounded at most once, and only where it falls below the range next to the largest; so X and 2^k X lose alike.
    """
    one = torch.ones_like(largest)
    lift = torch.where(largest < 1, torch.full_like(largest, torch.finfo(largest.dtype).tiny ** -0.5), one)
    largest = torch.where(largest == 0, one, largest * lift)
    # mantissa / largest is an exact power of two; 4 times that is never subnormal, whatever the hardware does with those.
    return lift, 4 * (torch.frexp(largest).mantissa / largest)
