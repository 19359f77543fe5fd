# SPDX-License-Identifier: Apache-2.0
"""What it costs to check a step before taking it: the same optimizer with `skip_nonfinite` and without."""

import pytest
import torch
from torch import nn

import impl


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "unguarded"])
def test_step(benchmark, algorithm, guard):
    benchmark.group = f"one {algorithm} step of 20 matrices, 256 x 256"
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(256, 256, generator=generator)) for _ in range(20)]
    optimizer = impl.Muon(weights, algorithm=algorithm, skip_nonfinite=guard)
    for W in weights:
        W.grad = torch.randn(256, 256, generator=generator)
    benchmark.pedantic(optimizer.step, rounds=30, warmup_rounds=3)
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    assert all(W.isfinite().all() for W in weights)
