# SPDX-License-Identifier: Apache-2.0
"""Cases of parameters on several ranks, taken there and in one process. MESHES holds meshes and placements of every kind."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from conformance import accept
from conformance.steps import expected
from conformance.strategies import HYPER, tensor
from conformance.target import Hyper, Target
from conformance.worlds import Log, threads

PLACEMENTS: dict[str, Any] = {"R": Replicate(), "P": Partial(), **{f"S{dim}": Shard(dim) for dim in range(4)}}
PLACEMENTS["F0"] = _StridedShard(0, split_factor=2)  # FSDP2's rows of what a second dimension has divided before
MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "1 rank": ((1,), ("S0",)),
    "2 by rows": ((2,), ("S0",)),
    "2 by columns": ((2,), ("S1",)),
    "3 by rows": ((3,), ("S0",)),
    "3 by columns": ((3,), ("S1",)),
    "4 by rows": ((4,), ("S0",)),
    "4 by columns": ((4,), ("S1",)),
    "4 copies": ((4,), ("R",)),
    "4 replicas": ((4,), ()),
    "8 by rows": ((8,), ("S0",)),
    "2x2 by rows, copied": ((2, 2), ("R", "S0")),
    "2x2 by rows and columns": ((2, 2), ("S0", "S1")),
    "2x2 by columns and rows": ((2, 2), ("S1", "S0")),
    "2x2 by rows twice": ((2, 2), ("S0", "S0")),
    "2x2 by rows, over tensor parallel": ((2, 2), ("F0", "S0")),
    "2x3 by columns, copied": ((2, 3), ("R", "S1")),
    "2x2x2 by rows, copied, by columns": ((2, 2, 2), ("S0", "R", "S1")),
}
Part = tuple[Tensor, tuple[slice, ...]]  # of a tensor, and where it is in that


@dataclass(frozen=True)
class Weight:
    """A parameter: its shape and the options of its group that differ from the case's."""

    shape: tuple[int, ...]
    layout: dict[str, Any] | None = None
    algorithm: str = "muon"


@dataclass(frozen=True)
class Case:
    """Some steps of some parameters on a mesh of ranks."""

    mesh: tuple[int, ...]
    placements: tuple[str, ...]  # keys of PLACEMENTS, one for each dimension of the mesh; none for plain tensors on `replicas`
    weights: tuple[Weight, ...]
    hyper: Hyper = HYPER
    dtype: torch.dtype = torch.float32
    seed: int = 0
    steps: int = 2
    missing: frozenset[tuple[int, int, int]] = frozenset()  # (step, rank, weight) without a gradient
    poison: frozenset[tuple[int, int, int]] = frozenset()  # (step, rank, weight) whose gradient holds a NaN
    partial: bool = False  # whether gradients come as sums over the mesh's last dimension
    order: tuple[int, ...] = ()  # of the ranks in the mesh, if it is not theirs

    @property
    def size(self) -> int:
        return math.prod(self.mesh)


@dataclass
class Outcome:
    """What became of a rank: its parts of weights and states by name, its counters, and its collectives."""

    parts: dict[str, Part]
    skipped: dict[str, int]
    log: list[tuple[str, int]]


def spread(T: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> Any:
    """This rank's part of T as a DTensor, without a collective."""
    at = where(T.shape, mesh, placements)
    own = T[at].clone().to(mesh.device_type)
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=T.shape, stride=T.stride())


def where(shape: torch.Size, mesh: DeviceMesh, placements: Any) -> tuple[slice, ...]:
    """Where this rank's part is."""
    size, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))


def part(T: Tensor) -> Part:
    if isinstance(T, DTensor):
        with torch.no_grad():
            own = T.to_local()
        return own.cpu().clone(), where(T.shape, T.device_mesh, T.placements)
    return T.detach().cpu().clone(), ()


def options(case: Case, weight: Weight) -> Hyper:
    return replace(case.hyper, layout=weight.layout, algorithm=weight.algorithm)


def weight(case: Case, i: int) -> Tensor:
    return tensor(case.weights[i].shape, case.seed + i, case.dtype)


def gradient(case: Case, step: int, i: int) -> Tensor:
    return tensor(case.weights[i].shape, case.seed + 100 * (step + 1) + i, case.dtype)


def construct(target: Target, case: Case, values: list[Tensor], replicas: Any = None) -> tuple[list[nn.Parameter], Any]:
    """Parameters with these values, and an optimizer with a group for each."""
    named = [(f"w{i}", nn.Parameter(W)) for i, W in enumerate(values)]
    optimizer = target.optimizer(named[:1], options(case, case.weights[0]), None, replicas)
    for each, kind in zip(named[1:], case.weights[1:], strict=True):
        optimizer.add_param_group(target.group([each], options(case, kind)))
    return [p for _, p in named], optimizer


def alone(target: Target, case: Case, device: Any = "cpu") -> Outcome:
    """The case in one process, which holds everything: a gradient is missing if it is on all ranks."""
    parameters, optimizer = construct(target, case, [weight(case, i).to(device) for i in range(len(case.weights))])
    for step in range(case.steps):
        for i, p in enumerate(parameters):
            G = gradient(case, step, i)
            for rank in range(case.size):
                at = _at(case, rank, p.shape)
                G[at] = torch.where(torch.tensor((step, rank, i) in case.missing), 0.0, G[at])
                G[at] = torch.where(torch.tensor((step, rank, i) in case.poison), float("nan"), G[at])
            gone = all((step, rank, i) in case.missing for rank in range(case.size))
            p.grad = None if gone else G.to(device)
        optimizer.step()
    return outcome(target, parameters, optimizer, [])


