# SPDX-License-Identifier: Apache-2.0
"""Muon, one function for each stage in SPEC's order, the optimizer last.   [SPEC: MOM to STATE]

G gradient, M momentum, U update direction, O orthogonalized update, W weight: float64, (..., m, n).
"""

from dataclasses import asdict
from math import sqrt

import torch

from .layout import as_section, matrices
from .polar import float64, orthogonalize
from .schedules import schedule


def momentum(M, G, beta, nesterov):
    """The new exponential average and the update direction: (M, U), in the unit of G.   [SPEC: MOM-1, MOM-2]"""
    M, G = float64(M), float64(G)
    M = beta * M + (1 - beta) * G
    U = (1 - beta) * G + beta * M if nesterov else M
    return M, U


def lr_scale(m, n, adjust_lr_fn):
    """The factor on the learning rate of an m x n matrix.   [SPEC: SCALE-1, SCALE-2]

    Source: None and "original": K. Jordan 2024; "match_rms_adamw": Moonlight, arXiv:2502.16982.
    """
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * sqrt(max(m, n))
    return sqrt(max(1, m / n))


def decay(W, lr, weight_decay):
    """Decoupled weight decay, with the learning rate before any scale.   [SPEC: DECAY-1]"""
    return (1 - lr * weight_decay) * W


def muon(W, G, M, group):
    """One step of matrices of one size: (W, M).   [SPEC: STEP-1, SCALE-3, DECAY-1]

    Args: W, G, M: (B, m, n).  group: options, named as in Muon.
    """
    *_, m, n = W.shape
    if W.numel() == 0:
        return W, M
    lr = float(group["lr"])
    M, U = momentum(M, G, group["momentum"], group["nesterov"])
    O = orthogonalize(U, schedule(group["ns_coefficients"], group["ns_steps"]), group["eps"])
    W = decay(W, lr, group["weight_decay"]) - lr * lr_scale(m, n, group["adjust_lr_fn"]) * O
    return W, M


def adamw(W, G, exp_avg, exp_avg_sq, step, group):
    """One step, the `step`-th from 1, of AdamW: (W, exp_avg, exp_avg_sq), any shape.   [SPEC: STEP-8]

    Source: Loshchilov and Hutter, arXiv:1711.05101, in the form of torch.optim.AdamW: epsilon is added to the square
    root of the bias-corrected second moment.
    """
    lr = float(group["lr"]) * group["adamw_lr_ratio"]
    beta1, beta2 = group["adamw_betas"]
    exp_avg = beta1 * exp_avg + (1 - beta1) * G
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * G**2
    mean = exp_avg / (1 - beta1**step)
    deviation = (exp_avg_sq / (1 - beta2**step)).sqrt()
    W = decay(W, lr, group["weight_decay"]) - lr * mean / (deviation + group["adamw_eps"])
    return W, exp_avg, exp_avg_sq


def rounded(W, dtype):
    """float64 rounded once, to nearest even, to `dtype`.   [SPEC: STEP-11]

    torch rounds float64 to a 16-bit type by way of float32, which is twice. Rounding the first time to the odd
    neighbour where that is inexact makes the second the only one that counts (Boldo and Melquiond 2008).
    """
    if dtype.itemsize > 2:
        return W.to(dtype)
    near = W.float()
    even = near.view(torch.int32) % 2 == 0
    other = torch.nextafter(near, torch.where(near < W, torch.inf, -torch.inf).float())
    return torch.where(even & (near != W), other, near).to(dtype)


class Muon(torch.optim.Optimizer):
    """The optimizer of SPEC.md, in float64 on the CPU whatever the weights are.   [SPEC: STEP, STATE]

    Args: as torch.optim.Muon, and for each group: algorithm: "muon" or "adamw".  layout: dict of the keywords of
        `matrices`.  adamw_lr_ratio, adamw_betas, adamw_eps: AdamW's options.  maximize: go up the gradient.
    State: momentum_buffer, exp_avg, exp_avg_sq in float64 and the shape of the parameter; step, float32.
    """

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
    ):
        muon = dict(momentum=momentum, nesterov=nesterov, ns_coefficients=ns_coefficients, eps=eps, ns_steps=ns_steps)
        muon |= dict(adjust_lr_fn=adjust_lr_fn, layout=layout)
        adamw = dict(adamw_lr_ratio=adamw_lr_ratio, adamw_betas=adamw_betas, adamw_eps=adamw_eps)
        both = dict(lr=lr, weight_decay=weight_decay, algorithm=algorithm, maximize=maximize)
        super().__init__(params, both | muon | adamw)

    def add_param_group(self, param_group):
        """As torch's; refuses an unsound schedule, keeps sections as plain dicts.   [SPEC: ORTH-10, STATE-3]"""
        options = {**self.defaults, **param_group}
        schedule(options["ns_coefficients"], options["ns_steps"])
        layout = options["layout"]
        if layout and "sections" in layout:
            sections = [asdict(as_section(section)) for section in layout["sections"]]
            param_group = {**param_group, "layout": {**layout, "sections": sections}}
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None):
        """Step every parameter that has a gradient; return what the closure returns.   [SPEC: STEP-2, STEP-5]"""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [(W, group) for group in self.param_groups for W in group["params"]]
        if any(W.grad is not None for W, _ in parameters):
            for W, group in parameters:
                self.initialize(W, group)
        for W, group in parameters:
            if W.grad is not None:
                self.step_parameter(W, group)
        return loss

    def initialize(self, W, group):
        """The whole state of a parameter that requires a gradient and has none yet.   [SPEC: STATE-1]"""
        if self.state.get(W) or not (W.requires_grad or W.grad is not None):
            return
        algorithms = {algorithm for algorithm, _ in parts(W, group)}
        if "muon" in algorithms:
            self.state[W]["momentum_buffer"] = torch.zeros(W.shape, dtype=torch.float64)
        if "adamw" in algorithms:
            self.state[W]["exp_avg"] = torch.zeros(W.shape, dtype=torch.float64)
            self.state[W]["exp_avg_sq"] = torch.zeros(W.shape, dtype=torch.float64)
            self.state[W]["step"] = torch.zeros(())

    def step_parameter(self, parameter, group):
        """Gather each part, step it as a parameter of its own, put it back.   [SPEC: LAYOUT-2, LAYOUT-5, MOM-5]"""
        state = self.state[parameter]
        W = float64(parameter).flatten().clone()
        G = float64(parameter.grad).flatten() * (-1 if group["maximize"] else 1)
        if "step" in state:
            state["step"] += 1
        for algorithm, index in parts(parameter, group):
            if algorithm == "muon":
                M = state["momentum_buffer"].view(-1)
                W[index], M[index] = muon(W[index], G[index], M[index], group)
            else:
                m, v = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
                W[index], m[index], v[index] = adamw(W[index], G[index], m[index], v[index], int(state["step"]), group)
        parameter.copy_(rounded(W, parameter.dtype).reshape(parameter.shape))

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
