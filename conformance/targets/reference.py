# SPDX-License-Identifier: Apache-2.0
"""The float64 reference: what it cannot pass, the suite asks wrongly."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

import reference
import reference.muon
from conformance.target import Hyper, Named, Norms, Unsupported, watching


class Target:
    name = "reference"
    validates = False
    skips = True
    shards = False

    def precision(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return torch.float64

    def orthogonalize(self, X: Tensor, schedule: Any, steps: int, eps: float) -> Tensor:
        return reference.orthogonalize(X, reference.schedule(schedule, steps), eps).to(X.dtype)

    def optimizer(self, named: Named, hyper: Hyper, process_group: Any = None, replicas: Any = None) -> Optimizer:
        if process_group is not None or replicas is not None or any(isinstance(p, DTensor) for _, p in named):
            raise Unsupported("the reference has one process")
        return reference.Muon(named, **self._options(hyper))

    def group(self, named: Named, hyper: Hyper) -> dict[str, Any]:
        options = self._options(hyper)
        del options["skip_nonfinite"]
        return {"params": list(named), **options}

    def momentum_buffer(self, optimizer: Optimizer, p: Tensor) -> Tensor:
        return optimizer.state[p]["momentum_buffer"]

    def variance_buffer(self, optimizer: Optimizer, p: Tensor) -> Tensor:
        return optimizer.state[p]["variance_buffer"]

    def clip(self, optimizer: Any, max_norm: float, clip_norm: str, floor: float) -> Norms:
        return _tensors(reference.clip_grad_norm_(optimizer, max_norm, clip_norm=clip_norm, floor=floor))

    def chain(self, optimizers: Sequence[Any], **policy: Any) -> reference.ChainedOptimizer:
        return reference.ChainedOptimizer(optimizers, **policy)

    def norms(self, chain: reference.ChainedOptimizer) -> Norms:
        return _tensors(chain.norms)

    def skipped(self, optimizer: Any) -> dict[str, int]:
        return dict(optimizer.skipped) if isinstance(optimizer.skipped, dict) else {"threshold": optimizer.skipped}

    def orthogonalizing(self, poison: float | None) -> AbstractContextManager[list[torch.Size]]:
        return watching(reference.muon, "orthogonalize", poison)

    def routes(self, model: nn.Module, **options: Any) -> dict[str, tuple[str, Any]]:
        raise Unsupported("the reference has no models")

    def report(self, model: nn.Module, **options: Any) -> str:
        raise Unsupported("the reference has no report")

    def _options(self, hyper: Hyper) -> dict[str, Any]:
        options = dict(vars(hyper))
        options["ns_coefficients"], options["ns_steps"] = options.pop("schedule"), options.pop("steps")
        if options.pop("shard_mode") == "blockwise":
            raise Unsupported("the reference has one process")
        return options


def _tensors(norms: reference.GradNorms) -> Norms:
    total, clipped, threshold = (None if x is None else torch.tensor(x, dtype=torch.float64) for x in norms)
    return total, clipped, threshold
