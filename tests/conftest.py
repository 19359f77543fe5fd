# SPDX-License-Identifier: Apache-2.0
"""Tests of kernels run with --gpu on a GPU, and without it in Triton's interpreter, in a process of their own.

Triton looks at TRITON_INTERPRET when it is imported, so a process interprets all kernels or none.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import impl.batches
from impl import Muon
from tests.planned import Change, nothing
from tests.poison import INTERPRETED

KERNELS = {"test_kernels.py", "test_kernels_by_entry.py", "test_plan.py", "test_plan_changes.py", "test_sharded_plan.py"}


class Interpreted(pytest.Item):
    """A whole file of tests, in a process that interprets kernels."""

    def runtest(self) -> None:
        pytest.importorskip("triton", reason="kernels need Triton")
        # NumPy, which does the interpreter's arithmetic, warns of what floating point numbers are meant to do.
        options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-W", "ignore::DeprecationWarning"]
        command = [sys.executable, "-m", "pytest", *options, str(self.path)]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "RANKS_TIMEOUT": "150"}  # an interpreter takes its time
        process = subprocess.run(command, cwd=self.config.rootpath, env=environment, capture_output=True, text=True)
        if process.returncode:
            pytest.fail(f"{' '.join(command)}\n{process.stdout[-20000:]}\n{process.stderr[-2000:]}", pytrace=False)


class Rerun(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield Interpreted.from_parent(self, name="in_the_interpreter")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if module_path.name in KERNELS and not INTERPRETED and not parent.config.getoption("--gpu"):
        return Rerun.from_parent(parent, path=module_path)
    return None


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What launchers ask of CUDA, answered without it."""
    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: SimpleNamespace(cuda_stream=0))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture
def take(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Muon]:
    """A function that takes steps with or without the kernels."""

    def take(fast: bool, optimizer: Muon, gradients: Sequence[Sequence[Tensor | None]], change: Change = nothing) -> Muon:
        monkeypatch.setattr(impl.batches, "usable", lambda device: fast)
        monkeypatch.setattr(sys.modules["impl.orthogonalize"], "usable", lambda device: False)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for step, each in enumerate(gradients):
            for p, G in zip(parameters, each, strict=True):
                p.grad = None if G is None else G.to(device, p.dtype)
            change(optimizer, step)
            optimizer.step()
            assert bool(optimizer.plans) == fast
        return optimizer

    return take


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """A context in which a step believes that it is being captured."""

    @contextmanager
    def context() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            yield

    return context
