# SPDX-License-Identifier: Apache-2.0
"""What the kernels do for an optimizer's matrices on one GPU: the launches of a step, made once, and their memory.

`kernels` is imported where it is used, so that the package needs no Triton.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from impl import operands
from impl.batches import Batch, Entry, Part, States, Tables, batches, gradient_dtype, planned, signature
from impl.operands import Launches, Operands, groups_of
from impl.options import lr_scale


def plans(
    old: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]], state: States, scaled: bool, apart: Collection[Tensor]
) -> dict[torch.device, "Plan"]:
    """A plan for each device, the old one where it fits, for parameters that are not `apart`.

    Parameters without a gradient are in it too, if they have a state: gradients come and go.
    """
    entries = defaultdict(list)
    for group in groups:
        for p in planned(group):
            if state.get(p) and p not in apart:
                entries[p.device].append((group, p))
    new = {}
    for device, those in entries.items():
        key = signature(those, state, scaled)
        plan = old.get(device)
        if plan is None or plan.signature != key or plan.replayed:
            plan = Plan(those, state, scaled, key, plan)
        plan.entries = those
        new[device] = plan
    return new


class Plan:
    """Prepares and applies the matrices of `entries`, all on one device.

    Between steps it holds a few numbers for each matrix; in a step, 2 bytes for each of their entries, and scratch memory.
    """

    def __init__(
        self, entries: Sequence[Entry], state: States, scaled: bool, key: tuple[Any, ...], before: "Plan | None" = None
    ) -> None:
        self.entries, self.signature, self.device = entries, key, entries[0][1].device
        # A plan made in a capture is filled by the graph's replays alone; one that a capture has used is overwritten by
        # them, and must outlive its time here.
        self.replayed = self.captured = torch.cuda.is_current_stream_capturing()
        self.before = before if before is None or before.captured else before.before
        self.operands = Operands(len(entries), groups_of(entries), scaled, self.device)
        self.code = torch.zeros((), dtype=torch.uint8, device=self.device)
        self.gradients: list[Tensor | None] = []
        self.prepares: list[tuple[Launches, Tensor]] = []  # for each chunk of a batch, as `orthogonalize` takes them
        self.applies: Launches = []
        self._build(batches(entries, state, self.operands.groups))

    def _build(self, found: Mapping[Batch, Mapping[Part, Tables]]) -> None:
        """Divide the memory, and make the launches."""
        from impl.kernels import iteration

        tables = [each.matrices for parts in found.values() for each in parts.values()]
        # The bits of the largest magnitudes in each matrix's update direction, in its orthogonalized update, and in its update
        # direction of the last step.
        self.flags = torch.zeros(3, sum(map(len, tables)), dtype=torch.int32, device=self.device)
        self.members = torch.cat(tables)[:, 0]  # which parameter each is in
        counts = [sum(len(each.matrices) for each in parts.values()) for parts in found.values()]
        chunks = [iteration.chunk(B, key.m, key.n) for key, B in zip(found, counts, strict=True)]
        sizes = [B * iteration.batch_numbers(key.m, key.n) for key, B in zip(found, counts, strict=True)]
        sizes.append(max(c * iteration.scratch_numbers(key.m, key.n) for key, c in zip(found, chunks, strict=True)))
        self.arena = torch.empty(sum(sizes), dtype=torch.float16, device=self.device)
        *memory, scratch = self.arena.split(sizes)
        flags = self.flags.split(counts, dim=1)
        for (key, parts), B, chunk, numbers, flag in zip(found.items(), counts, chunks, memory, flags, strict=True):
            O = iteration.batch(numbers, B, key.m, key.n)
            for first in range(0, B, chunk):
                self._prepare_chunk(key, parts, O, slice(first, min(first + chunk, B)), scratch, flag)
            self._apply_batch(parts, O)
        self._free()

    def _source(self, part: Part, table: Tensor) -> Any:
        form = (part.rows, part.columns, part.weight, part.gradient)
        return self.operands.source(part.group, form, part.rows > part.columns, part.aligned, table)

    def _prepare_chunk(
        self, key: Batch, parts: Mapping[Part, Tables], O: Tensor, chunk: slice, memory: Tensor, flag: Tensor
    ) -> None:
        """The launches from gradients to orthogonalized matrices for O[chunk]."""
        from impl.kernels import iteration
        from impl.kernels.prepare import prepare

        norms = iteration.norms(chunk.stop - chunk.start, key.m, self.device)
        largest, finite, guess = flag[:, chunk]
        X, launches, Q = iteration.iteration(O[chunk], key.m, key.schedule, key.eps, memory, *norms, largest, finite)
        before: Launches = []
        for part, where, table in _spread(parts):
            low, high = max(chunk.start, where.start), min(chunk.stop, where.stop)
            if low < high:
                source = self._source(part, table.matrices[low - where.start : high - where.start])
                here = slice(low - chunk.start, high - chunk.start)
                before += prepare(source, largest[here], guess[here], X[here])
        self.prepares.append(([*before, *launches], Q))

    def _apply_batch(self, parts: Mapping[Part, Tables], O: Tensor) -> None:
        """The launches from O to weights and states."""
        from impl.kernels.apply import apply
        from impl.kernels.variance import variance

        for part, where, (table, V) in _spread(parts):
            group, row_scale = self.operands.groups[part.group], None
            if V is not None:
                squares, row_scale = torch.zeros(2, len(table), part.rows, dtype=torch.float32, device=self.device)
                there = (part.rows, part.columns, V, self.operands.pointers, len(self.entries), self.code)
                self.applies += variance(O[where], *there, group["normuon_beta2"], squares, row_scale)
            scale = lr_scale(part.rows, part.columns, group["adjust_lr_fn"])
            self.applies.append(apply(self._source(part, table), O[where], self.code, scale, row_scale))

    def prepare(self, state: States, grad_scale: Any) -> None:
        """MOM and ORTH of all matrices; `magnitudes` then tells what was finite. Writes nothing of the optimizer's."""
        from impl.kernels.prepare import renew

        with torch.cuda.device(self.device):
            self._read(state, grad_scale)
            self.arena.untyped_storage().resize_(self.arena.numel() * 2)
            renew(self.flags)
            for launches, Q in self.prepares:
                operands.orthogonalize(launches, Q)

    def magnitudes(self) -> tuple[list[Tensor], list[Tensor]]:
        """The largest magnitudes in each matrix's update direction, and in its orthogonalized update: (B,) float32."""
        before, after, _ = self.flags.view(torch.float32)
        return [before], [after]

    def culprits(self) -> list[Tensor]:
        """The parameters with a matrix in which something is not finite; waits for the device."""
        bad = ~self.flags[:2].view(torch.float32).isfinite().all(0)
        return [self.entries[i][1] for i in sorted(set(self.members[bad].tolist()))]

    def apply(self, code: Tensor | None) -> None:
        """VAR to STEP of all matrices, as far as the decision allows; frees the memory of the step."""
        with torch.cuda.device(self.device):
            self.code.zero_() if code is None else self.code.copy_(code, non_blocking=True)
            for run in self.applies:
                run()
        self._free()

    def _read(self, state: States, grad_scale: Any) -> None:
        """Tell the kernels where everything is in this step, and the options that may have changed."""
        parameters = [p for _, p in self.entries]
        self.gradients = [None if p.grad is None else p.grad.to(gradient_dtype(p)).contiguous() for p in parameters]
        momenta, averages = ([state[p].get(key) for p in parameters] for key in ("momentum_buffer", "variance_buffer"))
        # A graph is to write what it was captured with, and others, from then on, what its replays have overwritten.
        self.captured = self.captured or torch.cuda.is_current_stream_capturing()
        tensors = (*parameters, *momenta, *self.gradients, *averages)
        self.operands.read(groups_of(self.entries), tensors, grad_scale, self.captured)

    def _free(self) -> None:
        self.arena.untyped_storage().resize_(0)
        self.gradients = []


def _spread(parts: Mapping[Part, Tables]) -> Iterator[tuple[Part, slice, Tables]]:
    """Each part with its place in the batch."""
    ends = accumulate(len(table.matrices) for table in parts.values())
    for (part, table), end in zip(parts.items(), ends, strict=True):
        yield part, slice(end - len(table.matrices), end), table
