# SPDX-License-Identifier: Apache-2.0
"""optax.contrib.muon: `pip install optax jax`. Weights and gradients go to jax and back; its states stay there.

Its functions are compiled once for all optimizers with the same options, as one that trains would have it.
"""

import functools
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
from optax.contrib import _muon
from torch import Tensor
from torch.distributed.tensor import DTensor

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from conformance.target import Hyper, Named, Partial, Unsupported

jax.config.update("jax_enable_x64", True)
EPS = 1e-8  # its default
PRESETS = {"jordan": "standard", "you": "dion"}
ROWS_OUT = _muon.MuonDimensionNumbers(reduction_axis=1, output_axis=0)  # torch's weights are the transposes of flax's


class Target(Partial):
    name = "optax"
    validates = False
    skips = False
    shards = False

    def precision(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return dtype

    def orthogonalize(self, X: Tensor, schedule: Any, steps: int, eps: float) -> Tensor:
        if X.ndim != 2:
            raise Unsupported("its batches are axes of a weight")
        coefficients = jnp.asarray(_coefficients(schedule, steps))
        return _torch(_orthogonalize(_jax(X), coefficients, steps, eps=eps or EPS))

    def optimizer(self, named: Named, hyper: Hyper, process_group: Any = None, replicas: Any = None) -> Any:
        if process_group is not None or replicas is not None:
            raise Unsupported("jax's ranks are not torch's")
        return Optimizer(self.group(named, hyper))

    def group(self, named: Named, hyper: Hyper) -> dict[str, Any]:
        if hyper.maximize or hyper.normuon_beta2 is not None or hyper.shard_mode != "owned" or isinstance(hyper.lr, Tensor):
            raise Unsupported("it has neither maximize, nor NorMuon, nor torch's learning rates")
        if hyper.layout is not None or any(isinstance(p, DTensor) for _, p in named):
            raise Unsupported("it has axes in place of layouts, and knows nothing of DTensors")
        if hyper.adjust_lr_fn in ("spectral", "unit_rms_norm"):
            raise Unsupported("it has no such scale")
        lr = hyper.lr if hyper.algorithm == "muon" else hyper.lr * hyper.adamw_lr_ratio
        rule = _rule(
            lr,
            ns_coeffs=_coefficients(hyper.schedule, hyper.steps),
            ns_steps=hyper.steps,
            beta=hyper.momentum,
            eps=(hyper.eps or EPS) if hyper.algorithm == "muon" else hyper.adamw_eps,
            weight_decay=hyper.weight_decay,
            nesterov=hyper.nesterov and hyper.algorithm == "muon",  # Nadam otherwise
            adam_b1=hyper.adamw_betas[0],
            adam_b2=hyper.adamw_betas[1],
            adam_weight_decay=hyper.weight_decay,
            mu_dtype="float32" if any(p.dtype.itemsize == 2 for _, p in named) else None,
            consistent_rms=0.2 if hyper.adjust_lr_fn == "match_rms_adamw" else None,
            algorithm=hyper.algorithm,
        )
        return {"params": [p for _, p in named], "rule": rule}

    def momentum_buffer(self, optimizer: Any, p: Tensor) -> Tensor:
        """It keeps the average, and corrects its bias where it is used."""
        return _torch(optimizer.states[p].inner_states["muon"].inner_state[0].mu["w"])

    def orthogonalizing(self, poison: float | None) -> AbstractContextManager[list[torch.Size]]:
        raise Unsupported("what it does is compiled")


class Optimizer:
    """Steps each parameter as a tree of its own. What else an optimizer of torch has, it has not."""

    def __init__(self, group: dict[str, Any]) -> None:
        self.param_groups, self.states = [], {}
        self.add_param_group(group)

    def add_param_group(self, group: dict[str, Any]) -> None:
        self.param_groups.append(group)
        self.states |= {p: group["rule"].init({"w": _jax(p)}) for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if closure is not None:
            raise Unsupported("it evaluates no closure")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    raise Unsupported("a tree of gradients is complete")
                W = {"w": _jax(p)}
                updates, self.states[p] = group["rule"].update({"w": _jax(p.grad)}, self.states[p], W)
                p.copy_(_torch(optax.apply_updates(W, updates)["w"]))

    def __getattr__(self, name: str) -> Any:
        raise Unsupported(f"it has no {name}")


_orthogonalize = jax.jit(_muon.orthogonalize_via_newton_schulz, static_argnames="ns_steps")


@functools.cache
def _rule(lr: float, algorithm: str, **options: Any) -> Any:
    dimensions = {"w": ROWS_OUT if algorithm == "muon" else None}
    rule = optax.contrib.muon(lr, muon_weight_dimension_numbers=dimensions, **options)
    return optax.GradientTransformation(rule.init, jax.jit(rule.update))


def _coefficients(schedule: Any, steps: int) -> Any:
    if isinstance(schedule, str):
        if schedule not in PRESETS or (schedule == "you" and steps != 5):
            raise Unsupported(f"it has no schedule {schedule} of {steps} steps")
        return tuple(_muon._NS_COEFFS_PRESET_DICT[PRESETS[schedule]])
    return schedule if isinstance(schedule[0], float) else tuple(schedule)


def _jax(T: Tensor) -> Any:
    return jnp.asarray(T.detach().double().cpu().numpy()).astype(str(T.dtype).removeprefix("torch."))


def _torch(A: Any) -> Tensor:
    return torch.tensor(jnp.asarray(A, jnp.float64).tolist(), dtype=getattr(torch, str(A.dtype))).reshape(A.shape)
