# SPDX-License-Identifier: Apache-2.0
"""Gradient norms over the whole range of floating point, and clipping that leaves exempt gradients alone.   [SPEC: CLIP]"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from impl.options import algorithms
from impl.stages import pieces

CLIP_NORMS = ("own", "global")
TINY = 2.0**-120  # smaller factors are applied in two parts


class GradNorms(NamedTuple):
    """Norms of the gradients before clipping, float64 tensors of no dimensions; None for one that nothing asked for."""

    total: Tensor | None  # of all gradients
    clipped: Tensor | None  # the one that decides how much is clipped
    threshold: Tensor | None  # of the gradients that are not exempt


class Leaf(NamedTuple):
    """An optimizer that holds parameters, found inside wrappers and containers."""

    optimizer: Any
    exempt: bool  # declared for all its groups
    process_group: dist.ProcessGroup | None  # over which its gradients are shards

    def clips(self) -> bool:
        """Whether anything of it is clipped."""
        return any(clipped(group, self.exempt) != "none" for group in self.optimizer.param_groups)


def leaves(optimizer: Any, process_group: dist.ProcessGroup | None = None) -> list[Leaf]:
    """The optimizers inside one, with what they and the wrappers around them declare.   [SPEC: CLIP-3]

    A container holds members in `.chained_optimizers` or `.optimizers`, a wrapper one in `.optimizer`.
    """
    declared = bool(getattr(optimizer, "skip_grad_norm_clip", False))
    members = getattr(optimizer, "chained_optimizers", getattr(optimizer, "optimizers", None))
    wraps = members is None and hasattr(optimizer, "optimizer")
    if wraps:
        members = [optimizer.optimizer]
    if members is None:
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"expected an optimizer with param_groups, or .optimizer or .optimizers, found {optimizer!r:.80}")
        return [Leaf(optimizer, declared, process_group)]
    if any(getattr(member, "clips_itself", False) for member in members):
        raise ValueError("a chain inside another should have neither clip_grad nor grad_norm_skip_threshold; the outer one has")
    own = getattr(optimizer, "process_groups", [None] * len(members))
    inside = [leaf for member, its in zip(members, own, strict=True) for leaf in leaves(member, its or process_group)]
    if declared and not (wraps and len(inside) == 1) and any(leaf.clips() for leaf in inside):
        raise ValueError(
            f"{type(optimizer).__name__} declares skip_grad_norm_clip but not all of its members do; declare it on each member"
        )
    return [leaf._replace(exempt=leaf.exempt or declared) for leaf in inside]


def norm(T: Tensor, norm_type: float = 2.0) -> Tensor:
    """The vector norm of all entries, in float64, without underflow or overflow on the way.   [SPEC: CLIP-4]"""
    if T.layout != torch.strided:
        raise RuntimeError("sparse gradients have no norm here; declare them exempt, or step them outside the chain")
    if T.numel() == 0:
        return T.new_zeros((), dtype=torch.float64)
    if T.dtype != torch.float64 or norm_type == math.inf:
        # The squares of all other types are normal numbers in float64.
        return torch.linalg.vector_norm(T, norm_type, dtype=torch.float64)
    largest = norm(T, math.inf)
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return unit * torch.linalg.vector_norm(T / unit, norm_type)


def clipped(group: Mapping[str, Any], exempt: bool = False) -> str:
    """What of a group's gradients is clipped, "all", "adamw" sections only, or "none"; `exempt` if its optimizer is."""
    if exempt or group.get("skip_grad_norm_clip", False):
        return "none"
    ours = {"algorithm", "layout"} <= group.keys()
    return "adamw" if ours and algorithms(group) == {"muon", "adamw"} else "all"


