# SPDX-License-Identifier: Apache-2.0
"""What the kernels do for an optimizer's matrices on one GPU: which are batched, where, and the launches, made once.

`kernels` is imported where it is used, so that the package needs no Triton.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from impl.layout import Layout, cut, matrices
from impl.options import algorithms, lr_scale
from impl.schedules import schedule
from impl.skip import scalar
from impl.state import form

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEPPED = ("lr", "weight_decay", "momentum")  # options that may change from step to step
Entry = tuple[Mapping[str, Any], Tensor]  # a group and a parameter of it
States = Mapping[Tensor, Mapping[str, Tensor]]


@lru_cache
def usable(device: torch.device) -> bool:
    """Whether the kernels run on this device."""
    return device.type == "cuda" and find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def planned(group: Mapping[str, Any]) -> list[Tensor]:
    """The parameters of a group whose matrices the kernels step: dense ones on a GPU, but for float64."""
    waits = isinstance(group["eps"], Tensor) and group["eps"].is_cuda  # the kernels want it on the host
    if waits or "muon" not in algorithms(group):
        return []
    dense = (p for p in group["params"] if type(p) in (Tensor, Parameter) and usable(p.device))
    return [p for p in dense if p.dtype in DTYPES and p.is_contiguous() and p.numel()]


class Part(NamedTuple):
    """What matrices have in common that one launch may serve."""

    group: int
    rows: int
    columns: int
    weight: torch.dtype
    gradient: torch.dtype
    aligned: bool


Tables = Mapping[Part, tuple[Tensor, Tensor | None]]


def signature(entries: Sequence[Entry], state: States, scaled: bool) -> tuple[Any, ...]:
    """All that a plan depends on. Values that change from step to step, and addresses, it reads again in each."""
    options = ("ns_coefficients", "ns_steps", "eps", "nesterov", "adjust_lr_fn", "layout", "normuon_beta2")
    unique = {id(group): group for group, _ in entries}
    groups = {key: repr([group[option] for option in options]) for key, group in unique.items()}
    numbers = {key: i for i, key in enumerate(groups)}
    members = tuple((numbers[id(group)], p.shape, p.dtype, gradient_dtype(p), aligned(p, state[p])) for group, p in entries)
    return scaled, tuple(groups.values()), members


def gradient_dtype(p: Tensor) -> torch.dtype:
    """What the kernels will read p's gradient as."""
    dtype = p.dtype if p.grad is None else p.grad.dtype
    return dtype if dtype in DTYPES else torch.float32


def aligned(p: Tensor, state: Mapping[str, Tensor]) -> bool:
    """Whether p, its gradient and its momentum begin at multiples of 16 bytes."""
    tensors = (p, p.grad, state.get("momentum_buffer"))
    return all(T is None or T.data_ptr() % 16 == 0 for T in tensors)


def orthogonalize(launches: Sequence[Callable[[], None]], Q: Tensor) -> None:
    """Run the launches of a batch; Q is the last one's left factor, (B, m, m) but for padding."""
    for run in launches:
        run()


def plans(
    old: Mapping[torch.device, "Plan"], entries: Sequence[Entry], state: States, scaled: bool
) -> dict[torch.device, "Plan"]:
    """A plan for each device of the entries: the old one where it fits."""
    by_device = defaultdict(list)
    for group, p in entries:
        by_device[p.device].append((group, p))
    new = {}
    for device, those in by_device.items():
        key = signature(those, state, scaled)
        new[device] = old[device] if device in old and old[device].signature == key else Plan(those, state, scaled, key)
        new[device].entries = those
    return new


