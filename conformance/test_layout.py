# SPDX-License-Identifier: Apache-2.0
"""LAYOUT: the matrices inside a parameter."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from conformance import accept
from conformance.steps import accept_fused, expected, run, run_fused_and_separate
from conformance.strategies import HYPER, LAYOUTS, MIXED, seeds, tensor
from conformance.target import Target

layouts = pytest.mark.parametrize(("shape", "layout"), LAYOUTS.values(), ids=LAYOUTS.keys())


@pytest.mark.clause("LAYOUT-2")
@layouts
@given(seed=seeds)
def test_fused_equals_separate(target: Target, device, shape, layout, seed):
    fused, apart = run_fused_and_separate(target, device, shape, layout, seed)
    for a, b in zip(fused, apart, strict=True):
        accept.same_bits(actual=a, expected=b)


@pytest.mark.clause("LAYOUT-2", "LAYOUT-3")
def test_128_fused_experts_equal_128_parameters(target: Target, device):
    """One dead, one 1e8 times larger than the rest."""

    def dead_and_huge(G: Tensor, step: int) -> Tensor:
        G = G.clone()
        G.view(128, 6, 10)[5] = 0
        G.view(128, 6, 10)[77] *= 1e8
        return G

    fused, apart = run_fused_and_separate(target, device, (128 * 6, 10), {"blocks": 128}, 0, change=dead_and_huge)
    for a, b in zip(fused, apart, strict=True):
        accept.same_bits(actual=a, expected=b)


@pytest.mark.clause("LAYOUT-3")
@given(seed=seeds, dead=st.integers(0, 3), exponent=st.integers(-60, 60))
def test_a_dead_expert_only_decays_and_scales_do_not_mix(target: Target, device, seed, dead, exponent):
    shape, layout = (4 * 6, 10), {"blocks": 4}
    W, G = tensor(shape, seed), tensor(shape, seed + 1)
    G.view(4, 6, 10)[dead] = 0
    (plain,), _ = run(target, [W], [[G]], replace(HYPER, layout=layout, weight_decay=0.0), device)
    accept.same_bits(actual=plain.view(4, 6, 10)[dead], expected=W.view(4, 6, 10)[dead])
    assert not torch.equal(plain.cpu(), W), "nothing was stepped at all"
    scaled = G.clone()
    scaled.view(4, 6, 10)[(dead + 1) % 4] *= 2.0**exponent
    (mixed,), _ = run(target, [W], [[scaled]], replace(HYPER, layout=layout, weight_decay=0.0), device)
    accept.same_bits(actual=mixed, expected=plain)


@pytest.mark.clause("LAYOUT-1")
@layouts
@given(seed=seeds)
def test_matrices_are_where_the_rules_say(target: Target, device, shape, layout, seed):
    W, gradients = tensor(shape, seed), [[tensor(shape, seed + 1 + i)] for i in range(2)]
    hyper = replace(HYPER, layout=layout)
    (p,), _ = run(target, [W], gradients, hyper, device)
    (right,) = expected([W], gradients, hyper)
    accept.step(before=W, actual=p, expected=right, precision=target.precision(W.dtype, device))


@pytest.mark.suite
@layouts
def test_matrices_are_a_partition(shape, layout):
    found = torch.cat([index.flatten() for _, index in reference.matrices(shape, **layout)])
    accept.same_bits(actual=found.sort().values, expected=torch.arange(found.numel()))
    assert found.numel() == torch.Size(shape).numel()


@pytest.mark.clause("LAYOUT-5")
@pytest.mark.parametrize(("shape", "layout"), MIXED.values(), ids=MIXED.keys())
@given(seed=seeds)
def test_sections_step_by_their_own_algorithm(target: Target, device, shape, layout, seed):
    accept_fused(target, device, shape, layout, seed)


@pytest.mark.clause("LAYOUT-4")
@pytest.mark.parametrize(
    ("shape", "layout", "words"),
    [
        ((10, 4), {"blocks": 3}, ["10", "3", "blocks"]),
        ((4, 10), {"columns": 3}, ["10", "3", "columns"]),
        ((12, 4), {"groups": 5}, ["12", "5", "groups"]),
        ((12, 4), {"sections": [{"rows": 4}, {"rows": 4}]}, ["12", "8", "sections"]),
        ((12, 4), {"sections": [{"rows": 12, "head_dim": 5}]}, ["12", "5", "head_dim"]),
        ((12, 4), {"sections": [{"rows": 12, "head_dim": 0}]}, ["head_dim", "0"]),
        ((4, 6, 5), {"blocks": 3}, ["4", "3", "blocks"]),
        ((4, 6, 5), {}, ["4", "1", "blocks"]),
        ((4, 2, 3, 3), {}, ["flatten"]),
        ((12,), {"blocks": 3}, ["12", "dimension"]),
        ((12, 4), {"blocks": 0}, ["blocks", "0"]),
        ((12, 4), {"blocks": 1.5}, ["blocks", "1.5"]),
        ((12, 4), {"sections": [{"rows": 12, "algorithm": "sgd"}]}, ["sgd"]),
        ((8, 4), {"blocks": 4, "groups": 4}, ["8", "4", "blocks", "groups"]),
        ((36, 4), {"blocks": 6, "groups": 4}, ["36", "6", "4", "groups"]),
        ((4, 6, 5), {"blocks": 6}, ["4", "6", "blocks"]),
        ((10, 4), {"blocks": 3, "columns": 4}, ["10", "3", "blocks", "columns", "4"]),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(validating: Target, shape, layout, words):
    named = [("the_weight", torch.nn.Parameter(torch.zeros(shape)))]
    hyper = replace(HYPER, layout=layout)
    accept.refuses(lambda: validating.optimizer(named, hyper), ValueError, "the_weight", *words)
