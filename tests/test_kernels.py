# SPDX-License-Identifier: Apache-2.0
"""Products and whole orthogonalizations against the same in torch; see conftest.py for where this runs."""

import pytest
import torch
from torch import Tensor

import impl
from conformance import accept
from conformance.strategies import matrix
from impl.kernels import general, iteration, orthogonalize, products, symmetric
from impl.kernels.launch import UNIT, tiles_for
from impl.kernels.products import PORTABLE, Products
from impl.kernels.symmetric import oracle
from impl.schedules import schedule
from tests.poison import INTERPRETED, accept_cast, accept_outside, padded, poisoned

EDGES = (1, 63, 64, 65, 127, 128, 129) if INTERPRETED else (1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000)
HEIGHTS = (UNIT, 2 * UNIT) if INTERPRETED else (UNIT, 2 * UNIT, 3 * UNIT, 8 * UNIT)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["fastest"] if INTERPRETED else ["fastest", "portable"])
def make(request, device) -> Products:
    """The products that the device gets, and those that all others get."""
    fastest = products.products(device)
    if request.param == "portable" and fastest is PORTABLE:
        pytest.skip("they are the fastest here")
    return fastest if request.param == "fastest" else PORTABLE


def normal(shape: tuple[int, ...], device: torch.device, seed: int = 0) -> Tensor:
    """float16 in memory that is NaN between its rows."""
    return padded(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.float16))


