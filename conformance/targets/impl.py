# SPDX-License-Identifier: Apache-2.0
"""This repository's implementation."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

import impl
from conformance.target import Hyper, Named


class Target:
    name = "impl"
    validates = True

    def precision(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype == torch.float64 else torch.float32

    def orthogonalize(self, X: Tensor, schedule: Any, steps: int, eps: float) -> Tensor:
        return impl.orthogonalize(X, schedule, steps, eps)

    def optimizer(self, named: Named, hyper: Hyper) -> Optimizer:
        return impl.Muon(named, **self._options(hyper))

    def group(self, named: Named, hyper: Hyper) -> dict[str, Any]:
        return {"params": list(named), **self._options(hyper)}

    def momentum_buffer(self, optimizer: Optimizer, p: Tensor) -> Tensor:
        return optimizer.state[p]["momentum_buffer"]

    def routes(self, model: nn.Module, **options: Any) -> dict[str, tuple[str, Any]]:
        return {
            name: (group["algorithm"], group["layout"] and asdict(group["layout"]))
            for group in impl.param_groups(model, **options)
            for name, _ in group["params"]
        }

    def report(self, model: nn.Module, **options: Any) -> str:
        return impl.Muon(impl.param_groups(model, **options)).report()

    def _options(self, hyper: Hyper) -> dict[str, Any]:
        options = dict(vars(hyper))
        options["ns_coefficients"], options["ns_steps"] = options.pop("schedule"), options.pop("steps")
        options["layout"] = None if hyper.layout is None else impl.Layout.of(hyper.layout)
        return options