def split(group: Mapping[str, Any], exempt: bool, G: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The parts of a gradient that are clipped, and those that are not; views where G is contiguous."""
    what = clipped(group, exempt)
    if what != "adamw":
        return ([G], []) if what == "all" else ([], [G])
    parts = pieces(group, G.contiguous())
    return [T for s, T in parts if s.algorithm == "adamw"], [T for s, T in parts if s.algorithm == "muon"]


def gradients(found: Iterable[Leaf]) -> Iterator[tuple[Mapping[str, Any], bool, Tensor]]:
    """Every gradient once, with its group, and whether its whole optimizer is exempt."""
    seen = set()
    for leaf in found:
        for group in leaf.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is None or id(p) in seen:
                    continue
                seen.add(id(p))
                yield group, leaf.exempt, torch.view_as_real(p.grad) if p.grad.is_complex() else p.grad


def device_of(found: Iterable[Leaf]) -> torch.device:
    """Where norms are: with the first parameter."""
    parameters = (p for leaf in found for group in leaf.optimizer.param_groups for p in group["params"])
    return next((p.device for p in parameters), torch.device("cpu"))


def grad_norms(
    found: Sequence[Leaf], norm_type: float, total: bool, silent: Collection[dist.ProcessGroup | None] = ()
) -> tuple[Tensor, Tensor | None]:
    """The norm of all gradients that are not exempt and, with `total`, of all: float64, on the first parameter's device.

    One all-gather for each process group, but without `total` none for those in `silent`, where all is exempt on all ranks.
    [SPEC: CLIP-6, CLIP-10]
    """
    device = device_of(found)

    def combined(norms: Iterable[Tensor]) -> Tensor:
        alone = [N.to(device, non_blocking=True) for N in norms]
        return norm(torch.stack(alone), norm_type) if alone else torch.zeros((), dtype=torch.float64, device=device)

    results = []
    for process_group in dict.fromkeys(leaf.process_group for leaf in found):
        mine = [leaf for leaf in found if leaf.process_group is process_group]
        parts = [split(*each) for each in gradients(mine)]
        counted = [norm(T, norm_type) for some, _ in parts for T in some]
        exempt = [norm(T, norm_type) for _, others in parts for T in others] if total else []
        both = torch.stack([combined(counted), combined(counted + exempt)])
        if process_group is not None and (total or process_group not in silent):
            everyone = [torch.empty_like(both) for _ in range(dist.get_world_size(process_group))]
            dist.all_gather(everyone, both, group=process_group)
            both = torch.stack([combined(each) for each in torch.stack(everyone, dim=1)])
        results.append(both)
    counted, everything = (combined(each) for each in torch.stack(results, dim=1))
    return counted, everything if total else None


def coefficient(size: Tensor, max_norm: float, floor: float) -> Tensor:
    """What gradients are multiplied with, from the norm that decides; 1 where that is not finite.   [SPEC: CLIP-2]"""
    return torch.where(size.isfinite() & (size > max_norm), (max_norm / size).clamp(min=floor), 1.0)


def scale(found: Iterable[Leaf], factor: Tensor) -> None:
    """Multiply every gradient that is not exempt by `factor`, in place.   [SPEC: CLIP-2]"""
    # Two factors in turn, since one may be too small for the dtype although its product with a huge gradient is not.
    last = torch.where(factor < TINY, TINY, 1.0)
    first = factor / last
    for group, exempt, G in gradients(found):
        if clipped(group, exempt) == "none":
            continue
        whole = G.contiguous()
        for part in split(group, exempt, whole)[0]:
            wide = part.to(torch.promote_types(part.dtype, torch.float32))
            for each in (first, last):
                wide.mul_(each.to(wide.device, wide.dtype, non_blocking=True))
            if wide is not part:
                part.copy_(wide)
        if whole is not G:
            G.copy_(whole)


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
    if isinstance(optimizer, Tensor) or (isinstance(optimizer, Iterable) and not hasattr(optimizer, "param_groups")):
        groups = [optimizer] if isinstance(optimizer, Tensor) else list(optimizer)
        if not all(isinstance(group, Mapping) for group in groups):
            raise TypeError(
                "clip_grad_norm_ takes the optimizer, which knows what is exempt, in place of its parameters; for several "
                "optimizers, a ChainedOptimizer"
            )
        return SimpleNamespace(param_groups=groups)
    return optimizer
