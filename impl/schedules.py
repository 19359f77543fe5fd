# SPDX-License-Identifier: Apache-2.0
"""Coefficient schedules: which odd quintics are composed, under which norm, and whether that is safe.

A schedule maps every normalised singular value x in [0, 1] to p(x), p being the composition of quintics
a x + b x^3 + c x^5. The published ones stand here by name; SPEC.md, ORTH, lists their bands and sources.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

Quintic = tuple[float, float, float]
Coefficients = str | Quintic | Sequence[Quintic]


class Schedule(NamedTuple):
    """Quintics in order; singular values are divided by `margin * norm` before the first."""

    coefficients: tuple[Quintic, ...]
    norm: str = "frobenius"
    margin: float = 1.0


# Minimax quintics (Amsel et al. 2025, arXiv:2505.16932), each for the interval that its predecessors leave, for singular
# values down to l = 1.5e-2, 5e-3, 2e-3, 7e-4 of the Schatten-4 norm. All but the last are divided by 1.02, so that
# rounding carries no value past an interval. Derived in reference/schedules.py; SPEC.md, ORTH, tells how l was chosen.
POLAR_EXPRESS_S4: dict[int, tuple[Quintic, ...]] = {
    3: (
        (7.7428, -21.5311, 15.2461),
        (3.35618, -2.42388, 0.47238),
        (2.41851, -1.78502, 0.437436),
    ),
    4: (
        (8.13598, -23.0214, 16.3849),
        (3.84597, -2.76006, 0.507983),
        (3.14505, -2.27395, 0.456636),
        (2.23105, -1.61865, 0.420671),
    ),
    5: (
        (8.26156, -23.4979, 16.7492),
        (4.03438, -2.88592, 0.521381),
        (3.66165, -2.63521, 0.494722),
        (2.77856, -2.00385, 0.428625),
        (2.02838, -1.42454, 0.401944),
    ),
    6: (
        (8.31713, -23.7088, 16.9105),
        (4.12358, -2.94494, 0.527674),
        (3.97413, -2.84585, 0.51711),
        (3.47747, -2.50852, 0.481313),
        (2.50903, -1.7943, 0.407347),
        (1.9462, -1.33936, 0.393859),
    ),
}

POLAR_EXPRESS = (
    (8.15655, -22.48329, 15.87877),
    (4.04293, -2.80892, 0.50002),
    (3.89167, -2.77248, 0.50606),
    (3.28575, -2.36813, 0.46449),
    (2.34654, -1.70978, 0.42324),
)
YOU = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
JORDAN = (3.4445, -4.7750, 2.0315)

NAMES = ("polar_express_s4", "polar_express", "you", "jordan")


def image(coefficients: Sequence[Quintic], low: float, high: float) -> tuple[float, float]:
    """The exact interval onto which the composition maps [low, high].

    A continuous function maps an interval onto an interval, whose ends are values at the ends or at a critical
    point; so going quintic by quintic loses nothing.
    """
    for a, b, c in coefficients:
        ends = [low, high]
        # p'(x) = a + 3 b x^2 + 5 c x^4, a quadratic in x^2.
        root = 9 * b * b - 20 * a * c
        if c and root >= 0:
            squares = [(-3 * b + sign * math.sqrt(root)) / (10 * c) for sign in (1, -1)]
        else:
            squares = [-a / (3 * b)] if b and not c else []
        for x in (sign * math.sqrt(s) for s in squares if s > 0 for sign in (1, -1)):
            if low < x < high:
                ends.append(x)
        values = [x * (a + x * x * (b + x * x * c)) for x in ends]
        low, high = min(values), max(values)
    return low, high


def schedule(ns_coefficients: Coefficients, ns_steps: int) -> Schedule:
    """Build the schedule that the options name, or refuse it.   [SPEC: ORTH-10]

    Args:
        ns_coefficients: a name from `NAMES`; one quintic (a, b, c), applied `ns_steps` times; or a tuple of `ns_steps`
            quintics. All but "polar_express_s4" normalise by the Frobenius norm.
        ns_steps: number of quintics, at least 1 and less than 100.

    Raises:
        ValueError: no such name, a number of steps that the schedule does not have, or a composition that can
            reverse a direction, shrink one or overshoot; the message holds the numbers.
    """
    if not isinstance(ns_steps, int) or isinstance(ns_steps, bool) or ns_steps < 1:
        raise ValueError(f"ns_steps should be an integer >= 1 but is: {ns_steps!r}")
    if isinstance(ns_coefficients, str):
        return _build(ns_coefficients, ns_steps)
    if not isinstance(ns_coefficients, Sequence) or not ns_coefficients:
        raise ValueError(f"ns_coefficients should be a name, a quintic (a, b, c) or quintics, but is: {ns_coefficients!r}")
    # A saved optimizer may hold lists; the cache wants tuples.
    return _build(tuple(tuple(q) if isinstance(q, Sequence) else q for q in ns_coefficients), ns_steps)


@lru_cache
def _build(ns_coefficients: str | tuple, ns_steps: int) -> Schedule:
    if ns_steps >= 100:
        raise ValueError(f"Number of steps must be less than 100 for computational efficiency, found ns_steps={ns_steps}")
    if isinstance(ns_coefficients, str):
        return _published(ns_coefficients, ns_steps)
    several = isinstance(ns_coefficients[0], Sequence)
    quintics = ns_coefficients if several else (ns_coefficients,) * ns_steps
    for quintic in quintics:
        if not isinstance(quintic, Sequence) or len(quintic) != 3:
            raise ValueError(f"Coefficients must be a tuple of exactly 3 values, found {quintic!r}")
        if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in quintic):
            raise ValueError(f"Coefficients must be finite numbers, found {quintic!r}")
    if len(quintics) != ns_steps:
        raise ValueError(
            f"ns_coefficients has {len(quintics)} quintics but ns_steps is {ns_steps}; say ns_steps={len(quintics)}"
        )
    _check(quintics)
    return Schedule(quintics)


def _published(name: str, steps: int) -> Schedule:
    offered = {
        "polar_express_s4": POLAR_EXPRESS_S4,
        "polar_express": {5: POLAR_EXPRESS},
        "you": {5: YOU},
        "jordan": {steps: (JORDAN,) * steps},
    }.get(name)
    if offered is None:
        raise ValueError(f"ns_coefficients should be one of {', '.join(NAMES)}, or quintics, but is: {name!r}")
    if steps not in offered:
        choices = ", ".join(map(str, sorted(offered)))
        raise ValueError(f"schedule {name!r} is defined for ns_steps in ({choices}) but ns_steps is {steps}")
    if name == "polar_express_s4":
        return Schedule(offered[steps], norm="schatten4")
    return Schedule(offered[steps], margin=1.02 if name == "polar_express" else 1.0)


def _check(quintics: tuple[Quintic, ...]) -> None:
    """Refuse a composition that could undo training.   [SPEC: ORTH-10]

    Emerging-Optimizers' "aol" at 5 steps ascends (its top direction comes out at -0.998) and its "quintic" at 6
    steps shrinks every update to 0.06..0.17, both without a word.
    """
    low, high = image(quintics, 0.0, 1.0 + 2.0**-10)
    floor, _ = image(quintics, 0.5, 1.0)
    slope = math.prod(a for a, _, _ in quintics)
    wrong = (
        (low < 0, "reverses directions"),
        (not high <= 2, "overshoots"),
        (not floor >= 0.5, "shrinks large singular values"),
        (not slope >= 1, "shrinks small singular values"),
    )
    faults = [fault for is_wrong, fault in wrong if is_wrong]
    if faults:
        raise ValueError(
            f"ns_coefficients of {len(quintics)} steps {' and '.join(faults)}: singular values in [0, 1] are mapped to "
            f"[{low:.3g}, {high:.3g}], those in [0.5, 1] to no less than {floor:.3g}, and the slope at 0 is {slope:.3g}. "
            "Use a number of steps that the coefficients were made for, or a named schedule: " + ", ".join(NAMES)
        )