class Plan:
    """Prepares and applies the matrices of `entries`, all on one device, whether or not they have a gradient.

    Between steps it holds a few numbers for each matrix; in a step, 2 bytes for each of their entries, and scratch memory.
    """

    def __init__(self, entries: Sequence[Entry], state: States, scaled: bool, key: tuple[Any, ...]) -> None:
        self.signature, self.entries = key, entries
        self.device = entries[0][1].device
        self.groups = list({id(group): group for group, _ in entries}.values())
        self.hyper = torch.zeros(len(self.groups), 4, dtype=torch.float64, device=self.device)
        self.values: list[list[float | None]] = [[None] * 4 for _ in self.groups]
        self.addresses = [0] * (4 * len(entries))
        self.pointers = torch.zeros(len(self.addresses) + 8, dtype=torch.int64, device=self.device)
        self.grad_scale = torch.ones((), device=self.device) if scaled else None
        self.code = torch.zeros((), dtype=torch.uint8, device=self.device)
        self.gradients: list[Tensor | None] = []
        batches = self._batches(entries, state)
        counts = [sum(len(table) for table, _ in parts.values()) for parts in batches.values()]
        self.flags = torch.zeros(2, sum(counts), dtype=torch.int32, device=self.device)
        # The parameter that each column of the flags belongs to.
        self.members = torch.cat([table[:, 0] for parts in batches.values() for table, _ in parts.values()])
        self._build(batches, counts, len(entries))

    def _batches(self, entries: Sequence[Entry], state: States) -> dict[tuple[Any, ...], Tables]:
        """For each shape and schedule, the parts and where their matrices are, and NorMuon's averages."""
        from impl.kernels import places

        found: dict[tuple[Any, ...], dict[Part, list[tuple[Tensor, Tensor | None]]]]
        found = defaultdict(lambda: defaultdict(list))
        number = {id(group): i for i, group in enumerate(self.groups)}
        for index, (group, p) in enumerate(entries):
            layout = Layout.of(group["layout"])
            views = cut(layout, torch.empty(p.shape, device="meta"))
            averages = cut(layout, torch.empty(form(group, "variance_buffer", p)[0], device="meta"))
            for (section, view), (_, V) in zip(views, averages, strict=True):
                if section.algorithm != "muon":
                    continue
                rows, columns = matrices(section, view).shape[1:]
                plan = schedule(group["ns_coefficients"], group["ns_steps"])
                straight = aligned(p, state[p]) and places.aligned(section, view)
                part = Part(number[id(group)], rows, columns, p.dtype, gradient_dtype(p), straight)
                table = places.places(index, section, view, self.device)
                normuon = None if group["normuon_beta2"] is None else places.places(index, section, V, self.device)
                found[min(rows, columns), max(rows, columns), plan, float(group["eps"])][part].append((table, normuon))
        return {
            key: {
                part: (torch.cat([table for table, _ in t]), None if t[0][1] is None else torch.cat([V for _, V in t]))
                for part, t in parts.items()
            }
            for key, parts in found.items()
        }

    def _build(self, batches: Mapping[tuple[Any, ...], Tables], counts: list[int], parameters: int) -> None:
        """Divide the memory, and make the launches."""
        from impl.kernels import iteration

        sizes = [B * iteration.batch_numbers(*key[:2]) for key, B in zip(batches, counts, strict=True)]
        chunks, needed = [], 0
        for (m, n, *_), B in zip(batches, counts, strict=True):
            chunks.append(iteration.chunk(B, m, n))
            needed = max(needed, chunks[-1] * iteration.scratch_numbers(m, n))
        self.arena = torch.empty(sum(sizes) + needed, dtype=torch.float16, device=self.device)
        *memory, scratch = self.arena.split([*sizes, needed])
        self.prepares: list[tuple[list[Callable[[], None]], Tensor]] = []  # for each chunk of a batch
        self.applies: list[Callable[[], None]] = []
        flags = self.flags.split(counts, dim=1)
        for (key, parts), B, chunk, numbers, flag in zip(batches.items(), counts, chunks, memory, flags, strict=True):
            O = iteration.batch(numbers, B, *key[:2])
            tables = [(part, *table) for part, table in parts.items()]
            for first in range(0, B, chunk):
                self._prepare_chunk(key, tables, O, first, min(first + chunk, B), scratch, flag, parameters)
            self._apply_batch(tables, O, parameters)
        self._free()

    def _source(self, part: Part, table: Tensor, parameters: int) -> Any:
        from impl.kernels.prepare import Source

        nesterov, hyper = self.groups[part.group]["nesterov"], self.hyper[part.group]
        shape = (part.rows, part.columns, part.weight, part.gradient)
        return Source(table, self.pointers, parameters, *shape, True, nesterov, part.aligned, hyper, self.grad_scale)

    def _prepare_chunk(
        self, key: tuple[Any, ...], tables: list[Any], O: Tensor, first: int, end: int, memory: Tensor, flag: Tensor, n: int
    ) -> None:
        """The launches from gradients to orthogonalized matrices for O[first:end]."""
        from impl.kernels import iteration
        from impl.kernels.prepare import largest, prepare

        m, _, plan, eps = key
        norms = iteration.norms(end - first, m, self.device)
        biggest, finite = flag[:, first:end]
        X, launches, Q = iteration.iteration(O[first:end], m, plan, eps, memory, *norms, biggest, finite)
        at, before = 0, []
        for part, table, _ in tables:
            low, high = max(first, at), min(end, at + len(table))
            if low < high:
                source = self._source(part, table[low - at : high - at], n)
                here = slice(low - first, high - first)
                before += [largest(source, biggest[here]), prepare(source, biggest[here], X[here])]
            at += len(table)
        self.prepares.append(([*before, *launches], Q))

    def _apply_batch(self, tables: list[Any], O: Tensor, parameters: int) -> None:
        """The launches from O to weights and states."""
        from impl.kernels.apply import apply
        from impl.kernels.variance import variance

        at = 0
        for part, table, V in tables:
            group, rows, mine = self.groups[part.group], None, O[at : at + len(table)]
            if V is not None:
                squares, rows = torch.zeros(2, len(table), part.rows, device=self.device)
                where = (part.rows, part.columns, V, self.pointers, parameters, self.code)
                self.applies += variance(mine, *where, group["normuon_beta2"], squares, rows)
            scale = lr_scale(part.rows, part.columns, group["adjust_lr_fn"])
            self.applies.append(apply(self._source(part, table, parameters), mine, self.code, scale, rows))
            at += len(table)

    def prepare(self, state: States, grad_scale: Any) -> None:
        """MOM and ORTH of all matrices; `magnitudes` then tells what was finite. Writes nothing of the optimizer's."""
        with torch.cuda.device(self.device):
            self._read(state, grad_scale)
            self.arena.untyped_storage().resize_(self.arena.numel() * 2)
            self.flags.zero_()
            for launches, Q in self.prepares:
                orthogonalize(launches, Q)

    def magnitudes(self) -> tuple[Tensor, Tensor]:
        """The largest magnitude of each matrix's update direction, and of its orthogonalized update: (B,) float32."""
        before, after = self.flags.view(torch.float32)
        return before, after

    def culprits(self) -> list[Tensor]:
        """The parameters with a matrix in which something is not finite; waits for the device."""
        bad = ~self.flags.view(torch.float32).isfinite().all(0)
        return [self.entries[i][1] for i in set(self.members[bad].tolist())]

    def apply(self, code: Tensor | None) -> None:
        """VAR to STEP of all matrices, as far as the decision allows; frees the memory of the step."""
        with torch.cuda.device(self.device):
            self.code.zero_() if code is None else self.code.copy_(code, non_blocking=True)
            for run in self.applies:
                run()
        self._free()

    def _read(self, state: States, grad_scale: Any) -> None:
        """Tell the kernels where everything is in this step, and the options that may have changed."""
        from impl.kernels.places import point

        self.groups = list({id(group): group for group, _ in self.entries}.values())
        self.gradients = [None if p.grad is None else p.grad.to(gradient_dtype(p)).contiguous() for _, p in self.entries]
        states = [state[p] for _, p in self.entries]
        tensors = [
            *(p for _, p in self.entries),
            *(each.get("momentum_buffer") for each in states),
            *self.gradients,
            *(each.get("variance_buffer") for each in states),
        ]
        addresses = [0 if T is None else T.data_ptr() for T in tensors]
        again = torch.cuda.is_current_stream_capturing()  # a graph is to write what it was captured with
        point(self.pointers, [-1] * len(addresses) if again else self.addresses, addresses)
        self.addresses = addresses
        if self.grad_scale is not None:
            self.grad_scale.copy_(scalar(grad_scale, self.device))
        for values, hyper, group in zip(self.values, self.hyper, self.groups, strict=True):
            options = [*(group[option] for option in STEPPED), -1.0 if group["maximize"] else 1.0]
            for i, option in enumerate(options):
                if isinstance(option, Tensor) and option.is_cuda:
                    hyper[i].copy_(option.reshape(()))
                    values[i] = None
                elif again or values[i] != float(option):
                    values[i] = number = float(option)
                    hyper[i].fill_(number)

    def _free(self) -> None:
        self.arena.untyped_storage().resize_(0)
        self.gradients = []
