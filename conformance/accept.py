# SPDX-License-Identifier: Apache-2.0
"""What SPEC.md accepts. Every tolerance of the suite is here, derived from the dtype that limits the arithmetic.

Each predicate raises AssertionError with the numbers; arguments are keywords, so that none is taken for another.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reference

# Roundings that add up in one orthogonalization: five steps of three products, each with errors of a few units. Measured:
# at most 43 (examples: plain products in float64 and float32; torch's loop in bfloat16, 3).
ROUNDINGS = 64
# The steepest named schedule multiplies what is next to zero by about 1000, and rounding errors in a step's U with it.
SLOPE = 1000
# However much rounding is amplified, a result further off than this is another result.
COARSE = 0.2
# ORTH-2: largest relative distance to the polar factor.
POLAR = {"gauss 1024x1024": 0.08, "gauss 768x2048": 0.04, "condition 100, 1024x1024": 0.04, "condition 100, 768x2048": 0.04}


def unit(dtype: torch.dtype) -> float:
    """The distance from 1 to the next number."""
    return torch.finfo(dtype).eps


def distance(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`, in float64; NaN counts as infinitely far."""
    __tracebackhide__ = True
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    size = torch.linalg.vector_norm(expected).item()
    error = torch.linalg.vector_norm(actual - expected).item()
    relative = error / size if size else (0.0 if error == 0 else float("inf"))
    return relative if relative == relative else float("inf")


def same_bits(*, actual: Tensor, expected: Tensor) -> None:
    """The same dtype, shape and bits; a zero may have either sign."""
    __tracebackhide__ = True
    assert actual.dtype == expected.dtype, f"{actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    a, b = actual.detach().cpu(), expected.detach().cpu()
    differ = ~((a == b) | (a.isnan() & b.isnan()))
    assert not differ.any(), f"{int(differ.sum())} of {a.numel()} entries differ, relative distance {distance(a, b):.2e}"


