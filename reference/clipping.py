# SPDX-License-Identifier: Apache-2.0
"""Clipping, which leaves alone the gradients of which only the direction counts.   [SPEC: CLIP]"""

from math import hypot, inf, isnan, nan
from typing import NamedTuple

import torch

from .muon import rounded
from .optimizer import Muon, parts
from .polar import float64


class GradNorms(NamedTuple):
    """Of all gradients, of those that decide, of those that are not exempt; None where it was not computed."""

    total: float | None
    clipped: float | None
    threshold: float | None


class Piece(NamedTuple):
    """The entries of a parameter at `index` of its flattened form, all exempt or none."""

    parameter: torch.Tensor
    index: torch.Tensor | slice
    exempt: bool


def norm(gradients, norm_type=2.0):
    """The 2-norm, or for norm_type=inf the largest magnitude, of all entries in their unit.   [SPEC: CLIP-4]

    NaN where there is one, else infinity where there is one; 0 of nothing.
    """
    entries = [x for G in gradients for x in float64(G).flatten().tolist()]
    if any(map(isnan, entries)):
        return nan
    return hypot(*entries) if norm_type == 2 else max(map(abs, entries), default=0.0)


def clip_coefficient(clipped, max_norm, floor):
    """The factor on gradients that are not exempt.   [SPEC: CLIP-2]"""
    if not 0 < clipped < inf:  # zeros stay zeros, and what is not finite no factor mends
        return 1.0
    return max(floor, min(1.0, max_norm / clipped))


def pieces(optimizer, exempt=False):
    """Each Piece of what an optimizer, a wrapper (`exempt` if the one around it is) or a container steps.   [SPEC: CLIP-3]"""
    members = getattr(optimizer, "optimizers", getattr(optimizer, "chained_optimizers", None))
    if members is not None:
        for member in members:
            yield from pieces(member)
        return
    exempt = exempt or getattr(optimizer, "skip_grad_norm_clip", False)
    if hasattr(optimizer, "optimizer"):
        yield from pieces(optimizer.optimizer, exempt)
        return
    for group in optimizer.param_groups:
        declared = exempt or group.get("skip_grad_norm_clip", False)
        for W in group["params"]:
            cut = parts(W, group) if isinstance(optimizer, Muon) else []
            if {algorithm for algorithm, _ in cut} == {"muon", "adamw"}:
                yield from (Piece(W, index.flatten(), declared or algorithm == "muon") for algorithm, index in cut)
            else:
                yield Piece(W, slice(None), declared)


def gradients(found):
    """The flattened gradients of pieces, where there are any."""
    return [W.grad.flatten()[index] for W, index, _ in found if W.grad is not None]


def multiply(found, coefficient):
    """Multiply the gradients of pieces in place, rounding once; by 1 not even a NaN changes its bits.   [SPEC: CLIP-2]"""
    for W, index, _ in found:
        if W.grad is not None and coefficient != 1:
            G = W.grad.detach().flatten()
            G[index] = rounded(coefficient * float64(G[index]), G.dtype)
            W.grad.detach().copy_(G.reshape(W.grad.shape))


def clip_grad_norm_(optimizer, max_norm, norm_type=2.0, *, clip_norm="own", floor=0.0):
    """Clip the gradients that are not exempt, in place: GradNorms of before.   [SPEC: CLIP-1, CLIP-2, CLIP-5, CLIP-6]

    Args: optimizer: optimizer, wrapper or container.  max_norm: in the unit of the gradients.  norm_type: 2 or inf.
        clip_norm: "own" or "global", the norm that decides.  floor: of the coefficient.
    """
    found = list(pieces(optimizer))
    own = [piece for piece in found if not piece.exempt]
    total, threshold = norm(gradients(found), norm_type), norm(gradients(own), norm_type)
    clipped = total if clip_norm == "global" else threshold
    multiply(own, clip_coefficient(clipped, max_norm, floor))
    return GradNorms(total, clipped, threshold)


class ChainedOptimizer:
    """Optimizers, wrappers or containers that step together or not at all, clipped together.   [SPEC: CLIP-7, CLIP-8]

    Args: clip_grad: max_norm, or None.  grad_norm_skip_threshold: above it, or at NaN, the threshold norm skips a step.
        log_grad_norm: compute the total in any case.  The others as in clip_grad_norm_.
    Attributes: norms: GradNorms of the last step, before clipping.  skipped: the number of steps not taken.
    """

    def __init__(
        self, optimizers, clip_grad=None, grad_norm_skip_threshold=inf, *, clip_norm="own", floor=0.0, log_grad_norm=False
    ):
        self.optimizers, self.clip_grad, self.clip_norm, self.floor = list(optimizers), clip_grad, clip_norm, floor
        self.grad_norm_skip_threshold, self.log_grad_norm = grad_norm_skip_threshold, log_grad_norm
        self.norms, self.skipped = GradNorms(None, None, None), 0

    def zero_grad(self, set_to_none=True):
        """Of every member."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        """Decide, clip, step every member; return what the closure, evaluated once before all, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = list(pieces(self))
        own = [piece for piece in found if not piece.exempt]
        skips = bool(own) and self.grad_norm_skip_threshold < inf
        clips = bool(own) and self.clip_grad is not None
        by_total = self.clip_norm == "global"

        total = norm(gradients(found)) if (clips and by_total) or self.log_grad_norm else None
        threshold = norm(gradients(own)) if (clips and not by_total) or skips else None
        clipped = total if by_total else threshold
        self.norms = GradNorms(total, clipped, threshold)
        if skips and not threshold <= self.grad_norm_skip_threshold:  # type: ignore[operator]
            self.skipped += 1
            return loss
        if clips:
            multiply(own, clip_coefficient(clipped, self.clip_grad, self.floor))
        for optimizer in self.optimizers:
            optimizer.step()
        return loss
