# SPDX-License-Identifier: Apache-2.0
"""Where kernels run, and which: what impl makes of the answers of GPUs and Tritons that are not here."""

import importlib
import sys

import pytest
import torch
from torch import nn

import impl.batches
from impl import Muon

GPU = torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch):
    """A function that says what the GPU's compute capability is."""
    return lambda *found: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)


@pytest.mark.parametrize(
    ("found", "runs", "fastest", "table"),
    [
        ((7, 5), False, "PORTABLE", 8),
        ((8, 0), True, "PORTABLE", 8),
        ((8, 9), True, "PORTABLE", 8),
        ((9, 0), True, "HOPPER", 9),
        ((10, 0), True, "PORTABLE", 10),
        ((12, 0), True, "PORTABLE", 8),
    ],
    ids=str,
)
def test_what_runs_on_which_gpu(capability, found, runs, fastest, table):
    pytest.importorskip("triton", reason="kernels need Triton")
    from impl.kernels import launch, products

    capability(*found)
    assert impl.batches.usable.__wrapped__(GPU) is runs
    assert products.products(GPU) is getattr(products, fastest)
    assert launch.tiles_for(GPU) is launch.TILES[table]


def test_without_gluon_every_gpu_has_the_portable_kernels(capability, monkeypatch):
    pytest.importorskip("triton", reason="kernels need Triton")
    from impl.kernels import products

    capability(9, 0)
    monkeypatch.setattr(products, "hopper", None)
    assert products.products(GPU) is products.PORTABLE


@pytest.mark.parametrize(
    ("version", "runs"), [("3.6.0", True), ("3.5.1", False), ("3.10.0", True), ("4.0.0", True), ("3.7.0+git1a2b3c", True)]
)
def test_tritons_that_are_new_enough(capability, monkeypatch, version, runs):
    triton = pytest.importorskip("triton", reason="kernels need Triton")
    capability(9, 0)
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", version)
        importlib.reload(impl.kernels)
        found = impl.batches.usable.__wrapped__(GPU)
    importlib.reload(impl.kernels)
    assert found is runs


def test_without_triton_a_gpu_steps_without_kernels(capability, monkeypatch):
    capability(9, 0)
    monkeypatch.setattr(impl.batches, "find_spec", lambda name: None)
    for name in [name for name in sys.modules if name == "triton" or name.startswith("impl.kernels")]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an error
    assert impl.batches.usable.__wrapped__(GPU) is False


def test_subclasses_are_left_to_torch(monkeypatch):
    """Their entries may lie elsewhere than where their address says."""
    other = torch.ones(9, 5).as_subclass(type("Other", (torch.Tensor,), {})).requires_grad_()
    plain = nn.Parameter(torch.ones(9, 5))
    monkeypatch.setattr(impl.batches, "usable", lambda device: True)
    assert [id(p) for p in impl.batches.planned(Muon([plain, other]).param_groups[0])] == [id(plain)]
