# SPDX-License-Identifier: Apache-2.0
"""One optimizer step of the example's model: ours, and torch.optim.Muon on the same matrices with AdamW for the rest.

torch.optim.Muon knows no layouts, so it gets every matrix as a parameter of its own; the work is the same.
"""

import pytest
import torch
from torch import nn

import impl
from examples.model import HybridLM
from examples.run import pieces

SYMBOLS = 103  # of the default text


def gradients(parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def ours(model: HybridLM) -> list[torch.optim.Optimizer]:
    optimizer = impl.Muon(impl.param_groups(model), lr=0.02, adamw_lr_ratio=0.1)
    gradients(list(model.parameters()))
    return [optimizer]


def torchs(model: HybridLM) -> list[torch.optim.Optimizer]:
    chosen = {"muon": [], "adamw": []}
    for group in impl.param_groups(model):
        for _, p in group["params"]:
            for algorithm, W in pieces(group, p.detach()):
                chosen[algorithm].append(nn.Parameter(W.clone()))
    gradients(chosen["muon"] + chosen["adamw"])
    return [torch.optim.Muon(chosen["muon"], lr=0.02), torch.optim.AdamW(chosen["adamw"], lr=0.002)]


@pytest.mark.benchmark(group="one step of the example's model")
@pytest.mark.parametrize("make", [ours, torchs])
def test_step(benchmark, make):
    torch.manual_seed(0)
    optimizers = make(HybridLM(SYMBOLS))

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    benchmark.pedantic(step, rounds=30, warmup_rounds=3)
    counts = [sum(p.numel() for g in o.param_groups for p in g["params"]) for o in optimizers]
    benchmark.extra_info |= {"parameters": sum(counts), "threads": torch.get_num_threads(), "torch": torch.__version__}
    assert all(p.isfinite().all() for o in optimizers for g in o.param_groups for p in g["params"])
