# SPDX-License-Identifier: Apache-2.0
"""SKIP: steps that are not taken."""

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance import accept
from conformance.campaign import Fault, everything, faults, gradients, run, scene
from conformance.steps import parameters, take
from conformance.strategies import DTYPES, HYPER, LAYOUTS, seeds, shapes, tensor
from conformance.target import Target

pytestmark = pytest.mark.filterwarnings("ignore:.*skipped:RuntimeWarning")
LAYOUT = "gated delta net"
NAN, INF = float("nan"), float("inf")
values = pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.clause("SKIP-1", "SKIP-2", "SKIP-5", "SKIP-6")
@settings(max_examples=40)
@given(fault=st.sampled_from(list(faults())), seed=st.integers(30, 1000))
def test_faults_are_counted_and_corrupt_nothing(skipping: Target, device, fault: Fault, seed):
    assert run(skipping, fault, seed, device) == (True, False)


@pytest.mark.clause("SKIP-1")
@values
@dtypes
@pytest.mark.parametrize("where", range(4))
def test_a_gradient_that_is_not_finite_changes_nothing(skipping: Target, device, where, dtype, value):
    named, optimizer = scene(skipping, LAYOUT, dtype, device)
    before = everything(named, optimizer)
    step = gradients(named, 30)
    step[where].view(-1)[-1] = value
    take(optimizer, named, step)
    assert accept.equal(everything(named, optimizer), before)
    assert skipping.skipped(optimizer) == {"found_inf": 0, "gradient": 1, "orthogonalization": 0}


@pytest.mark.clause("SKIP-1")
def test_squares_that_overflow_change_nothing(skipping: Target, device):
    named, optimizer = scene(skipping, LAYOUT, torch.float64, device)
    before = everything(named, optimizer)
    step = gradients(named, 30)
    step[-1][0] = 1e200
    take(optimizer, named, step)
    assert accept.equal(everything(named, optimizer), before)
    assert skipping.skipped(optimizer)["gradient"] == 1


@pytest.mark.clause("SKIP-1")
@values
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_an_average_that_is_not_finite_changes_nothing_else(skipping: Target, device, key, value):
    named, optimizer = scene(skipping, LAYOUT, torch.float32, device)
    average = optimizer.state[named[-1][1]][key]
    kept = average.clone()
    before = everything(named, optimizer)
    average[3] = value
    take(optimizer, named, gradients(named, 30))
    assert not average[3].isfinite()
    average.copy_(kept)
    assert accept.equal(everything(named, optimizer), before)
    assert skipping.skipped(optimizer)["gradient"] == 1


@pytest.mark.clause("SKIP-2")
def test_the_last_of_many_matrices_counts(skipping: Target, device):
    shape, layout = LAYOUTS["experts by rows"]
    named = parameters([tensor(shape, 0)], device)
    optimizer = skipping.optimizer(named, replace(HYPER, layout=layout))
    with skipping.orthogonalizing(NAN):
        take(optimizer, named, [tensor(shape, 1)])
    accept.same_bits(actual=named[0][1], expected=tensor(shape, 0))
    assert skipping.skipped(optimizer)["orthogonalization"] == 1


@pytest.mark.clause("SKIP-1")
def test_the_first_step_of_all_may_be_skipped(skipping: Target, device):
    named = parameters([tensor((4, 6), 0), tensor((4, 6), 1)], device)
    optimizer = skipping.optimizer(named, HYPER)
    take(optimizer, named, [torch.full((4, 6), NAN), tensor((4, 6), 2)])
    for i, (_, p) in enumerate(named):
        accept.same_bits(actual=p, expected=tensor((4, 6), i))
        accept.same_bits(actual=skipping.momentum_buffer(optimizer, p).float(), expected=torch.zeros(4, 6))


@pytest.mark.clause("SKIP-2")
@values
@dtypes
def test_a_bad_orthogonalization_leaves_momentum_its_update(skipping: Target, device, dtype, value):
    assert run(skipping, Fault("orthogonalized update", value, dtype, LAYOUT), device=device) == (True, False)


@pytest.mark.clause("SKIP-2")
def test_one_bad_update_among_many_stops_all(skipping: Target, device):
    named, optimizer = scene(skipping, LAYOUT, torch.float32, device)
    before = everything(named, optimizer)
    with skipping.orthogonalizing(NAN):
        take(optimizer, named, gradients(named, 30))
    after = everything(named, optimizer)
    changed = {(name, key) for name in after for key in after[name] if not accept.equal(after[name][key], before[name][key])}
    assert changed == {(name, "momentum_buffer") for name in ("w0", "w1", "w2")}
    assert skipping.skipped(optimizer) == {"found_inf": 0, "gradient": 0, "orthogonalization": 1}


@pytest.mark.clause("SKIP-2")
def test_a_bad_gradient_outweighs_a_bad_update(skipping: Target, device):
    named, optimizer = scene(skipping, LAYOUT, torch.float32, device)
    before = everything(named, optimizer)
    step = gradients(named, 30)
    step[-1][0] = NAN
    with skipping.orthogonalizing(NAN):
        take(optimizer, named, step)
    assert accept.equal(everything(named, optimizer), before)
    assert skipping.skipped(optimizer)["gradient"] == 1


