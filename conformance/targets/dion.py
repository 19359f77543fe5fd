# SPDX-License-Identifier: Apache-2.0
"""dion's Muon: `pip install git+https://github.com/microsoft/dion`.

It has no `jordan`, under which the suite takes most steps, but accepts a function: `reference/`'s, under the epsilon that it
hands over. `you` and `polar_express` are its own. Its functions run without being compiled.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from contextlib import AbstractContextManager
from typing import Any

import dion
import torch
from dion import megabatch_base
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

import reference
from conformance.target import Hyper, Named, Partial, Unsupported, watching

torch.compiler.set_stance("force_eager")
EPS = 1e-8  # its default
SCALES = {"match_rms_adamw": "rms_norm", "unit_rms_norm": "spectral_norm"}
OWN = {("you", 5): megabatch_base.zeropower_via_newtonschulz5, ("polar_express", 5): megabatch_base.polar_express}


class Target(Partial):
    name = "dion"
    validates = True
    skips = False
    shards = True

    def precision(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return torch.bfloat16

    def orthogonalize(self, X: Tensor, schedule: Any, steps: int, eps: float) -> Tensor:
        if (schedule, steps) not in OWN:
            raise Unsupported(f"it has no schedule {schedule} of {steps} steps")
        return OWN[schedule, steps](X, epsilon=eps or EPS).to(X.dtype)

    def optimizer(self, named: Named, hyper: Hyper, process_group: Any = None, replicas: Any = None) -> Optimizer:
        if process_group is not None:
            raise Unsupported("its ranks decide nothing together")
        self._schedule = hyper.schedule, hyper.steps
        if self._schedule not in (*OWN, ("jordan", 5)):
            raise Unsupported("what it is handed is a function")
        function = OWN.get(self._schedule, _jordan)
        group, options = self.group(named, hyper), {}
        for name in ("lr", "mu", "weight_decay", "epsilon", "nesterov", "adjust_lr", "flatten", "betas"):
            if name in group:  # so that its constructor sees it
                options[name] = group.pop(name)
        if "beta1" in group:
            options["betas"] = hyper.adamw_betas
        return dion.Muon([group], replicas or _mesh(named), newton_schulz_func=function, **options)

    def group(self, named: Named, hyper: Hyper) -> dict[str, Any]:
        if (hyper.schedule, hyper.steps) != self._schedule:
            raise Unsupported("an optimizer has one schedule")
        if hyper.maximize or hyper.normuon_beta2 is not None or hyper.shard_mode != "owned":
            raise Unsupported("its Muon has neither maximize, nor NorMuon, nor another way to divide")
        group = {"params": list(named), "lr": hyper.lr, "weight_decay": hyper.weight_decay, "algorithm": hyper.algorithm}
        if hyper.adjust_lr_fn == "spectral":
            raise Unsupported("it has no such scale")
        if hyper.algorithm != "muon":
            beta1, beta2 = (*hyper.adamw_betas, 0.0)[:2]
            rest = {"beta1": beta1, "beta2": beta2, "epsilon": hyper.adamw_eps}
            return {**group, **rest, "lr": hyper.lr * hyper.adamw_lr_ratio}
        eps = hyper.eps / (1 - hyper.momentum) if hyper.eps else EPS  # its sum is so much larger than the average
        group |= {"mu": hyper.momentum, "nesterov": hyper.nesterov, "epsilon": eps}
        if any(_cuts_heads(p, hyper.layout) for _, p in named):
            raise Unsupported("a rank holds whole heads, and all of their columns")
        matrices = [shape for _, p in named for shape in _cut(p.shape, hyper.layout, group)]
        return {**group, "adjust_lr": _scale(hyper.adjust_lr_fn, matrices)}

    def momentum_buffer(self, optimizer: Optimizer, p: Tensor) -> Tensor:
        """Its sum as an average."""
        mu = next(group["mu"] for group in optimizer.param_groups if any(p is q for q in group["params"]))
        return optimizer.state[p]["momentum"] * (1 - mu)

    def orthogonalizing(self, poison: float | None) -> AbstractContextManager[list[torch.Size]]:
        return watching(megabatch_base, "muon_update_newton_schulz", poison)


def _jordan(X: Tensor, epsilon: Tensor) -> Tensor:
    return reference.orthogonalize(X, reference.schedule("jordan", 5), float(epsilon)).to(X.dtype)


def _scale(name: str | None, matrices: list[tuple[int, ...]]) -> str | None:
    """`original` is its unclamped scale for tall matrices, and none for others."""
    if name not in (None, "original"):
        return SCALES.get(name, name)
    if all(m >= n for m, n in matrices):
        return "spectral_norm"
    if any(m > n for m, n in matrices):
        raise Unsupported("its scale is not clamped, so that tall and wide matrices need groups of their own")
    return None


def _cut(shape: torch.Size, layout: dict[str, Any] | None, group: dict[str, Any]) -> list[Any]:
    """The shapes of a layout's matrices; what asks for them goes to the group."""
    layout, rest = layout or {}, torch.Size(shape[1:]).numel()
    if layout == {"flatten": True} and len(shape) > 2:
        group["flatten"] = True
        return [(shape[0], rest)]
    if not layout:
        return [shape] if len(shape) == 2 else []
    if len(shape) == 3 and layout == {"blocks": shape[0]}:
        return [shape[1:]]
    if layout.keys() == {"blocks"} and len(shape) == 2:
        group["num_heads"] = layout["blocks"]
        return [(shape[0] // max(int(layout["blocks"]), 1), rest)]
    sections = layout.get("sections", ())
    if layout.keys() == {"sections"} and len(shape) == 2 and all(section.keys() == {"rows"} for section in sections):
        group["split_sizes"] = tuple(section["rows"] for section in sections)
        return [(section["rows"], rest) for section in sections]
    raise Unsupported(f"it has no layout {layout} of {len(shape)} dimensions")


def _cuts_heads(p: Tensor, layout: dict[str, Any] | None) -> bool:
    """Whether the shards of a matrix of several heads are refused."""
    heads = (layout or {}).get("blocks", 1)
    if p.ndim != 2 or heads == 1 or not isinstance(p, DTensor):
        return False
    sharded = [(size, place) for size, place in zip(p.device_mesh.shape, p.placements, strict=True) if place.is_shard()]
    return any(place.dim != 0 or heads % size for size, place in sharded)


def _mesh(named: Named) -> Any:
    """The one dimension of a mesh that it divides work over."""
    for _, p in named:
        if isinstance(p, DTensor):
            mesh = p.device_mesh
            divided = [
                name for name, placement in zip(mesh.mesh_dim_names or (), p.placements, strict=True) if placement.is_shard()
            ]
            if mesh.ndim > 1 and len(divided) != 1:
                raise Unsupported("it divides over one dimension of a mesh")
            return mesh if mesh.ndim == 1 else mesh[divided[0]]
    return None
