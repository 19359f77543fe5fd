# SPDX-License-Identifier: Apache-2.0
"""The predicates themselves: zeros, noise and a scale of 1.3 must not pass anywhere."""

import pytest
import torch

import reference
from conformance import accept
from conformance.strategies import matrix, tensor

pytestmark = pytest.mark.suite
PRECISIONS = [torch.float64, torch.float32, torch.bfloat16]
wrongs = pytest.mark.parametrize(
    "wrong",
    [
        lambda right: torch.zeros_like(right),
        lambda right: tensor(tuple(right.shape), 5, right.dtype) * right.std(),
        lambda right: 1.3 * right,
        lambda right: right / 1.3,
        lambda right: -right,
        lambda right: right.flip(0),
        lambda right: torch.where(torch.arange(right.numel()).view(right.shape) == 3, torch.nan, right),
    ],
    ids=["zeros", "noise", "1.3 times", "1.3 times less", "negative", "rows reversed", "one nan"],
)


def rejects(predicate, **arguments) -> None:
    with pytest.raises(AssertionError):
        predicate(**arguments)


@wrongs
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("spectrum", ["moderate", "log_uniform", "deficient", "spiked"])
def test_spectral(wrong, precision, spectrum):
    X = matrix((16, 24), spectrum, 0)
    for steps in reference.LOWER:
        schedule = reference.schedule("polar_express_s4", steps)
        right = reference.orthogonalize(X, schedule)
        accept.spectral(actual=right.to(precision), X=X, schedule=schedule, precision=precision)
        rejects(accept.spectral, actual=wrong(right), X=X, schedule=schedule, precision=precision)


@wrongs
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_step(wrong, precision):
    W, O = tensor((16, 24), 0), reference.polar_factor(tensor((16, 24), 1)).float()
    right = W - 0.02 * O
    accept.step(before=W, actual=right, expected=right, precision=precision)
    rejects(accept.step, before=W, actual=W - 0.02 * wrong(O), expected=right, precision=precision)


@wrongs
def test_close(wrong):
    for dtype in PRECISIONS:
        right = tensor((8, 8), 0, dtype)
        accept.close(actual=right, expected=right.double(), dtype=dtype)
        rejects(accept.close, actual=wrong(right), expected=right.double(), dtype=dtype)


@wrongs
def test_polar(wrong):
    right = reference.polar_factor(tensor((16, 24), 0))
    for case in accept.POLAR:
        accept.polar(actual=right, expected=right, case=case)
        rejects(accept.polar, actual=wrong(right), expected=right, case=case)


@pytest.mark.parametrize("values", [[0.9, 1.3], [0.0, 1.0], [0.7, 1.0], [float("nan"), 1.0]], ids=str)
def test_band(values):
    for precision in PRECISIONS[:2]:
        accept.band(singular_values=torch.tensor([0.97, 1.02]), low=0.96, high=1.03, precision=precision)
        rejects(accept.band, singular_values=torch.tensor(values), low=0.96, high=1.03, precision=precision)


def test_rounded():
    W, way = tensor((9, 9), 0), 0.01 * tensor((9, 9), 1)
    for dtype in (torch.bfloat16, torch.float16):
        before = W.to(dtype)
        right = before.double() * 0.99 - way
        accept.rounded(before=before, actual=right.float().to(dtype), expected=right)
        twice = (before * 0.99).to(dtype) - way.to(dtype)
        for wrong in (twice, before, (before * 0.99).to(dtype)):
            rejects(accept.rounded, before=before, actual=wrong, expected=right)


def test_same_bits():
    X = torch.tensor([1.0, -0.0, float("nan")])
    accept.same_bits(actual=X.clone(), expected=X)
    accept.same_bits(actual=X.abs(), expected=X)
    for other in (X.nextafter(torch.tensor(9.0)), X.double(), X[:2], X.nan_to_num()):
        rejects(accept.same_bits, actual=other, expected=X)


def test_dtype_and_finite():
    X = torch.zeros(2, 3)
    accept.dtype(actual=X, at_least=torch.float32, shape=(2, 3))
    accept.dtype(actual=X.double(), at_least=torch.float32, shape=(2, 3))
    accept.finite(actual=X)
    rejects(accept.dtype, actual=X.bfloat16(), at_least=torch.float32, shape=(2, 3))
    rejects(accept.dtype, actual=X, at_least=torch.float64, shape=(2, 3))
    rejects(accept.dtype, actual=X, at_least=torch.float32, shape=(3, 2))
    for bad in (float("nan"), float("inf")):
        rejects(accept.finite, actual=X + bad)


def test_routes():
    accept.routes(actual={"a": 1}, expected={"a": 1})
    for other in ({"a": 2}, {}, {"a": 1, "b": 1}):
        rejects(accept.routes, actual=other, expected={"a": 1})


def test_refuses():
    state = [torch.zeros(2)]

    def refuse(message="lr is -1", error=ValueError, change=False):
        if change:
            state[0] = state[0] + 1
        raise error(message)

    accept.refuses(refuse, ValueError, "lr", -1, unchanged=lambda: list(state))
    with pytest.raises(AssertionError, match="lacks"):
        accept.refuses(refuse, ValueError, "momentum")
    with pytest.raises(AssertionError, match="changed"):
        accept.refuses(lambda: refuse(change=True), ValueError, "lr", unchanged=lambda: list(state))
    with pytest.raises(pytest.fail.Exception):
        accept.refuses(lambda: None, ValueError)
    with pytest.raises(TypeError):
        accept.refuses(lambda: refuse(error=TypeError), ValueError)
