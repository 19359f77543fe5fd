# SPDX-License-Identifier: Apache-2.0
"""SPEC.md in float64: slow, declarative, obviously right. Written for readers."""

from .layout import Section, matrices
from .muon import Muon, decay, lr_scale, momentum
from .polar import orthogonalize, polar_factor, spectral_map
from .schedules import LOWER, Schedule, minimax, schedule

__all__ = [
    "LOWER",
    "Muon",
    "Schedule",
    "Section",
    "decay",
    "lr_scale",
    "matrices",
    "minimax",
    "momentum",
    "orthogonalize",
    "polar_factor",
    "schedule",
    "spectral_map",
]
