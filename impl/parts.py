# SPDX-License-Identifier: Apache-2.0
"""The rounds of matrices that torch's operations prepare, orthogonalize and apply, one by one; see sharded.py."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from impl.batches import Entry
from impl.exchange import Block, Round
from impl.layout import Layout
from impl.options import lr_scale
from impl.orthogonalize import orthogonalize_batch as orthogonalize
from impl.placement import local
from impl.shards import rows
from impl.skip import largest
from impl.stages import descend, momentum, normalize_rows, write

Found = list[tuple[int, Tensor]]  # parameter number, largest magnitude


def variance(layout: Layout, state: Mapping[str, Tensor], block: Block) -> Tensor:
    """NorMuon's averages of the rows of a part: (rows,)."""
    V = local(state["variance_buffer"]).view(-1, layout.columns)
    return V[block.rect.top : block.rect.top + block.rect.rows, block.job.matrix.average]


class Parts:
    """This rank's parts of the matrices of some rounds."""

    def __init__(self, entries: Sequence[Entry], layouts: Sequence[Layout], rounds: Sequence[Round]) -> None:
        self.entries, self.layouts, self.rounds = entries, layouts, rounds
        self.members = {block.job.entry for each in rounds for block in each.held.blocks}

    def prepare(self, state: Sequence[Mapping[str, Tensor]], directions: Mapping[int, Tensor]) -> None:
        """MOM; the update directions are then in the buffers that are to be sent."""
        self.state: Any = state
        self.states: Found = []
        self.updates: Found = []
        self.momenta: list[list[Tensor]] = []  # of the blocks of each round
        self.buffers = [self._prepare(each, directions) for each in self.rounds]

    def _prepare(self, each: Round, directions: Mapping[int, Tensor]) -> Tensor:
        device = local(self.entries[0][1]).device
        held, momenta = torch.empty(each.held.size, dtype=each.key.dtype, device=device), []
        for block in each.held.blocks:
            i = block.job.entry
            options, M = self.entries[i][0], block.rect.of(rows(self.layouts[i], local(self.state[i]["momentum_buffer"])))
            G = block.rect.of(rows(self.layouts[i], directions[i]))
            M, U = momentum(M, G, options["momentum"], options["nesterov"])
            block.entries(held).copy_(U)
            if block.averages:
                block.average(held, each.key.dtype)[0] = variance(self.layouts[i], self.state[i], block)
            momenta.append(M)
            self.states.append((i, largest(M)))
        self.momenta.append(momenta)
        return held

    def held(self) -> Iterator[tuple[Round, Tensor]]:
        """The rounds, with the buffers of this rank's parts."""
        return zip(self.rounds, self.buffers, strict=True)

    def solve(self, each: Round, got: Tensor, given: Tensor) -> None:
        """ORTH and VAR of the matrices that are this rank's in a round, from what has come to what is to be given back."""
        key, dtype = each.key, each.key.dtype
        if key.mode == "distributed":
            for block, O in zip(each.given.blocks, each.orthogonalize_parts(got), strict=True):
                block.entries(given).copy_(O)
                self.updates.append((block.job.entry, largest(O)))
            return
        X = got.new_empty(len(each.mine), key.m, key.n)
        averages = [got.new_empty(job.matrix.rows) for job in each.mine]
        for block in each.got.blocks:
            b = each.index[block.job.number]
            block.place(X[b]).copy_(block.wide(got))
            if block.averages:
                block.of_rows(averages[b]).copy_(block.average(got, dtype)[0])
        O = orthogonalize(X, key.schedule, key.eps) if each.mine else X
        for b, job in enumerate(each.mine):
            self.updates.append((job.entry, largest(O[b])))
            if key.normuon_beta2 is not None:
                upright = (O[b].mT if job.tall else O[b])[None].contiguous()
                N, V = normalize_rows(upright, averages[b][None, :, None], key.normuon_beta2)
                O[b], averages[b] = N[0].mT if job.tall else N[0], V[0, :, 0]
        for block in each.given.blocks:
            b = each.index[block.job.number]
            block.wide(given).copy_(block.place(O[b]))
            if block.averages:
                block.average(given, dtype)[0] = block.of_rows(averages[b])

    def magnitudes(self) -> tuple[Found, Found]:
        """Of what momenta would become, and of this rank's orthogonalized updates."""
        return self.states, self.updates

    def apply(self, weights: Sequence[Tensor], hold: Tensor, skip: Tensor) -> None:
        """Write momenta unless `hold`, and averages and weights unless `skip`, which have a number for each parameter."""
        for each, held, momenta in zip(self.rounds, self.buffers, self.momenta, strict=True):
            for block, M in zip(each.held.blocks, momenta, strict=True):
                i, layout = block.job.entry, self.layouts[block.job.entry]
                options = self.entries[i][0]
                write(block.rect.of(rows(layout, local(self.state[i]["momentum_buffer"]))), M, hold[i])
                if block.averages:
                    write(variance(layout, self.state[i], block), block.average(held, each.key.dtype)[0], skip[i])
                scale = lr_scale(*block.job.matrix.size, options["adjust_lr_fn"])
                W = block.rect.of(rows(layout, weights[i]))
                write(W, descend(options, W.to(each.key.dtype), block.entries(held), scale).to(W.dtype), skip[i])
        self.buffers, self.momenta = [], []
