# SPDX-License-Identifier: Apache-2.0
"""What the suite asks of an implementation. `--target=package.module:Name` names a class with these members.

An adapter translates SPEC.md's units into its implementation's own and raises `Unsupported` for what that does not
offer; the closing table then says "unsupported", never "passed". Nothing registers: any importable class will do.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

Named = Sequence[tuple[str, nn.Parameter]]


class Unsupported(Exception):
    """The implementation offers nothing like this; the clause does not apply to it."""


@dataclass(frozen=True)
class Hyper:
    """Every option of SPEC.md, in its units; there are no defaults, so that nothing is compared by accident."""

    lr: float | Tensor
    weight_decay: float
    momentum: float
    nesterov: bool
    schedule: Any
    steps: int
    eps: float
    adjust_lr_fn: str | None
    algorithm: str
    layout: dict[str, Any] | None
    adamw_lr_ratio: float
    adamw_betas: tuple[float, float]
    adamw_eps: float
    maximize: bool


class Target(Protocol):
    """The adapter of one implementation."""

    name: str
    validates: bool  # whether it checks its arguments; if not, clauses on refusals are unsupported

    def precision(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype whose rounding limits an orthogonalization of a `dtype` matrix."""
        ...

    def orthogonalize(self, X: Tensor, schedule: Any, steps: int, eps: float) -> Tensor:
        """ORTH on (m, n) or (B, m, n)."""
        ...

    def optimizer(self, named: Named, hyper: Hyper) -> Optimizer:
        """An optimizer with one group."""
        ...

    def group(self, named: Named, hyper: Hyper) -> dict[str, Any]:
        """A dict for its `add_param_group`."""
        ...

    def momentum_buffer(self, optimizer: Optimizer, p: Tensor) -> Tensor:
        """M of a parameter, in MOM-1's convention."""
        ...

    def routes(self, model: nn.Module, **options: Any) -> dict[str, tuple[str, Any]]:
        """Parameter name -> (algorithm, plain layout or None); `options` are `head` and `overrides` of ROUTE."""
        ...

    def report(self, model: nn.Module, **options: Any) -> str:
        """The routing report of an optimizer over the model."""
        ...


def load(path: str) -> Target:
    """The target that `package.module:Name` names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)()
