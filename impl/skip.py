# SPDX-License-Identifier: Apache-2.0
"""The decision whether a step is taken: on the device, once for all parameters, the same on all ranks.   [SPEC: SKIP]"""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# What a step can come to, as the number on the device: the largest that any parameter or rank has decides.
TAKEN, ORTHOGONALIZATION, GRADIENT, FOUND_INF = range(4)
REASONS = {"orthogonalization": ORTHOGONALIZATION, "gradient": GRADIENT, "found_inf": FOUND_INF}
FAILURES = {
    ORTHOGONALIZATION: "in {} an orthogonalized update was not finite, and no weight has changed",
    GRADIENT: "in {} a gradient, or an average made of it, was not finite, and nothing has changed",
}


def largest(T: Tensor) -> Tensor:
    """The largest magnitude in T, without dimensions: not finite if and only if an entry is not. Takes no memory."""
    return torch.linalg.vector_norm(T, float("inf")) if T.numel() else T.new_zeros(())


def nonfinite(magnitudes: Sequence[Tensor], device: torch.device) -> Tensor:
    """Whether any of these is NaN or infinite: a bool on `device`."""
    finite = [T.isfinite().to(device, non_blocking=True) for T in magnitudes]
    return ~torch.stack(finite).all() if finite else torch.zeros((), dtype=torch.bool, device=device)


def agree(code: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """The largest `code` of all ranks of the group, by one all-reduce of one byte.   [SPEC: SKIP-8]

    Args:
        code: a uint8 of no dimensions, on a device that the group's backend can reduce; it is overwritten.
        process_group: all the ranks that must decide alike; None for this process alone.
    """
    if process_group is not None:
        dist.all_reduce(code, op=dist.ReduceOp.MAX, group=process_group)
    return code


class Guard:
    """Decides, counts, and tells the host later.

    `counts` holds the number of steps for each thing that a step can come to, int64 on the device of the decision.
    """

    def __init__(self, skip_nonfinite: bool, process_group: dist.ProcessGroup | None, dump: str | os.PathLike[str] | None):
        if not isinstance(skip_nonfinite, bool):
            raise ValueError(f"skip_nonfinite should be True or False but is: {skip_nonfinite!r}")
        self.skip_nonfinite, self.process_group, self.dump = skip_nonfinite, process_group, dump
        self.counts = torch.zeros(1 + len(REASONS), dtype=torch.int64)
        self.told = [0] * len(self.counts)  # the counts of which the host was warned last
        self.copy: Tensor | None = None  # of counts, in pinned memory, once `copied` has happened
        self.copied: torch.cuda.Event | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guard":
        # A process group cannot be copied; the copy of an optimizer decides with the same ranks.
        twin = Guard(self.skip_nonfinite, self.process_group, self.dump)
        twin.counts, twin.told = self.counts.clone(), list(self.told)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "copy": None, "copied": None}

    def decide(
        self, states: Sequence[Tensor], updates: Sequence[Tensor], found_inf: Tensor | None, device: torch.device
    ) -> Tensor | None:
        """What the step comes to, a uint8 on `device`; None where nothing could keep it from being taken.

        Args:
            states: the largest magnitudes in what momentum and averages would become.
            updates: those in the orthogonalized updates.
            found_inf: not zero to skip the step; None for zero.
        """
        if not self.skip_nonfinite and found_inf is None:
            return None
        code = torch.zeros((), dtype=torch.uint8, device=device)
        if self.skip_nonfinite:
            code = torch.maximum(nonfinite(updates, device) * ORTHOGONALIZATION, nonfinite(states, device) * GRADIENT)
        if found_inf is not None:
            code = torch.maximum(code, (found_inf.reshape(()).to(device, non_blocking=True) != 0) * FOUND_INF)
        code = agree(code.to(torch.uint8), self.process_group)
        self._count(code)
        return code

    def _count(self, code: Tensor) -> None:
        self.counts = self.counts.to(code.device)
        self.counts += torch.arange(len(self.counts), device=code.device) == code
        if code.is_cuda and not torch.cuda.is_current_stream_capturing():
            if self.copy is None:
                self.copy, self.copied = torch.zeros_like(self.counts, device="cpu", pin_memory=True), torch.cuda.Event()
            self.copy.copy_(self.counts, non_blocking=True)
            self.copied.record()  # type: ignore[union-attr]

    def wants_dump(self, code: Tensor | None) -> bool:
        """Whether this decision is to be written down; waits for the device if there may be something to write."""
        return self.dump is not None and code is not None and int(code) in FAILURES

    def write_dump(self, culprits: dict[str, dict[str, Tensor]]) -> None:
        """Save the first failure that is this rank's."""
        if culprits and self.dump is not None:
            torch.save(culprits, self.dump)
            self.dump = None

    def look(self, wait: bool) -> None:
        """Warn, on the group's first rank, when steps have failed.   [SPEC: SKIP-5]

        Args:
            wait: wait for the device; without it, look only at what is known already.
        """
        if wait or not self.counts.is_cuda:
            counts = self.counts.tolist()
        elif torch.cuda.is_current_stream_capturing() or self.copied is None or not self.copied.query():
            return
        else:
            counts = self.copy.tolist()  # type: ignore[union-attr]
        failed, known = (sum(each[code] for code in FAILURES) for each in (counts, self.told))
        # At the first, and whenever there are twice as many: never silent, never a line for every step.
        if failed.bit_length() > known.bit_length():
            self.told = counts
            if self.process_group is None or dist.get_rank(self.process_group) == 0:
                what = "; ".join(text.format(counts[code]) for code, text in FAILURES.items() if counts[code])
                warnings.warn(
                    f"Muon has skipped {failed} step{'s' * (failed > 1)}: {what} (see Muon.skipped)",
                    RuntimeWarning,
                    stacklevel=3,
                )
