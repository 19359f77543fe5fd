# SPDX-License-Identifier: Apache-2.0
"""The optimizer: which stages of muon.py step what, and what is kept.   [SPEC: SKIP, STEP, STATE]"""

import warnings
from dataclasses import asdict

import torch

from .layout import as_section, matrices
from .muon import adamw, muon, rounded
from .polar import float64
from .schedules import schedule


class Muon(torch.optim.Optimizer):
    """The optimizer of SPEC.md, in float64 on the CPU whatever the weights are.   [SPEC: STEP, STATE]

    Args: as torch.optim.Muon, and for each group: algorithm: "muon" or "adamw".  layout: dict of the keywords of
        `matrices`.  adamw_lr_ratio, adamw_betas, adamw_eps: AdamW's options.  maximize: go up the gradient.
        normuon_beta2: that of VAR, or None.  skip_nonfinite, of the whole optimizer: see SKIP.
    State: momentum_buffer, exp_avg, exp_avg_sq in float64 and the shape of the parameter; variance_buffer, float64;
        step, float32.
    Attributes: skipped: the number of steps not taken, by reason.  found_inf, grad_scale: tensors of one element or
        None, written by whoever scales the loss, such as torch.amp.GradScaler.
    """

    _step_supports_amp_scaling = True  # GradScaler then leaves both attributes to us instead of acting on them

    def __init__(
        self,
        params,
        lr=1e-3,
        weight_decay=0.1,
        momentum=0.95,
        nesterov=True,
        ns_coefficients="polar_express_s4",
        eps=0.0,
        ns_steps=5,
        adjust_lr_fn=None,
        *,
        algorithm="muon",
        layout=None,
        adamw_lr_ratio=1.0,
        adamw_betas=(0.9, 0.95),
        adamw_eps=1e-8,
        maximize=False,
        normuon_beta2=None,
        skip_nonfinite=True,
    ):
        self.skip_nonfinite = skip_nonfinite
        self.skipped = {"found_inf": 0, "gradient": 0, "orthogonalization": 0}
        self.told = 0  # how many failures were last warned of
        muon = dict(momentum=momentum, nesterov=nesterov, ns_coefficients=ns_coefficients, eps=eps, ns_steps=ns_steps)
        muon |= dict(adjust_lr_fn=adjust_lr_fn, layout=layout, normuon_beta2=normuon_beta2)
        adamw = dict(adamw_lr_ratio=adamw_lr_ratio, adamw_betas=adamw_betas, adamw_eps=adamw_eps)
        both = dict(lr=lr, weight_decay=weight_decay, algorithm=algorithm, maximize=maximize)
        super().__init__(params, both | muon | adamw)

    def __getstate__(self):
        """What a copy or a pickle keeps; torch's would lose our attributes.   [SPEC: STATE-5]"""
        return super().__getstate__() | {"skip_nonfinite": self.skip_nonfinite, "skipped": self.skipped, "told": self.told}

    def add_param_group(self, param_group):
        """As torch's; refuses an unsound schedule, keeps sections as plain dicts, declares what needs no clipping.

        [SPEC: ORTH-10, STATE-3, CLIP-3]
        """
        options = {**self.defaults, **param_group}
        schedule(options["ns_coefficients"], options["ns_steps"])
        layout = options["layout"]
        if layout and "sections" in layout:
            sections = [asdict(as_section(section)) for section in layout["sections"]]
            param_group = {**param_group, "layout": {**layout, "sections": sections}}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        algorithms = [algorithm for W in group["params"] for algorithm, _ in parts(W, group)]
        group.setdefault("skip_grad_norm_clip", all(algorithm == "muon" for algorithm in algorithms))

    @torch.no_grad()
    def step(self, closure=None):
        """Step every parameter that has a gradient; return what the closure returns.   [SPEC: STEP-2, STEP-5, SKIP]"""
        self.warn()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [(W, group) for group in self.param_groups for W in group["params"]]
        ready = [(W, group) for W, group in parameters if W.grad is not None]
        if ready:
            for W, group in parameters:
                self.initialize(W, group)
        new = [self.compute(W, group) for W, group in ready]
        reason = self.reason_to_skip(new)
        if reason:
            self.skipped[reason] += 1
        for (W, _), values in zip(ready, new, strict=True):
            self.write(W, values, reason)
        return loss

    def initialize(self, W, group):
        """The whole state of a parameter that requires a gradient and has none yet.   [SPEC: STATE-1, VAR-5]"""
        if self.state.get(W) or not (W.requires_grad or W.grad is not None):
            return
        algorithms = {algorithm for algorithm, _ in parts(W, group)}
        shapes = {}
        if "muon" in algorithms:
            shapes["momentum_buffer"] = W.shape
            if group["normuon_beta2"] is not None:
                layout = group["layout"] or {}
                rows = W.shape[:1] if layout.get("flatten") else W.shape[:-1]
                shapes["variance_buffer"] = (*rows, layout.get("columns", 1))
        if "adamw" in algorithms:
            shapes["exp_avg"] = shapes["exp_avg_sq"] = W.shape
            self.state[W]["step"] = torch.zeros(())
        for name, shape in shapes.items():
            self.state[W][name] = torch.zeros(shape, dtype=torch.float64)

    def compute(self, parameter, group):
        """A parameter's new weight W and state, and the O between them, all flat, by name; writes nothing.

        Each part is gathered, stepped as a parameter of its own, and put back.   [SPEC: LAYOUT-2, LAYOUT-5]
        """
        scale = getattr(self, "grad_scale", None)
        sign = -1 if group["maximize"] else 1
        W = float64(parameter).flatten().clone()
        G = sign * float64(parameter.grad).flatten() / (1 if scale is None else float(scale))  # SKIP-9, MOM-5
        O = torch.zeros_like(G)
        new = {name: value.flatten().clone() for name, value in self.state[parameter].items()}
        if "step" in new:
            new["step"] += 1
        for algorithm, index in parts(parameter, group):
            if algorithm == "muon":
                M, V = new["momentum_buffer"], new.get("variance_buffer", torch.zeros_like(G))
                rows = index[..., :1] // index.shape[-1]  # a matrix's columns are a whole run of those of the parameter
                W[index], M[index], V[rows], O[index] = muon(W[index], G[index], M[index], V[rows], group)
            else:
                m, v, step = new["exp_avg"], new["exp_avg_sq"], new["step"]
                W[index], m[index], v[index] = adamw(W[index], G[index], m[index], v[index], int(step), group)
        return new | dict(W=W, O=O)

    def reason_to_skip(self, new):
        """Why the step is not taken, or None.   [SPEC: SKIP]"""

        def finite(*names):
            return all(values[name].isfinite().all() for values in new for name in names if name in values)

        if getattr(self, "found_inf", None):
            return "found_inf"
        if self.skip_nonfinite and not finite("momentum_buffer", "exp_avg", "exp_avg_sq"):
            return "gradient"  # one that is not finite makes its averages so
        if self.skip_nonfinite and not finite("O"):
            return "orthogonalization"
        return None

    def write(self, W, new, reason):
        """A step taken writes everything, one with clean gradients the momentum, one skipped for others nothing.

        [SPEC: SKIP-1, SKIP-2]
        """
        for name, value in self.state[W].items():
            if reason is None or (reason, name) == ("orthogonalization", "momentum_buffer"):
                value.copy_(new[name].reshape(value.shape))
        if reason is None:
            W.copy_(rounded(new["W"], W.dtype).reshape(W.shape))

    def warn(self):
        """Tell of the first failure, and whenever there are twice as many.   [SPEC: SKIP-5]"""
        failures = self.skipped["gradient"] + self.skipped["orthogonalization"]
        if failures.bit_length() > self.told.bit_length():
            self.told = failures
            warnings.warn(f"{failures} steps were skipped: {self.skipped}", RuntimeWarning, stacklevel=3)

    def state_dict(self):
        """As torch's.   [SPEC: SKIP-5]"""
        self.warn()
        return super().state_dict()

    def load_state_dict(self, state_dict):
        """As torch's, which however would cast the float64 state to the dtype of the weight.   [SPEC: STATE-2]"""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        ours = [W for group in self.param_groups for W in group["params"]]
        for i, W in zip(saved, ours, strict=True):
            if i in state_dict["state"]:
                self.state[W] = {name: value.clone() for name, value in state_dict["state"][i].items()}


def parts(W, group):
    """(algorithm, indices) for each part of a parameter; all of it where the group's algorithm is AdamW."""
    if group["algorithm"] == "adamw":
        return [("adamw", torch.arange(W.numel()))]
    return matrices(W.shape, **(group["layout"] or {}))
