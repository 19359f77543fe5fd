# SPDX-License-Identifier: Apache-2.0
"""What is measured, and the least work that it can be.

A batch is (B, m, n).
"""

import math
from collections.abc import Iterator

Batch = tuple[int, int, int]
Model = tuple[tuple[int, ...], ...]

BATCHES: dict[str, Batch] = {
    "gpt2-attn": (48, 768, 768),
    "gpt2-mlp": (24, 768, 3072),
    "qwen3moe-w13": (128, 768, 2048),
    "qwen3moe-w2": (128, 2048, 768),
    "llama8b-qo": (4, 4096, 4096),
    "llama8b-kv": (4, 1024, 4096),
    "llama8b-gate": (4, 14336, 4096),
}
# The hidden matrices of each model, stacked experts as (E, m, n).
MODELS: dict[str, Model] = {
    "gpt2-124m": (*4 * ((768, 768),), (3072, 768), (768, 3072)) * 12,
    "qwen3moe-1layer": (*2 * ((128, 768, 2048),), (128, 2048, 768), (4096, 2048), *2 * ((512, 2048),), (2048, 4096)),
    "llama8b-4layers": (*2 * ((4096, 4096),), *2 * ((1024, 4096),), *2 * ((14336, 4096),), (4096, 14336)) * 4,
}

# Stand-ins for a run without a GPU: they show that everything works, and nothing about speed.
TINY_BATCHES: dict[str, Batch] = {"tiny-square": (3, 48, 48), "tiny-wide": (3, 32, 96), "tiny-tall": (2, 96, 32)}
TINY_MODELS: dict[str, Model] = {"tiny-dense": ((48, 48), (96, 48)) * 2, "tiny-experts": ((4, 32, 64), (48, 64))}

BYTES_PER_ENTRY = 8  # orthogonalize: a float32 read and one written
BYTES_PER_PARAMETER = 20  # a step: gradient read, momentum and weight read and written, all float32


def batches(model: Model) -> Iterator[Batch]:
    """Every parameter of a model as a batch."""
    for shape in model:
        yield (math.prod(shape[:-2]), *shape[-2:])


def entries(batch: Batch) -> int:
    return math.prod(batch)


def parameters(model: Model) -> int:
    return sum(math.prod(shape) for shape in model)


def dense_operations(batch: Batch, steps: int = 5) -> int:
    """B * steps * (4 m^2 n + 2 m^3), m <= n: the textbook iteration, and what "effective" TFLOP/s count."""
    B, m, n = batch[0], min(batch[1:]), max(batch[1:])
    return B * steps * (4 * m * m * n + 2 * m**3)


def least_operations(batch: Batch, steps: int = 5) -> int:
    """The cheaper of the two forms that keep their accuracy in 16 bits; a symmetric product costs half.

    Directly: X X^T, A A and B X are m^2 n + m^3 + 2 m^2 n a step.
    By the Gram matrix, begun afresh after two steps: k steps cost m^2 n + (4 k - 3) m^3 + 2 m^2 n, k being 2 and steps - 2.
    """
    B, m, n = batch[0], min(batch[1:]), max(batch[1:])
    directly = steps * (3 * m * m * n + m**3)
    runs = [k for k in (min(2, steps), steps - 2) if k > 0]
    by_gram = sum(3 * m * m * n + (4 * k - 3) * m**3 for k in runs)
    return B * min(directly, by_gram)


def operations_floor(todo: list[Batch], flops: float, steps: int = 5) -> float:
    """Seconds: the least operations over the measured rate of large products, in operations a second."""
    return sum(least_operations(batch, steps) for batch in todo) / flops


def bytes_floor(count: int, bytes_each: int, bandwidth: float) -> float:
    """Seconds: count * bytes_each over the measured rate of a copy, in bytes a second, read and written alike."""
    return count * bytes_each / bandwidth
