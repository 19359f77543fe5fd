# SPDX-License-Identifier: Apache-2.0
"""Are the reference's skipped steps and row normalization right? Every check is against something else."""

import copy
import pickle
from math import inf, nan, sqrt

import numpy as np
import pytest
import torch

import reference.muon
from reference import Muon, normalize_rows

IDENTITY = dict(ns_coefficients=[(1.0, 0.0, 0.0)], ns_steps=1)  # O = U / |U|

pytestmark = pytest.mark.filterwarnings("ignore:.*skipped:RuntimeWarning")


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# VAR


@pytest.mark.parametrize(("m", "n"), [(4, 3), (3, 5)])
def test_it_is_the_published_rule_but_for_the_norm(m, n):
    lr, wd, beta1, beta2 = 0.3, 0.1, 0.8, 0.7
    parameter = torch.nn.Parameter(gaussian(m, n))
    options = dict(adjust_lr_fn="match_rms_adamw", normuon_beta2=beta2, nesterov=False, **IDENTITY)
    optimizer = Muon([parameter], lr=lr, weight_decay=wd, momentum=beta1, **options)
    W, M, v = gaussian(m, n).numpy(), np.zeros((m, n)), np.zeros((m, 1))
    for t in range(5):
        G = gaussian(m, n, seed=t + 1) * torch.arange(1.0, m + 1).view(m, 1)
        parameter.grad = G
        optimizer.step()
        M = beta1 * M + (1 - beta1) * G.numpy()
        O = M / np.linalg.norm(M)
        v = beta2 * v + (1 - beta2) * np.mean(O * O, axis=1, keepdims=True)
        Ohat = O / (np.sqrt(v) + 1e-8)
        published = 0.2 * lr * sqrt(m * n) / np.linalg.norm(Ohat) * Ohat
        W = W - lr * wd * W - published * np.linalg.norm(O) / sqrt(min(m, n))
        np.testing.assert_allclose(parameter.detach().numpy(), W, rtol=1e-12)
        np.testing.assert_allclose(optimizer.state[parameter]["variance_buffer"].numpy(), v, rtol=1e-12)


def test_rows_become_alike_and_the_norm_stays():
    O, V = gaussian(2, 3, 4), torch.zeros(2, 3, 1, dtype=torch.float64)
    O[1] = 0
    O[0, 2] = 0
    before, zeros = O.clone(), V
    N, V = normalize_rows(O, V, beta2=0.9)
    rows = N[0].norm(dim=-1)
    assert rows[0].item() == pytest.approx(rows[1].item(), rel=1e-6) and rows[2] == 0
    assert N[0].norm().item() == pytest.approx(O[0].norm().item(), rel=1e-12)
    assert N[1].count_nonzero() == 0 and V[1].count_nonzero() == 0
    assert torch.equal(O, before) and zeros.count_nonzero() == 0
    assert normalize_rows(O.fill_(nan), V, beta2=0.9)[0].isnan().all()


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        ((6, 4), None, (6, 1)),
        ((6, 4), dict(columns=2), (6, 2)),
        ((2, 6, 4), dict(blocks=2, columns=4), (2, 6, 4)),
        ((6, 2, 2, 2), dict(flatten=True, columns=4), (6, 4)),
    ],
)
def test_variance_buffer_has_one_number_for_each_row_of_each_matrix(shape, layout, expected):
    W = torch.nn.Parameter(torch.ones(shape))
    W.grad = gaussian(*shape).float()
    optimizer = Muon([W], layout=layout, normuon_beta2=0.5)
    optimizer.step()
    V = optimizer.state[W]["variance_buffer"]
    assert V.shape == expected and V.dtype == torch.float64 and (V > 0).all()


# SKIP


def model(**options):
    """A weight for each algorithm, and one of both, after a clean step: (optimizer, weights)."""
    W = [torch.nn.Parameter(gaussian(4, 3, seed=seed)) for seed in range(3)]
    both = dict(sections=((2,), (2, "adamw")))
    groups = [dict(params=W[:1]), dict(params=W[1:2], algorithm="adamw"), dict(params=W[2:], layout=both)]
    optimizer = Muon(groups, lr=0.1, normuon_beta2=0.9, **options)
    step(optimizer, W, seed=10)
    return optimizer, W


def step(optimizer, W, seed, broken=None, entry=nan, scale=1.0):
    for i, weight in enumerate(W):
        weight.grad = gaussian(4, 3, seed=seed + i) * scale
        if i == broken:
            weight.grad[2, 1] = entry
    optimizer.step()


