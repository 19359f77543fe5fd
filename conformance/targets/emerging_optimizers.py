# SPDX-License-Identifier: Apache-2.0
"""Emerging-Optimizers' Muon: `pip install emerging-optimizers` on Python 3.12; its precision and epsilon are its defaults."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from contextlib import AbstractContextManager
from typing import Any

import torch
from emerging_optimizers import utils
from emerging_optimizers.orthogonalized_optimizers import muon, muon_utils
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

from conformance.target import Hyper, Named, Partial, Unsupported, watching

EPS = 1e-15  # its default
NAMES = {"jordan": "simple", "you": "quintic"}  # its polar_express has another margin than SPEC.md's
SCALES = {None: ("shape_scaling", 1.0), "original": ("shape_scaling", 1.0), "match_rms_adamw": ("spectral", 0.2)}


class Target(Partial):
    name = "emerging_optimizers"
    validates = True
    skips = False
    shards = False

    def precision(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return torch.bfloat16

    def orthogonalize(self, X: Tensor, schedule: Any, steps: int, eps: float) -> Tensor:
        if X.dtype != torch.float32:
            raise Unsupported("it orthogonalizes float32")
        options: dict[str, Any] = {"coefficient_type": NAMES.get(schedule) if isinstance(schedule, str) else "custom"}
        if options["coefficient_type"] is None:
            raise Unsupported(f"it has no schedule {schedule}")
        if not isinstance(schedule, str):
            options["custom_coefficient_sets"] = [schedule] if isinstance(schedule[0], float) else list(schedule)
        with utils.fp32_matmul_precision("medium"):
            return muon_utils.newton_schulz(X, steps, eps=eps or EPS, **options)

    def optimizer(self, named: Named, hyper: Hyper, process_group: Any = None, replicas: Any = None) -> Optimizer:
        if process_group is not None or replicas is not None:
            raise Unsupported("its optimizer knows nothing of ranks")
        self._fixed = _fixed(hyper)
        group = self.group(named, hyper)
        return muon.Muon(group.pop("params"), **group, **self._fixed)

    def group(self, named: Named, hyper: Hyper) -> dict[str, Any]:
        if _fixed(hyper) != self._fixed:
            raise Unsupported("its groups share schedule, steps, scale and Nesterov's momentum")
        if any(p.dtype != torch.float32 for _, p in named) or any(isinstance(p, DTensor) for _, p in named):
            raise Unsupported("its optimizer steps float32 weights on one rank")
        return {"params": list(named), "lr": hyper.lr, "weight_decay": hyper.weight_decay, "momentum": hyper.momentum}

    def momentum_buffer(self, optimizer: Optimizer, p: Tensor) -> Tensor:
        return optimizer.state[p]["momentum_buffer"]

    def orthogonalizing(self, poison: float | None) -> AbstractContextManager[list[torch.Size]]:
        return watching(muon_utils, "newton_schulz", poison)


def _fixed(hyper: Hyper) -> dict[str, Any]:
    """What an optimizer has for all its groups."""
    if hyper.algorithm != "muon" or hyper.layout is not None or hyper.maximize or hyper.normuon_beta2 is not None:
        raise Unsupported("its Muon has neither layouts, nor AdamW, nor NorMuon, nor maximize")
    if hyper.schedule not in NAMES or hyper.eps or hyper.shard_mode != "owned":
        raise Unsupported("its optimizer has no such schedule, no epsilon to set, and no ranks")
    scale, factor = SCALES.get(hyper.adjust_lr_fn, (hyper.adjust_lr_fn, 1.0))
    options = {"coefficient_type": NAMES[hyper.schedule], "num_ns_steps": hyper.steps, "nesterov": hyper.nesterov}
    return {**options, "scale_mode": scale, "extra_scale_factor": factor}
