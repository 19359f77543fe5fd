# SPDX-License-Identifier: Apache-2.0
"""What Hypothesis draws: shapes, spectra, scales and seeds, never entries; and the options that tests start from."""

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from conformance.target import Hyper

# "jordan" is the one schedule that every implementation has.
HYPER = Hyper(
    lr=0.02,
    weight_decay=0.1,
    momentum=0.9,
    nesterov=True,
    schedule="jordan",
    steps=5,
    eps=0.0,
    adjust_lr_fn="original",
    algorithm="muon",
    layout=None,
    shard_mode="owned",
    normuon_beta2=None,
    adamw_lr_ratio=1.0,
    adamw_betas=(0.9, 0.95),
    adamw_eps=1e-8,
    maximize=False,
    skip_nonfinite=True,
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

QKV = ({"rows": 8}, {"rows": 4}, {"rows": 4})
GATED_QKV = ({"rows": 6}, {"rows": 6}, {"rows": 2}, {"rows": 2})  # the second is the output gate
# name: (shape of the parameter, its layout)
LAYOUTS = {
    "experts by rows": ((4 * 6, 10), {"blocks": 4}),
    "experts by columns": ((6, 4 * 10), {"columns": 4}),
    "experts in three dimensions": ((4, 6, 10), {"blocks": 4}),
    "gate and up of every expert": ((3, 2 * 5, 7), {"blocks": 6}),
    "gate beside up of every expert": ((3, 5, 2 * 7), {"blocks": 3, "columns": 2}),
    "unequal sections": ((16, 9), {"sections": QKV}),
    "interleaved groups": ((3 * 16, 9), {"groups": 3, "sections": GATED_QKV}),
    "heads": ((16, 2 * 9), {"columns": 2, "sections": ({"rows": 8, "head_dim": 4}, {"rows": 8, "head_dim": 2})}),
    "heads in groups": ((2 * 16, 9), {"groups": 2, "sections": ({"rows": 8, "head_dim": 4}, {"rows": 4}, {"rows": 4})}),
    "sections of every expert": ((3 * 16, 9), {"blocks": 3, "sections": QKV}),
    "convolution": ((8, 1, 2, 3), {"flatten": True}),
    "grouped convolution": ((8, 3, 2, 2), {"blocks": 2, "flatten": True}),
}
# the same, with sections for AdamW
MIXED = {
    "gated delta net": (
        (20, 9),
        {"sections": [{"rows": 8}, {"rows": 8}, {"rows": 2, "algorithm": "adamw"}, {"rows": 2, "algorithm": "adamw"}]},
    ),
    "gate first": ((20, 9), {"sections": [{"rows": 2, "algorithm": "adamw"}, {"rows": 18, "head_dim": 6}]}),
    "in every expert": ((30, 9), {"blocks": 3, "sections": [{"rows": 8}, {"rows": 2, "algorithm": "adamw"}]}),
}
FUSED = {**LAYOUTS, **MIXED}

# Wide, tall, square; one row, one column, one entry; around tile edges.
shapes = st.sampled_from(
    [(1, 1), (1, 7), (9, 1), (2, 3), (8, 8), (15, 17), (16, 16), (17, 15), (5, 40), (40, 5), (31, 33), (48, 64), (65, 32)]
)
seeds = st.integers(0, 2**31)
# With a condition number of at most 30, a schedule amplifies rounding only a little, whatever the precision.
conditioned = st.sampled_from(["flat", "moderate", "repeated"])
spectra = st.one_of(conditioned, st.sampled_from(["log_uniform", "rank_one", "deficient", "spiked"]))


def singular_values(kind: str, rank: int, generator: np.random.Generator) -> np.ndarray:
    """Descending singular values, the largest 1; momentum of real runs is "spiked", with a stable rank of 1 to 9."""
    i = np.arange(rank)
    return {
        "flat": np.ones(rank),
        "moderate": np.sort(generator.uniform(1 / 30, 1, rank))[::-1] if rank > 1 else np.ones(1),
        "repeated": np.where(i < (rank + 1) // 2, 1.0, 0.25),
        "log_uniform": 10.0 ** (-4 * i / max(rank - 1, 1)),
        "rank_one": (i == 0).astype(float),
        "deficient": np.where(i < (rank + 1) // 2, 1 / (1 + i), 0.0),
        "spiked": 1 / (1.0 + i) ** 2,
    }[kind]


def matrix(shape: tuple[int, int], spectrum: str, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random matrix with this spectrum, on the CPU."""
    generator = np.random.default_rng(seed)
    m, n = shape
    U = np.linalg.qr(generator.standard_normal((m, min(m, n))))[0]
    V = np.linalg.qr(generator.standard_normal((n, min(m, n))))[0]
    return torch.from_numpy((U * singular_values(spectrum, min(m, n), generator)) @ V.T).to(dtype)


def tensor(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal entries, on the CPU; the same numbers for every dtype, up to rounding."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)
