# SPDX-License-Identifier: Apache-2.0
"""The optimizer: validation, state, and one step as a straight pipe, with the words of SPEC.md."""

from collections.abc import Callable
from dataclasses import asdict
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from impl.layout import Layout, matrices
from impl.options import check_options, check_parameters, lr_scale
from impl.orthogonalize import orthogonalize
from impl.report import report
from impl.schedules import Coefficients
from impl.stages import gradient, momentum, pieces, step_adamw
from impl.state import new_state, placement, state_dtype, whole


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
            kept = [value for key, value in self.state.get(p, {}).items() if key != "step"]
            if any((value.shape, value.dtype, value.device) != (p.shape, state_dtype(p), p.device) for value in kept):
                raise RuntimeError(
                    f"a parameter is {p.dtype} {tuple(p.shape)} on {p.device} and was not when its state was made"
                )
        return ready

    def _init_state(self) -> None:
        """Give every trainable parameter its whole state, so that a checkpoint is complete.   [SPEC: STATE-1]"""
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state.get(p) and (p.requires_grad or p.grad is not None):
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
        # In float64, so that 1 - lr * weight_decay is right whatever the dtype of a tensor lr.
        lr = group["lr"].reshape(()).double() if isinstance(group["lr"], Tensor) else group["lr"]
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
        """As torch's, complete for every trainable parameter once there is any state, with options as plain data.

        [SPEC: STATE-1, STATE-3]
        """
        if any(self.state.values()):
            self._init_state()
        saved = super().state_dict()
        for group in saved.get("param_groups", ()):
            for option, value in group.items():
                if isinstance(value, Layout):
                    group[option] = asdict(value)
                elif isinstance(value, Real) and not isinstance(value, Integral):
                    group[option] = float(value)  # a scheduler may have left a NumPy number
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` saved, or raise ValueError naming the entry at fault and change nothing.   [SPEC: STATE-4]

        Unlike torch's, which casts every state to the dtype of its parameter, this keeps a float32 momentum float32.
        """
        if not isinstance(state_dict, dict):
            raise ValueError(f"the state dict should be a dict with 'state' and 'param_groups' but is: {state_dict!r:.80}")
        checked: dict[str, Any] = {}

        def check(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            checked.update(whole(self, saved))
            return checked

        # Between the hooks of others: after those that may rewrite what is loaded, before those that may look at it.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(lambda _: self._restore(checked), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _restore(self, saved: dict[str, Any]) -> None:
        """Put back the dtypes that torch's loading has cast away."""
        ids = (i for group in saved["param_groups"] for i in group["params"])
        for i, p in zip(ids, (p for group in self.param_groups for p in group["params"]), strict=True):
            for key, value in saved["state"].get(i, {}).items():
                dtype, device = placement(key, p)
                self.state[p][key] = torch.as_tensor(value).detach().to(device, dtype, copy=True).contiguous()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it here, and our constructor does not take it
        for group in self.param_groups:
            for option, value in self.defaults.items():
                group.setdefault(option, value)
            if group["layout"] is not None:
                group["layout"] = Layout.of(group["layout"])
