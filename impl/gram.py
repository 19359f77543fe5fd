# SPDX-License-Identifier: Apache-2.0
"""Orthogonalization of matrices that no rank holds whole: their Gram matrices are summed over the ranks.   [SPEC: DIST-2]"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from impl.orthogonalize import unit_scale
from impl.schedules import Schedule
from impl.skip import largest


def orthogonalize_parts(
    parts: Sequence[Tensor], counted: Sequence[bool], plan: Schedule, eps: float, group: dist.ProcessGroup
) -> list[Tensor]:
    """This rank's columns of the orthogonalized matrices: one all-reduce of a number for each, one of Gram matrices a quintic.

    Args:
        parts: this rank's columns of each matrix, (k, any number), float32 or float64.
        counted: whether they count; of several copies of the same columns one does.
    """
    sizes = torch.stack([largest(X) for X in parts])
    dist.all_reduce(sizes, dist.ReduceOp.MAX, group=group)
    lift, factor = unit_scale(sizes)
    parts = [(X * up) * by for X, up, by in zip(parts, lift, factor, strict=True)]
    floors = eps * lift * factor
    with torch.autocast(parts[0].device.type, enabled=False):
        for step, (a, b, c) in enumerate(plan.coefficients):
            gram = _gram(parts, counted, group)
            if not step:
                roots = [(torch.linalg.vector_norm(A) if plan.norm == "schatten4" else A.trace()).sqrt() for A in gram]
                norms = torch.stack(roots).maximum(floors) * plan.margin
                scales = torch.where(norms == 0, norms, 1 / norms)
                parts = [X * k for X, k in zip(parts, scales, strict=True)]
                gram = [A * (k * k) for A, k in zip(gram, scales, strict=True)]
            parts = [torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a) for X, A in zip(parts, gram, strict=True)]
    return list(parts)


def _gram(parts: Sequence[Tensor], counted: Sequence[bool], group: dist.ProcessGroup) -> list[Tensor]:
    """X X^T of the whole matrices."""
    mine = [X @ X.mT if counts else X.new_zeros(len(X), len(X)) for X, counts in zip(parts, counted, strict=True)]
    flat = torch.cat([A.flatten() for A in mine])
    dist.all_reduce(flat, group=group)
    return [each.view(A.shape) for each, A in zip(flat.split([A.numel() for A in mine]), mine, strict=True)]
