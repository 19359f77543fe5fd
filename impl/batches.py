# SPDX-License-Identifier: Apache-2.0
"""Which of an optimizer's matrices a GPU's kernels step, and which of those together."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from impl.layout import Layout, cut, matrices
from impl.options import algorithms
from impl.schedules import Schedule, schedule
from impl.state import form

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Entry = tuple[Mapping[str, Any], Tensor]  # a group and a parameter of it
States = Mapping[Tensor, Mapping[str, Tensor]]


@lru_cache
def usable(device: torch.device) -> bool:
    """Whether the kernels run on this device."""
    if device.type != "cuda" or find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    from impl.kernels import NEW_ENOUGH

    return NEW_ENOUGH


def planned(group: Mapping[str, Any]) -> list[Tensor]:
    """The parameters of a group whose matrices the kernels step: dense ones on a GPU, but for float64."""
    if "muon" not in algorithms(group):
        return []
    dense = (p for p in group["params"] if type(p) in (Tensor, Parameter) and usable(p.device))
    return [p for p in dense if p.dtype in DTYPES and p.is_contiguous() and p.numel()]


def gradient_dtype(p: Tensor) -> torch.dtype:
    """What the kernels will read p's gradient as."""
    dtype = p.dtype if p.grad is None else p.grad.dtype
    return dtype if dtype in DTYPES else torch.float32


def aligned(p: Tensor, state: Mapping[str, Tensor]) -> bool:
    """Whether p, its gradient and its momentum begin at multiples of 16 bytes."""
    tensors = (p, p.grad, state["momentum_buffer"])
    return all(T is None or T.data_ptr() % 16 == 0 for T in tensors)


def signature(entries: Sequence[Entry], state: States, scaled: bool) -> tuple[Any, ...]:
    """All that a plan depends on. Values that change from step to step, and addresses, it reads again in each."""
    options = ("ns_coefficients", "eps", "ns_steps", "nesterov", "adjust_lr_fn", "layout", "normuon_beta2")
    unique = {id(group): group for group, _ in entries}
    groups = {key: repr([group[o] for o in options]) for key, group in unique.items()}
    numbers = {key: i for i, key in enumerate(groups)}
    members = tuple((numbers[id(group)], p.shape, p.dtype, gradient_dtype(p), aligned(p, state[p])) for group, p in entries)
    return scaled, tuple(groups.values()), members


class Batch(NamedTuple):
    """Matrices that are orthogonalized together: m x n or n x m, m <= n."""

    m: int
    n: int
    schedule: Schedule
    eps: float


class Part(NamedTuple):
    """Matrices of a batch that one elementwise launch may serve."""

    group: int
    rows: int
    columns: int
    weight: torch.dtype
    gradient: torch.dtype
    aligned: bool


class Tables(NamedTuple):
    """Where matrices are, and where NorMuon's averages; see kernels/places.py."""

    matrices: Tensor
    averages: Tensor | None


def batches(entries: Sequence[Entry], state: States, groups: Sequence[Any]) -> dict[Batch, dict[Part, Tables]]:
    """The matrices of all entries by batch and part; parts name their group by its place in `groups`."""
    from impl.kernels.places import aligned as rows_aligned
    from impl.kernels.places import places

    found: dict[Batch, dict[Part, list[Tables]]] = defaultdict(lambda: defaultdict(list))
    number = {id(group): i for i, group in enumerate(groups)}
    for index, (group, p) in enumerate(entries):
        layout = Layout.of(group["layout"])
        views = cut(layout, torch.empty(p.shape, device="meta"))
        averages = cut(layout, torch.empty(form(group, "variance_buffer", p)[0], device="meta"))
        for (section, view), (_, V) in zip(views, averages, strict=True):
            if section.algorithm != "muon":
                continue
            rows, columns = matrices(section, view).shape[1:]
            plan = schedule(group["ns_coefficients"], group["ns_steps"])
            batch = Batch(min(rows, columns), max(rows, columns), plan, float(group["eps"]))
            straight = aligned(p, state[p]) and rows_aligned(view, rows)
            part = Part(number[id(group)], rows, columns, p.dtype, gradient_dtype(p), straight)
            normuon = None if group["normuon_beta2"] is None else places(index, section, V, p.device)
            found[batch][part].append(Tables(places(index, section, view, p.device), normuon))
    return {batch: {part: _join(tables) for part, tables in parts.items()} for batch, parts in found.items()}


def _join(tables: Sequence[Tables]) -> Tables:
    averages = [V for _, V in tables if V is not None]
    return Tables(torch.cat([T for T, _ in tables]), torch.cat(averages) if averages else None)
