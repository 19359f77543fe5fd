# SPDX-License-Identifier: Apache-2.0
"""Launching one kernel with the same arguments many times, and describing matrices to the tensor memory accelerator."""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def launch(kernel: Any, programs: int, arguments: dict[str, Any], **options: Any) -> Callable[[], None]:
    """A function that launches `kernel` on the current stream of the current device.

    Binding arguments anew takes Triton as long as a small product takes the GPU; so the first call compiles, and later
    ones hand the same arguments to what it compiled.
    """
    grid, values = (programs, 1, 1), tuple(arguments.values())
    again: Callable[..., None] | None = None

    def run() -> None:
        nonlocal again
        if again is not None:
            again(*values, stream=torch.cuda.current_stream().cuda_stream)
        elif (compiled := kernel[grid](**arguments, **options)) is not None:  # None from Triton's interpreter
            again = compiled[grid]

    return run


def processors(device: torch.device) -> int:
    """How many programs that fill a multiprocessor run at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def describe(X: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The rows of all matrices of X (B, m, n), one below the other, to be moved in blocks of rows x columns."""
    return TensorDescriptor(X, [X.shape[0] * X.shape[1], X.shape[2]], [X.stride(1), 1], [rows, columns])


def tiles(n: int, size: int) -> int:
    """How many tiles of `size` cover n."""
    return triton.cdiv(n, size)
