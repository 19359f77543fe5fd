# SPDX-License-Identifier: Apache-2.0
"""Schedules: odd polynomials that push singular values towards one.   [SPEC: ORTH]

A schedule is a norm, a margin and a list of odd quintics; `p` is their composition, first to last. What it does
to a matrix is in polar.py; here it is a function of numbers, and its images of intervals are exact.
"""

from dataclasses import dataclass
from functools import cache
from math import prod

import numpy as np

# One triple (a, b, c) for every step, each the quintic a x + b x^3 + c x^5. Sources as in SPEC's table.
POLAR_EXPRESS = (  # divided by its safety factor as published, like ours below
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

# polar_express_s4 by number of steps: the `l` of SPEC's table, the smallest s / N(X) it is made for.
LOWER = {3: 1.5e-2, 4: 5e-3, 5: 2e-3, 6: 7e-4}
SAFETY = 1.02  # every step but the last is evaluated at x / SAFETY, so that rounding does not push x above u


@dataclass(frozen=True)
class Schedule:
    """A norm N ("schatten4" or "frobenius"), a margin and quintics (a, b, c).   [SPEC: ORTH-1]"""

    coefficients: tuple[tuple[float, float, float], ...]
    norm: str = "frobenius"
    margin: float = 1.0

    def __call__(self, x):
        """p(x), entry by entry; x is s / (margin * N(X)), without unit."""
        for quintic in self.coefficients:
            x = _value(quintic, x)
        return x

    def size(self, s):
        """N(X) of a matrix with the singular values s, in their unit."""
        power = {"schatten4": 4, "frobenius": 2}[self.norm]
        return np.sum(s**power) ** (1 / power)

    def image(self, low, high):
        """The interval (min, max) of p over [low, high].

        The image of an interval under a continuous function is an interval, so the images of the steps compose.
        A schedule that diverges gives infinities or NaN.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            for quintic in self.coefficients:
                low, high = _image(quintic, low, high)
        return float(low), float(high)

    def band(self, lower):
        """Where singular values from lower * N(X) to N(X) go, margin included: (min, max).   [SPEC: ORTH-9]"""
        return self.image(lower / self.margin, 1 / self.margin)

    def faults(self):
        """What ORTH-10 has against this schedule, in words with numbers; nothing if it is sound.   [SPEC: ORTH-10]"""
        bottom, top = self.image(0.0, 1 + 2**-10)
        upper_half = self.image(0.5, 1.0)[0]
        slope = prod(a for a, _, _ in self.coefficients)
        checks = (  # written so that a NaN fails
            (bottom >= 0, f"reverses a direction: p falls to {bottom:.6g} < 0 on [0, 1 + 2^-10]"),
            (top <= 2, f"overshoots: p rises to {top:.6g} > 2 on [0, 1 + 2^-10]"),
            (upper_half >= 0.5, f"shrinks a direction: p falls to {upper_half:.6g} < 1/2 on [1/2, 1]"),
            (slope >= 1, f"shrinks a direction: the slope of p at 0 is {slope:.6g} < 1"),
        )
        return [fault for sound, fault in checks if not sound]


def _value(quintic, x):
    a, b, c = quintic
    return a * x + b * x**3 + c * x**5


def _image(quintic, low, high):
    """Extremes over [low, high] are at its ends or where the slope is 0.

    A root that rounding made slightly complex or displaced is still a point of the interval, so it does no harm.
    """
    a, b, c = quintic
    flat = np.roots([5 * c, 0, 3 * b, 0, a]).real
    values = _value(quintic, np.array([low, high, *(x for x in flat if low < x < high)]))
    return values.min(), values.max()


def minimax(l, u):
    """The odd quintic closest to 1 on [l, u], 0 < l < u, and its largest error E: ((a, b, c), E).

    Odd quintics form a three-dimensional Haar space on x > 0, so the best one is the one whose error has the same
    size and alternating sign at four points: the ends l and u and the two points q < r between them where the
    slope is 0 (Chebyshev). Remez's exchange: solve for a, b, c, E at four points, move q and r, repeat. E grows
    until it is the answer.
    """
    q, r = l + (u - l) / 4, u - (u - l) / 4
    E, before = 0.0, -np.inf
    while before < E:
        rows = [[x, x**3, x**5, sign] for x, sign in ((l, 1), (q, -1), (r, 1), (u, -1))]
        before = E
        a, b, c, E = np.linalg.solve(rows, np.ones(4))
        q, r = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a])))
    return (float(a), float(b), float(c)), float(E)


@cache
def polar_express_s4(l, steps):
    """Greedy minimax coefficients for singular values in [l, 1] times N(X), to six digits.   [SPEC: ORTH, table]

    Each step is the best quintic for the interval that the steps before it leave; then, but for the last, the safety
    factor is divided in. Source: Amsel et al., arXiv:2505.16932, where greedy is shown to be optimal; there the
    interval is the one before the division, so that the last step is centred elsewhere than the values it meets.
    """
    quintics, interval = [], (l, 1.0)
    for step in range(steps):
        (a, b, c), _ = minimax(*interval)
        safety = SAFETY if step < steps - 1 else 1.0
        quintics.append(tuple(float(f"{y:.6g}") for y in (a / safety, b / safety**3, c / safety**5)))
        interval = Schedule(tuple(quintics)).image(l, 1.0)
    return tuple(quintics)


def schedule(coefficients, steps):
    """The schedule that `ns_coefficients` and `ns_steps` name.   [SPEC: ORTH, table; ORTH-10]

    Args: coefficients: a name of SPEC's table, a triple (a, b, c) applied `steps` times, or a list of `steps` triples.
    Raises: ValueError: there is no such schedule, or ORTH-10 refuses it.
    """
    match coefficients:
        case "polar_express_s4" if steps in LOWER:
            return Schedule(polar_express_s4(LOWER[steps], steps), "schatten4")
        case "polar_express" if steps == 5:
            return Schedule(POLAR_EXPRESS, margin=1.02)
        case "you" if steps == 5:
            return Schedule(YOU)
        case "jordan" if 1 <= steps <= 99:
            return Schedule((JORDAN,) * steps)
        case str():
            raise ValueError(f"no schedule {coefficients!r} of {steps} steps")
    if np.ndim(coefficients) == 1:
        coefficients = [coefficients] * steps
    if np.shape(coefficients) != (steps, 3) or steps < 1:
        raise ValueError(f"expected {steps} triples (a, b, c), got an array of shape {np.shape(coefficients)}")
    result = Schedule(tuple((float(a), float(b), float(c)) for a, b, c in coefficients))
    if result.faults():
        raise ValueError("; ".join(result.faults()))
    return result
