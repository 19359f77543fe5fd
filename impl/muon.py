# SPDX-License-Identifier: Apache-2.0
"""The optimizer: validation, state, and one step as a straight pipe, with the words of SPEC.md."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer, ParamsT

from impl.layout import Layout, Section, cut, matrices
from impl.options import check_options, check_parameters, lr_scale
from impl.orthogonalize import orthogonalize
from impl.report import report
from impl.schedules import Coefficients
from impl.state import check_loadable, new_state, state_dtype


class Muon(Optimizer):
    """Muon for matrices and AdamW for the rest, in one optimizer.   [SPEC: LAYOUT to ERR]

    A drop-in for torch.optim.Muon: the same options with the same meaning, except that by default singular values come
    closer to 1 (`ns_coefficients`) and no epsilon takes part. Any option may be set per parameter group.

    Args:
        params: tensors, (name, tensor) pairs as from `named_parameters()`, or groups of either; `param_groups(model)`
            makes the groups. With algorithm="muon" and no layout, parameters are (m, n).
        lr: learning rate, a number or a tensor of one element.
        weight_decay: decoupled: a step first multiplies the weight by 1 - lr * weight_decay.
        momentum: decay rate of the averaged gradient, in [0, 1).
        nesterov: look ahead by one gradient.
        ns_coefficients: a schedule's name ("polar_express_s4", "polar_express", "you", "jordan"), a quintic (a, b, c)
            applied `ns_steps` times as in torch.optim.Muon, or a sequence of `ns_steps` quintics.
        eps: floor under the norm of the update direction, in units of the gradient; 0 for none.
        ns_steps: number of quintics.
        adjust_lr_fn: None or "original" for lr * sqrt(max(1, m / n)); "match_rms_adamw" for lr * 0.2 * sqrt(max(m, n)),
            which lets Muon share AdamW's learning rate and decay.
        algorithm: "muon" or "adamw".
        layout: the matrices inside each parameter of the group, a `Layout`; None for the parameter as one matrix.
        adamw_lr_ratio: AdamW steps with lr * adamw_lr_ratio, so that one scheduler moves both.
        adamw_betas, adamw_eps: AdamW's.
        maximize: ascend instead of descend.

    State: `momentum_buffer` for Muon; `exp_avg`, `exp_avg_sq`, `step` for AdamW; shaped like the parameter, float32
    unless the parameter is float64.

    Raises:
        ValueError: an option or a parameter that cannot be used, here and in `add_param_group`, with its name.
        RuntimeError: in `step`, for sparse gradients and complex parameters, before anything has changed.

    Source: K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = "polar_express_s4",
        eps: float = 0.0,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        algorithm: str = "muon",
        layout: Layout | None = None,
        adamw_lr_ratio: float = 1.0,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "algorithm": algorithm,
            "layout": layout,
            "adamw_lr_ratio": adamw_lr_ratio,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "maximize": maximize,
        }
        check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does, or refuse it as the constructor would and add nothing.   [SPEC: ERR-2]"""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            check_options(group)
            check_parameters(group, len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise

    def report(self) -> str:
        """A table of every parameter: shape, rule, algorithm, matrices, learning rate.   [SPEC: ROUTE-7]"""
        return report(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step every parameter that has a gradient; return the closure's value, if there is one.   [SPEC: STEP]"""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = self._ready()
        if ready:
            self._init_state()
        orthogonalized = [self._orthogonalize(group, p) for group, p in ready]
        for (group, p), O in zip(ready, orthogonalized, strict=True):
            self._apply(group, p, O)
        return loss

    def _ready(self) -> list[tuple[dict[str, Any], Tensor]]:
        """The parameters that have a gradient, with their groups; refuses before anything has changed.   [SPEC: ERR-3]"""
        ready = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, p in ready:
            if p.is_complex():
                raise RuntimeError("Muon does not support complex parameters; use torch.view_as_real on the weight")
            if p.grad.layout != torch.strided:
                raise RuntimeError("Muon does not support sparse gradients; route this parameter to another optimizer")
        return ready

    def _init_state(self) -> None:
        """Give every trainable parameter its whole state, so that a checkpoint is complete.   [SPEC: STATE-1]"""
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state and (p.requires_grad or p.grad is not None):
                    self.state[p] = new_state(group, p)

    def _orthogonalize(self, group: dict[str, Any], p: Tensor) -> list[Tensor]:
        """MOM and ORTH: update p's momentum; return O of each of its Muon sections, (B, m, n), in order."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            return []
        O = []
        for (section, M), (_, G) in zip(
            pieces(group, state["momentum_buffer"]), pieces(group, gradient(group, p)), strict=True
        ):
            if section.algorithm == "muon":
                U = matrices(section, momentum(M, G, group["momentum"], group["nesterov"]))
                O.append(orthogonalize(U, group["ns_coefficients"], group["ns_steps"], group["eps"]))
        return O

    def _apply(self, group: dict[str, Any], p: Tensor, O: list[Tensor]) -> None:
        """SCALE, DECAY and STEP: move p in the precision of its state and round once.   [SPEC: STEP-11]"""
        lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
        W = p.to(state_dtype(p)).contiguous()
        updates = iter(O)
        for section, view in pieces(group, W):
            if section.algorithm == "muon":
                update = next(updates)
                scale = lr_scale(update.shape[-2], update.shape[-1], group["adjust_lr_fn"])
                view.mul_(1 - lr * group["weight_decay"])
                # A product, then a difference: each rounded by itself, so an entry's bits do not depend on its position.
                view.sub_(update.reshape(view.shape) * (lr * scale))
        if "step" in self.state[p]:
            step_adamw(group, self.state[p], W, gradient(group, p), lr * group["adamw_lr_ratio"])
        if W is not p:
            p.copy_(W)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with layouts as plain data.   [SPEC: STATE-3]"""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            if isinstance(group["layout"], Layout):
                group["layout"] = asdict(group["layout"])
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` saved, or raise ValueError naming the entry at fault and change nothing.   [SPEC: STATE-4]

        Unlike torch's, which casts every state to the dtype of its parameter, this keeps a float32 momentum float32.
        """
        check_loadable(self, state_dict)
        super().load_state_dict(state_dict)
        saved = (i for group in state_dict["param_groups"] for i in group["params"])
        for i, p in zip(saved, (p for group in self.param_groups for p in group["params"]), strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                dtype, device = (torch.float32, "cpu") if key == "step" else (state_dtype(p), p.device)
                value = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(float(value))
                self.state[p][key] = value.to(device, dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it here, and our constructor does not take it
        for group in self.param_groups:
            for option, value in self.defaults.items():
                group.setdefault(option, value)
            if group["layout"] is not None:
                group["layout"] = Layout.of(group["layout"])


def pieces(group: dict[str, Any], T: Tensor) -> list[tuple[Section, Tensor]]:
    """The parts of a contiguous tensor of a parameter's shape that are stepped differently, as views."""
    if group["algorithm"] == "adamw":
        return [(Section(T.numel(), algorithm="adamw"), T)]
    return cut(Layout.of(group["layout"]), T)


def gradient(group: dict[str, Any], p: Tensor) -> Tensor:
    """p's descent gradient in the dtype of its state, contiguous."""
    assert p.grad is not None
    G = p.grad.to(state_dtype(p)).contiguous()
    return -G if group["maximize"] else G


def momentum(M: Tensor, G: Tensor, beta: float, nesterov: bool) -> Tensor:
    """Average G into M in place; return the direction U, which is M itself without `nesterov`.   [SPEC: MOM-1, MOM-2]"""
    M.lerp_(G, 1 - beta)
    return G.lerp(M, beta) if nesterov else M


def step_adamw(group: dict[str, Any], state: dict[str, Any], W: Tensor, G: Tensor, lr: float | Tensor) -> None:
    """Step the AdamW sections of W in place with torch's own AdamW.   [SPEC: STEP-8]"""
    weights, gradients, exp_avg, exp_avg_sq = (
        [view for section, view in pieces(group, T) if section.algorithm == "adamw"]
        for T in (W, G, state["exp_avg"], state["exp_avg_sq"])
    )
    # torch counts a step for every tensor it is given; the sections of one parameter share one count.
    steps = [state["step"].clone() for _ in weights]
    beta1, beta2 = group["adamw_betas"]
    options = {"beta1": beta1, "beta2": beta2, "lr": lr, "weight_decay": group["weight_decay"], "eps": group["adamw_eps"]}
    adamw(weights, gradients, exp_avg, exp_avg_sq, [], steps, foreach=False, amsgrad=False, maximize=False, **options)
    state["step"].add_(1)
