# SPDX-License-Identifier: Apache-2.0
"""Is the reference's orthogonalization right? Every check here is against something that is not the reference."""

from math import sqrt

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch

from reference import (
    LOWER,
    Muon,
    Schedule,
    minimax,
    orthogonalize,
    polar_factor,
    schedule,
    spectral_map,
)
from reference.schedules import polar_express_s4

IDENTITY = [(1.0, 0.0, 0.0)]
NAMED = [*(("polar_express_s4", steps) for steps in LOWER), ("polar_express", 5), ("you", 5), ("jordan", 5)]


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(n, rank, seed=0):
    return torch.linalg.qr(gaussian(n, rank, seed=seed)).Q


def assert_close(actual, expected, relative=1e-12):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= relative * expected.norm()


# polar.py


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (1, 6), (6, 1), (1, 1), (40, 17)])
def test_polar_factor_of_full_rank_is_scipys(shape):
    G = gaussian(*shape)
    assert_close(polar_factor(G), torch.from_numpy(scipy.linalg.polar(G.numpy())[0]))


@pytest.mark.parametrize("spectrum", [(3.0, 3.0, 3.0), (5.0, 2.0, 2.0), (1.0, 1e-6, 1e-12)])
def test_polar_factor_of_rank_deficient_matrix(spectrum):
    P, Q = orthonormal(7, 3, seed=1), orthonormal(9, 3, seed=2)
    O = polar_factor(P @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ Q.T)
    # Rounding of the product turns the singular vectors by about 2^-52 over the smallest singular value.
    assert_close(O, P @ Q.T, relative=1e-14 / min(spectrum))
    outside = gaussian(9, 1, seed=3)
    outside -= Q @ (Q.T @ outside)
    assert (O @ outside).norm() <= 1e-14 / min(spectrum)


def test_polar_factor_of_repeated_singular_values():
    Q = orthonormal(6, 6)
    assert_close(polar_factor(7 * Q), Q)
    assert_close(polar_factor(torch.eye(4, 6) * 3), torch.eye(4, 6).double())


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (0, 3, 3), (2, 0, 3), (3, 4), (2, 1, 5)])
def test_nothing_and_zero_give_exact_zeros(shape):
    for O in (polar_factor(torch.zeros(shape)), orthogonalize(torch.zeros(shape), schedule("jordan", 5))):
        assert O.dtype == torch.float64
        assert torch.equal(O, torch.zeros(shape, dtype=torch.float64))


def test_batch_is_matrix_by_matrix():
    G = gaussian(2, 3, 4, 5)
    G[0, 1] = 0
    G[1, 2] *= 2.0**900
    for f in (polar_factor, lambda X: orthogonalize(X, schedule("you", 5))):
        whole = f(G)
        assert whole[1, 2].norm() > 1
        for i in np.ndindex(2, 3):
            assert torch.equal(whole[i], f(G[i]))


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.float32, -149, 127), (torch.float64, -1074, 1023)])
def test_whole_range_of_the_dtype(dtype, low, high):
    whole = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, 0.0]], dtype=dtype)
    for k in (low, low + 1, -1, 0, 5, high):
        X = torch.from_numpy(np.ldexp(whole.numpy(), k))
        assert X[0, 0] > 0
        assert_close(polar_factor(X), whole.double() / sqrt(2))
        # Both singular values are N(X) / sqrt(2) under the Frobenius norm.
        p = np.polyval([2.0315, 0, -4.775, 0, 3.4445, 0], sqrt(1 / 2))
        assert_close(orthogonalize(X, schedule("jordan", 1)), whole.double() / sqrt(2) * p)


def test_spectral_map_is_a_map_of_singular_values():
    P, Q = orthonormal(5, 3, seed=1), orthonormal(4, 3, seed=2)
    X = P @ torch.diag(torch.tensor([8.0, 4.0, 1.0]).double()) @ Q.T
    expected = P @ torch.diag(torch.tensor([1.0, 0.25, 1 / 64]).double()) @ Q.T
    assert_close(spectral_map(X, lambda s: (s / s[0]) ** 2), expected)
    assert_close(spectral_map(X.T.tolist(), lambda s: (s / s[0]) ** 2), expected.T)


@pytest.mark.parametrize("shape", [(6, 6), (4, 11), (11, 4), (1, 5)])
@pytest.mark.parametrize(("name", "steps"), NAMED)
def test_orthogonalize_is_the_iterated_matrix_polynomial(name, steps, shape):
    X = gaussian(*shape)
    p = schedule(name, steps)
    norm = (X @ X.T).norm().sqrt() if p.norm == "schatten4" else X.norm()
    expected = X / (norm * {"polar_express": 1.02}.get(name, 1.0))
    for a, b, c in p.coefficients:
        A = expected @ expected.T
        expected = a * expected + b * A @ expected + c * A @ A @ expected
    assert_close(orthogonalize(X, p), expected)


