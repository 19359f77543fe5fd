# SPDX-License-Identifier: Apache-2.0
"""SCALE and DECAY: by how much a weight moves."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance import accept
from conformance.steps import expected, run
from conformance.strategies import HYPER, seeds, shapes, tensor
from conformance.target import Hyper, Target


def check(target: Target, device, shape, seed, hyper: Hyper) -> None:
    W, G = tensor(shape, seed), tensor(shape, seed + 1)
    (p,), _ = run(target, [W], [[G]], hyper, device)
    (right,) = expected([W], [[G]], hyper)
    accept.step(before=W, actual=p, expected=right, precision=target.precision(W.dtype, device))


@pytest.mark.clause("SCALE-1")
@pytest.mark.parametrize("name", [None, "original"])
@given(shape=shapes, seed=seeds)
def test_original_scale(target: Target, device, name, shape, seed):
    check(target, device, shape, seed, replace(HYPER, adjust_lr_fn=name, weight_decay=0.0))


@pytest.mark.clause("SCALE-2")
@given(shape=shapes, seed=seeds)
def test_scale_that_matches_adamw(target: Target, device, shape, seed):
    check(target, device, shape, seed, replace(HYPER, adjust_lr_fn="match_rms_adamw", weight_decay=0.0))


@pytest.mark.clause("SCALE-4")
@pytest.mark.parametrize("name", ["spectral", "unit_rms_norm"])
@given(shape=shapes, seed=seeds)
def test_scales_of_others(target: Target, device, name, shape, seed):
    check(target, device, shape, seed, replace(HYPER, adjust_lr_fn=name, weight_decay=0.0))


@pytest.mark.clause("SCALE-3")
@pytest.mark.parametrize("name", ["original", "match_rms_adamw", "unit_rms_norm"])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((64, 4), {"blocks": 8}), ((4, 64), {"columns": 16}), ((2, 16, 4), {"blocks": 4}), ((8, 3, 2, 2), {"flatten": True})],
)
@given(seed=seeds)
def test_scale_is_of_the_matrix_not_the_parameter(target: Target, device, name, shape, layout, seed):
    check(target, device, shape, seed, replace(HYPER, adjust_lr_fn=name, layout=layout))


@pytest.mark.clause("DECAY-1")
@given(shape=shapes, seed=seeds, lr=st.sampled_from([0.0, 1e-3, 0.5]), weight_decay=st.sampled_from([0.0, 0.1, 1.5]))
def test_decay_is_decoupled_and_first(target: Target, device, shape, seed, lr, weight_decay):
    check(target, device, shape, seed, replace(HYPER, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
