# SPDX-License-Identifier: Apache-2.0
"""This repository's implementation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

import impl
import impl.operands
import impl.parts
import impl.stages
from conformance.target import Hyper, Named, Norms, watching
from impl.batches import usable


class Target:
    name = "impl"
    validates = True
    skips = True
    shards = True

    def precision(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        if dtype == torch.float64:
            return torch.float64
        return torch.float16 if usable(device) else torch.float32

    def orthogonalize(self, X: Tensor, schedule: Any, steps: int, eps: float) -> Tensor:
        return impl.orthogonalize(X, schedule, steps, eps)

    def optimizer(self, named: Named, hyper: Hyper, process_group: Any = None, replicas: Any = None) -> Optimizer:
        return impl.Muon(named, process_group=process_group, replicas=replicas, **self._options(hyper))

    def group(self, named: Named, hyper: Hyper) -> dict[str, Any]:
        options = self._options(hyper)
        del options["skip_nonfinite"]
        return {"params": list(named), **options}

    def momentum_buffer(self, optimizer: Optimizer, p: Tensor) -> Tensor:
        return optimizer.state[p]["momentum_buffer"]

    def variance_buffer(self, optimizer: Optimizer, p: Tensor) -> Tensor:
        return optimizer.state[p]["variance_buffer"]

    def clip(self, optimizer: Any, max_norm: float, clip_norm: str, floor: float) -> Norms:
        return impl.clip_grad_norm_(optimizer, max_norm, clip_norm=clip_norm, floor=floor)

    def chain(self, optimizers: Sequence[Any], **policy: Any) -> impl.ChainedOptimizer:
        return impl.ChainedOptimizer(optimizers, **policy)

    def norms(self, chain: impl.ChainedOptimizer) -> Norms:
        return chain.norms

    def skipped(self, optimizer: Any) -> dict[str, int]:
        if isinstance(optimizer, impl.ChainedOptimizer):
            return {"threshold": int(optimizer.skipped)}
        return {reason: int(count) for reason, count in optimizer.skipped.items()}

    @contextmanager
    def orthogonalizing(self, poison: float | None) -> Iterator[list[torch.Size]]:
        def watched(launches: Sequence[Callable[[], None]], Q: Tensor) -> None:
            shapes.append(Q.shape)
            *before, last = launches
            batched(before, Q)
            if poison is not None:
                Q[:, 0, 0] = poison  # and with it the first row of every update
            last()

        batched = impl.operands.orthogonalize
        with (
            watching(impl.stages, "orthogonalize", poison) as shapes,
            watching(impl.parts, "orthogonalize", poison) as on_ranks,
            mock.patch.object(impl.operands, "orthogonalize", watched),
        ):
            yield shapes
            shapes += on_ranks

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
