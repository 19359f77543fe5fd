# SPDX-License-Identifier: Apache-2.0
"""SKIP-7: the decision stays on the device."""

import copy

import pytest
import torch

from conformance import accept
from conformance.campaign import everything, gradients, scene
from conformance.steps import not_waiting, take
from conformance.target import Target

pytestmark = pytest.mark.filterwarnings("ignore:.*skipped:RuntimeWarning")
LAYOUT = "gated delta net"
NAN = float("nan")


@pytest.mark.clause("SKIP-7")
@pytest.mark.parametrize("kind", ["clean", "poisoned", "found_inf", "tensor lr"])
def test_a_step_reads_nothing_on_the_host(skipping: Target, device, kind):
    named, optimizer = scene(skipping, LAYOUT, torch.float32, device)
    step = gradients(named, 30)
    if kind == "poisoned":
        step[0][0, 0] = NAN
    if kind == "found_inf":
        optimizer.found_inf = torch.ones((), device=device)
    if kind == "tensor lr":
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.01, device=device)
    take(optimizer, named, step)  # the second step of a kind is as any other
    for (_, p), G in zip(named, step, strict=True):
        p.grad = G.to(device)
    with not_waiting(device.type) as reads:
        optimizer.step()
    assert accept.equal(reads, [])


@pytest.mark.clause("SKIP-1", "SKIP-7")
def test_a_captured_step_decides_as_an_eager_one(skipping: Target, device):
    if device.type != "cuda":
        pytest.skip("a CUDA graph needs --gpu")
    named, optimizer = scene(skipping, LAYOUT, torch.float32, device)
    twins, twin = copy.deepcopy((named, optimizer))
    for (_, p), G in zip(named, gradients(named, 30), strict=True):
        p.grad = G.to(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for seed, value in ((30, 0.0), (40, NAN), (50, 0.0)):
        step = gradients(named, seed)
        step[0][0, 0] += value
        for (_, p), G in zip(named, step, strict=True):
            p.grad.copy_(G)
        graph.replay()
        take(twin, twins, step)
        assert accept.equal(everything(named, optimizer), everything(twins, twin))
        assert skipping.skipped(optimizer) == skipping.skipped(twin)
