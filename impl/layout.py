# SPDX-License-Identifier: Apache-2.0
"""How a parameter is cut into matrices.   [SPEC: LAYOUT]"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

ALGORITHMS = ("muon", "adamw")


@dataclass(frozen=True)
class Section:
    """A run of `rows` rows with an algorithm of its own; with `head_dim`, a matrix for every `head_dim` rows."""

    rows: int
    algorithm: str = "muon"
    head_dim: int | None = None


@dataclass(frozen=True)
class Layout:
    """The matrices inside a fused parameter. Everything is counted in rows and columns of the parameter.

    Args:
        blocks: equal runs of rows, each a matrix of its own: experts (E), or gate and up of each expert (2 E), or heads.
        columns: equal runs of columns, likewise.
        groups: equal runs of rows within a block over which `sections` are interleaved, as in Megatron's grouped QKV.
        sections: runs of rows within a group; a section's rows of all groups make one matrix.
        flatten: see a convolution's (out, in, ...) as (out, in * ...).

    A parameter (E, m, n) counts as E * m rows, so its `blocks` is E or a multiple of it.

    Examples:
        Layout(blocks=128)                                   128 experts, stacked by rows or (128, m, n)
        Layout(sections=(Section(2048), Section(512), Section(512)))    fused q, k, v
    """

    blocks: int = 1
    columns: int = 1
    groups: int = 1
    sections: tuple[Section, ...] = ()
    flatten: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sections", tuple(self.sections))  # a list would do, but has no hash

    @classmethod
    def of(cls, value: "Layout | dict | None") -> "Layout":
        """A layout from what a group holds: one already, the plain data that a state dict keeps, or None."""
        if value is None or isinstance(value, Layout):
            return value or cls()
        try:
            sections = tuple(s if isinstance(s, Section) else Section(**s) for s in value.get("sections", ()))
            return cls(**{**value, "sections": sections})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"layout should be a Layout or a dict of its fields but is: {value!r} ({error})") from error


def check_layout(layout: Layout, shape: Sequence[int], name: str) -> None:
    """Raise ValueError, with the numbers, unless `layout` fits a parameter of `shape`.   [SPEC: LAYOUT-4]"""

    def refuse(what: str) -> None:
        raise ValueError(f"layout of parameter {name} with shape {tuple(shape)} does not fit: {what}; found {layout}")

    counts = [("blocks", layout.blocks), ("columns", layout.columns), ("groups", layout.groups)]
    for section in layout.sections:
        if not isinstance(section, Section) or section.algorithm not in ALGORITHMS:
            refuse(f"sections should be Section(rows, algorithm in {ALGORITHMS}), found {section!r}")
        counts += [("rows of a section", section.rows), ("head_dim", 1 if section.head_dim is None else section.head_dim)]
    for what, count in counts:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            refuse(f"{what} should be an integer >= 1 but is {count!r}")
    if len(shape) < 2:
        refuse("a parameter with fewer than two dimensions has no matrices")
    if len(shape) > 3 and not layout.flatten:
        refuse("more than three dimensions need flatten=True (convolutions)")
    if len(shape) == 3 and not layout.flatten and layout.blocks % max(shape[0], 1):
        refuse(f"blocks should be a multiple of the first dimension, {shape[0]}, but is {layout.blocks}")
    rows, columns = rows_columns(layout, shape)
    if rows % (layout.blocks * layout.groups):
        refuse(f"{rows} rows cannot be cut into {layout.blocks} blocks of {layout.groups} groups")
    if columns % layout.columns:
        refuse(f"{columns} columns cannot be cut into {layout.columns}")
    run = rows // (layout.blocks * layout.groups)
    if layout.sections and sum(s.rows for s in layout.sections) != run:
        refuse(f"sections should add up to {run} rows but add up to {sum(s.rows for s in layout.sections)}")
    for section in layout.sections:
        if section.head_dim is not None and section.rows % section.head_dim:
            refuse(f"head_dim {section.head_dim} should divide its section's {section.rows} rows")


def cut(layout: Layout, T: Tensor) -> list[tuple[Section, Tensor]]:
    """The sections of a contiguous T as views of shape (blocks, columns, groups, rows, n), in order."""
    rows, columns = rows_columns(layout, T.shape)
    run = rows // (layout.blocks * layout.groups)
    runs = T.view(layout.blocks, layout.groups, run, layout.columns, columns // layout.columns)
    runs = runs.permute(0, 3, 1, 2, 4)
    sections = layout.sections or (Section(run),)
    return list(zip(sections, runs.split([s.rows for s in sections], dim=3), strict=True))


def matrices(section: Section, view: Tensor) -> Tensor:
    """The matrices (B, m, n) of a section's view; `reshape` to the view's shape puts a result back in place."""
    blocks, columns, groups, rows, n = view.shape
    if section.head_dim is None:
        return view.reshape(blocks * columns, groups * rows, n)
    return view.reshape(blocks * columns * groups * rows // section.head_dim, section.head_dim, n)


def rows_columns(layout: Layout, shape: Sequence[int]) -> tuple[int, int]:
    """A parameter of this shape as one matrix of rows."""
    if layout.flatten:
        return shape[0], math.prod(shape[1:])
    return math.prod(shape[:-1]), shape[-1]
