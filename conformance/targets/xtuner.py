# SPDX-License-Identifier: Apache-2.0
"""xtuner's Muon: `pip install git+https://github.com/InternLM/xtuner`; with --no-deps, what it needs of those is loguru,
mmengine==0.11.0rc2 and transformers==5.14.1.

It steps DTensors alone: a plain parameter is one, on a mesh of one rank, while it works. It has one schedule, `you`, and
accepts a function for others: `reference/`'s `jordan`, under which the suite takes most steps, cut into experts as its own.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import functools
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.optimizer import Optimizer
from xtuner.v1.optim import muon

import reference
from conformance.target import Hyper, Named, Norms, Partial, Unsupported, watching

EPS = 1e-8  # its default
SCALES = {"match_rms_adamw": "rms_norm", "unit_rms_norm": "spectral_norm"}


class Target(Partial):
    name = "xtuner"
    validates = True
    skips = False
    shards = True

    def precision(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return torch.bfloat16

    def orthogonalize(self, X: Tensor, schedule: Any, steps: int, eps: float) -> Tensor:
        if (schedule, steps) != ("you", 5):
            raise Unsupported(f"it has no schedule {schedule} of {steps} steps")
        stacked, experts = X.reshape(-1, X.shape[-1]), X.shape[0] if X.ndim == 3 else 1
        return muon.zeropower_via_newtonschulz5(stacked, eps or EPS, experts).to(X.dtype).reshape(X.shape)

    def optimizer(self, named: Named, hyper: Hyper, process_group: Any = None, replicas: Any = None) -> Optimizer:
        if process_group is not None or replicas is not None:
            raise Unsupported("its ranks decide nothing together, and its copies are DTensors")
        if (hyper.schedule, hyper.steps) not in (("you", 5), ("jordan", 5)):
            raise Unsupported("what it is handed is a function")
        self._schedule = hyper.schedule, hyper.steps
        group, sizes = self._group(named, hyper)
        options: dict[str, Any] = {"muon_split_sizes": {_inside(p): sizes for _, p in named} if sizes else None}
        for name in ("lr", "mu", "weight_decay", "epsilon", "nesterov", "adjust_lr", "flatten"):
            if name in group:  # so that its constructor sees it
                options[name] = group.pop(name)
        if group.pop("beta1", None) is not None:
            options["betas"] = hyper.adamw_betas
        return Muon([group], newton_schulz_func=_jordan if hyper.schedule == "jordan" else None, **options)

    def group(self, named: Named, hyper: Hyper) -> dict[str, Any]:
        group, sizes = self._group(named, hyper)
        if sizes or (hyper.schedule, hyper.steps) != self._schedule:
            raise Unsupported("sections and schedules are its constructor's")
        return group

    def _group(self, named: Named, hyper: Hyper) -> tuple[dict[str, Any], tuple[int, ...]]:
        """The group, and the rows of its sections."""
        if hyper.maximize or hyper.normuon_beta2 is not None or hyper.shard_mode != "owned":
            raise Unsupported("it has neither maximize, nor NorMuon, nor another way to divide")
        if any(isinstance(p, DTensor) and sum(_shards(p)) > 1 for _, p in named):
            raise Unsupported("it divides over one dimension of a mesh, or over the one that is called fsdp")
        group = {"params": list(named), "lr": hyper.lr, "weight_decay": hyper.weight_decay, "algorithm": hyper.algorithm}
        if hyper.algorithm != "muon":
            beta1, beta2 = (*hyper.adamw_betas, 0.0)[:2]
            rest = {"beta1": beta1, "beta2": beta2, "epsilon": hyper.adamw_eps}
            return {**group, **rest, "lr": hyper.lr * hyper.adamw_lr_ratio}, ()
        eps = hyper.eps / (1 - hyper.momentum) if hyper.eps else EPS  # its sum is so much larger than the average
        group |= {"mu": hyper.momentum, "nesterov": hyper.nesterov, "epsilon": eps}
        sizes = tuple(section.get("rows") for section in (hyper.layout or {}).get("sections", ()))
        matrices = [shape for _, p in named for shape in _cut(p.shape, hyper.layout, group)]
        return {**group, "adjust_lr": _scale(hyper.adjust_lr_fn, matrices)}, sizes

    def momentum_buffer(self, optimizer: Optimizer, p: Tensor) -> Tensor:
        """Its sum as an average."""
        mu = next(group["mu"] for group in optimizer.param_groups if any(p is q for q in group["params"]))
        return optimizer.state[p]["momentum"] * (1 - mu)

    def clip(self, optimizer: Any, max_norm: float, clip_norm: str, floor: float) -> Norms:
        raise Unsupported("what clips is its training engine")

    def routes(self, model: nn.Module, **options: Any) -> dict[str, tuple[str, Any]]:
        raise Unsupported("what routes is its configuration, and models of its own")

    def orthogonalizing(self, poison: float | None) -> AbstractContextManager[list[torch.Size]]:
        return watching(muon, "muon_update_newton_schulz", poison)


class Muon(muon.Muon):
    """Plain parameters, their gradients and states are DTensors inside its constructor and its steps, and plain outside."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        inside = [{**group, "params": [(name, _inside(p)) for name, p in group["params"]]} for group in groups]
        super().__init__(inside, **options)
        self._turn(_outside)
        for text in ("To copy construct", ".*is deprecated"):  # no errors for those who step with it
            warnings.filterwarnings("ignore", text)

    def step(self, closure: Any = None) -> Any:
        def outside() -> Any:
            self._turn(_outside)
            loss = closure()
            self._turn(_inside)
            return loss

        try:
            self._turn(_inside)
            return super().step(outside if closure else None)
        finally:
            self._turn(_outside)

    def _turn(self, side: Any) -> None:
        for group in self.param_groups:
            group["params"] = [side(p) for p in group["params"]]
        for p in list(self.state):
            self.state[side(p)] = {key: side(T) if isinstance(T, Tensor) else T for key, T in self.state.pop(p).items()}


