# SPDX-License-Identifier: Apache-2.0
"""Which part of which matrix every rank holds, and who is to orthogonalize it; nothing here communicates.   [SPEC: DIST]"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as shape_and_offset

from impl.layout import Layout, Section, rows_columns

SHARD_MODES = ("owned", "duplicated", "distributed", "blockwise")


class Matrix(NamedTuple):
    """A matrix inside a parameter, as runs of its rows, (first row, number), and as columns.

    `average` is the column of the variance buffer that belongs to it.
    """

    section: Section
    runs: tuple[tuple[int, int], ...]
    left: int
    columns: int
    average: int

    @property
    def rows(self) -> int:
        return sum(count for _, count in self.runs)

    @property
    def size(self) -> tuple[int, int]:
        return self.rows, self.columns


class Box(NamedTuple):
    """Of a parameter's stacks of `height` rows, those from `first` to `last`; of these the rows from `top` to `bottom`, and the
    columns from `left` to `right`. Most parameters are one stack."""

    height: int
    first: int
    last: int
    top: int
    bottom: int
    left: int
    right: int


class Rect(NamedTuple):
    """Where a part of a matrix is: at (row, column) of the matrix, and at (top, left) of the rank's own part, seen as rows."""

    row: int
    column: int
    rows: int
    columns: int
    top: int
    left: int

    def of(self, T: Tensor) -> Tensor:
        """Its entries in a rank's own part, which is given as a matrix of rows."""
        return T[self.top : self.top + self.rows, self.left : self.left + self.columns]


def local(T: Tensor) -> Tensor:
    """This rank's part."""
    return T.to_local() if isinstance(T, DTensor) else T


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


def matrices(layout: Layout, shape: Sequence[int]) -> Iterator[Matrix]:
    """The matrices of a parameter, AdamW's sections among them, in the order of SPEC.md.   [SPEC: LAYOUT]"""
    rows, columns = rows_columns(layout, shape)
    run, n = rows // (layout.blocks * layout.groups), columns // layout.columns
    first = 0
    for section in layout.sections or (Section(run),):
        for block, column in product(range(layout.blocks), range(layout.columns)):
            starts = [(block * layout.groups + group) * run + first for group in range(layout.groups)]
            if section.head_dim is None:
                yield Matrix(section, tuple((start, section.rows) for start in starts), column * n, n, column)
            else:
                heads = (s + h for s in starts for h in range(0, section.rows, section.head_dim))
                yield from (Matrix(section, ((head, section.head_dim),), column * n, n, column) for head in heads)
        first += section.rows


def box(layout: Layout, shape: Sequence[int], offset: Sequence[int], size: Sequence[int]) -> Box | None:
    """What a part of this offset and size is in terms of rows and columns; None if it is empty."""
    if not all(size[:-1]) or (layout.flatten and not size[0]):
        return None
    if layout.flatten or len(shape) == 2:
        width = 1
        for whole, part in zip(shape[2:], size[2:], strict=True):
            if whole != part:
                raise ValueError("only the first two dimensions of a flattened parameter can be sharded")
            width *= whole
        return Box(shape[0], 0, 1, offset[0], offset[0] + size[0], offset[1] * width, (offset[1] + size[1]) * width)
    e, i, j = ((o, o + s) for o, s in zip(offset, size, strict=True))
    return Box(shape[1], *e, *i, *j)


def _overlaps(matrix: Matrix, held: Box) -> Iterator[tuple[int, int, int, int]]:
    """The runs of rows of a matrix that are in a box: row of the matrix, row of the parameter, number, row of the box."""
    row = 0
    for start, count in matrix.runs:
        stack, at = divmod(start, held.height)  # no run leaves its stack
        top, bottom = max(at, held.top), min(at + count, held.bottom)
        if held.first <= stack < held.last and top < bottom:
            above = (stack - held.first) * (held.bottom - held.top) + top - held.top
            yield row + top - at, stack * held.height + top, bottom - top, above
        row += count


def part(matrix: Matrix, held: Box | None, rows: bool = False) -> list[Rect]:
    """The parts of a matrix that are in a box; with `rows`, also rows of which no column is."""
    if held is None:
        return []
    left, right = max(matrix.left, held.left), min(matrix.left + matrix.columns, held.right)
    if left >= right and not rows:
        return []
    place = (left - matrix.left, right - left, left - held.left) if left < right else (0, 0, 0)
    return [Rect(row, place[0], count, place[1], above, place[2]) for row, _, count, above in _overlaps(matrix, held)]


def restrict(matrix: Matrix, held: Box) -> Matrix | None:
    """What of a matrix is in a box, as a matrix of its own; None if nothing is."""
    left, right = max(matrix.left, held.left), min(matrix.left + matrix.columns, held.right)
    runs = tuple((first, count) for _, first, count, _ in _overlaps(matrix, held))
    return matrix._replace(runs=runs, left=left, columns=right - left) if runs and left < right else None


