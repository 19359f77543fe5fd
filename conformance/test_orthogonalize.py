# SPDX-License-Identifier: Apache-2.0
"""ORTH: orthogonalization."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import reference
from conformance import accept
from conformance.steps import parameters, take
from conformance.strategies import DTYPES, HYPER, conditioned, matrix, seeds, shapes, spectra, tensor
from conformance.target import Target, Unsupported

NAMED = [("polar_express_s4", steps) for steps in reference.LOWER] + [("polar_express", 5), ("you", 5), ("jordan", 5)]
# SPEC.md's table: l and the band on [l, 1]; the default's follow from its derivation.
BANDS = {("polar_express", 5): (0.01, 0.858, 1.142), ("you", 5): (0.01, 0.977, 1.032), ("jordan", 5): (0.01, 0.681, 1.135)}
BANDS |= {
    ("polar_express_s4", steps): (l, *reference.schedule("polar_express_s4", steps).band(l))
    for steps, l in reference.LOWER.items()
}
# The schedule under which relations are checked: every implementation has it.
JORDAN = ("jordan", 5, 0.0)


@pytest.mark.clause("ORTH-1")
@pytest.mark.parametrize(("name", "steps"), NAMED)
@given(shape=shapes, spectrum=spectra, seed=seeds, dtype=st.sampled_from(DTYPES))
def test_is_the_spectral_map_of_its_schedule(target: Target, device, name, steps, shape, spectrum, seed, dtype):
    X = matrix(shape, spectrum, seed, dtype)
    O = target.orthogonalize(X.to(device), name, steps, 0.0)
    accept.spectral(actual=O, X=X, schedule=reference.schedule(name, steps), precision=target.precision(dtype, device))


@pytest.mark.clause("ORTH-1")
@given(shape=shapes, seed=seeds)
def test_is_the_spectral_map_of_coefficients_of_ones_own(target: Target, device, shape, seed):
    X = matrix(shape, "moderate", seed)
    for coefficients, steps in (((1.5, -0.5, 0.0), 3), (((3.4445, -4.775, 2.0315), (1.5, -0.5, 0.0)), 2)):
        O = target.orthogonalize(X.to(device), coefficients, steps, 0.0)
        own = reference.schedule(coefficients, steps)
        accept.spectral(actual=O, X=X, schedule=own, precision=target.precision(X.dtype, device))


@pytest.mark.clause("ORTH-2")
@pytest.mark.parametrize("case", accept.POLAR)
def test_default_is_close_to_the_polar_factor(target: Target, device, case):
    kind, size = case.rsplit(maxsplit=1)
    m, n = map(int, size.split("x"))
    generator = np.random.default_rng(0)
    G = generator.standard_normal((m, n))
    if kind.startswith("condition"):
        U, _, Vt = np.linalg.svd(G, full_matrices=False)
        G = U * np.geomspace(1, 1 / 100, m) @ Vt
    X = torch.from_numpy(G).float()
    O = target.orthogonalize(X.to(device), "polar_express_s4", 5, 0.0)
    accept.polar(actual=O, expected=reference.polar_factor(X), case=case)


@pytest.mark.clause("ORTH-3")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes, spectrum=spectra, seed=seeds)
def test_powers_of_two_change_no_bit(target: Target, device, dtype, shape, spectrum, seed):
    info = torch.finfo(dtype)
    lowest = math.frexp(info.smallest_normal * info.eps)[1]
    # Four significant bits: exact down to the subnormal numbers, where fewer are left.
    X = (matrix(shape, spectrum, seed, torch.float64) * 8).round()
    top = math.frexp(info.max)[1] - 4
    expected = target.orthogonalize(X.to(device, dtype), *JORDAN)
    for k in (lowest, lowest + 1, lowest // 2, -20, -1, 1, 9, top // 2, top - 1, top):
        scaled = (X * 2.0**k).to(dtype)
        assert torch.equal(scaled.double(), X * 2.0**k) and scaled.isfinite().all(), "the suite scaled inexactly"
        accept.same_bits(actual=target.orthogonalize(scaled.to(device), *JORDAN), expected=expected)


@pytest.mark.clause("ORTH-4", "ORTH-12")
@given(shape=shapes, spectrum=conditioned, seed=seeds, exponent=st.floats(-37, 37))
def test_scale_does_not_matter(target: Target, device, shape, spectrum, seed, exponent):
    X = matrix(shape, spectrum, seed) * 10.0**exponent
    O = target.orthogonalize(X.to(device), *JORDAN)
    accept.spectral(actual=O, X=X, schedule=reference.schedule("jordan", 5), precision=target.precision(X.dtype, device))


@pytest.mark.clause("ORTH-5")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes)
def test_zero_gives_zero(target: Target, device, dtype, shape):
    Z = torch.zeros(shape, dtype=dtype, device=device)
    accept.same_bits(actual=target.orthogonalize(Z, *JORDAN), expected=Z)


@pytest.mark.clause("ORTH-5")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes, seed=seeds)
def test_finite_gives_finite(target: Target, device, dtype, shape, seed):
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    signs = torch.sign(matrix(shape, "moderate", seed, torch.float64))
    mixed = torch.where(signs > 0, signs * info.max, signs * smallest)
    for X in (signs * info.max, signs * smallest, mixed, -mixed):
        O = target.orthogonalize(X.to(device, dtype), *JORDAN)
        accept.finite(actual=O)
        assert O.double().norm() > 0.1, "a matrix that is not zero was orthogonalized to nothing"


@pytest.mark.clause("ORTH-6")
@given(shape=shapes, spectrum=spectra, seed=seeds)
def test_is_odd(target: Target, device, shape, spectrum, seed):
    X = matrix(shape, spectrum, seed).to(device)
    accept.same_bits(actual=target.orthogonalize(-X, *JORDAN), expected=-target.orthogonalize(X, *JORDAN))


@pytest.mark.clause("ORTH-7")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes, spectrum=spectra, seed=seeds, size=st.integers(1, 9), scale=st.integers(-60, 60))
def test_neighbours_in_a_batch_do_not_matter(target: Target, device, dtype, shape, spectrum, seed, size, scale):
    batch = torch.stack([matrix(shape, spectrum, seed + i, dtype) for i in range(size)]).to(device)
    batch[: size // 2] *= 2.0 ** (scale if dtype not in (torch.float16,) else scale // 6)
    batch[size // 2 + 1 :: 3] = 0
    together = target.orthogonalize(batch, *JORDAN)
    for alone, O in zip(batch, together, strict=True):
        accept.same_bits(actual=O, expected=target.orthogonalize(alone.clone(), *JORDAN))
        accept.same_bits(actual=O, expected=target.orthogonalize(alone[None], *JORDAN)[0])


@pytest.mark.clause("ORTH-8")
@given(shape=shapes, spectrum=conditioned, seed=seeds)
def test_transposes(target: Target, device, shape, spectrum, seed):
    X = matrix(shape, spectrum, seed).to(device)
    O = target.orthogonalize(X.mT, *JORDAN).mT
    accept.spectral(actual=O, X=X, schedule=reference.schedule("jordan", 5), precision=target.precision(X.dtype, device))


@pytest.mark.clause("ORTH-9")
@pytest.mark.parametrize(("name", "steps"), NAMED)
@given(shape=shapes, seed=seeds)
def test_singular_values_come_into_the_band(target: Target, device, name, steps, shape, seed):
    l, low, high = BANDS[name, steps]
    # The smallest singular value is 1/30 and N(X) at most 64^(1/2): so all are above l, or there are too many of them.
    X = matrix(shape, "moderate", seed)
    s = torch.linalg.svdvals(X.double()).numpy()
    if s.min() < l * reference.schedule(name, steps).size(s):
        X = matrix(shape, "repeated", seed)
    O = target.orthogonalize(X.to(device), name, steps, 0.0)
    values = torch.linalg.svdvals(O.cpu().double())
    accept.band(singular_values=values, low=low, high=high, precision=target.precision(X.dtype, device))


AOL = ((4.0098, -7.0585, 2.4635), (3.4585, -5.5479, 2.5959), (2.7573, -3.2939, 1.4254), (2.7215, -3.0494, 1.3169))
YOU = reference.schedule("you", 5).coefficients


@pytest.mark.clause("ORTH-10")
@pytest.mark.parametrize(
    ("coefficients", "steps", "words"),
    [
        pytest.param((*AOL, AOL[0]), 5, ["ns_coefficients", "reverse"], id="row-rescaled coefficients under a plain norm"),
        pytest.param((*YOU, YOU[0]), 6, ["ns_coefficients", "shrink", "0.06"], id="five quintics cycled to six"),
        pytest.param("you", 6, ["you", "6", "5"], id="a named schedule at other steps"),
        pytest.param((0.9, 0.0, 0.0), 5, ["ns_coefficients", "shrink"], id="slope below one"),
        pytest.param((0.98, 0.3, 0.0), 1, ["ns_coefficients", "shrink"], id="only the slope below one"),
        pytest.param((1.5, -1.2, 0.0), 1, ["ns_coefficients", "shrink"], id="only large ones shrink"),
        pytest.param(((1.5, -0.5, 0.0),) * 2, 4, ["ns_steps", "2", "4"], id="not a quintic for every step"),
        pytest.param((3.0, 0.0, 0.0), 1, ["ns_coefficients", "overshoot"], id="beyond two"),
        pytest.param((2.0, 0.0, 0.0), 1, ["ns_coefficients", "overshoot"], id="beyond two by rounding only"),
        pytest.param((3.0, -3.0, 0.0), 1, ["ns_coefficients", "reverse"], id="below zero by rounding only"),
        pytest.param("no_such_schedule", 5, ["ns_coefficients", "no_such_schedule", "jordan"], id="unknown name"),
        pytest.param("jordan", 0, ["ns_steps", "0"], id="no steps"),
    ],
)
def test_unsafe_schedules_are_refused(validating: Target, coefficients, steps, words):
    named = parameters([torch.ones(2, 3)])
    hyper = replace(HYPER, schedule=coefficients, steps=steps)
    accept.refuses(lambda: validating.optimizer(named, hyper), ValueError, *words)


@pytest.mark.clause("ORTH-11")
@given(shape=shapes, spectrum=spectra, seed=seeds, dtype=st.sampled_from(DTYPES))
def test_argument_is_not_touched_and_strides_do_not_matter(target: Target, device, shape, spectrum, seed, dtype):
    X = matrix(shape, spectrum, seed, dtype).to(device)
    before, version = X.clone(), X._version
    O = target.orthogonalize(X, *JORDAN)
    accept.same_bits(actual=X, expected=before)
    assert X._version == version
    assert (O.shape, O.dtype) == (X.shape, X.dtype)
    transposed = X.mT.contiguous().mT
    padded = torch.nn.functional.pad(X, (3, 0, 0, 1))[: shape[0], 3:]
    for same in (transposed, padded):
        accept.same_bits(actual=target.orthogonalize(same, *JORDAN), expected=O)


@pytest.mark.clause("ORTH-12")
@pytest.mark.parametrize("name", ["jordan", "polar_express", "polar_express_s4"])
@given(shape=shapes, seed=seeds, exponent=st.floats(-2, 3))
def test_epsilon_is_a_floor_under_the_norm(target: Target, device, name, shape, seed, exponent):
    X = matrix(shape, "repeated", seed)
    eps = float(X.double().norm()) * 2.0**exponent
    O = target.orthogonalize(X.to(device), name, 5, eps)
    accept.spectral(actual=O, X=X, schedule=reference.schedule(name, 5), precision=target.precision(X.dtype, device), eps=eps)


def operations(call: Callable[[], object]) -> int:
    """How many operations the products take that PyTorch runs; a kernel's are not among them."""
    with FlopCounterMode(display=False) as counter:
        call()
    if not counter.get_total_flops():
        raise Unsupported("it takes no products that could be counted")
    return counter.get_total_flops()


