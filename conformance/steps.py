# SPDX-License-Identifier: Apache-2.0
"""Taking steps with a target, and with the reference beside it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from conformance.target import Hyper, Named, Target
from conformance.targets.reference import Target as Reference

# Gradients of one step, None where a parameter has none.
Gradients = Sequence[Tensor | None]


def parameters(weights: Sequence[Tensor], device: torch.device | str = "cpu") -> Named:
    """Fresh parameters named w0, w1, ... with these values."""
    return [(f"w{i}", nn.Parameter(W.clone().to(device))) for i, W in enumerate(weights)]


def take(optimizer: Optimizer, named: Named, gradients: Gradients) -> None:
    """One step with these gradients."""
    for (_, p), G in zip(named, gradients, strict=True):
        p.grad = None if G is None else G.clone().to(p.device, p.dtype)
    optimizer.step()


def run(
    target: Target, weights: Sequence[Tensor], steps: Sequence[Gradients], hyper: Hyper, device: torch.device | str = "cpu"
) -> tuple[list[nn.Parameter], Optimizer]:
    """The parameters and the optimizer after these steps."""
    named = parameters(weights, device)
    optimizer = target.optimizer(named, hyper)
    for gradients in steps:
        take(optimizer, named, gradients)
    return [p for _, p in named], optimizer


def expected(weights: Sequence[Tensor], steps: Sequence[Gradients], hyper: Hyper) -> list[Tensor]:
    """What the weights should be after these steps: the reference on float64 copies."""
    wide = [[None if G is None else G.double() for G in gradients] for gradients in steps]
    return [p.detach() for p in run(Reference(), [W.double() for W in weights], wide, hyper)[0]]
