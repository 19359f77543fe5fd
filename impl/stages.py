# SPDX-License-Identifier: Apache-2.0
"""The stages of a step that act on one parameter: what is computed before the decision, and what is written after it."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from impl.layout import Layout, Section, cut, matrices
from impl.options import lr_scale
from impl.orthogonalize import orthogonalize
from impl.skip import GRADIENT, ORTHOGONALIZATION, largest, scalar
from impl.state import state_dtype

VARIANCE_FLOOR = 1e-8  # added to the root mean square of a row of O, which has no unit


class Prepared(NamedTuple):
    """What a step has computed for one parameter. Nothing is written yet."""

    O: list[Tensor]  # the orthogonalized update of each Muon section, (B, m, n)
    states: list[Tensor]  # the largest magnitudes in what momentum and averages would become
    updates: list[Tensor]  # those in O


def pieces(group: Mapping[str, Any], T: Tensor) -> list[tuple[Section, Tensor]]:
    """The parts of a contiguous tensor of a parameter's shape that are stepped differently, as views."""
    if group["algorithm"] == "adamw":
        return [(Section(T.numel(), algorithm="adamw"), T)]
    return cut(Layout.of(group["layout"]), T)


def sections(group: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[tuple[Section, dict[str, Tensor]]]:
    """Each part of a parameter that is stepped differently, with its views of the parameter's contiguous tensors."""
    parts = [pieces(group, T) for name, T in tensors.items()]
    for views in zip(*parts, strict=True):
        yield views[0][0], dict(zip(tensors, (view for _, view in views), strict=True))


def gradient(group: Mapping[str, Any], p: Tensor, grad_scale: Tensor | float | None) -> Tensor:
    """p's descent gradient in the dtype of its state, contiguous, without the loss scale.   [SPEC: SKIP-9]"""
    assert p.grad is not None
    G = p.grad.to(state_dtype(p)).contiguous()
    if grad_scale is not None:
        G = G / scalar(grad_scale, p.device)
    return -G if group["maximize"] else G


def momentum(M: Tensor, G: Tensor, beta: float, nesterov: bool) -> Tensor:
    """Average G into M in place; return the direction U, which is M itself without `nesterov`.   [SPEC: MOM-1, MOM-2]"""
    # Not lerp, whose difference of M and G overflows where both are huge and of opposite sign.
    new = G * (1 - beta)
    M.mul_(beta).add_(new)
    return new.add_(M * beta) if nesterov else M


def normalize_rows(O: Tensor, V: Tensor, beta2: float) -> Tensor:
    """Average the mean squares of O's rows into V in place; return O with rows divided by their roots.   [SPEC: VAR-1]

    Args:
        O: (B, m, n), contiguous.  V: (B, m, 1).  beta2: decay rate of V.

    Source: NorMuon, Li et al. 2025, arXiv:2510.05491.
    """
    result = torch.empty_like(O)
    for o, v, out in zip(O, V, result, strict=True):  # one by one, so that no sum depends on the others' number (VAR-4)
        v.mul_(beta2).add_(o.square().mean(-1, keepdim=True) * (1 - beta2))
        N = o / (v.sqrt() + VARIANCE_FLOOR)
        size = torch.linalg.vector_norm(N)
        torch.mul(N, torch.where(size == 0, size, torch.linalg.vector_norm(o) / size), out=out)
    return result


def prepare(group: Mapping[str, Any], p: Tensor, state: Mapping[str, Tensor], G: Tensor, check: bool) -> Prepared:
    """MOM and ORTH of one parameter, and with `check` what the decision depends on."""
    O, states = [], []
    averages = {key: value for key, value in state.items() if key not in ("step", "variance_buffer")}
    for section, part in sections(group, {"G": G, **averages}):
        if section.algorithm == "muon":
            M = part["momentum_buffer"].clone()
            U = momentum(M, part["G"], group["momentum"], group["nesterov"])
            O.append(orthogonalize(matrices(section, U), group["ns_coefficients"], group["ns_steps"], group["eps"]))
            states += [largest(M)] if check else []
        elif check:
            # Bounds of what the averages will be.
            beta2 = group["adamw_betas"][1]
            states += [
                largest(part["G"]).square() * (1 - beta2) + largest(part["exp_avg_sq"]) * beta2,
                largest(part["exp_avg"]),
            ]
    return Prepared(O, states, [largest(o) for o in O] if check else [])


def apply(
    group: Mapping[str, Any], p: Tensor, state: dict[str, Tensor], G: Tensor, O: list[Tensor], code: Tensor | None
) -> None:
    """VAR to STEP of one parameter, in the precision of its state, rounded once; `code` is the decision.   [SPEC: STEP-11]"""
    # In float64, so that 1 - lr * weight_decay is right whatever the dtype of a tensor lr.
    lr = group["lr"].reshape(()).double() if isinstance(group["lr"], Tensor) else group["lr"]
    W = p.to(state_dtype(p), copy=code is not None).contiguous()
    new = dict(state) if code is None else {key: value.clone() for key, value in state.items()}
    if "step" in new:
        new["step"].add_(1)
    updates = iter(O)
    for section, part in sections(group, {"W": W, "G": G, **{key: T for key, T in new.items() if key != "step"}}):
        if section.algorithm == "muon":
            momentum(part["momentum_buffer"], part["G"], group["momentum"], group["nesterov"])
            update = next(updates)
            if "variance_buffer" in part and update.numel():
                V = matrices(section, part["variance_buffer"]).clone()
                update = normalize_rows(update, V, group["normuon_beta2"])
                part["variance_buffer"].copy_(V.reshape(part["variance_buffer"].shape))
            scale = lr_scale(update.shape[-2], update.shape[-1], group["adjust_lr_fn"])
            part["W"].mul_(1 - lr * group["weight_decay"])
            # A product, then a difference: each rounded by itself, so an entry's bits do not depend on its position.
            part["W"].sub_(update.reshape(part["W"].shape) * (lr * scale))
        else:
            step_adamw(group, part, new["step"], lr * group["adamw_lr_ratio"])
    if code is None:
        if W is not p:
            p.copy_(W)
        return
    code = code.to(p.device, non_blocking=True)
    p.copy_(torch.where(code >= ORTHOGONALIZATION, p, W))
    for key, old in state.items():
        kept = code >= (GRADIENT if key == "momentum_buffer" else ORTHOGONALIZATION)
        torch.where(kept, old, new[key], out=old)


def step_adamw(group: Mapping[str, Any], part: Mapping[str, Tensor], step: Tensor, lr: float | Tensor) -> None:
    """Step a section with AdamW in place; `step` counts its steps, this one included.   [SPEC: STEP-8]

    torch's own functional form reads the count on the host, or else, where it is capturable, divides by the learning rate.
    """
    beta1, beta2 = group["adamw_betas"]
    W, G, exp_avg, exp_avg_sq = part["W"], part["G"], part["exp_avg"], part["exp_avg_sq"]
    # Sums of products, each rounded by itself, so an entry's bits do not depend on its position.
    exp_avg.mul_(beta1).add_(G * (1 - beta1))
    exp_avg_sq.mul_(beta2).add_(G * G * (1 - beta2))
    steps = step.double()
    mean = exp_avg / (1 - beta1**steps)
    deviation = (exp_avg_sq / (1 - beta2**steps)).sqrt_()
    W.mul_(1 - lr * group["weight_decay"])
    W.sub_(mean / deviation.add_(group["adamw_eps"]) * lr)
