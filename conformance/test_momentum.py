# SPDX-License-Identifier: Apache-2.0
"""MOM: momentum."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from conformance import accept
from conformance.steps import expected, parameters, run, take
from conformance.strategies import DTYPES, HYPER, seeds, shapes, tensor
from conformance.target import Target

betas = st.sampled_from([0.0, 0.5, 0.9, 0.95])


@pytest.mark.clause("MOM-1", "MOM-4")
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes, seed=seeds, beta=betas)
def test_is_an_exponential_average(target: Target, device, nesterov, dtype, shape, seed, beta):
    gradients = [tensor(shape, seed + i, dtype) for i in range(3)]
    hyper = replace(HYPER, momentum=beta, nesterov=nesterov)
    (p,), optimizer = run(target, [tensor(shape, seed, dtype)], [[G] for G in gradients], hyper, device)
    M = torch.zeros(shape, dtype=torch.float64)
    for G in gradients:
        M, _ = reference.momentum(M, G, beta, nesterov)
    buffer = target.momentum_buffer(optimizer, p)
    accept.close(actual=buffer, expected=M, dtype=buffer.dtype)


@pytest.mark.clause("MOM-1")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@given(shape=shapes, seed=seeds, beta=betas)
def test_average_of_huge_gradients(target: Target, device, dtype, shape, seed, beta):
    huge = torch.sign(tensor(shape, seed, torch.float64)).to(dtype) * (0.9 * torch.finfo(dtype).max)
    (p,), optimizer = run(
        target, [tensor(shape, seed, dtype)], [[huge], [-huge], [huge]], replace(HYPER, momentum=beta), device
    )
    M = torch.zeros(shape, dtype=torch.float64)
    for G in (huge, -huge, huge):
        M, _ = reference.momentum(M, G, beta, True)
    buffer = target.momentum_buffer(optimizer, p)
    accept.finite(actual=buffer)
    accept.finite(actual=p.detach())
    unit = M.abs().max()  # since the sum of squares in the predicate has a range too
    accept.close(actual=buffer.cpu().double() / unit, expected=M / unit, dtype=buffer.dtype)


@pytest.mark.clause("MOM-2")
@pytest.mark.parametrize("nesterov", [True, False])
@given(shape=shapes, seed=seeds, beta=betas)
def test_direction_looks_ahead_with_nesterov_only(target: Target, device, nesterov, shape, seed, beta):
    W, gradients = tensor(shape, seed), [[tensor(shape, seed + 1 + i)] for i in range(2)]
    hyper = replace(HYPER, momentum=beta, nesterov=nesterov)
    (p,), _ = run(target, [W], gradients, hyper, device)
    (right,) = expected([W], gradients, hyper)
    accept.step(before=W, actual=p, expected=right, precision=target.precision(W.dtype, device))


@pytest.mark.clause("MOM-3")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_kept_in_float32_or_wider(target: Target, device, dtype):
    (p,), optimizer = run(target, [tensor((3, 4), 0, dtype)], [[tensor((3, 4), 1, dtype)]], HYPER, device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    accept.dtype(actual=target.momentum_buffer(optimizer, p), at_least=wide, shape=p.shape)


@pytest.mark.clause("MOM-4")
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shares_no_storage(target: Target, device, nesterov, dtype):
    (p,), optimizer = run(
        target, [tensor((4, 4), 0, dtype)], [[tensor((4, 4), 1, dtype)]], replace(HYPER, nesterov=nesterov), device
    )
    M = target.momentum_buffer(optimizer, p)
    before = M.clone()
    p.grad.zero_()
    with torch.no_grad():
        p.zero_()
    accept.same_bits(actual=M, expected=before)


@pytest.mark.clause("MOM-5")
@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
@given(shape=shapes, seed=seeds)
def test_maximize_is_minimizing_the_negative(target: Target, device, algorithm, shape, seed):
    W, gradients = tensor(shape, seed), [tensor(shape, seed + 1 + i) for i in range(2)]
    hyper = replace(HYPER, algorithm=algorithm)
    (up,), _ = run(target, [W], [[G] for G in gradients], replace(hyper, maximize=True), device)
    (down,), _ = run(target, [W], [[-G] for G in gradients], hyper, device)
    accept.same_bits(actual=up, expected=down)


@pytest.mark.clause("MOM-4")
@given(seed=seeds)
def test_is_written_by_its_own_step_only(target: Target, device, seed):
    named = parameters([tensor((4, 6), seed), tensor((4, 6), seed + 1)], device)
    optimizer = target.optimizer(named, HYPER)
    take(optimizer, named, [tensor((4, 6), seed + 2), tensor((4, 6), seed + 3)])
    before = target.momentum_buffer(optimizer, named[0][1]).clone()
    take(optimizer, named, [None, tensor((4, 6), seed + 4)])
    accept.same_bits(actual=target.momentum_buffer(optimizer, named[0][1]), expected=before)
