# SPDX-License-Identifier: Apache-2.0
"""Are the reference's steps right? Every check here is against something that is not the reference."""

import copy
import io
from fractions import Fraction
from math import log2, sqrt

import numpy as np
import pytest
import torch

from reference import (
    Muon,
    Section,
    decay,
    lr_scale,
    matrices,
    momentum,
)
from reference.muon import rounded

IDENTITY = [(1.0, 0.0, 0.0)]


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_close(actual, expected, relative=1e-12):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= relative * expected.norm()


def test_momentum_is_the_unrolled_sum():
    gradients, beta, M = gaussian(6, 2, 3), 0.9, torch.zeros(2, 3)
    for t in range(6):
        before = M
        plain = momentum(M, gradients[t], beta, nesterov=False)
        M, U = momentum(M, gradients[t], beta, nesterov=True)
        unrolled = sum((1 - beta) * beta ** (t - i) * gradients[i] for i in range(t + 1))
        assert_close(M, unrolled)
        assert_close(U, beta * unrolled + (1 - beta) * gradients[t])
        assert torch.equal(plain[0], plain[1])
        assert torch.equal(plain[0], M)
    assert not torch.equal(before, M)


def test_scale_and_decay():
    assert lr_scale(9, 1, "original") == 3
    assert lr_scale(1, 9, None) == 1
    assert lr_scale(9, 4, "match_rms_adamw") == pytest.approx(0.6)
    assert lr_scale(4, 9, "match_rms_adamw") == pytest.approx(0.6)
    assert lr_scale(4, 9, "spectral") == lr_scale(9, 4, "spectral") == 3.0
    assert lr_scale(4, 9, "unit_rms_norm") == pytest.approx(2 / 3)
    assert lr_scale(9, 4, "unit_rms_norm") == 1.5
    assert decay(torch.tensor([8.0]), lr=0.5, weight_decay=0.25).item() == 7


def train(make, shape, steps=5, dtype=torch.float64, seed=0):
    """The weight after every step of the optimizer that make builds, with gradients that depend on the weight."""
    W = torch.nn.Parameter(gaussian(*shape, seed=seed).to(dtype))
    target, optimizer, history = gaussian(*shape, seed=seed + 1).to(dtype), make([W]), []
    for t in range(steps):
        W.grad = (W.detach() - target) * (1 + t) + 0.1 * W.detach() ** 2
        optimizer.step()
        history.append(W.detach().clone())
    return torch.stack(history)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("shape", "fn", "scale"), [((8, 2), None, 2.0), ((2, 8), None, 1.0), ((4, 9), "match_rms_adamw", 0.6)])
def test_linear_schedule_makes_it_sgd(nesterov, shape, fn, scale):
    # With p(x) = x and a floor far above the norm, O = U / floor; SGD's momentum is the sum form.
    floor, lr, beta = 1024.0, 30.0, 0.9
    options = dict(weight_decay=0.0, momentum=beta, nesterov=nesterov, ns_coefficients=IDENTITY, ns_steps=1, eps=floor)
    ours = train(lambda p: Muon(p, lr=lr, adjust_lr_fn=fn, **options), shape)
    sgd = train(lambda p: torch.optim.SGD(p, lr * scale / floor * (1 - beta), momentum=beta, nesterov=nesterov), shape)
    assert_close(ours, sgd)
    assert (ours[0] - ours[-1]).norm() > 0.1


def test_dampened_sgd_is_the_average_form():
    # From a zero gradient on, SGD with dampening = momentum keeps the same buffer as MOM-1.
    W, V = (torch.nn.Parameter(gaussian(3, 4)) for _ in range(2))
    ours = Muon([W], lr=512.0, weight_decay=0, momentum=0.8, nesterov=False, ns_coefficients=IDENTITY, ns_steps=1, eps=1024)
    sgd = torch.optim.SGD([V], lr=0.5, momentum=0.8, dampening=0.8)
    for t in range(5):
        W.grad = V.grad = gaussian(3, 4, seed=t) * (t > 0)
        ours.step(), sgd.step()
    assert_close(ours.state[W]["momentum_buffer"], sgd.state[V]["momentum_buffer"])
    assert_close(W.detach(), V.detach())