def _at(case: Case, rank: int, shape: torch.Size) -> tuple[slice, ...]:
    """Where a rank's part is, without the rank."""
    at = [slice(0, n) for n in shape]
    coordinates = [rank // math.prod(case.mesh[d + 1 :]) % case.mesh[d] for d in range(len(case.mesh))]
    for placement, count, coordinate in zip(case.placements, case.mesh, coordinates, strict=bool(case.placements)):
        if placement.startswith("S"):
            dim = int(placement[1:])
            first, length = at[dim].start, at[dim].stop - at[dim].start
            chunk = -(-length // count)
            at[dim] = slice(first + min(length, chunk * coordinate), first + min(length, chunk * (coordinate + 1)))
    return tuple(at)


def begin(target: Target, case: Case, device: str, mesh: DeviceMesh | None = None) -> tuple[list[nn.Parameter], Any]:
    """This rank's parameters and optimizer."""
    values = [weight(case, i) for i in range(len(case.weights))]
    if not case.placements:
        return construct(target, case, [W.to(device) for W in values], dist.group.WORLD)
    if mesh is None:
        ranks = torch.tensor(case.order or range(case.size)).view(case.mesh)
        mesh = DeviceMesh(device, ranks, mesh_dim_names=tuple("abc")[: ranks.ndim])
    return construct(target, case, [spread(W, mesh, [PLACEMENTS[name] for name in case.placements]) for W in values])


def give(case: Case, rank: int, step: int, parameters: list[nn.Parameter], factor: float = 1.0) -> None:
    """The gradients of one of the case's steps, times a factor."""
    for i, p in enumerate(parameters):
        p.grad = None if (step, rank, i) in case.missing else _gradient(case, step, i, p, rank) * factor


def take(case: Case, rank: int, step: int, parameters: list[nn.Parameter], optimizer: Any, factor: float = 1.0) -> None:
    """One of the case's steps."""
    give(case, rank, step, parameters, factor)
    optimizer.step()


def together(rank: int, target: Target, case: Case, device: str = "cpu", factor: float = 1.0) -> Outcome:
    """The case on this rank."""
    parameters, optimizer = begin(target, case, device)
    log = Log()
    with nullcontext() if dist.get_backend() == "threaded" else log:
        for step in range(case.steps):
            take(case, rank, step, parameters, optimizer, factor)
    return outcome(target, parameters, optimizer, log.found)


def clipped(rank: int, target: Target, case: Case, device: str, clip_norm: str) -> tuple[list[Tensor | None], list[Part]]:
    """The norms and this rank's parts of the gradients of a first step after these have been clipped."""
    parameters, optimizer = begin(target, case, device)
    found = [_gradient(case, 0, i, p, rank) for i, p in enumerate(parameters)]
    for p, G in zip(parameters, found, strict=True):
        p.grad = G
    norms = target.clip(optimizer, 3.0, clip_norm, 0.0)
    return [None if N is None else N.cpu() for N in norms], list(map(part, found))


def _gradient(case: Case, step: int, i: int, p: Tensor, rank: int) -> Tensor:
    G = gradient(case, step, i)
    if not isinstance(p, DTensor):
        G[...] = torch.where(torch.tensor((step, rank, i) in case.poison), float("nan"), G)
        return G.to(p.device)
    D = spread(G, p.device_mesh, list(p.placements))
    if (step, rank, i) in case.poison:
        D.to_local().fill_(float("nan"))
    if case.partial and p.placements[-1].is_replicate():
        share = D.to_local() * (p.device_mesh.get_coordinate() or [0])[-1]  # of 0 and 1
        return DTensor.from_local(share, p.device_mesh, [*p.placements[:-1], Partial()], run_check=False)
    return D


def outcome(target: Target, parameters: list[nn.Parameter], optimizer: Any, log: list[tuple[str, int]]) -> Outcome:
    parts = {f"w{i}": part(p) for i, p in enumerate(parameters)}
    for i, p in enumerate(parameters):
        parts |= {f"w{i}.{key}": part(torch.as_tensor(T)) for key, T in sorted(optimizer.state.get(p, {}).items())}
    return Outcome(parts, target.skipped(optimizer) if target.skips else {}, list(log))


def assemble(found: list[Outcome], name: str, shape: torch.Size) -> Tensor:
    """A tensor from all ranks' parts, of which copies must agree to the bit.   [SPEC: DIST-4]"""
    __tracebackhide__ = True
    T, seen = found[0].parts[name][0].new_zeros(shape), torch.zeros(shape, dtype=torch.bool)
    for each in found:
        own, at = each.parts[name]
        at = at if at and own.shape != shape else tuple(slice(0, n) for n in shape)
        if seen[at].any():
            accept.same_bits(actual=own[seen[at]], expected=T[at][seen[at]])
        T[at], seen[at] = own, True
    assert seen.all(), f"no rank has some part of {name}"
    return T


def accept_as_alone(target: Target, device: torch.device, case: Case, bits: bool) -> None:
    """All ranks' parts together are what one process has: to the bit, states included, or as far as the reference's step."""
    __tracebackhide__ = True
    accept_parts(target, device, case, threads(case.size, together, target, case, device.type), bits)


def accept_parts(target: Target, device: torch.device, case: Case, found: list[Outcome], bits: bool) -> None:
    __tracebackhide__ = True
    for name, (T, _) in alone(target, case, device).parts.items():
        if bits:
            accept.same_bits(actual=assemble(found, name, T.shape), expected=T)
        elif "." not in name:
            i, whole = int(name[1:]), assemble(found, name, T.shape)
            before, steps = weight(case, i), [[gradient(case, step, i)] for step in range(case.steps)]
            right = expected([before], steps, options(case, case.weights[i]))[0]
            accept.step(before=before, actual=whole, expected=right, precision=target.precision(case.dtype, device))
