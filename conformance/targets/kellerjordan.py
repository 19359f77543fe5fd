# SPDX-License-Identifier: Apache-2.0
"""Keller Jordan's Muon: `pip install git+https://github.com/KellerJordan/Muon`, module `muon`.

Its fixed choices are those of the first Muon: `jordan` for five steps, Nesterov, 1e-7 added to the norm, SPEC.md's average.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from contextlib import AbstractContextManager
from typing import Any

import muon
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

from conformance.target import Hyper, Named, Partial, Unsupported, watching


class Target(Partial):
    name = "kellerjordan"
    validates = False
    skips = False
    shards = False

    def precision(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return torch.bfloat16

    def orthogonalize(self, X: Tensor, schedule: Any, steps: int, eps: float) -> Tensor:
        if schedule != "jordan" or eps:
            raise Unsupported("it has one schedule and one epsilon")
        return muon.zeropower_via_newtonschulz5(X, steps).to(X.dtype)

    def optimizer(self, named: Named, hyper: Hyper, process_group: Any = None, replicas: Any = None) -> Optimizer:
        if process_group is not None or (replicas is not None and replicas is not dist.group.WORLD):
            raise Unsupported("its ranks are all there are, and decide nothing together")
        kind = muon.SingleDeviceMuonWithAuxAdam if replicas is None else muon.MuonWithAuxAdam
        return kind([self.group(named, hyper)])

    def group(self, named: Named, hyper: Hyper) -> dict[str, Any]:
        if hyper.maximize or hyper.normuon_beta2 is not None or hyper.shard_mode != "owned":
            raise Unsupported("it has neither maximize, nor NorMuon, nor shards")
        parameters = [p for _, p in named]
        if any(isinstance(p, DTensor) for p in parameters):
            raise Unsupported("it knows nothing of DTensors")
        group = {"params": parameters, "lr": hyper.lr, "weight_decay": hyper.weight_decay}
        if hyper.algorithm == "adamw":
            rest = {"betas": hyper.adamw_betas, "eps": hyper.adamw_eps, "use_muon": False}
            return {**group, **rest, "lr": hyper.lr * hyper.adamw_lr_ratio}
        if (hyper.schedule, hyper.steps, hyper.eps, hyper.nesterov) != ("jordan", 5, 0.0, True):
            raise Unsupported("its schedule, steps, epsilon and Nesterov's momentum are fixed")
        if hyper.adjust_lr_fn not in (None, "original"):
            raise Unsupported("its scale is fixed")
        for p in parameters:  # three dimensions are a batch, four a convolution
            if hyper.layout != {2: None, 3: {"blocks": len(p)}, 4: {"flatten": True}}.get(p.ndim, hyper):
                raise Unsupported(f"it has no layout {hyper.layout} of {p.ndim} dimensions")
        return {**group, "momentum": hyper.momentum, "use_muon": True}

    def momentum_buffer(self, optimizer: Optimizer, p: Tensor) -> Tensor:
        return optimizer.state[p]["momentum_buffer"]

    def orthogonalizing(self, poison: float | None) -> AbstractContextManager[list[torch.Size]]:
        return watching(muon, "zeropower_via_newtonschulz5", poison)
