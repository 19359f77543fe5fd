# SPDX-License-Identifier: Apache-2.0
"""The products that an iteration is made of, by the fastest kernel for the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from impl.kernels import general as portable
from impl.kernels import symmetric
from impl.kernels.launch import launch, processors, tiles, triangle

try:
    from impl.kernels import hopper
except ImportError:  # Gluon, in which it is written, is experimental: it may move
    hopper = None  # type: ignore[assignment]


class Products(NamedTuple):
    """What makes a launch of each product; for shapes and arguments see symmetric.py and general.py."""

    square: Callable[..., Callable[[], None]]
    product: Callable[..., Callable[[], None]]
    general: Callable[..., Callable[[], None]]


def start(FORM: str, A: Tensor, D: Tensor, total: int, **arguments: Any) -> Callable[[], None]:
    """A launch for `total` tiles; `arguments` are those that have another value than most forms need."""
    unused = arguments["alphas"]
    nothing = dict(c=None, betas=unused, shares=unused, largest=unused, alpha=1.0, beta=0.0, gamma=0.0, n=0)
    forms = dict.fromkeys(("QUADRATIC", "SQUARES", "TRACE", "LARGEST", "TRANSPOSED"), False)
    a = hopper.describe(A, hopper.SIDE, hopper.DEEP)
    every = {**nothing, **forms, **arguments, "a": a, "total": total, "m": A.shape[1], "depth": A.shape[2], "FORM": FORM}
    return launch(hopper.hopper_kernel, min(total, processors(D.device)), every, num_warps=4)


def symmetrical(FORM: str, A: Tensor, B: Tensor, D: Tensor, **arguments: Any) -> Callable[[], None]:
    """A launch of a symmetric product."""
    b, d = hopper.describe(B, hopper.SIDE, hopper.DEEP), hopper.describe(D, hopper.SIDE, hopper.SIDE)
    return start(FORM, A, D, len(D) * triangle(D.shape[1], hopper.SIDE), b=b, d=d, **arguments)


def square(A: Tensor, D: Tensor, alphas: Tensor, alpha: float = 1.0, **others: Any) -> Callable[[], None]:
    """On Hopper."""
    told = symmetric.options(alphas, alpha, **others)
    c = hopper.describe(A, hopper.SIDE, hopper.SIDE) if told["QUADRATIC"] else None
    return symmetrical("square", A, A, D, c=c, **told)


def product(A: Tensor, B: Tensor, D: Tensor, alphas: Tensor) -> Callable[[], None]:
    """On Hopper."""
    return symmetrical("product", A, B, D, alphas=alphas)


def general(A: Tensor, X: Tensor, D: Tensor, alphas: Tensor, largest: Tensor | None = None) -> Callable[[], None]:
    """On Hopper."""
    side, (batch, m, n) = hopper.SIDE, X.shape
    transposed = (batch, n, m) == D.shape != X.shape
    d = hopper.describe(D, *((side // 2, side) if transposed else (side, side // 2)))
    b = hopper.describe(X, hopper.DEEP, side)
    which = dict(LARGEST=largest is not None, TRANSPOSED=transposed)
    biggest = alphas if largest is None else largest
    total = batch * (m // side) * tiles(n, side)
    return start("general", A, D, total, b=b, d=d, n=n, alphas=alphas, largest=biggest, **which)


PORTABLE = Products(symmetric.square, symmetric.product, portable.general)
HOPPER = Products(square, product, general)


def products(device: torch.device) -> Products:
    """The fastest that run on a device."""
    wanted = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return HOPPER if wanted and hopper is not None else PORTABLE