@pytest.mark.clause("ORTH-13")
@pytest.mark.parametrize("batch", [(), (8,)], ids=["alone", "batch"])
@pytest.mark.parametrize("shape", [(8, 64), (24, 32), (16, 16)], ids=str)
def test_products_have_the_smaller_dimension_on_the_left(target: Target, device, shape, batch):
    X = tensor(shape, 0).to(device)
    once = operations(lambda: target.orthogonalize(X, *JORDAN))
    for same in (X, X.mT):
        found = operations(lambda same=same: target.orthogonalize(same.expand(*batch, *same.shape), *JORDAN))
        assert accept.equal(found, batch[0] * once if batch else once)


@pytest.mark.clause("ORTH-13")
@pytest.mark.parametrize("shape", [(8, 24), (24, 8)], ids=str)
@pytest.mark.parametrize("stacked", [True, False])
def test_experts_take_as_many_operations_as_apart(target: Target, device, shape, stacked):
    counts = []
    for experts in (1, 4):
        whole = (experts, *shape) if stacked else (experts * shape[0], shape[1])
        named = parameters([tensor(whole, 0)], device)
        optimizer = target.optimizer(named, replace(HYPER, layout={"blocks": experts}))
        counts.append(
            operations(lambda named=named, optimizer=optimizer: take(optimizer, named, [torch.ones_like(named[0][1])]))
        )
    assert accept.equal(counts[1], 4 * counts[0])