def everything(optimizer, W):
    states = [(i, name, value) for i, weight in enumerate(W) for name, value in optimizer.state[weight].items()]
    return {(i, name): value.clone() for i, name, value in [*states, *((i, "W", w.detach()) for i, w in enumerate(W))]}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("broken", [0, 1, 2])
@pytest.mark.parametrize("entry", [nan, inf, 1e200])  # the square of which is not finite
def test_broken_gradient_anywhere_changes_nothing_anywhere(broken, entry):
    optimizer, W = model()
    before = everything(optimizer, W)
    step(optimizer, W, 20, broken, entry)
    taken = entry == 1e200 and broken == 0  # Muon squares nothing
    assert bool(changed(before, everything(optimizer, W))) == taken
    assert optimizer.skipped == {"found_inf": 0, "gradient": int(not taken), "orthogonalization": 0}
    step(optimizer, W, 30)
    untroubled, V = model()
    if not taken:
        step(untroubled, V, 30)
        assert not changed(everything(untroubled, V), everything(optimizer, W))


@pytest.mark.parametrize("skip_nonfinite", [True, False])
def test_found_inf_comes_first_and_is_always_obeyed(skip_nonfinite):
    optimizer, W = model(skip_nonfinite=skip_nonfinite)
    before = everything(optimizer, W)
    optimizer.found_inf = torch.ones(1)
    step(optimizer, W, 20, broken=1)
    step(optimizer, W, 20)
    assert not changed(before, everything(optimizer, W))
    assert optimizer.skipped == {"found_inf": 2, "gradient": 0, "orthogonalization": 0}
    optimizer.found_inf = torch.zeros(())
    step(optimizer, W, 20)
    assert changed(before, everything(optimizer, W)) == set(before)


@pytest.mark.parametrize("skip_nonfinite", [True, False])
def test_broken_orthogonalization_leaves_the_momentum_its_update(monkeypatch, skip_nonfinite):
    optimizer, W = model(momentum=0.75, skip_nonfinite=skip_nonfinite)
    before = everything(optimizer, W)
    monkeypatch.setattr(reference.muon, "orthogonalize", lambda X, *_: X * inf)
    step(optimizer, W, 20)
    after = everything(optimizer, W)
    assert torch.equal(after[0, "momentum_buffer"], 0.75 * before[0, "momentum_buffer"] + 0.25 * W[0].grad)
    if skip_nonfinite:
        assert changed(before, after) == {(0, "momentum_buffer"), (2, "momentum_buffer")}
        assert optimizer.skipped == {"found_inf": 0, "gradient": 0, "orthogonalization": 1}
    else:
        assert not after[0, "W"].isfinite().any() and after[1, "W"].isfinite().all()
        assert sum(optimizer.skipped.values()) == 0


def test_without_skipping_what_is_not_finite_reaches_its_own_matrix():
    optimizer, W = model(skip_nonfinite=False)
    step(optimizer, W, 20, broken=0)
    finite = [weight.isfinite().all().item() for weight in W]
    assert finite == [False, True, True] and sum(optimizer.skipped.values()) == 0


def test_gradients_are_divided_by_the_scale_first():
    plain, W = model()
    scaled, V = model()
    scaled.grad_scale = torch.tensor(2.0**70)
    for seed in (20, 30):
        step(plain, W, seed)
        step(scaled, V, seed, scale=2.0**70)
    assert not changed(everything(plain, W), everything(scaled, V))


def test_grad_scaler_tells_and_divides():
    optimizer, W = model()
    plain, V = model()
    before, scaler = everything(optimizer, W), torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, scale in ((inf, 2.0), (1.0, 2.0)):
        optimizer.zero_grad()
        scaler.scale(sum((weight * factor).sum() for weight in W).float()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
        assert bool(changed(before, everything(optimizer, W))) == (factor == 1)
    assert optimizer.skipped == {"found_inf": 1, "gradient": 0, "orthogonalization": 0}
    for weight in V:
        weight.grad = torch.ones_like(weight)
    plain.step()
    assert not changed(everything(plain, V), everything(optimizer, W))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301
def test_copies_count_on_their_own(twin):
    optimizer, W = model(skip_nonfinite=False)
    optimizer.skipped["gradient"] = 3
    copied = twin(optimizer)
    optimizer.skipped["gradient"] = 4
    assert copied.skip_nonfinite is False and copied.skipped["gradient"] == 3
    copied.param_groups[0]["params"][0].grad = W[0].grad
    copied.step()
