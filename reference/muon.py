# SPDX-License-Identifier: Apache-2.0
"""Muon, one function for each stage in SPEC's order; optimizer.py puts them together.   [SPEC: MOM to STEP]

G gradient, M momentum, U update direction, O orthogonalized update, W weight: float64, (..., m, n).
V mean square of the rows of O: float64, (..., m, 1).
"""

from math import sqrt

import numpy as np
import torch

from .polar import float64, orthogonalize
from .schedules import schedule


def momentum(M, G, beta, nesterov):
    """The new exponential average and the update direction: (M, U), in the unit of G.   [SPEC: MOM-1, MOM-2]"""
    M, G = float64(M), float64(G)
    M = beta * M + (1 - beta) * G
    U = (1 - beta) * G + beta * M if nesterov else M
    return M, U


def normalize_rows(O, V, beta2):
    """Rows over the root of their average mean square, the matrix as large as before: (O, V).   [SPEC: VAR-1, VAR-2]

    Source: NorMuon, Li et al., arXiv:2510.05491, whose matrices have the norm 0.2 sqrt(m n) instead.
    """
    O, V = float64(O).clone(), float64(V).clone()
    for i in np.ndindex(O.shape[:-2]):  # one by one: the order of a sum, and so its bits, may depend on the batch
        V[i] = beta2 * V[i] + (1 - beta2) * O[i].square().mean(-1, keepdim=True)
        N = O[i] / (V[i].sqrt() + 1e-8)
        O[i] = N * O[i].norm() / N.norm() if N.any() else 0.0
    return O, V


def lr_scale(m, n, adjust_lr_fn):
    """The factor on the learning rate of an m x n matrix.   [SPEC: SCALE-1, SCALE-2, SCALE-4]

    Source: None and "original": K. Jordan 2024; "match_rms_adamw": Moonlight, arXiv:2502.16982; the others:
    Emerging-Optimizers.
    """
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * sqrt(max(m, n))
    if adjust_lr_fn == "spectral":
        return sqrt(max(m, n))
    if adjust_lr_fn == "unit_rms_norm":
        return sqrt(m / n)
    return sqrt(max(1, m / n))


def decay(W, lr, weight_decay):
    """Decoupled weight decay, with the learning rate before any scale.   [SPEC: DECAY-1]"""
    return (1 - lr * weight_decay) * W


def muon(W, G, M, V, group):
    """One step of matrices of one size: (W, M, V, O), where O is before VAR.   [SPEC: STEP-1, SCALE-3, DECAY-1]

    Args: W, G, M: (B, m, n).  V: (B, m, 1), of no consequence without normuon_beta2.  group: options, named as in Muon.
    """
    *_, m, n = W.shape
    if W.numel() == 0:
        return W, M, V, W
    lr = float(group["lr"])
    M, U = momentum(M, G, group["momentum"], group["nesterov"])
    N = O = orthogonalize(U, schedule(group["ns_coefficients"], group["ns_steps"]), group["eps"])
    if group["normuon_beta2"] is not None:
        N, V = normalize_rows(O, V, group["normuon_beta2"])
    W = decay(W, lr, group["weight_decay"]) - lr * lr_scale(m, n, group["adjust_lr_fn"]) * N
    return W, M, V, O


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
