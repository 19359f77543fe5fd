# SPDX-License-Identifier: Apache-2.0
"""Optimizers that take the same steps with a plan, by kernels, and without one, by torch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conformance import accept
from conformance.strategies import tensor
from impl import Layout, Muon
from tests.poison import INTERPRETED

STEPS = 1 if INTERPRETED else 5

Change = Callable[[Muon, int], None]  # what happens before a step


def nothing(optimizer: Muon, step: int) -> None:
    pass


def make(device: torch.device, shapes: Sequence[Any], dtype: torch.dtype = torch.float32, **options: Any) -> Muon:
    """An optimizer with a group for each (shape, options of the group)."""
    groups = []
    for i, (shape, mine) in enumerate(shapes):
        layout = mine.get("layout")
        mine = mine if layout is None else {**mine, "layout": Layout.of(layout)}
        groups.append({"params": [nn.Parameter(tensor(shape, 100 + i).to(device, dtype))], **mine})
    return Muon(groups, **{"lr": 0.02, "ns_coefficients": "jordan", "ns_steps": STEPS, **options})


def random_gradients(shapes: Sequence[Any], steps: int = 3) -> list[list[Tensor | None]]:
    return [[tensor(shape, 10 * step + i) for i, (shape, _) in enumerate(shapes)] for step in range(steps)]


def states(optimizer: Muon, key: str) -> list[Tensor]:
    return [state[key].clone() for state in optimizer.state.values() if key in state]


def accept_alike(fast: Muon, slow: Muon, before: Sequence[Tensor], way: float = 5e-3) -> None:
    """The same momenta to the bit; weights and NorMuon's averages up to the kernels' rounding."""
    __tracebackhide__ = True
    for a, b in zip(states(fast, "momentum_buffer"), states(slow, "momentum_buffer"), strict=True):
        accept.same_bits(actual=a, expected=b)
    for key in ("variance_buffer", "exp_avg", "exp_avg_sq", "step"):
        for a, b in zip(states(fast, key), states(slow, key), strict=True):
            assert accept.distance(a, b) < (1e-2 if key == "variance_buffer" else 1e-6), key
    for a, b, W in zip(weights(fast), weights(slow), before, strict=True):
        size, moved = b.double().norm(), (b.double() - W.double()).norm()
        off = (a.double() - b.double()).norm()
        rounding = torch.finfo(a.dtype).eps * (2 if INTERPRETED else 1) if a.dtype != torch.float32 else 2e-7
        assert off <= way * moved + rounding * size, f"off by {off:.2e} after {moved:.2e}"
        assert moved > 0 or off == 0


def weights(optimizer: Muon) -> list[Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def accept_same_steps(take: Callable, build: Callable[[], Muon], gradients: Any, change: Change = nothing) -> Muon:
    """The steps of the kernels are those of the plain path; returns the optimizer that took them with kernels."""
    __tracebackhide__ = True
    fast, slow = build(), build()
    before = weights(slow)
    take(False, slow, gradients, change)
    take(True, fast, gradients, change)
    accept_alike(fast, slow, before)
    return fast
