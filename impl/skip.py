# SPDX-License-Identifier: Apache-2.0
"""The decision whether a step is taken: on the device, once for all parameters, the same on all ranks.   [SPEC: SKIP]"""

import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from impl.placement import group_of

# What a step can come to, as the number on the device: the largest that any parameter or rank has decides.
TAKEN, ORTHOGONALIZATION, GRADIENT, FOUND_INF = range(4)
REASONS = {"orthogonalization": ORTHOGONALIZATION, "gradient": GRADIENT, "found_inf": FOUND_INF}
FAILURES = {
    ORTHOGONALIZATION: "in {} an orthogonalized update was not finite, and no weight has changed",
    GRADIENT: "in {} a gradient, or an average made of it, was not finite, and nothing has changed",
}


def largest(T: Tensor) -> Tensor:
    """The largest magnitude in T, without dimensions: not finite if and only if an entry is not. Takes no memory."""
    if not T.numel():
        return T.new_zeros(())
    low, high = T.aminmax()  # NaN where there is one; many times faster on a CPU than vector_norm(inf)
    return torch.maximum(high, -low)


def nonfinite(magnitudes: Sequence[Tensor], device: torch.device) -> Tensor:
    """Whether any of these is NaN or infinite: a bool on `device`."""
    alike = defaultdict(list)
    for T in magnitudes:
        alike[T.dtype, T.device].append(T.reshape(-1))
    finite = [torch.cat(each).isfinite().all().to(device, non_blocking=True) for each in alike.values()]
    return ~torch.stack(finite).all() if finite else torch.zeros((), dtype=torch.bool, device=device)


def scalar(value: Tensor | float, device: torch.device) -> Tensor:
    """A number that may be a tensor of one element, as a tensor without dimensions on `device`, without waiting."""
    if isinstance(value, Tensor):
        return value.reshape(()).to(device, non_blocking=True)
    return torch.full((), value, dtype=torch.float64, device=device)


def agree(code: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """The largest `code` of all ranks of the group, by one all-reduce of one byte.   [SPEC: SKIP-8]

    Args:
        code: a uint8 of no dimensions, on a device that the group's backend can reduce; it is overwritten.
        process_group: all the ranks that must decide alike; None for this process alone.
    """
    if process_group is not None:
        dist.all_reduce(code, op=dist.ReduceOp.MAX, group=process_group)
    return code


class Tally:
    """Counts on the device what steps come to, and tells the host later.

    Args:
        who: the class whose steps are counted.
        failures: for each number that a step can come to and that the host should hear of, a line with {} for the count.
        size: one more than the largest number.
    """

    def __init__(self, who: str, failures: dict[int, str], size: int) -> None:
        self.who, self.failures = who, failures
        self.counts = torch.zeros(size, dtype=torch.int64)
        self.told = 0  # the number of failures that the host was warned of last
        self.copy: Tensor | None = None  # of counts, in pinned memory, once `copied` has happened
        self.copied: torch.cuda.Event | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "copy": None, "copied": None}

    def count(self, code: Tensor) -> None:
        """Count a step that came to `code`, on the device where that is."""
        self.counts = self.counts.to(code.device)
        self.counts += torch.arange(len(self.counts), device=code.device) == code
        if code.is_cuda and not torch.cuda.is_current_stream_capturing():
            if self.copy is None:
                self.copy, self.copied = torch.zeros_like(self.counts, device="cpu", pin_memory=True), torch.cuda.Event()
            self.copy.copy_(self.counts, non_blocking=True)
            self.copied.record()  # type: ignore[union-attr]

    def look(self, wait: bool, speak: bool = True) -> None:
        """Warn of the first failure, and whenever there are twice as many: never silent, never a line for every step.

        Args:
            wait: wait for the device; without it, look only at what is known already.
            speak: give the warning, rather than leave that to another rank.
        """
        if wait or not self.counts.is_cuda:
            counts = self.counts.tolist()
        elif torch.cuda.is_current_stream_capturing() or self.copied is None or not self.copied.query():
            return
        else:
            counts = self.copy.tolist()  # type: ignore[union-attr]
        failed = sum(counts[code] for code in self.failures)
        if failed.bit_length() > self.told.bit_length():
            self.told = failed
            if speak:
                what = "; ".join(text.format(counts[code]) for code, text in self.failures.items() if counts[code])
                warning = f"{self.who} has skipped {failed} step{'s' * (failed > 1)}: {what} (see {self.who}.skipped)"
                warnings.warn(warning, RuntimeWarning, stacklevel=4)


