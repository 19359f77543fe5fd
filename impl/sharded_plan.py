# SPDX-License-Identifier: Apache-2.0
"""The rounds of matrices that a GPU's kernels prepare, orthogonalize and apply, many in one launch; see sharded.py.

A matrix is brought to float16 by the same power of two on all ranks, found with one all-reduce for all matrices, so its bits
are those of plan.py. `kernels` is imported where it is used, so that the package needs no Triton.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from impl.batches import Entry, gradient_dtype
from impl.exchange import Block, Round
from impl.layout import Layout
from impl.operands import Form, Launches, Operands, groups_of
from impl.options import lr_scale
from impl.owned import Owned, Run, runs
from impl.parts import variance
from impl.placement import local
from impl.shards import rows
from impl.stages import write


class ShardedPlan:
    """This rank's parts of the matrices of some rounds, with what `parts.Parts` has."""

    def __init__(self, entries: Sequence[Entry], layouts: Sequence[Layout], rounds: Sequence[Round], device: torch.device):
        self.entries, self.layouts, self.rounds, self.device = entries, layouts, rounds, device
        self.blocks = [block for each in rounds for block in each.held.blocks]
        self.signature: Any = None
        self.code = torch.zeros((), dtype=torch.uint8, device=device)
        # Bits of the largest magnitude in every matrix, of those of this rank's parts, and of these in the last step.
        self.bits = torch.zeros(max((job.number + 1 for each in rounds for job in each.jobs), default=0), dtype=torch.int32)
        self.bits = self.bits.to(device)
        self.largest, self.guess = torch.zeros(2, len(self.blocks), dtype=torch.int32, device=device)
        self.numbers = torch.tensor([block.job.number for block in self.blocks], dtype=torch.int64, device=device)
        self.buffers: Sequence[Tensor] = ()

    def _build(self, scaled: bool) -> None:
        """Divide the memory, and make the launches."""
        from impl.kernels import iteration

        self.operands = Operands(len(self.entries), groups_of(self.entries), scaled, self.device)
        sizes = [each.held.size for each in self.rounds]
        mine = [(len(each.mine), each.key.m, each.key.n) for each in self.rounds]
        sizes.append(max(B * iteration.batch_numbers(m, n) for B, m, n in mine))
        sizes.append(max(B * iteration.scratch_numbers(m, n) for B, m, n in mine))
        self.arena = torch.empty(sum(sizes), dtype=torch.float16, device=self.device)
        *self.buffers, memory, scratch = self.arena.split(sizes)
        self.owned = [Owned(each, memory, scratch, self.device) for each in self.rounds]
        self.prepares: list[Launches] = []
        self.applies: Launches = []
        self.averaged: list[tuple[Run, Tensor, Tensor]] = []  # runs with NorMuon's averages, their buffer, and row_scale
        first = 0
        for each, held in zip(self.rounds, self.buffers, strict=True):
            for run in runs(each.held.blocks, self._form):
                self._launches(run, held, slice(first, first + len(run.blocks)))
                first += len(run.blocks)

    def _place(self, block: Block) -> list[int]:
        """A row of kernels/places.py."""
        i, rect = block.job.entry, block.rect
        width = rows(self.layouts[i], self.weights[i]).shape[1]
        return [i, rect.top * width + rect.left, rect.rows, 0, width]

    def _form(self, block: Block) -> tuple[int, Form, bool, bool, tuple[int, int]]:
        """What is the same for all matrices of a launch: what its source is told, and the size that its scale is made of."""
        i, rect = block.job.entry, block.rect
        tensors = (self.weights[i], self.gradients[i], self.momenta[i])
        _, offset, _, _, width = self._place(block)
        aligned = all(number % 8 == 0 for number in (rect.rows, rect.columns, offset, width))
        aligned = aligned and all(T is not None and T.data_ptr() % 16 == 0 for T in tensors)
        group = [id(each) for each in self.operands.groups].index(id(self.entries[i][0]))
        form = (rect.rows, rect.columns, self.weights[i].dtype, self.gradients[i].dtype)
        return group, form, block.job.tall, aligned, block.job.matrix.size

    def _launches(self, run: Run, held: Tensor, those: slice) -> None:
        from impl.kernels.apply import apply
        from impl.kernels.prepare import prepare

        group, form, tall, aligned, size = self._form(run.first)
        table = torch.tensor([self._place(block) for block in run.blocks], dtype=torch.int64, device=self.device)
        source = self.operands.source(group, form, tall, aligned, table)
        X = run.rows(held)[:, :, : run.wide(held).shape[2]]
        row_scale = None
        if run.first.averages:
            row_scale = torch.zeros(len(run.blocks), run.first.rect.rows, dtype=torch.float32, device=self.device)
            self.averaged.append((run, held, row_scale))
        if not X.numel():  # rows of which this rank has averages alone
            return
        self.prepares.append(prepare(source, self.largest[those], self.guess[those], X))
        scale = lr_scale(*size, self.operands.groups[group]["adjust_lr_fn"])
        self.applies.append(apply(source, X, self.code, scale, row_scale))

    def prepare(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor], state: Sequence[Mapping[str, Tensor]], grad_scale: Any
    ) -> Tensor:
        """The first half of MOM; the bits of the largest magnitude in this rank's part of every matrix."""
        if not self.rounds:
            return self.bits
        self.weights, self.state, groups = weights, state, groups_of(self.entries)
        self.gradients = [G.to(gradient_dtype(p)) for G, (_, p) in zip(gradients, self.entries, strict=True)]
        self.momenta = [local(each["momentum_buffer"]) if "momentum_buffer" in each else None for each in state]
        tensors = (*weights, *self.momenta, *self.gradients)
        forms = [None if T is None else (T.dtype, T.data_ptr() % 16 == 0) for T in tensors]
        signature = (grad_scale is not None, [(group["nesterov"], group["adjust_lr_fn"]) for group in groups], forms)
        if signature != self.signature:
            self.signature = signature
            self._build(grad_scale is not None)
        with torch.cuda.device(self.device):
            self.operands.read(groups, [*tensors, *[None] * len(weights)], grad_scale, again=False)
            self.arena.untyped_storage().resize_(2 * self.arena.numel())
            self.guess.copy_(self.largest)
            self.largest.zero_()
            for first, _ in self.prepares:
                first()
        return self.bits.zero_().scatter_reduce_(0, self.numbers, self.largest, "amax")

    def again(self, bits: Tensor) -> None:
        """The second half, with the bits of whole matrices; update directions are then in the buffers that are to be sent."""
        if not self.rounds:
            return
        self.bits.copy_(bits)
        self.largest.copy_(self.bits[self.numbers])
        with torch.cuda.device(self.device):
            for _, second in self.prepares:
                second()
        for owned in self.owned:
            owned.largest.copy_(self.bits[owned.numbers])
            owned.finite.zero_()
        for run, held, _ in self.averaged:
            for block in run.blocks:
                block.average(held, torch.float32)[0] = variance(
                    self.layouts[block.job.entry], self.state[block.job.entry], block
                )

    def held(self) -> Iterator[tuple[Round, Tensor]]:
        """The rounds, with the buffers of this rank's parts."""
        return zip(self.rounds, self.buffers, strict=True)

    def solve(self, each: Round, got: Tensor, given: Tensor) -> None:
        """ORTH and VAR of the matrices that are this rank's in a round, from what has come to what is to be given back."""
        with torch.cuda.device(self.device):
            self.owned[self.rounds.index(each)].solve(each, got, given)

    def magnitudes(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of what momenta would become, and of this rank's orthogonalized updates."""
        if not self.rounds:
            return [], []
        return [self.largest.view(torch.float32)], [owned.finite.view(torch.float32) for owned in self.owned]

    def culprits(self) -> list[int]:
        """The parameters, by number, with a matrix of this rank's in which something is not finite; waits for the device."""
        found: list[int] = []
        for states, updates in [self.magnitudes()] if self.rounds else []:
            found += [block.job.entry for block, bad in zip(self.blocks, ~states[0].isfinite(), strict=True) if bad]
            for each, T in zip(self.rounds, updates, strict=True):
                found += [job.entry for job, bad in zip(each.mine, ~T.isfinite(), strict=True) if bad]
        return found

    def apply(self, present: Tensor, skip: Tensor, code: Tensor | None) -> None:
        """VAR to STEP, as far as the decision and the gradients that there are allow; frees the memory of the step.

        Args: present, skip: for each parameter, whether there is a gradient, and whether its weight is to be left alone.
        """
        if not self.rounds:
            return
        n = len(self.entries)
        self.operands.pointers[2 * n : 3 * n] *= present  # the kernels leave alone what has no gradient
        self.operands.addresses[2 * n : 3 * n] = [-1] * n
        self.code.zero_() if code is None else self.code.copy_(code)
        for run, held, row_scale in self.averaged:
            for k, block in enumerate(run.blocks):
                i, (average, row_scale[k]) = block.job.entry, block.average(held, torch.float32)
                write(variance(self.layouts[i], self.state[i], block), average, skip[i])
        with torch.cuda.device(self.device):
            for launch in self.applies:
                launch()
        self.arena.untyped_storage().resize_(0)
        self.weights, self.gradients, self.momenta, self.state = [], [], [], []
