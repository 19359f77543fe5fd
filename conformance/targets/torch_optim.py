# SPDX-License-Identifier: Apache-2.0
"""torch.optim.Muon, with the epsilon that it has unless told otherwise."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.optim import _muon
from torch.optim.optimizer import Optimizer

from conformance.target import Hyper, Named, Norms, Partial, Unsupported, watching


class Target(Partial):
    name = "torch_optim"
    validates = True
    skips = False
    shards = True

    def precision(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return torch.bfloat16

    def orthogonalize(self, X: Tensor, schedule: Any, steps: int, eps: float) -> Tensor:
        if X.ndim != 2:
            raise Unsupported("it has no batches")
        # It divides in place, on a copy only where the dtype is not bfloat16 already.
        return _muon._zeropower_via_newtonschulz(X, _triple(schedule), steps, eps or _muon.EPS).to(X.dtype)

    def optimizer(self, named: Named, hyper: Hyper, process_group: Any = None, replicas: Any = None) -> Optimizer:
        if process_group is not None or replicas is not None:
            raise Unsupported("its ranks cannot decide together")
        return torch.optim.Muon(named, **self._options(hyper))

    def group(self, named: Named, hyper: Hyper) -> dict[str, Any]:
        return {"params": list(named), **self._options(hyper)}

    def momentum_buffer(self, optimizer: Optimizer, p: Tensor) -> Tensor:
        return optimizer.state[p]["momentum_buffer"]

    def clip(self, optimizer: Any, max_norm: float, clip_norm: str, floor: float) -> Norms:
        """As its users clip: every gradient alike."""
        if clip_norm != "global" or floor:
            raise Unsupported("torch clips by the global norm and has no floor")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        total = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        return total, total, total

    def orthogonalizing(self, poison: float | None) -> AbstractContextManager[list[torch.Size]]:
        return watching(_muon, "_zeropower_via_newtonschulz", poison)

    def _options(self, hyper: Hyper) -> dict[str, Any]:
        if hyper.shard_mode != "owned":
            raise Unsupported("it knows nothing of ranks")
        if hyper.adjust_lr_fn in ("spectral", "unit_rms_norm"):
            raise Unsupported("it has no such scale")
        if hyper.algorithm != "muon" or hyper.layout is not None or hyper.maximize or hyper.normuon_beta2 is not None:
            raise Unsupported("it has neither layouts, nor AdamW, nor NorMuon, nor maximize")
        return {
            "lr": hyper.lr,
            "weight_decay": hyper.weight_decay,
            "momentum": hyper.momentum,
            "nesterov": hyper.nesterov,
            "ns_coefficients": _triple(hyper.schedule),
            "ns_steps": hyper.steps,
            "eps": hyper.eps or _muon.EPS,
            "adjust_lr_fn": hyper.adjust_lr_fn,
        }


def _triple(schedule: Any) -> Any:
    if schedule == "jordan":
        return _muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C
    if isinstance(schedule, str) or not isinstance(schedule[0], float):
        raise Unsupported(f"it has no schedule {schedule}")
    return schedule