def check_shards(p: Tensor, layout: Layout, mode: str) -> None:
    """Raise ValueError unless a parameter's placements and its group's shard_mode fit.   [SPEC: DIST-10]"""
    if isinstance(p, DTensor):
        if any(place.is_partial() for place in p.placements):
            raise ValueError(f"a weight cannot be a sum over ranks, found {p.placements}")
        held = Boxes(p, layout, p.device_mesh.mesh.flatten().tolist())
        for matrix in matrices(layout, p.shape) if mode == "distributed" else ():
            held.cut_rows(matrix)


def rows(layout: Layout, T: Tensor) -> Tensor:
    """A rank's part as a matrix of rows."""
    height = T.shape[0] if layout.flatten else math.prod(T.shape[:-1])
    return T.view(height, T.numel() // height if height else 0)


def own_sections(p: DTensor, layout: Layout, T: Tensor) -> list[tuple[str, Tensor]]:
    """The parts of this rank's part of p, each with its algorithm."""
    ranks = p.device_mesh.mesh.flatten().tolist()
    held, me = Boxes(p, layout, ranks), ranks.index(dist.get_rank())
    every = matrices(layout, p.shape)
    return [(matrix.section.algorithm, rect.of(rows(layout, T))) for matrix in every for rect in held.of(matrix, me)]


@lru_cache
def _intervals(shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[Any, ...]) -> tuple[Any, ...]:
    """(offset, size) at every coordinate of a mesh, in order; ValueError if a rank's part is no run in a dimension."""
    found = [shape_and_offset(shape, mesh, list(at), placements)[::-1] for at in product(*map(range, mesh))]
    for dim, length in enumerate(shape):
        end = 0
        for start, size in sorted({(offset[dim], size[dim]) for offset, size in found if size[dim]}):
            if start != end:
                raise ValueError(f"placements {placements} on a mesh {mesh} leave gaps in a rank's part of dimension {dim}")
            end = start + size
        if end != length and 0 not in shape:
            raise ValueError(f"placements {placements} on a mesh {mesh} do not cover dimension {dim}")
    return tuple(found)


class Boxes:
    """What every rank of a process group holds of a parameter, as its placements say; all of it if it is no DTensor."""

    def __init__(self, p: Tensor, layout: Layout, ranks: Sequence[int]) -> None:
        self.held: tuple[Box | None, ...] = (box(layout, p.shape, [0] * p.ndim, p.shape),) * len(ranks)
        if isinstance(p, DTensor):
            mesh = p.device_mesh
            found = _intervals(tuple(p.shape), tuple(mesh.shape), tuple(p.placements))
            at = dict(zip(mesh.mesh.flatten().tolist(), found, strict=True))
            self.held = tuple(box(layout, p.shape, *at[rank]) for rank in ranks)
        self.copies: dict[Box, list[int]] = defaultdict(list)
        for rank, each in enumerate(self.held):
            if each is not None:
                self.copies[each].append(rank)

    def of(self, matrix: Matrix, rank: int, rows: bool = False) -> list[Rect]:
        """The parts of a matrix that a rank holds."""
        return part(matrix, self.held[rank], rows)

    def sender(self, rank: int, owner: int) -> int:
        """Of the ranks that hold what `rank` holds, the one in the replica that the owner is in."""
        mine, home = self.held[rank], self.held[owner]
        if mine is None:
            return rank
        same = self.copies[mine]
        return same[(owner if home is None else self.copies[home].index(owner)) % len(same)]

    def first(self, rank: int) -> bool:
        """Whether, of the ranks that hold what `rank` holds, it is the first."""
        mine = self.held[rank]
        return mine is not None and self.copies[mine][0] == rank

    def holders(self, matrix: Matrix, rows: bool) -> list[int]:
        """The ranks that hold a part of a matrix."""
        return sorted(rank for box, ranks in self.copies.items() if part(matrix, box, rows) for rank in ranks)

    def covers(self, matrix: Matrix) -> list[int]:
        """The ranks that hold all of it."""
        sizes = {box: sum(rect.rows * rect.columns for rect in part(matrix, box)) for box in self.copies}
        return sorted(r for box, ranks in self.copies.items() if sizes[box] == matrix.rows * matrix.columns for r in ranks)

    def cut_rows(self, matrix: Matrix) -> bool:
        """Whether ranks hold some of a matrix's rows, whole; ValueError unless it is that or some of its columns."""
        rects = [rect for box in self.copies for rect in part(matrix, box)]
        if all(rect.rows == matrix.rows for rect in rects):
            return False
        if any(rect.columns < matrix.columns for rect in rects):
            raise ValueError(f"shard_mode='distributed' needs matrices cut in one dimension, found {matrix.size} cut in two")
        return True


def assign(costs: Sequence[float], candidates: Sequence[Sequence[int]], world: int) -> list[int]:
    """An owner for each matrix: the largest first, each to the candidate with the least to do.

    Matrices with few candidates, which lie whole on some ranks and should stay there, come before all others.
    """
    loads, owners = [0.0] * world, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (len(candidates[i]) == world, -costs[i])):
        owners[i] = min(candidates[i], key=loads.__getitem__)
        loads[owners[i]] += costs[i]
    return owners
