# SPDX-License-Identifier: Apache-2.0
"""SKIP-7: the decision stays on the device."""

import contextlib
import copy
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conformance import accept
from conformance.campaign import everything, gradients, scene
from conformance.steps import take
from conformance.target import Target

pytestmark = pytest.mark.filterwarnings("ignore:.*skipped:RuntimeWarning")
LAYOUT = "gated delta net"
NAN = float("nan")


@contextlib.contextmanager
def refusing_to_wait():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Reads(TorchDispatchMode):
    """Notes every operation that brings a tensor's value to the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "item"}:
            self.found.append(func)
        return func(*args, **(kwargs or {}))


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
    with Reads() as reads, refusing_to_wait() if device.type == "cuda" else contextlib.nullcontext():
        optimizer.step()
    assert accept.equal(reads.found, [])


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
