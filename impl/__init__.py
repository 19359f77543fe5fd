# SPDX-License-Identifier: Apache-2.0
"""Muon for people who train models: a drop-in for torch.optim.Muon that SPEC.md defines exactly."""

from impl.layout import Layout, Section
from impl.muon import Muon
from impl.orthogonalize import orthogonalize
from impl.routing import param_groups

__all__ = ["Layout", "Muon", "Section", "orthogonalize", "param_groups"]
