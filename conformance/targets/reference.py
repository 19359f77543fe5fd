# SPDX-License-Identifier: Apache-2.0
"""The float64 reference: what it cannot pass, the suite asks wrongly."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

import reference
from conformance.target import Hyper, Named, Unsupported


class Target:
    name = "reference"
    validates = False

    def precision(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64

    def orthogonalize(self, X: Tensor, schedule: Any, steps: int, eps: float) -> Tensor:
        return reference.orthogonalize(X, reference.schedule(schedule, steps), eps).to(X.dtype)

    def optimizer(self, named: Named, hyper: Hyper) -> Optimizer:
        return reference.Muon(named, **self._options(hyper))

    def group(self, named: Named, hyper: Hyper) -> dict[str, Any]:
        return {"params": list(named), **self._options(hyper)}

    def momentum_buffer(self, optimizer: Optimizer, p: Tensor) -> Tensor:
        return optimizer.state[p]["momentum_buffer"]

    def routes(self, model: nn.Module, **options: Any) -> dict[str, tuple[str, Any]]:
        raise Unsupported("the reference has no models")

    def report(self, model: nn.Module, **options: Any) -> str:
        raise Unsupported("the reference has no report")

    def _options(self, hyper: Hyper) -> dict[str, Any]:
        options = dict(vars(hyper))
        options["ns_coefficients"], options["ns_steps"] = options.pop("schedule"), options.pop("steps")
        return options