def commuting(B: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pairs of symmetric float16 matrices that commute exactly: circulant ones, their rows and columns shuffled alike."""
    generator = torch.Generator().manual_seed(m)
    index = (torch.arange(m)[:, None] - torch.arange(m)).abs()
    index = index.minimum(m - index)
    pairs = []
    for _ in range(B):
        order = torch.randperm(m, generator=generator)
        pairs.append([torch.randn(m, generator=generator)[index][order][:, order] for _ in "AB"])
    A, X = (torch.stack(each).to(device, torch.float16) for each in zip(*pairs, strict=True))
    return A, X


def numbers(B: int, device: torch.device) -> Tensor:
    """Coefficients that differ from matrix to matrix, and are no powers of two."""
    return torch.tensor([0.07 + 0.011 * i for i in range(B)], device=device)


def accept_rounding(D: Tensor, exact: Tensor, peer: Tensor, granule: int = 1) -> None:
    """At most twice the error of the same in torch, rounded to float16; for a wider D, much less."""
    __tracebackhide__ = True
    error, bound = accept.distance(D, exact), accept.distance(peer.half(), exact) * (2 if D.dtype == torch.float16 else 0.125)
    assert error <= bound, f"relative distance {error:.2e}, accepted {bound:.2e}"
    accept_outside(D, granule)


def bits(largest: Tensor) -> Tensor:
    return largest.view(torch.float32)


def shares(B: int, m: int, device: torch.device) -> Tensor:
    strips = m // tiles_for(device).product.rows
    return poisoned((B, strips * (strips + 1) // 2), device, torch.float32)


@pytest.mark.parametrize("k", EDGES)
@pytest.mark.parametrize("m", HEIGHTS)
def test_gram_matrices(make, device, m, k):
    B = 2 if INTERPRETED and m > UNIT else 3
    X, D, alphas = normal((B, m, k), device), poisoned((B, m, m), device), numbers(B, device)
    norms = shares(B, m, device)
    make.square(X, D, alphas, 0.5, squares=norms)()
    exact = X.double() @ X.double().mT * alphas.double()[:, None, None] / 2
    accept_rounding(D, exact, oracle(X, X, alphas / 2, torch.zeros_like(alphas), 0.0))
    accept.same_bits(actual=D, expected=D.mT)
    torch.testing.assert_close(norms.double().sum(1), exact.square().sum((1, 2)), rtol=2e-5, atol=0)
    accept_outside(norms)
    traces = shares(B, m, device)
    again = poisoned((B, m, m), device)
    make.square(X, again, alphas, 0.5, trace=traces)()
    torch.testing.assert_close(traces.double().sum(1), exact.diagonal(dim1=1, dim2=2).sum(1), rtol=2e-5, atol=0)
    accept.same_bits(actual=again, expected=D)


@pytest.mark.parametrize("m", HEIGHTS)
@pytest.mark.parametrize("B", [1, 2, 5])
def test_quadratics(make, device, m, B):
    A, _ = commuting(B, m, device)
    D, alphas, betas = poisoned((B, m, m), device), numbers(B, device), numbers(B, device).flip(0) + 3
    make.square(A, D, alphas, 0.3, quadratic=(betas, -0.7, 1.75))()
    wide = A.double() @ A.double() * alphas.double()[:, None, None] * 0.3
    wide += A.double() * betas.double()[:, None, None] * -0.7 + 1.75 * torch.eye(m, device=device)
    accept_rounding(D, wide, oracle(A, A, alphas * 0.3, betas * -0.7, 1.75))
    accept.same_bits(actual=D, expected=D.mT)
    again = poisoned((B, m, m), device)
    make.square(A, again, alphas, 0.3, quadratic=(betas, -0.7, 1.75))()
    accept.same_bits(actual=again, expected=D)


@pytest.mark.parametrize("m", HEIGHTS)
@pytest.mark.parametrize("B", [1, 2, 5])
def test_products_of_matrices_that_commute(make, device, m, B):
    A, X = commuting(B, m, device)
    D, alphas = poisoned((B, m, m), device), numbers(B, device)
    make.product(A, X, D, alphas)()
    wide = A.double() @ X.double() * alphas.double()[:, None, None]
    accept_rounding(D, wide, A.float() @ X.float() * alphas[:, None, None])
    accept.same_bits(actual=D, expected=D.mT)
    again = poisoned((B, m, m), device)
    make.product(A, X, again, alphas)()
    accept.same_bits(actual=again, expected=D)


@pytest.mark.parametrize("n", EDGES)
@pytest.mark.parametrize("m", HEIGHTS)
def test_general_products(make, device, m, n):
    B = 2
    A, X, D, alphas = normal((B, m, m), device), normal((B, m, n), device, 1), normal((B, m, n), device), numbers(B, device)
    D.fill_(NAN)
    found = torch.zeros(B, dtype=torch.int32, device=device)
    make.general(A, X, D, alphas, found)()
    exact = A.double() @ X.double() * alphas.double()[:, None, None]
    accept_rounding(D, exact, general.oracle(A, X, alphas), granule=8)  # what the hardware stores at a time
    accept.same_bits(actual=bits(found).half(), expected=D.abs().amax((1, 2)))
    again = poisoned((B, m, n), device, stride=D.stride(1))
    make.general(A, X, again, alphas)()
    accept.same_bits(actual=again, expected=D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m, n, transposed", [(128, 72, False), (256, 256, False), (128, 256, True), (256, 512, True)])
def test_products_that_end_in_another_dtype_and_orientation(make, device, dtype, m, n, transposed):
    A, X, alphas = normal((2, m, m), device), normal((2, m, n), device, 1), numbers(2, device)
    D = poisoned((2, n, m) if transposed else (2, m, n), device, dtype)
    found = torch.zeros(2, dtype=torch.int32, device=device)
    make.general(A, X, D, alphas, found)()
    accept_outside(D)
    plain = torch.empty(2, m, n, dtype=torch.float32, device=device)
    make.general(A, X, plain, alphas)()
    accept_rounding(plain.clone(), A.double() @ X.double() * alphas.double()[:, None, None], general.oracle(A, X, alphas))
    accept_cast(D.mT if transposed else D, plain.to(dtype))
    accept.same_bits(actual=bits(found), expected=plain.abs().amax((1, 2)))


@pytest.mark.parametrize("programs", [7] if INTERPRETED else [1, 2, 3, 7, 1000])
def test_any_number_of_programs_does_the_same(make, device, programs, monkeypatch):
    results = []
    for number in (4, programs):
        for module in (symmetric, general, products):
            monkeypatch.setattr(module, "processors", lambda device, number=number: number)
        (A, B), X, one = commuting(3, 256, device), normal((3, 256, 70), device), torch.ones(3, device=device)
        C, D, E, W = (poisoned((3, 256, n), device, stride=-(-n // 8) * 8) for n in (256, 256, 256, 70))
        sums = shares(3, 256, device)
        make.square(A, C, one, 0.25, squares=sums)()
        make.square(A, D, one, 0.25, quadratic=(one, 0.5, 2.0))()
        make.product(A, B, E, one)()
        make.general(A, X, W, one)()
        results.append([C, D, E, W, sums])
    for actual, expected in zip(*results, strict=True):
        accept.same_bits(actual=actual, expected=expected)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_stays_with_its_matrix_and_shows(make, device, bad):
    A, X = normal((3, UNIT, UNIT), device), normal((3, UNIT, 65), device, 1)
    A[1, 70, 5] = bad
    D, one, found = poisoned((3, UNIT, 65), device, stride=72), torch.ones(3, device=device), torch.zeros(3, dtype=torch.int32)
    found = found.to(device)
    make.general(A, X, D, one, found)()
    assert D.isfinite().all((1, 2)).tolist() == bits(found).isfinite().tolist() == [True, False, True]
    G, sums = poisoned((3, UNIT, UNIT), device), shares(3, UNIT, device)
    make.square(A, G, one, 0.01, squares=sums)()
    assert sums.sum(1).isfinite().tolist() == G.isfinite().all((1, 2)).tolist() == [True, False, True]
    S, sums = A + A.mT, shares(3, UNIT, device)
    make.square(S, G, one, 0.01, trace=sums)()
    assert sums.sum(1).isfinite().tolist() == [True, False, True]
    make.product(S, S, G, one * 0.01)()
    assert G.isfinite().all((1, 2)).tolist() == [True, False, True]


def test_zeros_give_zeros(make, device):
    Z, one, found = (
        torch.zeros(2, UNIT, UNIT).half().to(device),
        torch.ones(2, device=device),
        torch.zeros(2, dtype=torch.int32),
    )
    found = found.to(device)
    D, sums = poisoned((2, UNIT, UNIT), device), shares(2, UNIT, device)
    for run in (make.square(Z, D, one, squares=sums), make.product(Z, Z, D, one), make.general(Z, Z, D, one, found)):
        D.fill_(NAN)
        run()
        assert not D.any() and not sums.any() and not found.any()
    make.square(Z, D, one, quadratic=(one, 2.0, 0.75))()
    accept.same_bits(actual=D, expected=0.75 * torch.eye(UNIT).half().to(device).expand(2, -1, -1))


SHAPES = [(1, 1), (63, 65), (129, 64)] if INTERPRETED else [(m, n) for m in EDGES for n in EDGES]


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m, n", SHAPES)
def test_orthogonalizations_at_tile_edges(device, m, n, dtype):
    X = torch.stack([matrix((m, n), "moderate", seed).to(dtype) for seed in range(2)]).to(device)
    before = X.clone()
    plan = schedule("jordan", 5)
    O = orthogonalize.orthogonalize(X, plan, 0.0)
    expected = impl.orthogonalize(X.cpu().double(), "jordan", 5)
    assert accept.distance(O, expected) < (8e-3 if dtype != torch.bfloat16 else 1.2e-2)
    accept.same_bits(actual=orthogonalize.orthogonalize(X, plan, 0.0), expected=O)
    accept.same_bits(actual=X, expected=before)
    assert orthogonalize.batch(X.shape, dtype, plan, 0.0, X.device, True, caller(device)).arena.untyped_storage().size() == 0


@pytest.mark.parametrize(
    "m, n, dtype",
    [
        *((m, n, torch.float32) for m, n in [(200, 128), (256, 72), (100, 128), (128, 100), (384, 128), (128, 129)]),
        (128, 132, torch.bfloat16),
    ],
)
def test_orthogonalizations_write_their_result_alone(monkeypatch, device, m, n, dtype):
    """The last product among them, which writes whole tiles to a result that has room for these, in whatever order."""
    if INTERPRETED:  # one program after the other: of three, the last meets the first matrix after others have met the second
        monkeypatch.setattr(general, "processors", lambda device: 3)
    X = torch.stack([matrix((m, n), "moderate", seed).to(dtype) for seed in range(2)]).to(device)
    out = poisoned((4, m, n), device, dtype)[1:3]
    monkeypatch.setattr(torch, "empty_like", lambda T: out)
    O = orthogonalize.orthogonalize(X, schedule("jordan", 2), 0.0)
    assert O is out and accept.distance(O, impl.orthogonalize(X.cpu().double(), "jordan", 2)) < 8e-3, dtype
    accept_outside(out)


def caller(device: torch.device) -> tuple[int, int]:
    """The key of this thread and stream in `orthogonalize.batch`."""
    return orthogonalize.threading.get_ident(), torch.cuda.current_stream().cuda_stream


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6] if INTERPRETED else [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("m, n", [(40, 70), (48, 48)] if INTERPRETED else [(40, 70), (48, 48), (300, 130)])
def test_every_number_of_steps(device, m, n, steps):
    """And an epsilon under a norm, or above it."""
    X = torch.stack([matrix((m, n), "flat", seed) for seed in range(2)]).to(device)
    for eps in (1e-7, 20.0):
        expected = impl.orthogonalize(X.cpu().double(), "jordan", steps, eps)
        assert accept.distance(orthogonalize.orthogonalize(X, schedule("jordan", steps), eps), expected) < 1e-2, eps


@pytest.mark.parametrize(("name", "steps"), [("polar_express_s4", 3), ("polar_express", 5), ("you", 5)])
def test_every_schedule(device, name, steps):
    """Of singular values that are alike, so that little is amplified but the norm and the margin."""
    X = torch.stack([matrix((20, 30), "flat", seed) for seed in range(2)]).to(device)
    expected = impl.orthogonalize(X.cpu().double(), name, steps)
    assert accept.distance(orthogonalize.orthogonalize(X, schedule(name, steps), 0.0), expected) < 8e-3


def test_what_is_kept_between_calls(device, monkeypatch):
    """Not the result's memory; and nothing of a call that is captured, which its graph's replays fill."""
    X, plan = torch.ones(2, 9, 5, device=device), schedule("jordan", 1)
    orthogonalize.batch.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    orthogonalize.orthogonalize(X, plan, 0.0)
    assert orthogonalize.batch.cache_info().currsize == 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    orthogonalize.orthogonalize(X, plan, 0.0)
    these = orthogonalize.batch(X.shape, X.dtype, plan, 0.0, X.device, True, caller(device))
    assert [part.untyped_storage().size() for _, part in these.outs] == [0]


def test_matrices_in_chunks_come_out_the_same(device, monkeypatch):
    X = torch.stack([matrix((20, 30), "moderate", seed) for seed in range(5)]).to(device)
    plan = schedule("polar_express_s4", 3)
    together = orthogonalize.orthogonalize(X, plan, 0.0)
    monkeypatch.setattr(iteration, "SCRATCH", 4 * iteration.scratch_numbers(20, 30))
    orthogonalize.batch.cache_clear()
    assert iteration.chunk(5, 20, 30) == 2 and iteration.chunk(3, 40000, 40000) == 1
    accept.same_bits(actual=orthogonalize.orthogonalize(X, plan, 0.0), expected=together)
    for x, o in zip(X, together, strict=True):
        accept.same_bits(actual=orthogonalize.orthogonalize(x[None], plan, 0.0)[0], expected=o)
    orthogonalize.batch.cache_clear()


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-140, 2.0**-126, 2.0**-100, 2.0**100, 2.0**126])
@pytest.mark.parametrize("shape", [(9, 13), (8, 8)])
def test_the_whole_range_of_float32(device, scale, shape):
    """Also where entries of the Gram matrix are as large as can be."""
    X = torch.full((1, *shape), 3.0, device=device)
    X[0, 0, 0] = -3
    plan = schedule("polar_express_s4", 5)
    expected = orthogonalize.orthogonalize(X, plan, 0.0)
    assert expected.isfinite().all()
    accept.same_bits(actual=orthogonalize.orthogonalize(X * scale, plan, 0.0), expected=expected)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_orthogonalizing_zero_and_what_is_not_finite(device, bad):
    X = torch.randn(4, 9, 13, generator=torch.Generator().manual_seed(0)).to(device)
    X[1] = 0
    X[2, 3, 4] = bad
    O = orthogonalize.orthogonalize(X, schedule("polar_express_s4", 5), 0.0)
    assert not O[1].any() and O[2].isnan().all() and O[[0, 3]].isfinite().all()


def test_wide_matrices_of_entries_that_are_alike(device):
    """Products of rows are as large as can be, and have as many terms as there are columns."""
    X = torch.full((1, 3, 200), 3.0, device=device)
    X[0, 0, 0] = -3
    O = orthogonalize.orthogonalize(X, schedule("jordan", 1), 0.0)
    assert accept.distance(O, impl.orthogonalize(X.cpu().double(), "jordan", 1)) < 1e-2


@pytest.mark.parametrize(
    ("view", "dtype"),
    [
        (lambda X: X.mT, torch.float32),
        (lambda X: X[:, ::2], torch.bfloat16),
        (lambda X: X[:, :, 1:], torch.float16),
    ],
    ids=["transposed", "every other row", "but the first column"],
)
def test_views_of_every_dtype(device, view, dtype):
    X = view(torch.randn(2, 10, 14, generator=torch.Generator().manual_seed(0)).to(device, dtype))
    O, same = (orthogonalize.orthogonalize(each, schedule("jordan", 1), 0.0) for each in (X, X.contiguous().clone()))
    accept.same_bits(actual=O, expected=same)
    assert accept.distance(O, impl.orthogonalize(X.cpu().double(), "jordan", 1)) < 1e-2


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_views(device):
    """The last ones are contiguous, but do not begin at a multiple of 16 bytes."""
    X = torch.randn(4, 96, 130, device=device)
    views = [X.mT, X[:, ::2], X[:, :, 1:], X[:, :, ::2], X[1:3], X.transpose(0, 1), X.permute(2, 0, 1)]
    views += [X.flatten()[i:][: 96 * 128].view(96, 128) for i in (1, 2)]
    for view in views:
        accept.same_bits(actual=impl.orthogonalize(view), expected=impl.orthogonalize(view.clone()))


@pytest.mark.skipif(INTERPRETED, reason="10 GB")
def test_more_than_two_to_the_31_entries(make, device):
    B, m, n = 16500, 128, 1024
    X, D = torch.empty(B, m, n, dtype=torch.float16, device=device), torch.empty(B, m, n, dtype=torch.float16, device=device)
    assert X.numel() > 2**31
    X.normal_()
    D.fill_(NAN)
    A, one = torch.randn(1, m, m, device=device).half().expand(B, m, m).contiguous(), torch.ones(B, device=device)
    make.general(A, X, D, one)()
    for i in (0, 1, B // 2, B - 2, B - 1):
        accept_rounding(D[i].clone(), A[i].double() @ X[i].double(), A[i].float() @ X[i].float())
    assert not any(part.isnan().any() for part in D.split(1000))
