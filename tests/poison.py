# SPDX-License-Identifier: Apache-2.0
"""Memory that shows who has written where: full of NaN, with more of it around and between the rows."""

import os

import torch
from torch import Tensor

from conformance import accept

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
AROUND = 128  # entries; a multiple of 16 bytes


def poisoned(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float16, stride: int = 0) -> Tensor:
    """NaN of a shape, its rows `stride` apart if that is more than their length."""
    *before, n = shape
    rows = torch.Size(before).numel()
    stride = max(stride, n)
    memory = torch.full((rows * stride + 2 * AROUND,), float("nan"), dtype=dtype, device=device)
    return memory[AROUND:-AROUND].view(*before, stride)[..., :n]


def padded(X: Tensor, multiple: int = 8) -> Tensor:
    """X with rows a multiple of so many entries apart, and NaN between them."""
    copy = poisoned(tuple(X.shape), X.device, X.dtype, -(-X.shape[-1] // multiple) * multiple)
    return copy.copy_(X)


def accept_outside(X: Tensor, granule: int = 1) -> None:
    """Nothing was written around a tensor from `poisoned`, but rows up to a multiple of `granule` entries."""
    __tracebackhide__ = True
    memory = torch.empty(0, dtype=X.dtype, device=X.device).set_(X.untyped_storage())
    outside = torch.ones_like(memory, dtype=torch.bool)
    shape = (*X.shape[:-1], -(-X.shape[-1] // granule) * granule)
    outside.as_strided(shape, X.stride(), X.storage_offset()).fill_(False)
    written = outside & ~memory.isnan()
    assert not written.any(), f"{int(written.sum())} entries written outside, the first at {int(written.nonzero()[0])}"


def accept_cast(actual: Tensor, expected: Tensor) -> None:
    """The same bits; but the interpreter truncates to bfloat16."""
    __tracebackhide__ = True
    if INTERPRETED and expected.dtype == torch.bfloat16:
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=0)
    else:
        accept.same_bits(actual=actual, expected=expected)
