# SPDX-License-Identifier: Apache-2.0
"""SKIP-9 and SKIP-10: loss scaling and accumulated gradients."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conformance import accept
from conformance.campaign import everything
from conformance.ranks import Case, Outcome, Weight, begin, give, outcome, together
from conformance.steps import parameters, take
from conformance.strategies import HYPER, seeds, shapes, tensor
from conformance.target import Target
from conformance.worlds import threads

pytestmark = pytest.mark.filterwarnings("ignore:.*skipped:RuntimeWarning")
INF = float("inf")


@pytest.mark.clause("SKIP-9")
@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
@given(shape=shapes, seed=seeds, exponents=st.lists(st.integers(-8, 40), min_size=3, max_size=3))
def test_a_loss_scale_changes_no_bit(skipping: Target, device, algorithm, shape, seed, exponents):
    hyper = replace(HYPER, algorithm=algorithm)
    plain, scaled = (parameters([tensor(shape, seed)], device) for _ in range(2))
    a, b = skipping.optimizer(plain, hyper), skipping.optimizer(scaled, hyper)
    for i, k in enumerate(exponents):
        G = tensor(shape, seed + 1 + i)
        take(a, plain, [G])
        b.grad_scale = torch.tensor(2.0**k, device=device)
        take(b, scaled, [G * 2.0**k])
    assert accept.equal(everything(scaled, b), everything(plain, a))


def scaled(rank: int, target: Target, case: Case, device: str, exponents: list[int | None]) -> Outcome:
    """The case on this rank, whose gradients come with a loss scale, or in some steps without one."""
    parameters, optimizer = begin(target, case, device)
    for step, k in enumerate(exponents):
        optimizer.grad_scale = None if k is None else torch.tensor(2.0**k, device=device)
        give(case, rank, step, parameters, 2.0 ** (k or 0))
        optimizer.step()
    return outcome(target, parameters, optimizer, [])


@pytest.mark.dist
@pytest.mark.clause("SKIP-9", "DIST-1", "DIST-2")
@pytest.mark.parametrize("mode", ["owned", "distributed"])
@pytest.mark.parametrize("mesh", [((2,), ("S0",)), ((2,), ("R",)), ((2,), ())], ids=["by rows", "copies", "replicas"])
def test_a_loss_scale_changes_no_bit_on_any_rank(skipping: Target, device, mesh, mode):
    weights = (Weight((8, 12)), Weight((12, 8), None, "adamw"))
    case = Case(*mesh, weights, replace(HYPER, shard_mode=mode), steps=3)
    plain = threads(case.size, together, skipping, case, device.type)
    found = threads(case.size, scaled, skipping, case, device.type, [10, None, -3])
    for each, other in zip(found, plain, strict=True):
        for name, (T, _) in other.parts.items():
            accept.same_bits(actual=each.parts[name][0], expected=T)


@pytest.mark.clause("SKIP-9")
@pytest.mark.parametrize(
    ("dtype", "state", "scale"), [(torch.float16, torch.float32, 2.0**24), (torch.float64, torch.float64, 3)]
)
def test_a_loss_scale_is_divided_in_the_precision_of_the_state(skipping: Target, device, dtype, state, scale):
    named = parameters([tensor((6, 4), 0, dtype)], device)
    optimizer, G = skipping.optimizer(named, HYPER), tensor((6, 4), 1, dtype)
    optimizer.grad_scale = torch.tensor(scale, dtype=torch.float32, device=device)
    take(optimizer, named, [G])
    M = skipping.momentum_buffer(optimizer, named[0][1]).double() * scale
    accept.close(actual=M, expected=(1 - HYPER.momentum) * G.double(), dtype=state)


@pytest.mark.clause("SKIP-9", "SKIP-1")
@pytest.mark.parametrize("way", ["handed over", "unscaled first", "plain"])
def test_grad_scaler(skipping: Target, device, way):
    """The scale doubles in every step, and halves where it overflows."""
    named = parameters([tensor((6, 4), 0), tensor((9,), 1)], device)
    twins = copy.deepcopy(named)
    optimizers = []
    for each in (named, twins):
        optimizers.append(skipping.optimizer(each[:1], HYPER))
        optimizers[-1].add_param_group(skipping.group(each[1:], replace(HYPER, algorithm="adamw")))
    optimizer, twin = optimizers
    if way == "plain":
        optimizer._step_supports_amp_scaling = False
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=1)
    for i in range(4):
        step = [tensor((6, 4), 10 + i), tensor((9,), 20 + i)]
        scale = scaler.get_scale()
        for (_, p), G in zip(named, step, strict=True):
            p.grad = G.to(device) * scale
        if i == 2:
            named[1][1].grad[0] = INF
        before = everything(named, optimizer)
        scaler.scale(torch.ones((), device=device))
        if way == "unscaled first":
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if i == 2:
            assert accept.equal(everything(named, optimizer), before)
            assert scaler.get_scale() == scale / 2
        else:
            take(twin, twins, step)
        assert accept.equal(everything(named, optimizer), everything(twins, twin))


@pytest.mark.clause("SKIP-10")
@given(seed=seeds, passes=st.integers(1, 4))
def test_accumulated_gradients_are_orthogonalized_once(target: Target, device, seed, passes):
    named = parameters([tensor((6, 4), seed)], device)
    optimizer = target.optimizer(named, HYPER)
    ((_, p),) = named
    total = torch.zeros(6, 4)
    with target.orthogonalizing(None) as shapes:
        for i in range(passes):
            (p * tensor((6, 4), seed + i).to(device)).sum().backward()
            total += tensor((6, 4), seed + i)
        optimizer.step()
    assert len(shapes) == 1
    (alone,) = parameters([tensor((6, 4), seed)], device)
    other = target.optimizer([alone], HYPER)
    take(other, [alone], [total])
    accept.same_bits(actual=p, expected=alone[1])
