# SPDX-License-Identifier: Apache-2.0
"""STEP: the whole step."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conformance import accept
from conformance.steps import expected, parameters, run, take
from conformance.strategies import DTYPES, HYPER, seeds, shapes, tensor
from conformance.target import Target

hypers = st.builds(
    replace,
    st.just(HYPER),
    lr=st.sampled_from([1e-4, 0.02, 0.3]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    momentum=st.sampled_from([0.0, 0.6, 0.95]),
    nesterov=st.booleans(),
    adjust_lr_fn=st.sampled_from([None, "match_rms_adamw"]),
)


@pytest.mark.clause("STEP-1")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes, seed=seeds, hyper=hypers)
def test_equals_the_reference(target: Target, device, dtype, shape, seed, hyper):
    W, gradients = tensor(shape, seed, dtype), [[tensor(shape, seed + 1 + i, dtype)] for i in range(3)]
    (p,), _ = run(target, [W], gradients, hyper, device)
    accept.step(before=W, actual=p, expected=expected([W], gradients, hyper)[0], precision=target.precision(dtype, device))


@pytest.mark.clause("STEP-2")
@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
@given(shape=shapes, seed=seeds)
def test_no_gradient_no_change(target: Target, device, algorithm, shape, seed):
    named = parameters([tensor(shape, seed), tensor(shape, seed + 1)], device)
    optimizer = target.optimizer(named, replace(HYPER, algorithm=algorithm))
    G = tensor(shape, seed + 2)
    take(optimizer, named, [G, G])
    still = named[0][1]
    before, state = still.detach().clone(), copy.deepcopy(optimizer.state[still])
    moving = named[1][1].detach().clone()
    take(optimizer, named, [None, G])
    accept.same_bits(actual=still, expected=before)
    assert accept.equal(optimizer.state[still], state)
    assert not torch.equal(named[1][1], moving), "nothing was stepped at all"


@pytest.mark.clause("STEP-3")
@given(shape=shapes, seed=seeds)
def test_a_zero_gradient_is_a_gradient(target: Target, device, shape, seed):
    W, G = tensor(shape, seed), tensor(shape, seed + 1)
    gradients = [[G], [torch.zeros(shape)], [torch.zeros(shape)]]
    (p,), _ = run(target, [W], gradients, HYPER, device)
    accept.step(before=W, actual=p, expected=expected([W], gradients, HYPER)[0], precision=target.precision(W.dtype, device))


@pytest.mark.clause("STEP-4")
@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("maximize", [False, True])
@given(shape=shapes, seed=seeds, nesterov=st.booleans())
def test_gradients_are_not_touched(target: Target, device, algorithm, dtype, maximize, shape, seed, nesterov):
    named = parameters([tensor(shape, seed, dtype)], device)
    optimizer = target.optimizer(named, replace(HYPER, algorithm=algorithm, nesterov=nesterov, maximize=maximize))
    p = named[0][1]
    for i in range(2):
        p.grad = tensor(shape, seed + i, dtype).to(device)
        before, version = p.grad.clone(), p.grad._version
        optimizer.step()
        accept.same_bits(actual=p.grad, expected=before)
        assert p.grad._version == version, "the gradient was written to"


@pytest.mark.clause("STEP-5")
def test_closure(target: Target, device):
    W, X = tensor((4, 6), 0), tensor((6, 5), 1)
    named = parameters([W], device)
    optimizer = target.optimizer(named, HYPER)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = (named[0][1] @ X.to(device)).square().sum()
        loss.backward()
        losses.append(loss.detach())
        return loss

    returned = optimizer.step(closure=closure)
    assert len(losses) == 1, f"the closure was evaluated {len(losses)} times"
    accept.same_bits(actual=returned, expected=losses[0])
    (p,), _ = run(target, [W], [[named[0][1].grad.cpu()]], HYPER, device)
    accept.same_bits(actual=named[0][1], expected=p)
    assert optimizer.step() is None


@pytest.mark.clause("STEP-6")
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_tensor_learning_rate(target: Target, device, shape, algorithm):
    W, gradients = tensor((4, 6), 0), [tensor((4, 6), 1), tensor((4, 6), 2)]
    hyper = replace(HYPER, algorithm=algorithm)
    named = parameters([W], device)
    optimizer = target.optimizer(named, replace(hyper, lr=torch.full(shape, 0.25)))
    take(optimizer, named, gradients[:1])
    optimizer.param_groups[0]["lr"].fill_(0.125)
    take(optimizer, named, gradients[1:])
    right = parameters([W], device)
    other = target.optimizer(right, replace(hyper, lr=0.25))
    take(other, right, gradients[:1])
    torch.optim.lr_scheduler.LambdaLR(other, lambda _: 0.5)
    take(other, right, gradients[1:])
    accept.step(before=W, actual=named[0][1], expected=right[0][1], precision=torch.float32)


@pytest.mark.clause("STEP-7")
@given(some=st.lists(shapes, min_size=2, max_size=5), seed=seeds, order=st.randoms(use_true_random=False))
def test_order_and_groups_do_not_matter(target: Target, device, some, seed, order):
    weights = [tensor(shape, seed + i) for i, shape in enumerate(some)]
    gradients = [[tensor(shape, seed + 100 * (1 + step) + i) for i, shape in enumerate(some)] for step in range(2)]
    first, _ = run(target, weights, gradients, HYPER, device)
    again, _ = run(target, weights, gradients, HYPER, device)
    shuffled = list(range(len(some)))
    order.shuffle(shuffled)
    named = parameters([weights[i] for i in shuffled], device)
    optimizer = target.optimizer(named[:1], HYPER)
    optimizer.add_param_group(target.group(named[1:], HYPER))
    for step in gradients:
        take(optimizer, named, [step[i] for i in shuffled])
    for i, p in enumerate(first):
        accept.same_bits(actual=again[i], expected=p)
        accept.same_bits(actual=named[shuffled.index(i)][1], expected=p)


@pytest.mark.clause("STEP-8")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(shape=st.one_of(shapes, st.sampled_from([(), (7,), (2, 3, 4)])), seed=seeds, ratio=st.sampled_from([0.1, 1.0]))
def test_adamw_is_torchs(target: Target, device, dtype, shape, seed, ratio):
    W, gradients = tensor(shape, seed, dtype), [[tensor(shape, seed + 1 + i, dtype)] for i in range(4)]
    hyper = replace(HYPER, algorithm="adamw", adamw_lr_ratio=ratio)
    (p,), _ = run(target, [W], gradients, hyper, device)
    named = parameters([W.double()])
    adamw = torch.optim.AdamW(named, lr=HYPER.lr * ratio, betas=(0.9, 0.95), eps=1e-8, weight_decay=HYPER.weight_decay)
    for step in gradients:
        take(adamw, named, step)
    accept.step(before=W, actual=p, expected=named[0][1], precision=dtype)


@pytest.mark.clause("STEP-9")
@pytest.mark.parametrize(
    "option",
    [
        {"lr": 0.5},
        {"weight_decay": 0.7},
        {"momentum": 0.3},
        {"nesterov": False},
        {"schedule": (1.5, -0.5, 0.0)},
        {"steps": 2},
        {"eps": 1e3},
        {"adjust_lr_fn": "match_rms_adamw"},
        {"algorithm": "adamw"},
        {"algorithm": "adamw", "adamw_lr_ratio": 0.1},
        {"algorithm": "adamw", "adamw_betas": (0.5, 0.6)},
        {"algorithm": "adamw", "adamw_eps": 10.0},
        {"layout": {"blocks": 2}},
        {"maximize": True},
    ],
    ids=str,
)
def test_options_of_one_group(target: Target, device, option):
    W, gradients = tensor((8, 12), 0), [tensor((8, 12), 1 + i) for i in range(2)]
    changed = replace(HYPER, **option)
    named = parameters([W, W], device)
    optimizer = target.optimizer(named[:1], HYPER)
    optimizer.add_param_group(target.group(named[1:], changed))
    for G in gradients:
        take(optimizer, named, [G, G])
    steps = [[G] for G in gradients]
    for (_, p), hyper in zip(named, (HYPER, changed), strict=True):
        accept.step(before=W, actual=p, expected=expected([W], steps, hyper)[0], precision=target.precision(W.dtype, device))
    # The option must make a difference, or the above shows nothing.
    assert not torch.equal(named[0][1], named[1][1])


@pytest.mark.clause("STEP-10")
@given(shape=shapes, seed=seeds, exponent=st.integers(-60, 60))
def test_gradient_scale_does_not_matter(target: Target, device, shape, seed, exponent):
    W, gradients = tensor(shape, seed), [tensor(shape, seed + 1 + i) for i in range(3)]
    (p,), _ = run(target, [W], [[G] for G in gradients], HYPER, device)
    (scaled,), _ = run(target, [W], [[G * 2.0**exponent] for G in gradients], HYPER, device)
    accept.same_bits(actual=scaled, expected=p)


@pytest.mark.clause("STEP-11")
@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@given(shape=shapes, seed=seeds)
def test_half_precision_is_rounded_once(target: Target, device, algorithm, dtype, shape, seed):
    hyper = replace(HYPER, algorithm=algorithm, lr=0.01, weight_decay=1.0)
    W, gradients = tensor(shape, seed, dtype), [[tensor(shape, seed + 1, dtype)]]
    (p,), _ = run(target, [W], gradients, hyper, device)
    precision = target.precision(torch.float32, device)
    accept.rounded(before=W, actual=p, expected=expected([W], gradients, hyper)[0], precision=precision)