def test_one_step_written_out():
    W, G = gaussian(6, 2), gaussian(6, 2, seed=1)
    parameter = torch.nn.Parameter(W.clone())
    parameter.grad = G
    Muon([parameter], lr=0.5, weight_decay=0.2, ns_coefficients=IDENTITY, ns_steps=1).step()
    assert_close(parameter.detach(), 0.9 * W - 0.5 * sqrt(3) * G / G.norm())


def test_close_to_torch_muon():
    # torch's runs in bfloat16, and its epsilon and ours differ, so only a few digits agree.
    options = dict(lr=0.02, weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    ours = train(lambda p: Muon(p, ns_coefficients="jordan", **options), (16, 40))
    torchs = train(lambda p: torch.optim.Muon(p, **options), (16, 40))
    start = gaussian(16, 40)
    assert_close(ours - start, torchs - start, relative=0.03)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (5,), (), (2, 3, 2, 2)])
def test_adamw_is_torchs(shape, maximize):
    options = dict(lr=0.03, weight_decay=0.2, maximize=maximize)
    ours = train(
        lambda p: Muon(p, algorithm="adamw", adamw_lr_ratio=0.5, adamw_betas=(0.8, 0.9), adamw_eps=1e-3, **options),
        shape,
    )
    options["lr"] *= 0.5
    torchs = train(lambda p: torch.optim.AdamW(p, betas=(0.8, 0.9), eps=1e-3, **options), shape)
    assert_close(ours, torchs)


LAYOUTS = [
    ((6, 4), dict(blocks=3)),
    ((4, 6), dict(columns=2)),
    ((3, 4, 2), dict(blocks=3)),
    ((2, 3, 2, 2), dict(flatten=True)),
    ((24, 5), dict(groups=2, sections=(Section(6, head_dim=3), Section(3), Section(3, "adamw")))),
]


@pytest.mark.parametrize("beta2", [None, 0.9])
@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
def test_fused_equals_separate(shape, layout, beta2):
    fused = torch.nn.Parameter(gaussian(*shape))
    optimizer = Muon([fused], lr=0.1, layout=layout, normuon_beta2=beta2)
    pieces = []
    for algorithm, indices in matrices(shape, **layout):
        for index in indices:
            W = torch.nn.Parameter(fused.detach().flatten()[index])
            pieces.append((W, index, Muon([W], lr=0.1, algorithm=algorithm, normuon_beta2=beta2)))
    for t in range(3):
        fused.grad = gaussian(*shape, seed=t + 1)
        optimizer.step()
        for W, index, separate in pieces:
            W.grad = fused.grad.flatten()[index]
            separate.step()
            assert torch.equal(W, fused.detach().flatten()[index])


def test_maximize_is_minimizing_the_negative():
    W, V = (torch.nn.Parameter(gaussian(4, 3)) for _ in range(2))
    up, down = Muon([W], maximize=True), Muon([V])
    for t in range(3):
        W.grad = gaussian(4, 3, seed=t)
        V.grad = -W.grad
        up.step(), down.step()
        assert torch.equal(W, V)


