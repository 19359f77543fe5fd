# SPDX-License-Identifier: Apache-2.0
"""The optimizer: validation, state, and one step as a straight pipe, with the words of SPEC.md."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from impl.layout import Layout
from impl.options import OPTIONS, algorithms, check_options, check_parameters, names
from impl.placement import local
from impl.plan import Plan, plans
from impl.report import report
from impl.schedules import Coefficients
from impl.sharded import Sharded, shardings, shared
from impl.skip import REASONS, Guard, nonfinite
from impl.stages import Prepared, apply, gradient, prepare
from impl.state import check_step, new_state, plain, restore, whole

# A parameter with a gradient, its group, and a function that makes the gradient to descend.
Ready = tuple[dict[str, Any], Tensor, Callable[[], Tensor]]


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
            which lets Muon share AdamW's learning rate and decay; "spectral" for lr * sqrt(max(m, n)); "unit_rms_norm" for
            lr * sqrt(m / n).
        algorithm: "muon" or "adamw".
        layout: the matrices inside each parameter of the group, a `Layout`; None for the parameter as one matrix.
        shard_mode: what is done with a matrix that lies on several ranks (DTensor): "owned", one of them orthogonalizes it and
            gives the parts back; "duplicated", each of them does; "distributed", all together, and no rank holds it whole;
            "blockwise", each its own part as if that were the matrix, which is another optimizer.   [SPEC: DIST]
        normuon_beta2: decay rate of the mean squares by which NorMuon evens out rows, 0.95 in its paper; None for Muon.
        adamw_lr_ratio: AdamW steps with lr * adamw_lr_ratio, so that one scheduler moves both.
        adamw_betas, adamw_eps: AdamW's.
        maximize: ascend instead of descend.
        skip_nonfinite: take no step in which anything is not finite; `skipped` counts them.   [SPEC: SKIP]
        process_group: the ranks that take or skip a step together; None for those on which parameters lie.
        replicas: the ranks that hold the same parameters and gradients, as under DistributedDataParallel, and share the work.
        dump_nonfinite: path of a file for what the first such step was made of (torch.save; with a process group, one for
            each rank that had a part in it); every step then waits for the device.

    State: `momentum_buffer` for Muon, and `variance_buffer` for NorMuon, one number for a matrix's row; `exp_avg`,
    `exp_avg_sq`, `step` for AdamW; else shaped like the parameter, float32 unless the parameter is float64.

    On a GPU, kernels step matrices that are not float64, those of all groups together (plan.py). A step can be captured in a
    CUDA graph, in which lr, weight_decay and momentum can change if they are tensors there. `torch.amp.GradScaler` may hand
    its scale and its finding to `step`, which then needs no host synchronization.

    Raises:
        ValueError: an option or a parameter that cannot be used, here and in `add_param_group`, with its name.
        RuntimeError: in `step`, for sparse gradients and complex parameters, before anything has changed.

    Source: K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
    """

    _step_supports_amp_scaling = True  # what torch.amp.GradScaler looks for   [SPEC: SKIP-9]

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
        shard_mode: str = "owned",
        normuon_beta2: float | None = None,
        adamw_lr_ratio: float = 1.0,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        maximize: bool = False,
        skip_nonfinite: bool = True,
        process_group: dist.ProcessGroup | None = None,
        replicas: dist.ProcessGroup | None = None,
        dump_nonfinite: str | os.PathLike[str] | None = None,
    ) -> None:
        defaults = {option: value for option, value in locals().items() if option in OPTIONS}
        check_options(defaults)
        self.guard = Guard(skip_nonfinite, process_group, replicas, dump_nonfinite)
        self.plans: dict[Any, Plan | Sharded] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does, or refuse it as the constructor would and add nothing.   [SPEC: ERR-2]"""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            check_options(group)
            check_parameters(group, len(self.param_groups) - 1)
            self.guard.join(group["params"])
            group.setdefault("skip_grad_norm_clip", algorithms(group) == {"muon"})
        except Exception:
            self.param_groups.pop()
            raise

    @property
    def skip_grad_norm_clip(self) -> bool:
        """Whether clipping gradients by their norm would touch none of ours.   [SPEC: CLIP-3]"""
        return all(group["skip_grad_norm_clip"] for group in self.param_groups)

    @property
    def skipped(self) -> dict[str, Tensor]:
        """How many steps were skipped for which reason: int64, on the device, without waiting for it.   [SPEC: SKIP-5]"""
        return {reason: self.guard.tally.counts[code].clone() for reason, code in REASONS.items()}

    def report(self) -> str:
        """A table of every parameter: shape, rule, algorithm, matrices, learning rate, clipping.   [SPEC: ROUTE-7]"""
        self.guard.look(wait=True)
        return report(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step every parameter that has a gradient; return the closure's value, if there is one.   [SPEC: STEP, SKIP]

        Nothing is written before everything is computed and the decision to take the step has been made.
        """
        self.guard.look(wait=False)
        with torch.enable_grad():
            loss = None if closure is None else closure()
        ready = self._ready()
        scale = getattr(self, "grad_scale", None)
        apart = shared(self.param_groups, self.guard.replicas)
        if ready or apart:
            self._init_state()
        groups = self.param_groups if ready else []
        self.plans = plans(self.plans, groups, self.state, scale is not None, apart) | shardings(
            self.plans, self.param_groups, apart
        )
        for plan in self.plans.values():
            plan.prepare(self.state, scale)
        mine = {p for plan in self.plans.values() for _, p in plan.entries}
        rest = [(group, p, G) for group, p, G in ready if p not in apart and (p not in mine or "step" in self.state[p])]
        prepared = [prepare(group, p, self.state[p], G(), self.guard.skip_nonfinite, p in mine) for group, p, G in rest]
        code = self._decide(prepared)
        if self.guard.wants_dump(code):
            self.guard.write_dump(self._culprits(rest, prepared))
        for plan in self.plans.values():
            plan.apply(code)
        for (group, p, G), each in zip(rest, prepared, strict=True):
            apply(group, p, self.state[p], G() if "step" in self.state[p] else None, each, code)
        return loss

    def _ready(self) -> list[Ready]:
        """The parameters that have a gradient; refuses before anything has changed.   [SPEC: ERR-3]"""
        for group in self.param_groups:
            check_options(group, wait=False)  # a scheduler may have written to it
            check_step(group, self.state)
        every = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        return [(group, p, partial(gradient, group, p, getattr(self, "grad_scale", None))) for group, p in every]

    def _init_state(self) -> None:
        """Give every trainable parameter its whole state, so that a checkpoint is complete.   [SPEC: STATE-1]"""
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state.get(p) and (p.requires_grad or p.grad is not None):
                    self.state[p] = new_state(group, p)

    def _decide(self, prepared: list[Prepared]) -> Tensor | None:
        """The one decision of the step, over all groups and algorithms.   [SPEC: SKIP]"""
        found = [(each.states, each.updates) for each in prepared] + [plan.magnitudes() for plan in self.plans.values()]
        states, updates = ([T for pair in found for T in pair[i]] for i in range(2))
        device = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
        return self.guard.decide(states, updates, getattr(self, "found_inf", None), device)

    def _culprits(self, rest: list[Ready], prepared: list[Prepared]) -> dict[str, dict[str, Tensor]]:
        """Gradient and state before the step, by name, of every parameter that kept it from being taken."""
        groups = enumerate(self.param_groups)
        home = {p: (name, g) for i, g in groups for name, p in zip(names(g, i), g["params"], strict=True)}
        bad = [p for (_, p, _), each in zip(rest, prepared, strict=True) if nonfinite([*each.states, *each.updates], p.device)]
        bad += [p for plan in self.plans.values() for p in plan.culprits()]
        scale, found = getattr(self, "grad_scale", None), {}
        for name, group, p in ((*home[p], p) for p in bad):
            G = {} if p.grad is None else {"gradient": gradient(group, p, scale)}
            found[name] = {key: local(T) for key, T in (G | self.state[p]).items()}  # this rank's part
        return found

    def state_dict(self) -> dict[str, Any]:
        """As torch's, complete for every trainable parameter once there is state, options as plain data.   [SPEC: STATE-1]"""
        self.guard.look(wait=True)
        if any(self.state.values()):
            self._init_state()
        saved = super().state_dict()
        for group in saved.get("param_groups", ()):
            group.update(plain(group))
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

        # After the hooks of others that may rewrite what is loaded, before those that may look at it.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(lambda _: restore(self, checked), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "guard": self.guard}  # torch's keeps defaults, state and groups only

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.plans = {}  # they hold addresses of the original's tensors
        self.defaults.pop("differentiable", None)  # torch adds it here, and our constructor does not take it
        for group in self.param_groups:
            for option, value in self.defaults.items():
                group.setdefault(option, value)
            if group["layout"] is not None:
                group["layout"] = Layout.of(group["layout"])
            group.setdefault("skip_grad_norm_clip", algorithms(group) == {"muon"})
