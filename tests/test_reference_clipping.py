# SPDX-License-Identifier: Apache-2.0
"""Is the reference's clipping right? Every check is against NumPy, torch, or an example that fits in a head."""

from math import inf, isnan, nan
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reference import ChainedOptimizer, Muon, clip_coefficient, clip_grad_norm_, norm


def weight(*gradient, dtype=torch.float64):
    """A column of zeros with this gradient."""
    W = torch.nn.Parameter(torch.zeros(len(gradient), 1, dtype=dtype))
    W.grad = torch.tensor(gradient, dtype=dtype).view(-1, 1)
    return W


def sgd(*weights, exempt=False):
    optimizer = torch.optim.SGD(list(weights), lr=1.0)
    optimizer.skip_grad_norm_clip = exempt
    return optimizer


def grads(*weights):
    return [W.grad.flatten().tolist() for W in weights]


def test_norm_over_the_whole_range():
    X = np.random.default_rng(0).standard_normal((2, 50)) * np.logspace(-5, 5, 50)
    for scale in (1.0, 2.0**1000, 2.0**-1000):
        assert norm(X * scale) == pytest.approx(np.linalg.norm(X) * scale, rel=1e-15)
        assert norm([X * scale], inf) == np.abs(X).max() * scale
    assert norm([[5e-324] * 4]) == 1e-323
    largest = torch.finfo(torch.float32).max
    assert norm([torch.tensor([largest] * 4), [0.0]]) == 2 * largest
    for p in (2.0, inf):
        assert norm([], p) == norm([[]], p) == 0
        assert isnan(norm([[inf], [nan], [1.0]], p)) and isnan(norm([[nan, 1.0]], p)) and norm([[-inf, 1.0]], p) == inf


def test_coefficient():
    assert [clip_coefficient(4.0, max_norm, 0.0) for max_norm in (0.0, 1.0, 4.0, 5.0, inf)] == [0, 0.25, 1, 1, 1]
    assert [clip_coefficient(clipped, 1.0, 0.5) for clipped in (0.0, 4.0, inf, nan)] == [1, 0.5, 1, 1]


def test_plain_optimizer_as_torch_does():
    W, V, none = weight(3.0), weight(4.0), torch.nn.Parameter(torch.zeros(1))
    assert clip_grad_norm_(sgd(W, none, V), 2.5) == (5, 5, 5)
    assert grads(W, V) == [[1.5], [2]] and none.grad is None
    assert clip_grad_norm_(sgd(weight(3.0, -4.0)), 1.0, inf) == (4, 4, 4)
    ours, theirs = (torch.nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    ours.grad, theirs.grad = torch.arange(15.0).view(3, 5).T, torch.arange(15.0).view(3, 5).T
    total = torch.nn.utils.clip_grad_norm_(theirs, 3.0).item()
    assert clip_grad_norm_(sgd(ours), 3.0).clipped == pytest.approx(total, rel=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-6)  # they add an epsilon


def test_product_is_rounded_once():
    W = weight(1.0, dtype=torch.bfloat16)  # by way of float32, this would become 1 - 2^-9, a tie, and then 1
    clip_grad_norm_(sgd(W), 1 - 2**-9 - 2**-40)
    assert W.grad.item() == 1 - 2**-8


@pytest.mark.parametrize(
    "declare",
    [
        lambda W: sgd(W, exempt=True),
        lambda W: SimpleNamespace(optimizer=SimpleNamespace(optimizer=sgd(W)), skip_grad_norm_clip=True),
        lambda W: SimpleNamespace(chained_optimizers=[ChainedOptimizer([sgd(W, exempt=True)])]),
        lambda W: torch.optim.SGD([dict(params=[W], skip_grad_norm_clip=True)], lr=1.0),
        lambda W: Muon([W]),
    ],
)
def test_who_declares_is_exempt(declare):
    for clip_norm, clipped in (("own", 6), ("global", 10)):
        W, V = weight(8.0), weight(6.0)
        both = SimpleNamespace(optimizers=[declare(W), sgd(V)], param_groups=[])
        assert clip_grad_norm_(both, 3.0, clip_norm=clip_norm, floor=0.375) == (10, clipped, 6)
        assert grads(W, V) == [[8], [3 if clip_norm == "own" else 6 * 0.375]]
    assert clip_grad_norm_(declare(weight(nan)), 1.0)[1:] == (0, 0)


def test_who_declares_nothing_is_not_exempt():
    W, V = weight(3.0), weight(4.0)
    muon = Muon([dict(params=[W], skip_grad_norm_clip=False), dict(params=[V], algorithm="adamw")])
    assert clip_grad_norm_(muon, 2.5) == (5, 5, 5)
    assert grads(W, V) == [[1.5], [2]]


def test_of_a_parameter_with_both_algorithms_one_is_exempt():
    W = weight(3.0, inf, 4.0)
    optimizer = Muon([W], layout=dict(sections=((1, "adamw"), (1,), (1, "adamw"))))
    assert clip_grad_norm_(optimizer, 2.5) == (inf, 5, 5)
    assert grads(W) == [[1.5, inf, 2]]
    optimizer.param_groups[0]["skip_grad_norm_clip"] = True
    assert clip_grad_norm_(optimizer, 1.0).threshold == 0


def test_chain_computes_what_is_used():
    def step(exempt=False, **options):
        V = weight(6.0)
        chain = ChainedOptimizer([sgd(weight(8.0), exempt=True), sgd(V, exempt=exempt)], **options)
        chain.step()
        return *chain.norms, V.item()

    assert step() == (None, None, None, -6)
    assert step(clip_grad=3.0) == (None, 6, 6, -3)
    assert step(clip_grad=3.0, floor=0.75) == (None, 6, 6, -4.5)
    assert step(clip_grad=2.5, clip_norm="global") == (10, 10, None, -1.5)
    assert step(grad_norm_skip_threshold=6.0) == (None, 6, 6, -6)
    assert step(log_grad_norm=True) == (10, None, None, -6)
    assert step(True, clip_grad=3.0, log_grad_norm=True) == (10, None, None, -6)
    assert step(True, clip_grad=3.0, clip_norm="global", grad_norm_skip_threshold=1.0) == (None, None, None, -6)


@pytest.mark.parametrize(("gradient", "skipped"), [(3.0, False), (4.0, True), (inf, True), (nan, True)])
def test_chain_skips_before_it_clips(gradient, skipped):
    W, V = weight(nan), weight(gradient)
    chain = ChainedOptimizer([sgd(W, exempt=True), sgd(V)], clip_grad=1.0, grad_norm_skip_threshold=3.0)
    assert torch.no_grad()(chain.step)(torch.is_grad_enabled) is True
    assert chain.skipped == skipped and V.item() == (0 if skipped else -1)
    assert isnan(W.item()) != skipped
    assert skipped == (str(V.grad.item()) == str(gradient))
    chain.zero_grad()
    assert W.grad is V.grad is None
