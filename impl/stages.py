# SPDX-License-Identifier: Apache-2.0
"""The stages of a step that act on one parameter: its parts, its gradient, MOM, and AdamW's whole step."""

from typing import Any

from torch import Tensor
from torch.optim.adamw import adamw

from impl.layout import Layout, Section, cut
from impl.state import state_dtype


def pieces(group: dict[str, Any], T: Tensor) -> list[tuple[Section, Tensor]]:
    """The parts of a contiguous tensor of a parameter's shape that are stepped differently, as views."""
    if group["algorithm"] == "adamw":
        return [(Section(T.numel(), algorithm="adamw"), T)]
    return cut(Layout.of(group["layout"]), T)


def gradient(group: dict[str, Any], p: Tensor) -> Tensor:
    """p's descent gradient in the dtype of its state, contiguous."""
    assert p.grad is not None
    G = p.grad.to(state_dtype(p)).contiguous()
    return -G if group["maximize"] else G


def momentum(M: Tensor, G: Tensor, beta: float, nesterov: bool) -> Tensor:
    """Average G into M in place; return the direction U, which is M itself without `nesterov`.   [SPEC: MOM-1, MOM-2]"""
    # Not lerp, whose difference of M and G overflows where both are huge and of opposite sign.
    new = G * (1 - beta)
    M.mul_(beta).add_(new)
    return new.add_(M * beta) if nesterov else M


def step_adamw(group: dict[str, Any], state: dict[str, Any], W: Tensor, G: Tensor, lr: float | Tensor) -> None:
    """Step the AdamW sections of W in place with torch's own AdamW.   [SPEC: STEP-8]"""
    weights, gradients, exp_avg, exp_avg_sq = (
        [view for section, view in pieces(group, T) if section.algorithm == "adamw"]
        for T in (W, G, state["exp_avg"], state["exp_avg_sq"])
    )
    # torch counts a step for every tensor it is given; the sections of one parameter share one count.
    steps = [state["step"].clone() for _ in weights]
    beta1, beta2 = group["adamw_betas"]
    options = {"beta1": beta1, "beta2": beta2, "lr": lr, "weight_decay": group["weight_decay"], "eps": group["adamw_eps"]}
    adamw(weights, gradients, exp_avg, exp_avg_sq, [], steps, foreach=False, amsgrad=False, maximize=False, **options)
    state["step"].add_(1)
