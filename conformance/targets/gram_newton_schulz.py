# SPDX-License-Identifier: Apache-2.0
"""gram-newton-schulz: `pip install gram-newton-schulz`. Its orthogonalization alone, on torch's products, not compiled."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from contextlib import AbstractContextManager
from typing import Any

import gram_newton_schulz
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from conformance.target import Hyper, Named, Partial, Unsupported

EPS = 1e-7  # its default
JORDAN = [3.4445, -4.7750, 2.0315]


class Target(Partial):
    name = "gram_newton_schulz"
    validates = False
    skips = False
    shards = False

    def precision(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return torch.float16

    def orthogonalize(self, X: Tensor, schedule: Any, steps: int, eps: float) -> Tensor:
        function = gram_newton_schulz.GramNewtonSchulz(
            ns_epsilon=eps or EPS, ns_use_kernels=False, ns_coefficients=_coefficients(schedule, steps), compile_kwargs=None
        )
        return function(X)

    def optimizer(self, named: Named, hyper: Hyper, process_group: Any = None, replicas: Any = None) -> Optimizer:
        raise Unsupported("its orthogonalization alone is held to SPEC.md")

    def group(self, named: Named, hyper: Hyper) -> dict[str, Any]:
        raise Unsupported("its orthogonalization alone is held to SPEC.md")

    def momentum_buffer(self, optimizer: Optimizer, p: Tensor) -> Tensor:
        raise Unsupported("its orthogonalization alone is held to SPEC.md")

    def orthogonalizing(self, poison: float | None) -> AbstractContextManager[list[torch.Size]]:
        raise Unsupported("it has no optimizer here")


def _coefficients(schedule: Any, steps: int) -> list[Any]:
    """Its users hand over a quintic for every step; its own `polar_express` has another margin than SPEC.md's."""
    if schedule == "jordan":
        return [JORDAN] * steps
    if (schedule, steps) == ("you", 5):
        return gram_newton_schulz.YOU_COEFFICIENTS
    if isinstance(schedule, str):
        raise Unsupported(f"it has no schedule {schedule} of {steps} steps")
    return [schedule] * steps if isinstance(schedule[0], float) else list(schedule)
