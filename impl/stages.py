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

    M: list[Tensor]  # the momentum of each Muon section, shaped as its view
    O: list[Tensor]  # and its orthogonalized update, (B, m, n)
    states: list[Tensor]  # the largest magnitudes in what momentum and averages would become
    updates: list[Tensor]  # those in O
    planned: bool = False  # whether its matrices are stepped by kernels (plan.py), and here is AdamW's part alone


def pieces(group: Mapping[str, Any], T: Tensor) -> list[tuple[Section, Tensor]]:
    """The parts of a contiguous tensor of a parameter's shape that are stepped differently, as views."""
    if group["algorithm"] == "adamw":
        return [(Section(T.numel(), algorithm="adamw"), T)]
    return cut(Layout.of(group["layout"]), T)


def sections(
    group: Mapping[str, Any], tensors: Mapping[str, Tensor], planned: bool = False
) -> Iterator[tuple[Section, dict[str, Tensor]]]:
    """Each part of a parameter that is stepped differently, with its views of the parameter's contiguous tensors.

    With `planned`, AdamW's parts alone.
    """
    parts = [pieces(group, T) for T in tensors.values()]
    for views in zip(*parts, strict=True):
        section = views[0][0]
        if not (planned and section.algorithm == "muon"):
            yield section, dict(zip(tensors, (view for _, view in views), strict=True))


def gradient(group: Mapping[str, Any], p: Tensor, grad_scale: Tensor | float | None) -> Tensor:
    """p's descent gradient in the dtype of its state, contiguous, without the loss scale.   [SPEC: SKIP-9]"""
    assert p.grad is not None
    return descent(group, p.grad, state_dtype(p), grad_scale).contiguous()


def descent(group: Mapping[str, Any], G: Tensor, dtype: torch.dtype, grad_scale: Tensor | float | None) -> Tensor:
    """A gradient without the loss scale, in the direction that is to be descended.   [SPEC: SKIP-9, MOM-5]"""
    G = G.to(dtype)
    if grad_scale is not None:
        G = G / scalar(grad_scale, G.device)
    return -G if group["maximize"] else G


def number(option: Any) -> Any:
    """An option that may be a tensor of one element, to be calculated with.

    It has no dimensions then, and is in float64, so that 1 - lr * weight_decay is right whatever the dtype of a tensor.
    """
    return option.reshape(()).double() if isinstance(option, Tensor) else option


def descend(group: Mapping[str, Any], W: Tensor, O: Tensor, scale: float) -> Tensor:
    """A part's new weight, in W's precision.   [SPEC: DECAY-1]"""
    lr = number(group["lr"])
    # Products, then a difference: each rounded by itself, so an entry's bits do not depend on its position.
    return (W * (1 - lr * number(group["weight_decay"]))).sub_(O * (lr * scale))


def momentum(M: Tensor, G: Tensor, beta: float | Tensor, nesterov: bool) -> tuple[Tensor, Tensor]:
    """The new average and the direction: (M, U), which are one tensor without `nesterov`.   [SPEC: MOM-1, MOM-2]"""
    beta = number(beta)
    # Not lerp, whose difference of M and G overflows where both are huge and of opposite sign.
    new = G * (1 - beta)
    M = (M * beta).add_(new)
    return M, new.add_(M * beta) if nesterov else M


