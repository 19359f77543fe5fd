# SPDX-License-Identifier: Apache-2.0
"""A parameter that is divided among ranks: where, in a rank's part of it, the parts of its matrices are."""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from torch import Tensor

from impl.layout import Layout, Section, rows_columns


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
    """What a part of this offset and size is in terms of rows and columns; None if it has no rows."""
    if not all(size[:1] if layout.flatten else size[:-1]):
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


def rows(layout: Layout, T: Tensor) -> Tensor:
    """A rank's part as a matrix of rows."""
    height = T.shape[0] if layout.flatten else math.prod(T.shape[:-1])
    return T.view(height, T.numel() // height if height else 0)
