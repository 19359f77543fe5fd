# SPDX-License-Identifier: Apache-2.0
"""Muon for people who train models: a drop-in for torch.optim.Muon that SPEC.md defines exactly."""

from impl.chain import ChainedOptimizer
from impl.clipping import clip_grad_norm_
from impl.layout import Layout, Section
from impl.muon import Muon
from impl.norms import GradNorms
from impl.origins import import_state, like
from impl.orthogonalize import orthogonalize
from impl.routing import param_groups

__all__ = [
    "ChainedOptimizer",
    "GradNorms",
    "Layout",
    "Muon",
    "Section",
    "clip_grad_norm_",
    "import_state",
    "like",
    "orthogonalize",
    "param_groups",
]
