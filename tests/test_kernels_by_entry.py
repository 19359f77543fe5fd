# SPDX-License-Identifier: Apache-2.0
"""Kernels that work entry by entry, to the bit, against the same in torch; see conftest.py for where this runs."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from conformance import accept
from conformance.strategies import LAYOUTS
from impl.kernels import iteration, places
from impl.kernels import scales as scale
from impl.kernels.apply import apply, unpack
from impl.kernels.prepare import Source, prepare
from impl.kernels.variance import variance
from impl.layout import Layout, cut, matrices
from impl.stages import normalize_rows
from tests.poison import INTERPRETED, accept_cast, accept_outside, padded, poisoned

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 63, 64, 65, 127, 128, 129) if INTERPRETED else (1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000)
REMAINDERS = (0, 1, 2, 4, 8, 15) if INTERPRETED else range(16)
LENGTH = 112 if INTERPRETED else 240
STRIPS = [*((8, LENGTH + n) for n in REMAINDERS), *((LENGTH + n, 8) for n in REMAINDERS)]
SHAPES = [
    *STRIPS,
    *((m, n) for m in SIZES for n in SIZES if not INTERPRETED or m in (1, 65, 129) or n == 64),
    (100, 600),  # more tiles than there are programs for a matrix whose scale was guessed wrong
]
LR, DECAY, BETA, SCALE = 0.02, 0.1, 0.95, 0.75


class Case:
    """Parameters with one layout, a momentum and a gradient for each, and the tables that tell kernels of them."""

    def __init__(
        self, shape: Sequence[int], device: torch.device, count: int = 2, layout: dict | None = None,
        weight: torch.dtype = torch.float32, gradient: torch.dtype = torch.float32, missing: Sequence[int] = (),
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(1)

        def tensors(dtype: torch.dtype) -> list[Tensor]:
            values = (torch.randn(tuple(shape), generator=generator) for _ in range(count))
            return [poisoned(tuple(shape), device, dtype).copy_(value) for value in values]

        self.device, self.missing, self.layout = device, missing, Layout.of(layout)
        self.W, self.M, self.G = tensors(weight), tensors(torch.float32), tensors(gradient)
        self.section, view = cut(self.layout, self.W[0].contiguous())[0]
        self.rows, self.columns = matrices(self.section, view).shape[1:]
        self.table = torch.cat([places.places(i, self.section, self.meta(shape), device) for i in range(count)])
        self.aligned = places.aligned(self.meta(shape), self.rows)
        self.code = torch.zeros((), dtype=torch.uint8, device=device)
        self.V = [torch.rand(*shape[:-1], self.layout.columns, generator=generator).to(device) for _ in range(count)]
        gradients = [0 if i in missing else G.data_ptr() for i, G in enumerate(self.G)]
        addresses = [*(T.data_ptr() for T in (*self.W, *self.M)), *gradients, *(V.data_ptr() for V in self.V)]
        self.pointers = torch.zeros(len(addresses) + 8, dtype=torch.int64, device=device)
        places.point(self.pointers, [-1] * len(addresses), addresses)

    def meta(self, shape: Sequence[int]) -> Tensor:
        return cut(self.layout, torch.empty(*shape, device="meta"))[0][1]

    def averages(self) -> Tensor:
        """The table of NorMuon's averages."""
        V = self.meta(self.V[0].shape)
        return torch.cat([places.places(i, self.section, V, self.device) for i in range(len(self.V))])

    def source(
        self, momentum: bool = True, nesterov: bool = True, maximize: bool = False, scaled: float | None = None
    ) -> Source:
        hyper = torch.tensor([LR, DECAY, BETA, -1.0 if maximize else 1.0], dtype=torch.float64, device=self.device)
        grad_scale = None if scaled is None else torch.tensor(scaled, device=self.device)
        shape = (self.rows, self.columns, self.W[0].dtype, self.G[0].dtype, self.rows > self.columns)
        return Source(self.table, self.pointers, len(self.W), *shape, momentum, nesterov, self.aligned, hyper, grad_scale)

    def matrices(self, tensors: Sequence[Tensor]) -> Tensor:
        """The matrices (B, rows, columns) of all parameters."""
        return torch.cat([matrices(self.section, cut(self.layout, T.contiguous())[0][1]) for T in tensors])

    def absent(self) -> Tensor:
        """(B, 1, 1): whether a matrix has no gradient."""
        return torch.tensor([i in self.missing for i in self.table[:, 0].tolist()], device=self.device)[:, None, None]

    def direction(self, nesterov: bool = True, maximize: bool = False, scaled: float | None = None) -> tuple[Tensor, Tensor]:
        """Momentum and update direction by torch, each operation rounded to float32 by itself."""
        G, M = self.matrices(self.G).float(), self.matrices(self.M)
        G = G if scaled is None else G / torch.tensor(scaled, device=self.device)
        beta, rest = (torch.tensor(x, dtype=torch.float32, device=self.device) for x in (BETA, (1 - BETA) * (1 - 2 * maximize)))
        new = G * rest
        M = M * beta + new
        return M, new + M * beta if nesterov else M

    def prepared(self, source: Source) -> tuple[Tensor, Tensor]:
        """What the kernels find, and write into a batch of NaN: `largest` and X."""
        m, n = sorted((self.rows, self.columns))
        found, guess = torch.zeros(2, len(self.table), dtype=torch.int32, device=self.device)
        X = poisoned((len(self.table), iteration.padded(m), n), self.device, stride=iteration.stride(m, n))
        for run in prepare(source, found, guess, X):
            run()
        accept_outside(X)
        expected, once = X.clone(), found.clone()
        # It is the same with a guess that is right, too small, too large, infinite, or NaN.
        guesses = torch.stack([once, once // 2, once + (3 << 23), 0 * once + 0x7F800000, 0 * once + 0x7FC00000])
        which = torch.arange(self.columns, self.columns + len(once), device=self.device) % len(guesses)
        guess = guesses.gather(0, which[None])[0]
        X.fill_(NAN)
        for run in prepare(source, found.zero_(), guess, X):
            run()
        accept.same_bits(actual=found, expected=once)
        accept.same_bits(actual=X, expected=expected)
        return found.view(torch.float32), X

    def accept_prepared(self, U: Tensor, source: Source) -> Tensor:
        """Each matrix of U by a power of two, wide, and zeros below it: X, as written."""
        __tracebackhide__ = True
        U = torch.where(self.absent(), 0.0, U)
        found, X = self.prepared(source)
        biggest = U.abs().amax((1, 2))
        accept.same_bits(actual=found, expected=biggest)
        exponent = torch.where(biggest == 0, 0, 14 - torch.frexp(biggest.double()).exponent)
        expected = torch.ldexp(U.double(), exponent[:, None, None]).half()
        expected = expected.mT if self.rows > self.columns else expected
        accept.same_bits(actual=X[:, : expected.shape[1]], expected=expected)
        assert not X[:, expected.shape[1] :].any()
        return X

    def orthogonalized(self) -> tuple[Tensor, Tensor]:
        """Random matrices, as they are to be stepped with, and as a batch for the kernels."""
        O = torch.randn(len(self.table), self.rows, self.columns, generator=torch.Generator().manual_seed(2))
        O = O.to(self.device, torch.float16)
        m, n = sorted((self.rows, self.columns))
        batch = poisoned((len(self.table), iteration.padded(m), n), self.device, stride=iteration.stride(m, n))
        batch[:, :m] = O.mT if self.rows > self.columns else O
        return O, batch

    def stepped(self, O: Tensor, scale: float = SCALE, rows: Tensor | None = None) -> Tensor:
        """New weights by torch, each operation rounded to float32 by itself."""
        kept, step = (torch.tensor(x, dtype=torch.float32, device=self.device) for x in (1 - LR * DECAY, LR * scale))
        D = O.float() if rows is None else O.float() * rows[:, :, None]
        W = self.matrices(self.W)
        return torch.where(self.absent(), W, (W.float() * kept - D * step).to(W.dtype))

    def accept_around(self) -> None:
        for T in (*self.W, *self.M, *self.G):
            accept_outside(T)


@pytest.mark.parametrize("m, n", SHAPES)
def test_shapes_of_every_alignment(device, m, n):
    case = Case((m, n), device)
    M, U = case.direction()
    case.accept_prepared(U, case.source())
    O, batch = case.orthogonalized()
    W = case.stepped(O)
    apply(case.source(), batch, case.code, SCALE)()
    accept.same_bits(actual=case.matrices(case.W), expected=W)
    accept.same_bits(actual=case.matrices(case.M), expected=M)
    case.accept_around()


@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("gradient", DTYPES)
@pytest.mark.parametrize("shape", [(17, 24), (24, 17), (16, 32)])
def test_dtypes(device, shape, gradient, weight):
    case = Case(shape, device, weight=weight, gradient=gradient)
    M, U = case.direction()
    case.accept_prepared(U, case.source())
    O, batch = case.orthogonalized()
    W = case.stepped(O)
    apply(case.source(), batch, case.code, SCALE)()
    accept_cast(case.matrices(case.W), W)
    accept.same_bits(actual=case.matrices(case.M), expected=M)
    case.accept_around()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("scaled", [None, 3.0])
def test_options(device, nesterov, maximize, scaled):
    case = Case((19, 40), device, count=3, missing=[1])
    options = dict(nesterov=nesterov, maximize=maximize, scaled=scaled)
    M, U = case.direction(**options)
    case.accept_prepared(U, case.source(**options))
    before = [T.clone() for T in (case.W[1], case.M[1])]
    O, batch = case.orthogonalized()
    W = case.stepped(O)
    apply(case.source(**options), batch, case.code, SCALE)()
    accept.same_bits(actual=case.matrices(case.W), expected=W)
    accept.same_bits(actual=case.matrices(case.M), expected=torch.where(case.absent(), case.matrices([*case.M]), M))
    for T, old in zip((case.W[1], case.M[1]), before, strict=True):
        accept.same_bits(actual=T, expected=old)


@pytest.mark.parametrize("shape, layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(device, shape, layout):
    case = Case(shape, device, layout=layout, count=3, missing=[0])
    W0, M0 = ([T.clone() for T in tensors] for tensors in (case.W, case.M))
    M, U = case.direction()
    case.accept_prepared(U, case.source())
    O, batch = case.orthogonalized()
    W, M = case.stepped(O), torch.where(case.absent(), case.matrices(case.M), M)
    apply(case.source(), batch, case.code, SCALE)()
    accept.same_bits(actual=case.matrices(case.W), expected=W)
    accept.same_bits(actual=case.matrices(case.M), expected=M)
    # The other sections of the parameter are as they were.
    for new, old in zip((*case.W, *case.M), (*W0, *M0), strict=True):
        for (_, a), (_, b) in list(zip(cut(case.layout, new.contiguous()), cut(case.layout, old), strict=True))[1:]:
            accept.same_bits(actual=a, expected=b)
    case.accept_around()


@pytest.mark.parametrize("code", range(4))
def test_decisions(device, code):
    case = Case((9, 40), device)
    W, (M, _) = case.matrices(case.W), case.direction()
    old, (O, batch) = case.matrices(case.M), case.orthogonalized()
    moved = case.stepped(O)
    case.code.fill_(code)
    apply(case.source(), batch, case.code, SCALE)()
    accept.same_bits(actual=case.matrices(case.W), expected=W if code else moved)
    accept.same_bits(actual=case.matrices(case.M), expected=M if code < 2 else old)


@pytest.mark.parametrize("size", [1e-45, 2.0**-149, 3e-45, 1e-40, 2.0**-126, 1e-30, 1e-9, 1.0, 65504.0, 1e20, 2.0**127, 3e38])
@pytest.mark.parametrize("shape", [(9, 13), (16, 24)])
def test_the_whole_range_of_float32(device, size, shape):
    case = Case(shape, device)
    for i, G in enumerate(case.G):
        G.copy_(torch.rand(shape, generator=torch.Generator().manual_seed(i)).to(device) * 2 - 1).mul_(size)
        G.flatten()[i] = -size
    X = case.accept_prepared(case.matrices(case.G), case.source(momentum=False, nesterov=False))
    assert ((X.abs().amax((1, 2)) >= 2**13) & (X.abs().amax((1, 2)) <= 2**14)).all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_shows_where_it_is(device, bad):
    case = Case((70, 300), device, count=3)
    case.G[1][69, 299] = bad
    found, X = case.prepared(case.source())
    assert found.isfinite().tolist() == [True, False, True] == X.isfinite().all((1, 2)).tolist()


def test_zeros(device):
    case = Case((9, 13), device)
    for T in (*case.G, *case.M):
        T.zero_()
    found, X = case.prepared(case.source())
    assert not found.any() and not X.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n", [*STRIPS, (129, 65), (64, 64)])
def test_unpacking(device, m, n, dtype):
    case = Case((m, n), device)
    O, batch = case.orthogonalized()
    out = poisoned(tuple(O.shape), device, dtype)
    unpack(batch, out)()
    accept_cast(out, O.to(dtype))
    accept_outside(out)


@pytest.mark.parametrize("shape, layout", [((9, 40), None), ((130, 3), None), ((1030, 2), None), ((1, 1), None), ((24, 10), {"blocks": 4}), ((6, 40), {"columns": 4})])  # fmt: skip  # noqa: E501
def test_rows_are_evened_out(device, shape, layout):
    case = Case(shape, device, layout=layout, count=3, missing=[1])
    O, batch = case.orthogonalized()
    O[0] = batch[0] = 0
    B, rows, columns = O.shape
    squares, factors = (poisoned((B, rows), device, torch.float32) for _ in range(2))
    before = case.matrices(case.V)
    where = (case.averages(), case.pointers, 3, case.code, 0.9)
    case.code.fill_(1)
    for run in variance(batch, rows, columns, *where, squares, factors):
        run()
    accept.same_bits(actual=case.matrices(case.V), expected=before)
    case.code.zero_()
    for run in variance(batch, rows, columns, *where, squares, factors):
        run()
    expected, V = normalize_rows(O.double(), before.double(), 0.9)
    there = ~case.absent().flatten()
    torch.testing.assert_close(squares.double(), O.double().square().sum(-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(case.matrices(case.V)[there].double(), V[there], rtol=1e-5, atol=0)
    accept.same_bits(actual=case.matrices(case.V)[~there], expected=before[~there])
    torch.testing.assert_close((O * factors[:, :, None])[there].double(), expected[there], rtol=2e-5, atol=1e-9)
    accept_outside(squares)
    accept_outside(factors)
    W = case.stepped(O, rows=factors)
    apply(case.source(), batch, case.code, SCALE, factors)()
    accept.same_bits(actual=case.matrices(case.W), expected=W)


def test_rows_that_are_small_or_zero_in_the_first_step(device):
    case = Case((9, 40), device, count=2)
    O, batch = case.orthogonalized()
    O[:, 0] = batch[:, 0] = 0
    O[:, 1] = batch[:, 1] = 2.0**-20
    for V in case.V:
        V.zero_()
    squares, factors = (poisoned((2, 9), device, torch.float32) for _ in range(2))
    for run in variance(batch, 9, 40, case.averages(), case.pointers, 2, case.code, 0.9, squares, factors):
        run()
    expected, _ = normalize_rows(O.double(), torch.zeros(2, 9, 1, dtype=torch.float64, device=device), 0.9)
    torch.testing.assert_close((O * factors[:, :, None]).double(), expected, rtol=2e-5, atol=1e-9)


def test_matrices_that_are_far_apart(device, tmp_path):
    """Further than 2^31 entries; in the interpreter in a file, of which a few pages are written to."""
    case = Case((2, 64), device, count=3)
    size, path = 3 * 2**30, str(tmp_path / "far")
    far = torch.from_file(path, True, size, dtype=torch.float16) if INTERPRETED else torch.empty(size, dtype=torch.float16)
    far = far.to(device).view(3, 2**24, 64)
    far[:, :2] = O = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(2)).to(device, torch.float16)
    squares, factors = torch.zeros(2, 3, 2, device=device)
    for run in variance(far, 2, 64, case.averages(), case.pointers, 3, case.code, 0.9, squares, factors):
        run()
    torch.testing.assert_close(squares.double(), O.double().square().sum(-1), rtol=1e-5, atol=0)
    W = case.stepped(O)
    apply(case.source(), far, case.code, SCALE)()
    accept.same_bits(actual=case.matrices(case.W), expected=W)
    out = poisoned((3, 2, 64), device, torch.float32)
    unpack(far, out)()
    accept.same_bits(actual=out, expected=O.float())


@pytest.mark.parametrize("squares", [True, False])
@pytest.mark.parametrize("tiles", [1, 255, 256, 257, 600])
@pytest.mark.parametrize("eps", [0.0, 1e-7, 0.3])
def test_scales(device, squares, tiles, eps):
    gram, margin = 2.0**-20, 1.0625
    sums = torch.rand(6, tiles, generator=torch.Generator().manual_seed(0)).to(device) * 100
    sums[2] = 0
    sums[3, -1] = NAN
    sums[4] *= 1e-6
    sums = padded(sums, 1)
    sizes = torch.tensor([1.0, 3e-8, 0.0, 1.0, 1e-40, 3e38], device=device)
    out = poisoned((scale.ROWS, 6), device, torch.float32)
    scale.scales(sums, sizes.view(torch.int32), out, gram, margin, eps, squares)()
    norm = sums.double().sum(1).sqrt() if squares else sums.double().sum(1)
    zero, r, N = norm == 0, 1 / norm, (norm / gram).sqrt()
    shift = 14 - torch.frexp(sizes.double()).exponent
    t = N / (margin * torch.maximum(N, torch.ldexp(torch.full_like(N, eps), shift)))
    expected = torch.stack([r, r * t**2, (r * t**2) ** 2, t**2, t**4, 1 / N, t, t / N])
    expected = torch.where(zero, 0.0, expected)
    fits = expected.isnan() | ((expected < 1e38) & (expected > 1e-37)) | (expected == 0)
    torch.testing.assert_close(out[1:].double()[fits], expected[fits], rtol=1e-5, atol=0, equal_nan=True)
    assert out[0].isnan().all(), "the first row is the caller's"
    accept_outside(out)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
def test_addresses(device, count):
    pointers = torch.zeros(-(-count // 8) * 8 + 8, dtype=torch.int64, device=device)
    old, new = list(range(count)), [2**45 + 16 * i for i in range(count)]
    places.point(pointers, [-1] * count, old)
    assert pointers[:count].tolist() == old
    for i in range(count):
        old[i] = new[i]
        places.point(pointers, [*range(i + 1, count)] and pointers[:count].tolist(), old)
        assert pointers[:count].tolist() == old
    assert math.prod(pointers[count:].shape) >= 8 and not pointers[count:].any()


@pytest.mark.skipif(INTERPRETED, reason="9 GB")
def test_more_than_two_to_the_31_entries(device):
    B, m, n = 16500, 128, 1024
    O, out = torch.empty(B, m, n, dtype=torch.float16, device=device), torch.empty(B, m, n, dtype=torch.float16, device=device)
    assert O.numel() > 2**31
    O.normal_()
    out.fill_(NAN)
    unpack(O, out)()
    assert all(a.equal(b) for a, b in zip(out.split(500), O.split(500), strict=True))
    del out
    case = Case((m, n), device, count=1)
    case.table = case.table.repeat(B, 1)
    found, guess = torch.zeros(2, B, dtype=torch.int32, device=device)
    O.fill_(NAN)
    for run in prepare(case.source(), found, guess, O):
        run()
    assert (found == found[0]).all() and all((part == O[0]).all() for part in O.split(500))
