# SPDX-License-Identifier: Apache-2.0
"""Spectral maps: what a function of the singular values does to a matrix.   [SPEC: ORTH]"""

from functools import partial

import numpy as np
import scipy.linalg
import torch


def float64(values):
    """Any tensor, array or nested list as a float64 tensor on the CPU."""
    return torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()


def spectral_map(G, f):
    """P f(S) Q^T of every matrix in G, where G = P S Q^T is a singular value decomposition.   [SPEC: ORTH-1, ORTH-7]

    Each matrix is first multiplied by the power of two that brings its largest entry into [1/2, 1). That is exact
    (but for entries 2^-1000 times smaller than the largest) and keeps the whole range of float64 away from overflow.
    So f must not depend on scale, f(c s) = f(s) for c > 0, as where it divides s by a norm of s; and it must map 0
    to 0, which makes the result unique where singular values are zero or repeated. A zero matrix gives zeros, one that
    is not finite NaN.

    Args: G: (..., m, n).  f: array of the min(m, n) singular values, descending -> array of the same shape.
    Returns: (..., m, n) float64.
    """
    G = float64(G)
    matrices = G.reshape(G.shape[:-2].numel(), *G.shape[-2:]).numpy()
    images = np.zeros_like(matrices)
    for X, image in zip(matrices, images, strict=True):
        if not np.isfinite(X).all():
            image[:] = np.nan
        elif X.any():
            P, s, Qt = scipy.linalg.svd(np.ldexp(X, -exponent(X)), full_matrices=False)
            image[:] = P * f(s) @ Qt
    return torch.from_numpy(images).reshape(G.shape)


def exponent(X):
    """The integer k for which the largest absolute entry of X is in [2^(k-1), 2^k)."""
    return np.frexp(np.abs(X).max())[1]


def polar_factor(G):
    """P Q^T over the singular values that are not zero; zero on the null space.   [SPEC: ORTH]

    A singular value counts as zero up to max(m, n) * 2^-52 times the largest, as in numpy.linalg.matrix_rank.

    Args: G: (..., m, n).   Returns: (..., m, n) float64.
    """
    G = float64(G)
    tolerance = max(G.shape[-2:]) * np.finfo(np.float64).eps
    return spectral_map(G, lambda s: np.where(s > tolerance * s[0], 1.0, 0.0))


def orthogonalize(X, schedule, eps=0.0):
    """P p(S / (margin * max(N(X), eps))) Q^T.   [SPEC: ORTH-1, ORTH-12]

    Args: X: (..., m, n).  schedule: Schedule.  eps: floor under the norm, in the unit of X.
    Returns: (..., m, n) float64, without unit.
    """
    X = float64(X)
    O = torch.zeros_like(X)
    for i in np.ndindex(X.shape[:-2]):
        if X[i].any():
            with np.errstate(over="ignore"):  # beyond 2^1024 times X, infinity is as good
                floor = np.ldexp(eps, -exponent(X[i].numpy()))  # in the unit of spectral_map
            O[i] = spectral_map(X[i], partial(_normalized, schedule=schedule, floor=floor))
    return O


def _normalized(s, schedule, floor):
    return schedule(s / (schedule.margin * max(schedule.size(s), floor)))
