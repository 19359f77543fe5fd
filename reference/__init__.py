# SPDX-License-Identifier: Apache-2.0
"""SPEC.md in float64: slow, declarative, obviously right. Written for readers."""

from .clipping import ChainedOptimizer, GradNorms, clip_coefficient, clip_grad_norm_, norm
from .layout import Section, matrices
from .muon import decay, lr_scale, momentum, normalize_rows
from .optimizer import Muon
from .polar import orthogonalize, polar_factor, spectral_map
from .schedules import LOWER, Schedule, minimax, schedule

__all__ = [
    "LOWER",
    "ChainedOptimizer",
    "GradNorms",
    "Muon",
    "Schedule",
    "Section",
    "clip_coefficient",
    "clip_grad_norm_",
    "decay",
    "lr_scale",
    "matrices",
    "minimax",
    "momentum",
    "norm",
    "normalize_rows",
    "orthogonalize",
    "polar_factor",
    "schedule",
    "spectral_map",
]
