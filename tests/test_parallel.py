# SPDX-License-Identifier: Apache-2.0
"""Torch's own ways to train on several processes, with Muon inside: FSDP2, DDP, tensor parallel, ZeRO."""

import csv
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from conformance import accept
from conformance.strategies import tensor
from conformance.worlds import processes
from examples.parallel import KINDS
from impl import Muon

ROOT = Path(__file__).parent.parent
SHAPES = [(8, 12), (12, 8), (6, 6), (16, 4)]


def losses(folder: Path, *command: str) -> list[float]:
    """Of the example, trained for three steps in a folder of its own."""
    folder.mkdir()
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = ["-m", "examples.train", *command, "--steps", "3", "--data", "text.txt", "--name", "run"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if "--parallel" in command else []
    done = subprocess.run([sys.executable, *torchrun, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(folder / "runs" / "run" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return [float(row["train_loss"]) for row in rows] + [float(rows[-1]["val_loss"])]


def test_the_example_has_the_losses_of_one_process(tmp_path):
    one = losses(tmp_path / "one")
    assert len(one) == 4
    for kind in KINDS:
        together = losses(tmp_path / kind, "--parallel", kind)
        assert together == pytest.approx(one, rel=1e-5), kind


def steps(poison: bool = False) -> list[list[Tensor]]:
    gradients = [[tensor(shape, 10 * step + i) for i, shape in enumerate(SHAPES)] for step in range(3)]
    if poison:
        gradients[1][2][0, 0] = float("nan")
    return gradients


def take(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: list[list[Tensor]]) -> list[Tensor]:
    for each in gradients:
        for p, G in zip(parameters, each, strict=True):
            p.grad = G.clone()
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def fresh() -> list[nn.Parameter]:
    return [nn.Parameter(tensor(shape, 100 + i)) for i, shape in enumerate(SHAPES)]


def with_zero(rank: int) -> list[list[Tensor]]:
    """Weights after three steps, and after three of which one has a gradient that is not finite."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # not at the top: its import warns

    found = []
    for poison in (False, True):
        parameters = fresh()
        together = partial(Muon, process_group=dist.group.WORLD)  # or else each rank would skip what it steps itself
        optimizer = ZeroRedundancyOptimizer(parameters, together, lr=0.1)
        found.append(take(optimizer, parameters, steps(poison)))
    return found


@pytest.mark.filterwarnings("ignore:Muon has skipped:RuntimeWarning")
def test_zero_redundancy_optimizer(tmp_path):
    found = processes(2, tmp_path, "cpu", with_zero)
    for poison in (False, True):
        parameters = fresh()
        one = take(Muon(parameters, lr=0.1), parameters, steps(poison))
        for each in found:
            assert isinstance(each, list), each
            for actual, expected in zip(each[poison], one, strict=True):
                accept.same_bits(actual=actual, expected=expected)
