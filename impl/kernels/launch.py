# SPDX-License-Identifier: Apache-2.0
"""Launching one kernel with the same arguments many times, and describing matrices to the tensor memory accelerator."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def launch(kernel: Any, programs: int, arguments: dict[str, Any], **options: Any) -> Callable[[], None]:
    """A function that launches `kernel` on the current stream of the current device; it takes the arguments that it has.

    Binding arguments anew takes Triton as long as a small product takes the GPU; so the first call compiles, and later
    ones hand the same arguments to what it compiled.
    """
    grid, arguments = (programs, 1, 1), {name: arguments[name] for name in kernel.arg_names}
    values = tuple(arguments.values())
    again: Callable[..., None] | None = None

    def run() -> None:
        nonlocal again
        if again is not None:
            again(*values)
        elif (compiled := kernel[grid](**arguments, **options)) is not None:  # None from Triton's interpreter
            again = compiled[grid]

    return run


class Tile(NamedTuple):
    """How a product is divided: `rows` x `columns` of the result for a program, `depth` of the sum at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


UNIT = 128  # every tile's rows divide it


class Tiles(NamedTuple):
    """The tiles for one generation of GPUs. The quadratic holds a second tile, which takes registers."""

    product: Tile
    quadratic: Tile
    general: Tile


# By major compute capability. Measured on an H200 (9) before hopper.py took over there; the others are compiled, and fit, but
# have not been run.
TILES = {
    8: Tiles(Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 8, 3), Tile(64, 128, 32, 4, 3)),
    9: Tiles(Tile(128, 128, 64, 4, 4), Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3)),
    10: Tiles(Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 2)),
}


def tiles_for(device: torch.device) -> Tiles:
    """The tiles for a device; what is not in the table gets the smallest, and so does Triton's interpreter on a CPU."""
    return TILES.get(torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0, TILES[8])


def processors(device: torch.device) -> int:
    """How many programs that fill a multiprocessor run at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def describe(X: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The rows of all matrices of X (B, m, n), one below the other, to be moved in blocks of rows x columns."""
    return TensorDescriptor(X, [X.shape[0] * X.shape[1], X.shape[2]], [X.stride(1), 1], [rows, columns])


def tiles(n: int, size: int) -> int:
    """How many tiles of `size` cover n."""
    return triton.cdiv(n, size)


def triangle(m: int, size: int) -> int:
    """How many tiles of size x size are on or above the diagonal of an m x m matrix; `size` divides m."""
    return m // size * (m // size + 1) // 2