def normalize_rows(O: Tensor, V: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """Rows over the root of their average mean square, each matrix as large as before: (O, V).   [SPEC: VAR-1]

    Args:
        O: (B, m, n), n > 0.  V: (B, m, 1).  beta2: decay rate of V.

    Source: NorMuon, Li et al. 2025, arXiv:2510.05491.
    """
    O, V = O.clone(), V.clone()
    for o, v in zip(O, V, strict=True):  # one by one, so that no sum depends on the others' number (VAR-4)
        v.mul_(beta2).add_(o.square().mean(-1, keepdim=True) * (1 - beta2))
        N = o / (v.sqrt() + VARIANCE_FLOOR)
        size = torch.linalg.vector_norm(N)
        torch.mul(N, torch.where(size == 0, size, torch.linalg.vector_norm(o) / size), out=o)
    return O, V


def adamw(group: Mapping[str, Any], part: Mapping[str, Tensor], step: Tensor, lr: float | Tensor) -> dict[str, Tensor]:
    """The new weight and averages of a section; `step` counts its steps, this one included.   [SPEC: STEP-8]

    torch's own functional form reads the count on the host, or else, where it is capturable, divides by the learning rate.
    """
    beta1, beta2 = group["adamw_betas"]
    # Sums of products, each rounded by itself, so an entry's bits do not depend on its position.
    exp_avg = (part["exp_avg"] * beta1).add_(part["G"] * (1 - beta1))
    exp_avg_sq = (part["exp_avg_sq"] * beta2).add_(part["G"] * part["G"] * (1 - beta2))
    steps = step.double()
    mean = exp_avg / (1 - beta1**steps)
    deviation = (exp_avg_sq / (1 - beta2**steps)).sqrt_()
    W = part["W"] * (1 - lr * number(group["weight_decay"]))
    W.sub_(mean.div_(deviation.add_(group["adamw_eps"])).mul_(lr))
    return {"W": W, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def adamw_magnitudes(group: Mapping[str, Any], G: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> list[Tensor]:
    """What AdamW's averages to come are no larger than, which costs no memory; not finite if they might not be."""
    beta2 = group["adamw_betas"][1]
    return [largest(G).square() * (1 - beta2) + largest(exp_avg_sq) * beta2, largest(exp_avg)]


def prepare(
    group: Mapping[str, Any], p: Tensor, state: Mapping[str, Tensor], G: Tensor, check: bool, planned: bool
) -> Prepared:
    """MOM and ORTH of one parameter, and with `check` what the decision depends on; with `planned`, of AdamW's part only."""
    prepared = Prepared([], [], [], [], planned)
    averages = {key: value for key, value in state.items() if key not in ("step", "variance_buffer")}
    for section, part in sections(group, {"G": G, **averages}, planned):
        if section.algorithm == "muon":
            M, U = momentum(part["momentum_buffer"], part["G"], group["momentum"], group["nesterov"])
            O = orthogonalize(matrices(section, U), group["ns_coefficients"], group["ns_steps"], group["eps"])
            prepared.M.append(M)
            prepared.O.append(O)
            prepared.states.extend([largest(M)] if check else [])
            prepared.updates.extend([largest(O)] if check else [])
        elif check:
            prepared.states.extend(adamw_magnitudes(group, part["G"], part["exp_avg"], part["exp_avg_sq"]))
    return prepared


def apply(
    group: Mapping[str, Any], p: Tensor, state: Mapping[str, Tensor], G: Tensor | None, prepared: Prepared, code: Tensor | None
) -> None:
    """VAR to STEP of one parameter, in the precision of its state, rounded once.   [SPEC: STEP-11]

    Args:
        G: the gradient, which only AdamW needs.
        code: the decision, or None where there was nothing to decide.
    """
    skip = hold = None
    if code is not None:
        code = code.to(p.device, non_blocking=True)
        skip, hold = code >= ORTHOGONALIZATION, code >= GRADIENT
    W = p.to(state_dtype(p)).contiguous()
    step = state["step"] + 1 if "step" in state else None
    muon = zip(prepared.M, prepared.O, strict=True)
    tensors = {"W": W, **{key: value for key, value in state.items() if key != "step"}} | ({} if G is None else {"G": G})
    for section, part in sections(group, tensors, prepared.planned):
        if section.algorithm == "muon":
            M, O = next(muon)
            write(part["momentum_buffer"], M, hold)
            if "variance_buffer" in part and O.numel():
                O, V = normalize_rows(O, matrices(section, part["variance_buffer"]), group["normuon_beta2"])
                write(part["variance_buffer"], V.reshape(part["variance_buffer"].shape), skip)
            scale = lr_scale(O.shape[-2], O.shape[-1], group["adjust_lr_fn"])
            write(part["W"], descend(group, part["W"], O.reshape(part["W"].shape), scale), skip)
        else:
            assert step is not None
            for key, value in adamw(group, part, step, number(group["lr"]) * group["adamw_lr_ratio"]).items():
                write(part[key], value, skip)
    if step is not None:
        write(state["step"], step, skip)
    if W is not p:
        p.copy_(W)


def write(old: Tensor, new: Tensor, keep: Tensor | None) -> None:
    """Let `old` become `new`, unless `keep`, which is a tensor so that nobody waits for it."""
    if keep is None:
        old.copy_(new)
    else:
        torch.where(keep, old, new, out=old)
