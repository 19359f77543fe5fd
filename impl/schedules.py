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


# Optimal by minimax (Amsel et al. 2025, arXiv:2505.16932) for singular values down to l = 2e-2, 5e-3, 2e-3, 1e-3 of the
# Schatten-4 norm; all but the last divided by 1.02, so that rounding never carries a value past the interval.
# reference/schedules.py derives them.
POLAR_EXPRESS_S4: dict[int, tuple[Quintic, ...]] = {
    3: (
        (7.55977, -20.8383, 14.717),
        (3.15223, -2.2721, 0.454043),
        (2.21831, -1.59399, 0.410748),
    ),
    4: (
        (8.13598, -23.0214, 16.3849),
        (3.83845, -2.75265, 0.506506),
        (3.11236, -2.24314, 0.450897),
        (2.18946, -1.56722, 0.407887),
    ),
    5: (
        (8.26156, -23.4979, 16.7492),
        (4.03103, -2.88269, 0.520753),
        (3.64173, -2.61789, 0.491757),
        (2.7274, -1.95525, 0.419807),
        (1.99315, -1.37581, 0.387787),
    ),
    6: (
        (8.30424, -23.6599, 16.8731),
        (4.10082, -2.9294, 0.525873),
        (3.88417, -2.78368, 0.509905),
        (3.22214, -2.32256, 0.459529),
        (2.22917, -1.5498, 0.376957),
        (1.88872, -1.26516, 0.376519),
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


@lru_cache
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
    if ns_steps >= 100:
        raise ValueError(
            f"Number of steps must be less than 100 for computational efficiency, found ns_steps={ns_steps}"
        )
    if isinstance(ns_coefficients, str):
        return _published(ns_coefficients, ns_steps)
    if len(ns_coefficients) == 3 and not isinstance(ns_coefficients[0], Sequence):
        quintics = (ns_coefficients,) * ns_steps
    else:
        quintics = tuple(ns_coefficients)
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