class Guard:
    """Decides whether an optimizer's step is taken.

    `process_group` is who decides, and `given` whether the user has said so; `replicas` is kept for the optimizer, which cannot
    copy process groups. `dump` is the path for what the first failure was made of, None once that is written.
    """

    def __init__(
        self,
        skip_nonfinite: bool,
        process_group: dist.ProcessGroup | None,
        replicas: dist.ProcessGroup | None,
        dump: str | os.PathLike[str] | None,
    ) -> None:
        if not isinstance(skip_nonfinite, bool):
            raise ValueError(f"skip_nonfinite should be True or False but is: {skip_nonfinite!r}")
        if dump is not None and not Path(dump).absolute().parent.is_dir():
            raise ValueError(f"dump_nonfinite should be a path in a directory that exists but is: {os.fspath(dump)}")
        self.skip_nonfinite, self.process_group, self.replicas, self.dump = skip_nonfinite, process_group, replicas, dump
        self.given = process_group is not None
        self.tally = Tally("Muon", FAILURES, 1 + len(REASONS))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guard":
        # A process group cannot be copied; the copy of an optimizer decides with the same ranks.
        twin = copy(self)
        twin.tally = deepcopy(self.tally, memo)
        return twin

    def join(self, parameters: Sequence[Tensor]) -> None:
        """Decide with all ranks on which these lie; ValueError if they cannot be one process group's.   [SPEC: DIST-6]"""
        process_group = self.process_group
        for p in parameters:
            group = group_of(p, self.replicas)
            if group is None or group is process_group:
                continue
            new, known = (set(dist.get_process_group_ranks(g)) if g else set() for g in (group, process_group))
            if new > known and not self.given:
                process_group = group
            elif not new <= known:
                raise ValueError(
                    f"a parameter lies on the ranks {sorted(new)}, and the optimizer's steps are decided by the ranks "
                    f"{sorted(known)}; give it a process_group of all ranks that should step together"
                )
        self.process_group = process_group

    def decide(
        self, states: Sequence[Tensor], updates: Sequence[Tensor], found_inf: Tensor | float | None, device: torch.device
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
            code = torch.maximum(code, (scalar(found_inf, device) != 0) * FOUND_INF)
        code = agree(code.to(torch.uint8), self.process_group)
        self.tally.count(code)
        return code

    def wants_dump(self, code: Tensor | None) -> bool:
        """Whether this decision is to be written down; waits for the device if there may be something to write."""
        return self.dump is not None and code is not None and int(code) in FAILURES

    def write_dump(self, culprits: dict[str, dict[str, Tensor]]) -> None:
        """Save what is this rank's in the first failure; where that fails, training is more important."""
        if not culprits or self.dump is None:
            return
        path = os.fspath(self.dump) + ("" if self.process_group is None else f".rank{dist.get_rank()}")
        self.dump = None
        try:
            torch.save(culprits, path)
        except (OSError, RuntimeError) as error:
            warnings.warn(f"dump_nonfinite could not be written: {error}", RuntimeWarning, stacklevel=4)

    def look(self, wait: bool) -> None:
        """Warn, on the group's first rank, when steps have failed.   [SPEC: SKIP-5]"""
        self.tally.look(wait, speak=self.process_group is None or dist.get_rank(self.process_group) == 0)