def test_missing_and_zero_gradients():
    missing, zero, frozen = (torch.nn.Parameter(gaussian(3, 3)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = Muon([missing, zero, frozen], lr=0.5, weight_decay=0.5)
    optimizer.step()
    assert not optimizer.state
    zero.grad = torch.zeros(3, 3).double()
    optimizer.step()
    assert torch.equal(missing, gaussian(3, 3))
    assert torch.equal(zero.detach(), 0.75 * gaussian(3, 3))
    assert optimizer.state[missing]["momentum_buffer"].count_nonzero() == 0
    assert frozen not in optimizer.state


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_parameter(shape):
    W, other = torch.nn.Parameter(torch.zeros(shape)), torch.nn.Parameter(torch.ones(2, 2))
    W.grad, other.grad = torch.zeros(shape), torch.ones(2, 2)
    Muon([W, other]).step()
    assert W.shape == shape
    assert not torch.equal(other, torch.ones(2, 2))


def test_gradients_and_strides():
    W = torch.nn.Parameter(gaussian(5, 3).T)
    V = torch.nn.Parameter(gaussian(5, 3).T.contiguous())
    W.grad = gaussian(5, 3, seed=1).T
    V.grad = W.grad.contiguous()
    before = W.grad.clone()
    Muon([W, V]).step()
    assert torch.equal(W, V)
    assert torch.equal(W.grad, before)
    assert W.grad._version == 0


def test_closure_learning_rate_tensor_and_scheduler():
    W, V = (torch.nn.Parameter(gaussian(3, 3)) for _ in range(2))
    ours, plain = Muon([W], lr=torch.tensor([[0.5]])), Muon([V], lr=0.5)
    schedulers = [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.25, 4) for optimizer in (ours, plain)]
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        W.grad = None
        loss = (W**2).sum()
        loss.backward()
        return loss

    for t in range(3):
        V.grad = 2 * V.detach()
        assert ours.step(closure).item() == pytest.approx(V.detach().square().sum().item())
        plain.step()
        for scheduler in schedulers:
            scheduler.step()
        assert calls == [True] * (t + 1)
        assert_close(W.detach(), V.detach(), relative=1e-6)  # the learning rate is float32
    assert plain.param_groups[0]["lr"] < 0.4


def nearest_bfloat16(x):
    if x == 0:
        return 0.0
    spacing = Fraction(2) ** (max(int(np.floor(log2(abs(x)))), -126) - 7)
    return float(round(Fraction(x) / spacing) * spacing)  # Python rounds a Fraction half to even


def test_sixteen_bit_weights_are_rounded_once():
    rng = np.random.default_rng(0)
    ties = 1 + (2 * np.arange(64) + 1) * 2.0**-8  # halfway between bfloat16 neighbours
    aside = np.array([[0, 2.0**-45, -(2.0**-45), 0.7 * 2.0**-23, -0.7 * 2.0**-23]]).T  # float32: a tie, or its neighbour
    nearly = np.concatenate([(ties + aside).flatten(), -(ties + aside).flatten()])
    values = np.concatenate([nearly, nearly * 2.0**-130, rng.standard_normal(1000), [0.0]])
    expected = torch.tensor([nearest_bfloat16(x) for x in values]).double()
    assert torch.equal(rounded(torch.from_numpy(values), torch.bfloat16).double(), expected)
    halves = np.concatenate([1 + (nearly - 1) / 8, nearly * 2.0**-20, rng.standard_normal(1000) * 1e4, [1e9, -1e9]])
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(halves.astype(np.float16))  # NumPy rounds float64 to float16 at once
    assert torch.equal(rounded(torch.from_numpy(halves), torch.float16), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_save_load_and_copy_go_on_with_the_same_bits(dtype):
    layout = dict(sections=(Section(3), Section(3, "adamw")))
    W = torch.nn.Parameter(gaussian(6, 5, dtype=dtype))
    optimizer = Muon([dict(params=[W], layout=layout)], lr=0.1)

    def step(W, optimizer, seed):
        W.grad = gaussian(6, 5, seed=seed, dtype=dtype)
        optimizer.step()

    for seed in range(3):
        step(W, optimizer, seed)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    V = torch.nn.Parameter(W.detach().clone())
    loaded = Muon([V])
    loaded.load_state_dict(torch.load(file, weights_only=True))
    copied_W, copied = copy.deepcopy((W, optimizer))
    for seed in range(3, 6):
        for weight, o in ((W, optimizer), (V, loaded), (copied_W, copied)):
            step(weight, o, seed)
        assert torch.equal(W, V)
        assert torch.equal(W, copied_W)
    assert {name: value.dtype for name, value in loaded.state[V].items()} == {
        "momentum_buffer": torch.float64,
        "exp_avg": torch.float64,
        "exp_avg_sq": torch.float64,
        "step": torch.float32,
    }
    assert not torch.equal(W, gaussian(6, 5, dtype=dtype))


def test_options_of_one_group():
    W, V = (torch.nn.Parameter(gaussian(4, 2)) for _ in range(2))
    optimizer = Muon([dict(params=[W], lr=0.5, adjust_lr_fn="match_rms_adamw"), dict(params=[V])], lr=0.1, weight_decay=0)
    W.grad = V.grad = gaussian(4, 2, seed=1)
    optimizer.step()
    start = gaussian(4, 2)
    assert_close(W.detach() - start, (V.detach() - start) * 5 * 0.4 / sqrt(2))