def test_eps_is_a_floor_under_the_norm():
    X = gaussian(3, 4)
    identity = schedule(IDENTITY, 1)
    assert_close(orthogonalize(X, identity, eps=100.0), X / 100)
    assert_close(orthogonalize(X, identity, eps=1e-9), X / X.norm())
    assert_close(orthogonalize(X * 1e-300, identity, eps=1e-290), X * 1e-10)
    # Far below the floor only the slope of p at 0 counts.
    slope = 8.15655 * 4.04293 * 3.89167 * 3.28575 * 2.34654
    assert_close(orthogonalize(X, schedule("polar_express", 5), eps=1e12), X / 1.02e12 * slope)
    assert torch.equal(orthogonalize(X * 1e-320, identity, eps=1e300), torch.zeros(3, 4).double())


def test_argument_is_not_written_to():
    X = gaussian(4, 3)
    before = X.clone()
    polar_factor(X)
    orthogonalize(X, schedule("you", 5))
    assert torch.equal(X, before)
    assert X._version == 0


# schedules.py


def test_derived_coefficients():
    assert schedule("polar_express_s4", 5).norm == "schatten4"
    assert schedule("polar_express_s4", 5).margin == 1
    # The first step as derived elsewhere for the same l; the later ones depend on the interval that it leaves.
    assert polar_express_s4(2e-3, 5)[0] == (8.26156, -23.4979, 16.7492)


@pytest.mark.parametrize("steps", LOWER)
def test_derived_schedule_is_centred_on_one(steps):
    low, high = schedule("polar_express_s4", steps).band(LOWER[steps])
    assert low + high == pytest.approx(2, abs=1e-4)  # six digits of each coefficient


def test_published_coefficients():
    # Typed a second time, so that a slip of the finger in one of the two shows.
    quintics = {
        "polar_express": "8.15655 -22.48329 15.87877 4.04293 -2.80892 0.50002 3.89167 -2.77248 0.50606 "
        "3.28575 -2.36813 0.46449 2.34654 -1.70978 0.42324",
        "you": "4.0848 -6.8946 2.9270 3.9505 -6.3029 2.6377 3.7418 -5.5913 2.3037 2.8769 -3.1427 1.2046 2.8366 -3.0525 1.2012",
        "jordan": "3.4445 -4.7750 2.0315 " * 5,
    }
    for name, numbers in quintics.items():
        p = schedule(name, 5)
        assert np.array_equal(np.ravel(p.coefficients), np.array(numbers.split(), dtype=float))
        assert (p.norm, p.margin) == ("frobenius", 1.02 if name == "polar_express" else 1)


def largest_error(quintic, grid):
    a, b, c = quintic
    return np.abs(a * grid + b * grid**3 + c * grid**5 - 1).max()


INTERVALS = [*((l, 1.0) for l in (1e-4, *LOWER.values(), 0.3)), (0.05, 1.95), (0.5, 1.5), (0.9, 1.1)]


@pytest.mark.parametrize(("l", "u"), INTERVALS)
def test_minimax_is_the_best_quintic(l, u):
    quintic, E = minimax(l, u)
    grid = np.linspace(l, u, 4001)
    assert largest_error(quintic, grid) == pytest.approx(E, rel=1e-4)
    # The same problem as a linear program: minimize E subject to |p(x) - 1| <= E on the grid.
    powers, ones = np.stack([grid, grid**3, grid**5], axis=1), np.ones((len(grid), 1))
    constraints = np.block([[powers, -ones], [-powers, -ones]])
    bounds = [(None, None)] * 4
    best = scipy.optimize.linprog([0, 0, 0, 1], constraints, np.concatenate([ones, -ones]), bounds=bounds)
    assert best.fun == pytest.approx(E, rel=1e-4)


@pytest.mark.parametrize(("l", "u"), INTERVALS)
def test_no_nearby_quintic_is_better_than_minimax(l, u):
    quintic, E = minimax(l, u)
    a, b, c = quintic
    turns = np.roots([5 * c, 0, 3 * b, 0, a])
    assert np.isreal(turns).all()
    grid = np.union1d(np.linspace(l, u, 2001), turns[turns > 0])
    rng = np.random.default_rng(0)
    for size in (1e-2, 1e-4):
        for direction in rng.standard_normal((100, 3)):
            assert largest_error(np.array(quintic) * (1 + size * direction), grid) > E * (1 + 1e-9)


