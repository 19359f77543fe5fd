# SPDX-License-Identifier: Apache-2.0
"""Whose gradients there are, what of them is exempt from clipping, and their norms, over all ranks.   [SPEC: CLIP, DIST-7]"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from impl.layout import Layout
from impl.options import algorithms
from impl.placement import group_of, local, own_gradient, own_sections
from impl.stages import pieces


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


def clipped(group: Mapping[str, Any], exempt: bool = False) -> str:
    """What of a group's gradients is clipped, "all", "adamw" sections only, or "none"; `exempt` if its optimizer is."""
    if exempt or group.get("skip_grad_norm_clip", False):
        return "none"
    ours = {"algorithm", "layout"} <= group.keys()
    return "adamw" if ours and algorithms(group) == {"muon", "adamw"} else "all"


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


class Gradient(NamedTuple):
    """This rank's part of a gradient, which may have to be summed over ranks still, and whose it is."""

    group: Mapping[str, Any]
    exempt: bool  # its whole optimizer
    p: Tensor
    G: Tensor

    def split(self, G: Tensor, whole: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """The parts of G, this rank's part of `whole`, that are clipped, and those that are not; views if it is contiguous."""
        what = clipped(self.group, self.exempt)
        if what != "adamw":
            return ([G], []) if what == "all" else ([], [G])
        G = G.contiguous()
        if isinstance(whole, DTensor):
            parts = own_sections(whole, Layout.of(self.group["layout"]), G)
        else:
            parts = [(section.algorithm, T) for section, T in pieces(self.group, G)]
        return [T for algorithm, T in parts if algorithm == "adamw"], [T for algorithm, T in parts if algorithm == "muon"]


def gradients(found: Iterable[Leaf]) -> Iterator[Gradient]:
    """Every gradient once."""
    seen = set()
    for leaf in found:
        for group in leaf.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is None or id(p) in seen:
                    continue
                seen.add(id(p))
                G = local(p.grad)
                yield Gradient(group, leaf.exempt, p, torch.view_as_real(G) if G.is_complex() else G)


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
    for process_group, (mine, loud) in _by_ranks(found, silent).items():
        parts = [each.split(counted(each), each.p) for each in mine]
        some = [norm(T, norm_type) for clip, _ in parts for T in clip]
        exempt = [norm(T, norm_type) for _, others in parts for T in others] if total else []
        both = torch.stack([combined(some), combined(some + exempt)])
        if process_group is not None and (total or loud):
            everyone = [torch.empty_like(both) for _ in range(dist.get_world_size(process_group))]
            dist.all_gather(everyone, both, group=process_group)
            both = torch.stack([combined(each) for each in torch.stack(everyone, dim=1)])
        results.append(both)
    threshold, everything = (combined(each) for each in torch.stack(results, dim=1))
    return threshold, everything if total else None


def _by_ranks(
    found: Sequence[Leaf], silent: Collection[dist.ProcessGroup | None]
) -> dict[dist.ProcessGroup | None, tuple[list[Gradient], bool]]:
    """The gradients on each set of ranks, and whether anything of them is clipped on any of these: known to all of these."""
    there = {id(each.p): each for each in gradients(found)}
    same: dict[Any, dist.ProcessGroup | None] = {}
    sorted_: dict[dist.ProcessGroup | None, tuple[list[Gradient], bool]] = {}

    def add(process_group: dist.ProcessGroup | None, loud: bool, some: Iterable[Gradient] = ()) -> None:
        """To the first process group of the same ranks."""
        ranks = None if process_group is None else tuple(dist.get_process_group_ranks(process_group))
        first = same.setdefault(ranks, process_group)
        mine, known = sorted_.get(first, ([], False))
        mine.extend(some)
        sorted_[first] = mine, known or loud

    for leaf in found:
        add(leaf.process_group, leaf.process_group not in silent)
        for group in leaf.optimizer.param_groups:
            loud = clipped(group, leaf.exempt) != "none"
            for p in group["params"]:
                some = [there.pop(id(p))] if id(p) in there else []
                add(group_of(p, leaf.process_group), loud and isinstance(p, DTensor), some)
    return sorted_


def counted(each: Gradient) -> Tensor:
    """The entries of a gradient that this rank counts: of those that several ranks hold, one rank counts them."""
    p, own = each.p, own_gradient(each.p)
    if not isinstance(p, DTensor) or own is None:
        return each.G
    own = torch.view_as_real(own) if own.is_complex() else own
    at = p.device_mesh.get_coordinate() or ()
    if any(index and place.is_replicate() for index, place in zip(at, p.placements, strict=True)):
        return own[:0] if own.ndim else own.new_empty(0)
    return own