def _inside(T: Tensor) -> Tensor:
    """What is plain, as a DTensor with the same memory."""
    if isinstance(T, DTensor):
        return T
    if T.layout != torch.strided:
        raise Unsupported("a DTensor is not sparse")
    if not isinstance(T, nn.Parameter):
        return DTensor.from_local(T, _alone(T.device.type), [Replicate()], run_check=False)
    if not hasattr(T, "inside"):
        T.inside = nn.Parameter(_inside(T.detach()), T.requires_grad)
        T.inside.outside = T
    T.inside.grad = None if T.grad is None else _inside(T.grad)
    return T.inside


def _outside(T: Tensor) -> Tensor:
    if not isinstance(T, DTensor) or T.device_mesh is not _alone(T.device.type):
        return T
    return T.outside if isinstance(T, nn.Parameter) else T.to_local()


@functools.cache
def _alone(device: str) -> DeviceMesh:
    return DeviceMesh(device, [0], _init_backend=False, _rank=0)


def _jordan(X: Tensor, epsilon: Tensor, num_experts: int) -> Tensor:
    stacked = X.reshape(num_experts, -1, X.shape[-1])
    O = reference.orthogonalize(stacked, reference.schedule("jordan", 5), float(epsilon))
    return O.to(X.dtype).reshape(X.shape)


def _scale(name: str | None, matrices: list[tuple[int, ...]]) -> str:
    """`original` is its unclamped scale for tall matrices, and none for others."""
    if name == "spectral":
        raise Unsupported("it has no such scale")
    if name not in (None, "original"):
        return SCALES.get(name, name)
    if all(m >= n for m, n in matrices):
        return "spectral_norm"
    if any(m > n for m, n in matrices):
        raise Unsupported("its scale is not clamped, so that tall and wide matrices need groups of their own")
    return "none"


def _cut(shape: torch.Size, layout: dict[str, Any] | None, group: dict[str, Any]) -> list[Any]:
    """The shapes of a layout's matrices; what asks for them goes to the group."""
    layout, rest = layout or {}, torch.Size(shape[1:]).numel()
    if layout == {"flatten": True} and len(shape) > 2:
        group["flatten"] = True
        return [(shape[0], rest)]
    if not layout:
        return [shape] if len(shape) == 2 else []
    if len(shape) == 3 and layout == {"blocks": shape[0]}:
        return [shape[1:]]  # what has three dimensions is a batch, its documentation says
    if layout.keys() == {"blocks"} and len(shape) == 2:
        group["num_experts"] = layout["blocks"]
        return [(shape[0] // max(int(layout["blocks"]), 1), rest)]
    sections = layout.get("sections", ())
    if layout.keys() == {"sections"} and len(shape) == 2 and all(section.keys() == {"rows"} for section in sections):
        return [(section["rows"], rest) for section in sections]
    raise Unsupported(f"it has no layout {layout} of {len(shape)} dimensions")


def _shards(p: DTensor) -> list[bool]:
    """Which dimensions of the mesh divide a parameter."""
    return [size > 1 and place.is_shard() for size, place in zip(p.device_mesh.shape, p.placements, strict=True)]
