# SPDX-License-Identifier: Apache-2.0
"""The matrices inside a parameter, as sets of indices.   [SPEC: LAYOUT]"""

from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class Section:
    """`rows` consecutive rows of each group, their algorithm, and the rows of a head where heads are matrices."""

    rows: int
    algorithm: str = "muon"
    head_dim: int | None = None


def matrices(shape, blocks=1, columns=1, groups=1, sections=(), flatten=False):
    """Where the elements of each matrix are in the flattened parameter.   [SPEC: LAYOUT-1, LAYOUT-4]

    Args: shape: of the parameter; the others as in SPEC. A section may be a tuple or dict of Section's fields.
    Returns: (algorithm, indices) for every section in order. indices: (B, m, n) int64, the positions of B matrices
        of one size: block by block, in a block column run by column run, in that head by head.
    Raises: ValueError: the layout does not fit the shape.
    """
    cut = [
        block
        for rows in equal_runs(as_matrix(shape, flatten), blocks, "blocks")
        for block in equal_runs(rows, columns, "columns", dim=1)
    ]
    group_rows = equal_runs(cut[0], groups, "groups")[0].shape[0]
    sections = [as_section(section) for section in sections] or [Section(group_rows)]
    if sum(s.rows for s in sections) != group_rows or min(s.rows for s in sections) < 0:
        raise ValueError(f"sections of {[s.rows for s in sections]} rows do not fill groups of {group_rows} rows")

    result, begin = [], 0
    for section in sections:
        found = []
        for block in cut:
            of_each_group = [group[begin : begin + section.rows] for group in equal_runs(block, groups, "groups")]
            found += heads(torch.cat(of_each_group), section.head_dim)
        result.append((section.algorithm, torch.stack(found)))
        begin += section.rows
    return result


def as_matrix(shape, flatten):
    """The positions of a parameter's elements, seen as a matrix of R rows: (R, n) int64."""
    if len(shape) == 2:
        R, n = shape
    elif len(shape) > 2 and flatten:
        R, n = shape[0], prod(shape[1:])
    elif len(shape) == 3:
        R, n = shape[0] * shape[1], shape[2]
    else:
        raise ValueError(f"a parameter of shape {tuple(shape)} needs 2 dimensions, 3, or more and flatten")
    return torch.arange(R * n).reshape(R, n)


def equal_runs(index, count, name, dim=0):
    """A matrix of positions cut into `count` runs of equally many rows (dim=0) or columns (dim=1)."""
    if count < 1 or index.shape[dim] % count:
        raise ValueError(f"{name}={count} does not divide {index.shape[dim]} {('rows', 'columns')[dim]}")
    return index.tensor_split(count, dim)


def heads(rows, head_dim):
    """One matrix, or one for every `head_dim` rows."""
    if head_dim is None:
        return [rows]
    if head_dim < 1 or rows.shape[0] % head_dim:
        raise ValueError(f"head_dim={head_dim} does not divide the section's {rows.shape[0]} rows")
    return list(rows.split(head_dim))


def as_section(section):
    """A Section, or the tuple or dict of one."""
    match section:
        case dict():
            return Section(**section)
        case tuple() | list():
            return Section(*section)
    return section