def by_hand(coefficients, x):
    for a, b, c in coefficients:
        x = np.polyval([c, 0, b, 0, a, 0], x)
    return x


@pytest.mark.parametrize(("name", "steps"), [*NAMED, ("jordan", 1), ("jordan", 2), ("jordan", 12)])
def test_images_are_those_of_a_dense_grid(name, steps):
    p = schedule(name, steps)
    for low, high in ((0, 1 + 2**-10), (0.01, 1), (0.5, 1), (-0.3, 0.2), (0.37, 0.37)):
        near_zero = np.outer([1, -1], np.geomspace(1e-9, 1, 100_001))
        grid = np.union1d(np.linspace(low, high, 100_001), near_zero)
        values = by_hand(p.coefficients, grid[(low <= grid) & (grid <= high)])
        assert p.image(low, high)[0] - 1e-12 <= values.min() <= p.image(low, high)[0] + 1e-4
        assert p.image(low, high)[1] - 1e-4 <= values.max() <= p.image(low, high)[1] + 1e-12
    margin = {"polar_express": 1.02}.get(name, 1.0)
    for lower in (0.001, 0.01):
        values = by_hand(p.coefficients, np.geomspace(lower, 1, 100_001) / margin)
        assert p.band(lower) == pytest.approx((values.min(), values.max()), abs=1e-4)


def test_singular_values_land_in_the_band():
    for name, steps in NAMED:
        p = schedule(name, steps)
        s = np.array([1.0, 0.9, 0.5, 0.3, 0.2, 0.1, 0.05])
        X = orthonormal(9, 7, seed=1) @ torch.diag(torch.from_numpy(s)) @ orthonormal(8, 7, seed=2).T
        smallest = s[-1] / (np.sum(s**4) ** 0.25 if p.norm == "schatten4" else np.sum(s**2) ** 0.5)
        low, high = p.band(smallest)
        out = scipy.linalg.svdvals(orthogonalize(X, p).numpy())[:7]
        assert low - 1e-12 <= out.min() <= out.max() <= high + 1e-12


def test_calling_a_schedule_evaluates_it():
    x = np.linspace(-1, 1, 23)
    for name, steps in NAMED:
        p = schedule(name, steps)
        np.testing.assert_allclose(p(x), by_hand(p.coefficients, x), rtol=1e-10, atol=1e-14)


def test_norms():
    assert Schedule((), "frobenius").size(np.array([3.0, 4.0])) == pytest.approx(5)
    assert Schedule((), "schatten4").size(np.array([1.0, 2.0, 2.0])) == pytest.approx(33**0.25)


def test_triple_and_list():
    assert schedule((2, -1.5, 0.5), 3).coefficients == ((2.0, -1.5, 0.5),) * 3
    assert schedule([(2, -1.5, 0.5), [1.5, -0.5, 0]], 2).coefficients == ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0))
    assert schedule((2, -1.5, 0.5), 3).norm == "frobenius"


@pytest.mark.parametrize(
    ("coefficients", "steps", "words"),
    [
        ("newton", 5, "newton"),
        ("you", 4, "4 steps"),
        ("polar_express", 6, "6 steps"),
        ("polar_express_s4", 2, "2 steps"),
        ("jordan", 100, "100 steps"),
        ([(2, -1.5, 0.5)], 2, "2 triples"),
        ((2, -1.5), 2, "triples"),
        ((3.0, -4.0, 0.5), 1, "reverses"),  # p(1) = -1/2
        ((3.0, 0.0, 0.0), 1, "overshoots"),  # p(1) = 3
        ((1.0, -1.0, 0.4), 1, "falls to 0.38"),  # on [1/2, 1] lowest at 1/sqrt(2) or 1
        ((0.9, 0.0, 0.0), 1, "slope"),
        ((1e200, 1e200, 1e200), 9, "overshoots"),
    ],
)
def test_refused_schedules(coefficients, steps, words):
    with pytest.raises(ValueError, match=words):
        schedule(coefficients, steps)


def test_constructor_refuses_an_unsound_schedule():
    W = torch.nn.Parameter(gaussian(2, 2))
    with pytest.raises(ValueError, match="overshoots"):
        Muon([W], ns_coefficients=(3.0, 0.0, 0.0))
    optimizer = Muon([W])
    with pytest.raises(ValueError, match="6 steps"):
        optimizer.add_param_group(dict(params=[torch.nn.Parameter(gaussian(2, 2))], ns_coefficients="you", ns_steps=6))
    assert len(optimizer.param_groups) == 1


def test_published_schedules_are_sound():
    for name, steps in (*NAMED, *(("jordan", steps) for steps in range(1, 100))):
        assert schedule(name, steps).faults() == []
