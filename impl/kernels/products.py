# SPDX-License-Identifier: Apache-2.0
"""The products that an iteration is made of, by the fastest kernel for the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from impl.kernels import general as portable
from impl.kernels import symmetric
from impl.kernels.launch import launch, processors, tiles

try:
    from impl.kernels import hopper
except ImportError:  # Gluon, in which it is written, is experimental: it may move
    hopper = None  # type: ignore[assignment]

SIDE, DEEP = 128, 64  # of hopper.py's tiles


class Products(NamedTuple):
    """What makes a launch of each product; for shapes and arguments see symmetric.py and general.py."""

    square: Callable[..., Callable[[], None]]
    product: Callable[..., Callable[[], None]]
    general: Callable[..., Callable[[], None]]


def start(FORM: str, A: Tensor, D: Tensor, alphas: Tensor, total: int, **arguments: Any) -> Callable[[], None]:
    """A launch for `total` tiles; `arguments` are those that have another value than most forms need."""
    nothing = dict(c=None, betas=alphas, shares=alphas, largest=alphas, alpha=1.0, beta=0.0, gamma=0.0, n=0)
    forms = dict.fromkeys(("QUADRATIC", "SQUARES", "TRACE", "LARGEST", "TRANSPOSED"), False)
    mine = dict(a=hopper.describe(A, SIDE, DEEP), alphas=alphas, total=total, m=A.shape[1], depth=A.shape[2], FORM=FORM)
    return launch(
        hopper.hopper_kernel, min(total, processors(D.device)), {**nothing, **forms, **mine, **arguments}, num_warps=4
    )


def triangles(D: Tensor) -> int:
    """How many tiles are on or above the diagonals."""
    return len(D) * (strips := D.shape[1] // SIDE) * (strips + 1) // 2


def square(
    A: Tensor,
    D: Tensor,
    alphas: Tensor,
    alpha: float = 1.0,
    quadratic: tuple[Tensor, float, float] | None = None,
    squares: Tensor | None = None,
    trace: Tensor | None = None,
) -> Callable[[], None]:
    """On Hopper."""
    betas, beta, gamma = quadratic or (alphas, 0.0, 0.0)
    shares = next((T for T in (squares, trace) if T is not None), alphas)
    which = dict(QUADRATIC=quadratic is not None, SQUARES=squares is not None, TRACE=trace is not None)
    numbers = dict(betas=betas, shares=shares, alpha=alpha, beta=beta, gamma=gamma)
    operands = dict(
        b=hopper.describe(A, SIDE, DEEP),
        c=hopper.describe(A, SIDE, SIDE) if quadratic else None,
        d=hopper.describe(D, SIDE, SIDE),
    )
    return start("square", A, D, alphas, triangles(D), **operands, **numbers, **which)


def product(A: Tensor, B: Tensor, D: Tensor, alphas: Tensor) -> Callable[[], None]:
    """On Hopper."""
    return start("product", A, D, alphas, triangles(D), b=hopper.describe(B, SIDE, DEEP), d=hopper.describe(D, SIDE, SIDE))


def general(A: Tensor, X: Tensor, D: Tensor, alphas: Tensor, largest: Tensor | None = None) -> Callable[[], None]:
    """On Hopper."""
    batch, m, n = X.shape
    transposed = (batch, n, m) == D.shape != X.shape
    d = hopper.describe(D, *((SIDE // 2, SIDE) if transposed else (SIDE, SIDE // 2)))
    which = dict(LARGEST=largest is not None, TRANSPOSED=transposed)
    biggest = alphas if largest is None else largest
    total = batch * (m // SIDE) * tiles(n, SIDE)
    return start("general", A, D, alphas, total, b=hopper.describe(X, DEEP, SIDE), d=d, n=n, largest=biggest, **which)


PORTABLE = Products(symmetric.square, symmetric.product, portable.general)
HOPPER = Products(square, product, general)


def products(device: torch.device) -> Products:
    """The fastest that run on a device."""
    wanted = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return HOPPER if wanted and hopper is not None else PORTABLE
