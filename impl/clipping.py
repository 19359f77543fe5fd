# SPDX-License-Identifier: Apache-2.0
"""Clipping that leaves exempt gradients alone.   [SPEC: CLIP]"""

import math
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from impl.norms import GradNorms, Leaf, clipped, grad_norms, gradients, leaves

CLIP_NORMS = ("own", "global")
TINY = 2.0**-120  # smaller factors are applied in two parts


def coefficient(size: Tensor, max_norm: float, floor: float) -> Tensor:
    """What gradients are multiplied with, from the norm that decides; 1 where that is not finite.   [SPEC: CLIP-2]"""
    return torch.where(size.isfinite() & (size > max_norm), (max_norm / size).clamp(min=floor), 1.0)


def scale(found: Iterable[Leaf], factor: Tensor) -> None:
    """Multiply every gradient that is not exempt by `factor`, in place.   [SPEC: CLIP-2]"""
    # Two factors in turn, since one may be too small for the dtype although its product with a huge gradient is not.
    last = torch.where(factor < TINY, TINY, 1.0)
    first = factor / last
    for each in gradients(found):
        if clipped(each.group, each.exempt) == "none":
            continue
        whole = each.G.contiguous()
        for part in each.split(whole, each.p.grad)[0]:
            wide = part.to(torch.promote_types(part.dtype, torch.float32))
            for power in (first, last):
                wide.mul_(power.to(wide.device, wide.dtype, non_blocking=True))
            if wide is not part:
                part.copy_(wide)
        if whole is not each.G:
            each.G.copy_(whole)


def check_policy(name: str, max_norm: float | None, clip_norm: str, floor: float, norm_type: float = 2.0) -> None:
    """Raise ValueError for a clip policy that means nothing; `name` is what the caller calls the norm.   [SPEC: CLIP-9]"""
    if max_norm is not None and not max_norm >= 0:
        raise ValueError(f"{name} should be >= 0 but is: {max_norm}")
    if clip_norm not in CLIP_NORMS:
        raise ValueError(f"clip_norm should be one of {CLIP_NORMS} but is: {clip_norm!r}")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor should be in [0, 1] but is: {floor}")
    if norm_type not in (2, math.inf):
        raise ValueError(f"norm_type should be 2 or inf but is: {norm_type}")


@torch.no_grad()
def clip_grad_norm_(
    optimizer: Any,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    clip_norm: str = "own",
    floor: float = 0.0,
    process_group: dist.ProcessGroup | None = None,
) -> GradNorms:
    """Clip gradients by their norm as torch.nn.utils.clip_grad_norm_ does, except those that are exempt.   [SPEC: CLIP]

    Args:
        optimizer: whose gradients to clip, in place; or a list of parameter groups. It knows what is exempt.
        max_norm: the norm that gradients are brought down to, in their unit.
        norm_type: 2, or inf for the largest magnitude.
        error_if_nonfinite: raise RuntimeError if the total is not finite; waits for the device.
        clip_norm: "own" for the norm of what is clipped, "global" for that of all gradients.
        floor: the smallest factor that gradients are multiplied with.
        process_group: over which the gradients are shards.

    Returns:
        The norms before clipping, on the device. Nothing is scaled if `clipped` is not finite.

    Raises:
        TypeError: parameters in place of their optimizer.
        ValueError: an option outside its range.
    """
    check_policy("max_norm", max_norm, clip_norm, floor, norm_type)
    found = leaves(_with_groups(optimizer), process_group)
    threshold, total = grad_norms(found, norm_type, total=True)
    if error_if_nonfinite and not bool(torch.as_tensor(total).isfinite()):
        raise RuntimeError(f"the total norm of order {norm_type} of the gradients is {total}, so they cannot be clipped")
    deciding = threshold if clip_norm == "own" else torch.as_tensor(total)
    scale(found, coefficient(deciding, max_norm, floor))
    return GradNorms(total, deciding, threshold)


def _with_groups(optimizer: Any) -> Any:
    """An optimizer as it is; a list of groups as something that has them."""
    holds = any(hasattr(optimizer, name) for name in ("param_groups", "optimizer", "optimizers", "chained_optimizers"))
    if isinstance(optimizer, Tensor) or (isinstance(optimizer, Iterable) and not holds):
        groups = [optimizer] if isinstance(optimizer, Tensor) else list(optimizer)
        if not all(isinstance(group, Mapping) for group in groups):
            raise TypeError(
                "clip_grad_norm_ takes the optimizer, which knows what is exempt, in place of its parameters; for several "
                "optimizers, a ChainedOptimizer"
            )
        return SimpleNamespace(param_groups=groups)
    return optimizer