def close(*, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to a few roundings in `dtype`."""
    __tracebackhide__ = True
    error, bound = distance(actual, expected), 8 * unit(dtype)
    assert error <= bound, f"relative distance {error:.2e}, accepted {bound:.2e}"


def spectral(*, actual: Tensor, X: Tensor, schedule: reference.Schedule, precision: torch.dtype, eps: float = 0.0) -> None:
    """The spectral map of X, or of X stored in `precision`, up to rounding, amplified as the map amplifies perturbations.

    The second is for narrow formats: next to zero a map may be so steep that storing X moves the result by more than COARSE.
    """
    __tracebackhide__ = True
    error = min(distance(actual, reference.orthogonalize(T, schedule, eps)) for T in (X, stored(X, precision)))
    # The result may be stored in a narrower dtype than it was computed in.
    bound = min(ROUNDINGS * condition(X, schedule) * unit(precision), COARSE) + unit(actual.dtype)
    assert error <= bound, f"relative distance {error:.2e}, accepted {bound:.2e}"


def stored(X: Tensor, precision: torch.dtype) -> Tensor:
    """X rounded to `precision`, as if by an exact power of two its largest entry came near the end of the range."""
    X = X.detach().cpu().double()
    if not X.any():
        return X
    shift = int(torch.frexp(torch.tensor(torch.finfo(precision).max, dtype=torch.float64)).exponent) - 2
    exponent = torch.frexp(X.abs().max()).exponent - shift
    return torch.ldexp(torch.ldexp(X, -exponent).to(precision).double(), exponent)


def condition(X: Tensor, schedule: reference.Schedule) -> float:
    """How much larger, relatively, a perturbation of X can be in its image.

    The derivative of a spectral map has as its norm the largest divided difference of p over the singular values;
    p'(x) and p(x) / x on their interval bound it (Daleckii and Krein).
    """
    s = torch.linalg.svdvals(X.detach().cpu().double() / max(X.abs().max().item(), 1e-300)).flatten().numpy()
    if not s.any():
        return 1.0
    x = s / (schedule.margin * schedule.size(s))
    y = schedule(x)
    grid = np.linspace(min(x.min(), 0.999 * x.max()), x.max(), 2001)
    slopes = np.abs(np.gradient(schedule(grid), grid))
    ratios = schedule(np.maximum(grid, 1e-6)) / np.maximum(grid, 1e-6)
    return float(max(slopes.max(), ratios.max()) * np.linalg.norm(x) / np.linalg.norm(y))


def polar(*, actual: Tensor, expected: Tensor, case: str) -> None:
    """Within ORTH-2's distance of the polar factor."""
    __tracebackhide__ = True
    error = distance(actual, expected)
    assert error <= POLAR[case], f"{case}: relative distance to the polar factor {error:.4f}, accepted {POLAR[case]}"


def band(*, singular_values: Tensor, low: float, high: float, precision: torch.dtype) -> None:
    """All singular values within [low, high], up to rounding."""
    __tracebackhide__ = True
    slack = ROUNDINGS * unit(precision)
    smallest, largest = singular_values.min().item(), singular_values.max().item()
    assert smallest >= low - slack and largest <= high + slack, (
        f"singular values in [{smallest:.4f}, {largest:.4f}], accepted [{low:.4f}, {high:.4f}] +- {slack:.1e}"
    )


def finite(*, actual: Tensor) -> None:
    """Neither NaN nor infinity."""
    __tracebackhide__ = True
    bad = int((~actual.isfinite()).sum())
    assert bad == 0, f"{bad} of {actual.numel()} entries are not finite"


def step(*, before: Tensor, actual: Tensor, expected: Tensor, precision: torch.dtype) -> None:
    """A weight after steps: off by less than its roundings, plus the orthogonalization's on the way it went."""
    __tracebackhide__ = True
    before, after, expected = (T.detach().cpu().double() for T in (before, actual, expected))
    error = torch.linalg.vector_norm(after - expected).item()
    way = torch.linalg.vector_norm(expected - before).item()
    size = torch.linalg.vector_norm(expected).item()
    bound = min(8 * SLOPE * unit(precision), COARSE) * way + 4 * unit(actual.dtype) * size
    assert error <= bound, f"off by {error:.2e} after moving {way:.2e}, accepted {bound:.2e}"


def rounded(*, before: Tensor, actual: Tensor, expected: Tensor, precision: torch.dtype = torch.float32) -> None:
    """Every entry of a 16-bit weight within half a unit in its last place, plus what `precision` leaves open on the way."""
    __tracebackhide__ = True
    before, after, expected = (T.detach().cpu().double() for T in (before, actual, expected))
    ulp = unit(actual.dtype) * 2.0 ** (torch.frexp(expected).exponent - 1).clamp(
        min=-14 if actual.dtype == torch.float16 else -126
    )
    open_ = min(8 * SLOPE * unit(precision), ROUNDINGS * unit(torch.float16)) * (expected - before).abs().max()
    worst = ((after - expected).abs() - open_).div(ulp).max().item()
    assert worst <= 0.5, f"an entry is {worst:.2f} units in the last place from its value, accepted 0.5"


def dtype(*, actual: Tensor, at_least: torch.dtype, shape: torch.Size | tuple[int, ...]) -> None:
    """This shape, and a dtype that holds every number of `at_least`."""
    __tracebackhide__ = True
    wide_enough = torch.promote_types(actual.dtype, at_least) == actual.dtype
    assert wide_enough and tuple(actual.shape) == tuple(shape), (
        f"{actual.dtype} {tuple(actual.shape)}, expected at least {at_least} {tuple(shape)}"
    )


def routes(*, actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """The same parameters, each with the same route."""
    __tracebackhide__ = True
    wrong = {k: (actual.get(k), expected.get(k)) for k in actual.keys() | expected.keys() if actual.get(k) != expected.get(k)}
    assert not wrong, f"parameter: (found, expected) {wrong}"


def refuses(call: Callable[[], Any], error: type[Exception], *words: Any, unchanged: Callable[[], Any] = lambda: None) -> None:
    """`call` raises `error`, its message holds every word, and what `unchanged` returns is the same after as before."""
    __tracebackhide__ = True
    before = unchanged()
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert str(word) in str(caught.value), f"the message lacks {word!r}: {caught.value}"
    after = unchanged()
    assert equal(before, after), f"something changed although it was refused: {before} -> {after}"


def equal(a: Any, b: Any) -> bool:
    """Whether nested containers hold the same tensors, to the bit, and the same values."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b
