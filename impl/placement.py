# SPDX-License-Identifier: Apache-2.0
"""What every rank holds of a parameter, and which one orthogonalizes a matrix; nothing here communicates.   [SPEC: DIST]"""

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from heapq import heapify, heapreplace
from itertools import product
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as shape_and_offset

from impl.layout import Layout
from impl.shards import Box, Matrix, Rect, box, matrices, part, rows

SHARD_MODES = ("owned", "duplicated", "distributed", "blockwise")


def local(T: Tensor) -> Tensor:
    """This rank's part."""
    return T.to_local() if isinstance(T, DTensor) else T


def own_gradient(p: Tensor) -> Tensor | None:
    """This rank's part of p's gradient, which may still have to be summed over ranks."""
    G = p.grad
    if isinstance(p, DTensor) and isinstance(G, DTensor) and G.placements != p.placements:
        G = G.redistribute(placements=p.placements)
    return None if G is None else local(G)


def group_of(p: Tensor, replicas: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The process group of all ranks on which a parameter lies; None for this rank alone."""
    if not isinstance(p, DTensor):
        return replicas
    mesh: DeviceMesh = p.device_mesh
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size() and dist.group.WORLD is not None:
        return dist.group.WORLD
    return mesh._flatten().get_group()


def check_shards(p: Tensor, layout: Layout, mode: str) -> None:
    """Raise ValueError unless a parameter's placements and its group's shard_mode fit.   [SPEC: DIST-10]"""
    if isinstance(p, DTensor):
        held = boxes(p, layout, p.device_mesh.mesh.flatten().tolist())
        for matrix in matrices(layout, p.shape) if mode == "distributed" else ():
            held.cut_rows(matrix)


def own_sections(p: DTensor, layout: Layout, T: Tensor) -> list[tuple[str, Tensor]]:
    """The parts of this rank's part of p, each with its algorithm."""
    ranks = p.device_mesh.mesh.flatten().tolist()
    held, me = boxes(p, layout, ranks), ranks.index(dist.get_rank())
    every = matrices(layout, p.shape)
    return [(matrix.section.algorithm, rect.of(rows(layout, T))) for matrix in every for rect in held.of(matrix, me)]


def _intervals(shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[Any, ...]) -> tuple[Any, ...]:
    """(offset, size) at every coordinate of a mesh, in order; ValueError if a rank's part is no run in a dimension."""
    found = [shape_and_offset(shape, mesh, list(at), placements)[::-1] for at in product(*map(range, mesh))]
    for dim, length in enumerate(shape):
        end = 0
        for start, size in sorted({(offset[dim], size[dim]) for offset, size in found if size[dim]}):
            if start != end:
                raise ValueError(f"placements {placements} on a mesh {mesh} leave gaps in a rank's part of dimension {dim}")
            end = start + size
        if end != length:
            raise ValueError(f"placements {placements} on a mesh {mesh} do not cover dimension {dim}")
    return tuple(found)


class Boxes:
    """What every rank of a process group holds of a parameter."""

    def __init__(self, held: tuple[Box | None, ...]) -> None:
        self.held = held
        self.copies: dict[Box, list[int]] = defaultdict(list)
        for rank, each in enumerate(held):
            if each is not None:
                self.copies[each].append(rank)
        self.position = {rank: i for ranks in self.copies.values() for i, rank in enumerate(ranks)}
        self.holders, self.covers = lru_cache(None)(self._holders), lru_cache(None)(self._covers)

    def of(self, matrix: Matrix, rank: int, rows: bool = False) -> list[Rect]:
        """The parts of a matrix that a rank holds."""
        return part(matrix, self.held[rank], rows)

    def all(self, matrix: Matrix, rows: bool = False) -> list[tuple[int, Rect]]:
        """The parts of a matrix that each rank holds."""
        return [(rank, rect) for rank in self.holders(matrix, rows) for rect in self.of(matrix, rank, rows)]

    def sender(self, rank: int, owner: int) -> int:
        """Of the ranks that hold what `rank` holds, the one in the replica that the owner is in."""
        mine = self.held[rank]
        same = [rank] if mine is None else self.copies[mine]
        return same[self.position.get(owner, owner) % len(same)]

    def first(self, rank: int) -> bool:
        """Whether, of the ranks that hold what `rank` holds, it is the first."""
        return self.position.get(rank) == 0

    def _holders(self, matrix: Matrix, rows: bool = False) -> tuple[int, ...]:
        """The ranks that hold a part of a matrix."""
        return tuple(sorted(rank for box, ranks in self.copies.items() if part(matrix, box, rows) for rank in ranks))

    def _covers(self, matrix: Matrix) -> tuple[int, ...]:
        """The ranks that hold all of it."""
        whole = matrix.rows * matrix.columns
        return tuple(r for r in self.holders(matrix) if sum(x.rows * x.columns for x in self.of(matrix, r)) == whole)

    def cut_rows(self, matrix: Matrix) -> bool:
        """Whether ranks hold some of a matrix's rows, whole; ValueError unless it is that or some of its columns."""
        held = [self.of(matrix, rank) for rank in self.holders(matrix)]
        if all(sum(rect.rows for rect in rects) == matrix.rows for rects in held):
            return False
        if any(rect.columns < matrix.columns for rects in held for rect in rects):
            raise ValueError(f"shard_mode='distributed' needs matrices cut in one dimension, found {matrix.size} cut in two")
        return True


def boxes(p: Tensor, layout: Layout, ranks: Sequence[int]) -> Boxes:
    """As p's placements say; every rank holds all of it if it is no DTensor."""
    if not isinstance(p, DTensor):
        return _boxes(layout, tuple(p.shape), (), (), (), tuple(ranks))
    mesh = p.device_mesh
    where = (tuple(p.placements), tuple(mesh.shape), tuple(mesh.mesh.flatten().tolist()))
    return _boxes(layout, tuple(p.shape), *where, tuple(ranks))


@lru_cache  # a model has few kinds of parameters
def _boxes(
    layout: Layout,
    shape: tuple[int, ...],
    placements: Any,
    mesh: tuple[int, ...],
    order: tuple[int, ...],
    ranks: tuple[int, ...],
) -> Boxes:
    if not mesh:
        return Boxes((box(layout, shape, [0] * len(shape), shape),) * len(ranks))
    at = dict(zip(order, _intervals(shape, mesh, placements), strict=True))
    return Boxes(tuple(box(layout, shape, *at[rank]) for rank in ranks))


def work(m: int, n: int) -> int:
    """In proportion to what five steps cost for an m x n matrix, m <= n, as kernels/iteration.py takes them."""
    return m * m * (3 * n + 7 * m)


def assign(costs: Sequence[float], candidates: Sequence[Sequence[int]], world: int) -> list[int]:
    """An owner for each matrix: the largest first, each to the rank with the least to do.

    Matrices with candidates, ranks on which they lie whole, go to one of these, and before all others.
    """
    loads, owners = [0.0] * world, [0] * len(costs)
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    for i in order:
        if candidates[i]:
            owners[i] = min(candidates[i], key=loads.__getitem__)
            loads[owners[i]] += costs[i]
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapify(heap)
    for i in order:
        if not candidates[i]:
            load, owners[i] = heap[0]
            heapreplace(heap, (load + costs[i], owners[i]))
    return owners