@pytest.mark.clause("SKIP-3")
@dtypes
@given(shape=shapes, seed=seeds, huge=st.booleans())
def test_the_guard_changes_no_bit(skipping: Target, device, dtype, shape, seed, huge):
    # Finite, as the momentum is, although its square and the sum of its entries may not be.
    results, size = [], torch.finfo(dtype).max / 8 if huge else 1.0
    for guarded in (True, False):
        hyper = replace(HYPER, skip_nonfinite=guarded, normuon_beta2=0.9)
        named = parameters([tensor(shape, seed, dtype), tensor((7,), seed, dtype)], device)
        optimizer = skipping.optimizer(named[:1], hyper)
        optimizer.add_param_group(skipping.group(named[1:], replace(hyper, algorithm="adamw", normuon_beta2=None)))
        for i in range(3):
            take(optimizer, named, [tensor(shape, seed + i, dtype).clamp(-4, 4) * size, tensor((7,), seed + i, dtype)])
        results.append(everything(named, optimizer))
    assert accept.equal(*results)


@pytest.mark.clause("SKIP-4")
@values
@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_without_the_guard_it_reaches_the_weights(skipping: Target, device, algorithm, value):
    hyper = replace(HYPER, skip_nonfinite=False, algorithm=algorithm)
    named = parameters([tensor((4, 6), 0)], device)
    optimizer = skipping.optimizer(named, hyper)
    G = tensor((4, 6), 1)
    G[1, 2] = value
    take(optimizer, named, [G])
    assert not named[0][1].isfinite().all()
    assert not any(skipping.skipped(optimizer).values())


@pytest.mark.clause("SKIP-4")
def test_without_the_guard_a_bad_update_reaches_the_weights(skipping: Target, device):
    named = parameters([tensor((4, 6), 0)], device)
    optimizer = skipping.optimizer(named, replace(HYPER, skip_nonfinite=False))
    with skipping.orthogonalizing(NAN):
        take(optimizer, named, [tensor((4, 6), 1)])
    assert named[0][1].isnan().any()


@pytest.mark.clause("SKIP-1", "SKIP-4")
@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("told", [1.0, 2.0])
def test_found_inf_is_obeyed(skipping: Target, device, guarded, told):
    named = parameters([tensor((4, 6), 0)], device)
    optimizer = skipping.optimizer(named, replace(HYPER, skip_nonfinite=guarded))
    take(optimizer, named, [tensor((4, 6), 1)])
    before = everything(named, optimizer)
    optimizer.found_inf = torch.tensor(told, device=device)
    take(optimizer, named, [tensor((4, 6), 2)])
    assert accept.equal(everything(named, optimizer), before)
    assert skipping.skipped(optimizer) == {"found_inf": 1, "gradient": 0, "orthogonalization": 0}
    optimizer.found_inf = torch.tensor(0.0, device=device)
    take(optimizer, named, [tensor((4, 6), 2)])
    assert not accept.equal(everything(named, optimizer), before)


@pytest.mark.clause("SKIP-1", "CLIP-7")
def test_found_inf_and_a_threshold_each_stop_one_step(skipping: Target, device):
    named = parameters([tensor((4, 6), 0)], device)
    optimizer = skipping.optimizer(named, replace(HYPER, algorithm="adamw"))
    chain = skipping.chain([optimizer], grad_norm_skip_threshold=1e6)
    moved = []
    for size, told in ((1e9, None), (1.0, None), (1.0, 1.0), (1.0, 0.0)):
        if told is not None:
            optimizer.found_inf = torch.tensor(told, device=device)
        before = named[0][1].detach().clone()
        take(chain, named, [tensor((4, 6), 1) * size])
        moved.append(not accept.equal(named[0][1].detach(), before))
    assert moved == [False, True, False, True]
    assert skipping.skipped(chain) == {"threshold": 1}


@pytest.mark.clause("SKIP-5")
@pytest.mark.parametrize("look", ["step", "state_dict"])
@pytest.mark.parametrize("bad", ["gradient", "orthogonalization", "found_inf", None])
def test_the_host_is_warned_when_it_looks(skipping: Target, device, bad, look):
    named = parameters([tensor((4, 6), 0)], device)
    optimizer = skipping.optimizer(named, HYPER)
    heard = []
    for i in range(9):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if bad == "found_inf":
                optimizer.found_inf = torch.ones((), device=device)
            with skipping.orthogonalizing(NAN if bad == "orthogonalization" else None):
                take(optimizer, named, [torch.full((4, 6), NAN) if bad == "gradient" else tensor((4, 6), i)])
            if device.type == "cuda":
                torch.cuda.synchronize()
            optimizer.found_inf = None
            for _ in range(2):
                optimizer.state_dict() if look == "state_dict" else take(optimizer, named, [tensor((4, 6), 2)])
        heard.append(sum(issubclass(w.category, RuntimeWarning) and "skipped" in str(w.message) for w in caught))
    assert heard == ([1, 1, 0, 1, 0, 0, 0, 1, 0] if bad in ("gradient", "orthogonalization") else [0] * 9)
