# SPDX-License-Identifier: Apache-2.0
"""Is the reference right? Every check here is against something that is not the reference."""

import copy
import io
from fractions import Fraction
from math import log2, sqrt

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch

from reference import (
    LOWER,
    Muon,
    Schedule,
    Section,
    decay,
    lr_scale,
    matrices,
    minimax,
    momentum,
    orthogonalize,
    polar_factor,
    schedule,
    spectral_map,
)
from reference.muon import rounded
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
    assert low + high == pytest.approx(2, abs=1e-5)


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


# layout.py


def index_sets(shape, **layout):
    return [index for _, index in matrices(shape, **layout)]


def test_plain_matrix():
    assert torch.equal(index_sets((3, 4))[0], torch.arange(12).view(1, 3, 4))


def test_experts_by_rows_by_columns_and_three_dimensional():
    by_rows = torch.arange(6 * 5).view(6, 5)
    assert torch.equal(index_sets((6, 5), blocks=3)[0], torch.stack([by_rows[0:2], by_rows[2:4], by_rows[4:6]]))
    by_columns = torch.arange(2 * 6).view(2, 6)
    expected = torch.stack([by_columns[:, 0:2], by_columns[:, 2:4], by_columns[:, 4:6]])
    assert torch.equal(index_sets((2, 6), columns=3)[0], expected)
    cube = torch.arange(4 * 2 * 6).view(4, 2, 6)
    assert torch.equal(index_sets((4, 2, 6), blocks=4)[0], cube)
    halves = torch.stack([half for expert in cube for half in (expert[:, :3], expert[:, 3:])])
    assert torch.equal(index_sets((4, 2, 6), blocks=4, columns=2)[0], halves)


def test_gate_above_up_in_every_expert():
    gate, up = index_sets((3, 4, 2), blocks=3, sections=(Section(1), Section(3)))
    cube = torch.arange(24).view(3, 4, 2)
    assert torch.equal(gate, cube[:, :1])
    assert torch.equal(up, cube[:, 1:])


def test_grouped_qkv_with_heads():
    # Megatron: for each of 2 groups 2 query heads, one key head and one value head of 3 rows each.
    grouped = torch.arange(2 * 4 * 3 * 5).view(2, 4, 3, 5)
    sections = (Section(6, head_dim=3), Section(3), (3, "adamw"))
    q, k, v = matrices((24, 5), groups=2, sections=sections)
    assert [algorithm for algorithm, _ in (q, k, v)] == ["muon", "muon", "adamw"]
    assert torch.equal(q[1], grouped[:, :2].reshape(4, 3, 5))
    assert torch.equal(k[1], grouped[:, 2].reshape(1, 6, 5))
    assert torch.equal(v[1], grouped[:, 3].reshape(1, 6, 5))


def test_heads_of_every_block():
    indices = index_sets((8, 2), blocks=2, sections=[{"rows": 4, "head_dim": 2}])[0]
    assert torch.equal(indices, torch.arange(16).view(4, 2, 2))


def test_flattened_convolution():
    assert torch.equal(index_sets((4, 3, 2, 2), flatten=True)[0], torch.arange(48).view(1, 4, 12))
    assert torch.equal(index_sets((4, 3, 2), flatten=True)[0], torch.arange(24).view(1, 4, 6))


def test_written_out_case():
    layout = dict(blocks=2, columns=2, groups=2, sections=(Section(1), Section(2, head_dim=2)))
    one, two = index_sets((12, 2), **layout)
    assert one[..., 0].tolist() == [[0, 6], [1, 7], [12, 18], [13, 19]]
    assert two[..., 0].tolist() == [[2, 4], [8, 10], [3, 5], [9, 11], [14, 16], [20, 22], [15, 17], [21, 23]]


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((6, 4), dict(blocks=3, columns=2)),
        ((24, 4), dict(blocks=2, groups=3, sections=((1,), (3,)))),
        ((24, 4), dict(groups=2, sections=((8, "muon", 4), (4, "adamw")))),
        ((2, 12, 4), dict(blocks=2, columns=2, groups=3, sections=((4, "muon", 2),))),
        ((0, 4), dict(blocks=3)),
        ((4, 0), {}),
        ((5, 1, 3, 3), dict(flatten=True)),
    ],
)
def test_matrices_are_disjoint_and_cover_the_parameter(shape, layout):
    found = torch.cat([index.flatten() for index in index_sets(shape, **layout)])
    assert torch.equal(found.sort().values, torch.arange(np.prod(shape)))


@pytest.mark.parametrize(
    ("shape", "layout", "words"),
    [
        ((6, 4), dict(blocks=4), "blocks=4"),
        ((6, 4), dict(columns=3), "columns=3"),
        ((6, 4), dict(groups=4), "groups=4"),
        ((6, 4), dict(blocks=0), "blocks=0"),
        ((6, 4), dict(sections=(Section(2), Section(3))), "6 rows"),
        ((6, 4), dict(sections=(Section(8), Section(-2))), "6 rows"),
        ((6, 4), dict(sections=(Section(6, head_dim=4),)), "head_dim=4"),
        ((6,), {}, "shape"),
        ((2, 2, 2, 2), {}, "shape"),
    ],
)
def test_layouts_that_do_not_fit(shape, layout, words):
    with pytest.raises(ValueError, match=words):
        matrices(shape, **layout)


# muon.py


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


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
def test_fused_equals_separate(shape, layout):
    fused = torch.nn.Parameter(gaussian(*shape))
    optimizer = Muon([fused], lr=0.1, layout=layout)
    pieces = []
    for algorithm, indices in matrices(shape, **layout):
        for index in indices:
            W = torch.nn.Parameter(fused.detach().flatten()[index])
            pieces.append((W, index, Muon([W], lr=0.1, algorithm=algorithm)))
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
