# SPDX-License-Identifier: Apache-2.0
"""The matrices of a round that are a rank's own, on a GPU: from buffer to batch, orthogonalization, and back."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from impl import operands
from impl.exchange import Block, Round
from impl.layout import Section
from impl.operands import Launches


class Run:
    """Blocks of one form, one after another in a buffer: (blocks, height, stride) numbers of it."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks, self.first = blocks, blocks[0]

    def rows(self, buffer: Tensor) -> Tensor:
        """All rows of the blocks, those of averages included."""
        one = self.first
        return buffer[one.start : one.start + len(self.blocks) * one.size].view(len(self.blocks), -1, one.stride)

    def wide(self, buffer: Tensor) -> Tensor:
        """The parts as they lie there."""
        return self.rows(buffer)[:, : self.first.height, : self.first.corner[3]]


def runs(blocks: Sequence[Block], form: Callable[[Block], Any]) -> list[Run]:
    """Neighbouring blocks of the same size and `form` together."""
    alike = groupby(blocks, lambda block: (block.size, block.stride, block.rect.rows, block.rect.columns, form(block)))
    return [Run(list(each)) for _, each in alike]


class Owned:
    """The matrices of a round that are this rank's: their memory, and what orthogonalizes them."""

    def __init__(self, each: Round, memory: Tensor, scratch: Tensor, device: torch.device) -> None:
        from impl.kernels import iteration

        B, key = len(each.mine), each.key
        self.numbers = torch.tensor([job.number for job in each.mine], dtype=torch.int64, device=device)
        self.largest, self.finite = torch.zeros(2, B, dtype=torch.int32, device=device)
        self.variances: Launches = []
        if not each.mine:
            return
        self.O = iteration.batch(memory, B, key.m, key.n)
        norms = iteration.norms(B, key.m, device)
        flags = (self.largest, self.finite)
        self.X, self.launches, self.Q = iteration.iteration(self.O, key.m, key.schedule, key.eps, scratch, *norms, *flags)
        self.got, self.given = (self._runs(each, side.blocks) for side in (each.got, each.given))
        if key.normuon_beta2 is not None:
            self._normuon(each, key.normuon_beta2, device)

    def _runs(self, each: Round, blocks: Sequence[Block]) -> list[Run]:
        """Blocks that lie alike in matrices that follow each other."""
        position = {id(block): k for k, block in enumerate(blocks)}
        return runs(blocks, lambda block: (block.corner, each.index[block.job.number] - position[id(block)]))

    def _normuon(self, each: Round, beta2: float, device: torch.device) -> None:
        from impl.kernels.places import places
        from impl.kernels.variance import variance as launches

        self.V, self.row_scale = [], []
        code, tall = torch.zeros((), dtype=torch.uint8, device=device), sum(job.tall for job in each.mine)
        for those in (slice(0, tall), slice(tall, len(each.mine))):
            jobs = each.mine[those]
            if not jobs:
                continue
            height, width = jobs[0].matrix.size
            V, row_scale, squares = torch.zeros(3, len(jobs), height, dtype=torch.float32, device=device)
            table = places(0, Section(height), torch.empty(len(jobs), 1, 1, height, 1, device="meta"), device)
            pointers = torch.tensor([0, 0, 1, V.data_ptr()], dtype=torch.int64, device=device)
            where = (height, width, table, pointers, 1, code)
            self.variances += launches(self.O[those], *where, beta2, squares, row_scale)
            self.V += list(V)
            self.row_scale += list(row_scale)

    def solve(self, each: Round, got: Tensor, given: Tensor) -> None:
        """From what has come to what is to be given back."""
        if not each.mine:
            return
        self.X[:, each.key.m :].zero_()
        for run in self.got:
            b, (row, column, height, width) = each.index[run.first.job.number], run.first.corner
            self.X[b : b + len(run.blocks), row : row + height, column : column + width] = run.wide(got)
        if self.variances:
            for block in each.got.blocks:
                block.of_rows(self.V[each.index[block.job.number]]).copy_(block.average(got, torch.float32)[0])
        operands.orthogonalize(self.launches, self.Q)
        for launch in self.variances:
            launch()
        for run in self.given:
            b, (row, column, height, width) = each.index[run.first.job.number], run.first.corner
            run.wide(given).copy_(self.O[b : b + len(run.blocks), row : row + height, column : column + width])
        if self.variances:
            for block in each.given.blocks:
                b, average = each.index[block.job.number], block.average(given, torch.float32)
                average[0], average[1] = block.of_rows(self.V[b]), block.of_rows(self.row_scale[b])
