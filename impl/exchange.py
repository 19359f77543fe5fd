# SPDX-License-Identifier: Apache-2.0
"""How the parts of matrices travel to the ranks that orthogonalize them, and back.   [SPEC: DIST-1]

Matrices of one shape travel together, in rounds: one all-to-all there and one back, either left out where nothing would
travel. A part is a block of a buffer: as many rows as the matrix, laid on its side if that makes it wide, has in this part,
each of a multiple of 8 numbers; then, for NorMuon, numbers for each of the parameter's rows.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from impl.gram import orthogonalize_parts
from impl.placement import Boxes, assign, work
from impl.schedules import Schedule
from impl.shards import Matrix, Rect, restrict

ROUND = 2**28  # entries of matrices that a rank orthogonalizes in a round, unless a matrix has more


class Key(NamedTuple):
    """What the matrices of a round have in common: all that matters to their orthogonalization, `shard_mode`, the size m x n
    or n x m, m <= n, and whether anything travels, there and back."""

    schedule: Schedule
    eps: float
    normuon_beta2: float | None
    dtype: torch.dtype  # of states
    wire: torch.dtype  # of what travels
    mode: str
    m: int = 0
    n: int = 0
    there: bool = True
    back: bool = True


class Job(NamedTuple):
    """A matrix of parameter number `entry`, whose boxes are `held`, and the ranks that orthogonalize it."""

    number: int
    entry: int
    matrix: Matrix
    held: Boxes
    owners: tuple[int, ...] = ()

    @property
    def tall(self) -> bool:
        return self.matrix.rows > self.matrix.columns

    def home(self, rank: int) -> int:
        """Who gives a rank its part of the result."""
        return rank if rank in self.owners else self.owners[0]


class Block(NamedTuple):
    """A part of a matrix in a buffer: `height` rows of `stride` numbers, then `averages` numbers, from `start` on."""

    job: Job
    rect: Rect
    start: int
    height: int
    stride: int
    averages: int

    @property
    def size(self) -> int:
        return (self.height + -(-self.averages // self.stride)) * self.stride

    def wide(self, buffer: Tensor) -> Tensor:
        """The part as it lies there: of a matrix with no more rows than columns."""
        rows = buffer[self.start : self.start + self.height * self.stride].view(self.height, self.stride)
        return rows[:, : self.corner[3]]

    def entries(self, buffer: Tensor) -> Tensor:
        """The part as it lies in the parameter."""
        return self.wide(buffer).mT if self.job.tall else self.wide(buffer)

    def average(self, buffer: Tensor, dtype: torch.dtype) -> Tensor:
        """NorMuon's averages of its rows, (1, rows) of their dtype; in buffers of float16 (2, rows), with room for more."""
        start = self.start + self.height * self.stride
        return buffer[start : start + self.averages].view(dtype).view(-1, self.rect.rows)

    def of_rows(self, T: Tensor) -> Tensor:
        """Of numbers for all rows of its matrix, those for its own."""
        return T[self.rect.row : self.rect.row + self.rect.rows]

    @property
    def corner(self) -> tuple[int, int, int, int]:
        """Where it is in its matrix as that lies: row, column, rows, columns."""
        row, column, rows, columns = self.rect[:4]
        return (column, row, columns, rows) if self.job.tall else (row, column, rows, columns)

    def place(self, X: Tensor) -> Tensor:
        """Its entries of its matrix, (m, n)."""
        row, column, rows, columns = self.corner
        return X[row : row + rows, column : column + columns]


Parts = Iterable[tuple[int, Job, Rect]]  # parts of matrices, each with the rank to which it goes or from which it comes


class Side:
    """The blocks of one buffer, rank by rank, and how many numbers each rank has of it."""

    def __init__(self, parts: Parts, world: int, averages: int) -> None:
        by_rank: list[list[tuple[Job, Rect]]] = [[] for _ in range(world)]
        for rank, job, rect in parts:
            by_rank[rank].append((job, rect))
        self.blocks: list[Block] = []
        self.sizes: list[int] = []
        self.size = 0
        for those in by_rank:
            before = self.size
            # Equal ones next to each other, so that they can be moved together.
            for job, rect in sorted(those, key=lambda part: (part[1].rows, part[1].columns)):
                height, width = (rect.columns, rect.rows) if job.tall else (rect.rows, rect.columns)
                block = Block(job, rect, self.size, height, max(8, -(-width // 8) * 8), averages * rect.rows)
                self.blocks.append(block)
                self.size += block.size
            self.sizes.append(self.size - before)


class Round:
    """Matrices that are orthogonalized at the same time, by as many ranks as own some of them.

    `held` are the blocks of this rank's parts by who gives them back; `sent`, of those that it sends; `got`, of what comes
    to it; `given`, of what it gives back; `mine`, the matrices that it orthogonalizes, in the order of its batch.
    """

    def __init__(self, key: Key, jobs: Sequence[Job], me: int, group: dist.ProcessGroup) -> None:
        self.key, self.group, self.me = key, group, me
        self.jobs = jobs = sorted(jobs, key=lambda job: not job.tall)
        self.mine = [job for job in jobs if me in job.owners]
        self.index = {job.number: b for b, job in enumerate(self.mine)}
        averages = 1 if key.wire == key.dtype else 2 * key.dtype.itemsize // key.wire.itemsize
        averages = 0 if key.normuon_beta2 is None else averages

        def sends(job: Job, rank: int, owner: int) -> bool:
            return rank == owner if key.mode == "distributed" else job.held.sender(rank, owner) == rank

        def side(parts: Parts) -> Side:
            return Side(parts, dist.get_world_size(group), averages)

        # Averages go back to all ranks that hold the row, also to those that hold none of its columns.
        rows, mine = averages > 0, self.mine
        self.held = side((job.home(me), job, x) for job in jobs for x in job.held.of(job.matrix, me, rows))
        ours = [(job, x) for job in jobs for x in job.held.of(job.matrix, me)]
        self.sent = side((o, job, x) for job, x in ours for o in job.owners if sends(job, me, o))
        self.got = side((r, job, x) for job in mine for r, x in job.held.all(job.matrix) if sends(job, r, me))
        self.given = side((r, job, x) for job in mine for r, x in job.held.all(job.matrix, rows) if job.home(r) == me)
        at = {(block.job.number, block.rect): block for block in self.held.blocks}
        pairs = [(at[block.job.number, block.rect], block) for block in self.sent.blocks]
        # Where nobody holds a copy, what is sent lies in the held buffer as it should.
        self.packing = [] if all(source.start == target.start for source, target in pairs) else pairs

    def send(self, held: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Send this rank's parts to the matrices' owners: what comes here, once the work is done."""
        sent = held[: self.sent.size]
        if self.packing:
            sent = held.new_empty(self.sent.size)
            for source, target in self.packing:
                sent[target.start : target.start + target.size] = held[source.start : source.start + source.size]
        if not self.key.there:
            return sent, None
        got, sizes = held.new_empty(self.got.size), (self.got.sizes, self.sent.sizes)
        return got, dist.all_to_all_single(got, sent, *sizes, group=self.group, async_op=True)

    def to_give(self, held: Tensor) -> Tensor:
        """A buffer for what this rank gives back; if nothing travels, the one in which it should be in the end."""
        return held.new_empty(self.given.size) if self.key.back else held

    def give(self, given: Tensor, held: Tensor) -> dist.Work | None:
        """Give the parts of the results back; they are in `held` once the work is done."""
        if not self.key.back:
            return None
        return dist.all_to_all_single(held, given, self.held.sizes, self.given.sizes, group=self.group, async_op=True)

    def orthogonalize_parts(self, got: Tensor) -> list[Tensor]:
        """The orthogonalized parts of this rank in matrices that are nowhere whole, in the order of `got`."""
        across = {job.number: job.held.cut_rows(job.matrix) for job in self.jobs}
        pieces: dict[int, list[Tensor]] = {job.number: [] for job in self.jobs}
        for block in self.got.blocks:
            pieces[block.job.number].append(block.entries(got))
        parts = []
        for job in self.jobs:
            nothing = (0, job.matrix.columns) if across[job.number] else (job.matrix.rows, 0)
            X = torch.cat(pieces[job.number] or [got.new_empty(nothing)])
            parts.append(X.mT if across[job.number] else X)
        counted = [job.held.first(self.me) for job in self.jobs]
        done = orthogonalize_parts(parts, counted, self.key.schedule, self.key.eps, self.group)
        apart = {
            job.number: iter((O.mT if across[job.number] else O).split([len(X) for X in pieces[job.number]]))
            for job, O in zip(self.jobs, done, strict=True)
            if pieces[job.number]
        }
        return [next(apart[block.job.number]) for block in self.got.blocks]


def rounds(found: Sequence[tuple[int, Matrix, Boxes, Key]], group: dist.ProcessGroup) -> list[Round]:
    """The rounds in which matrices, each with its parameter's number and what ranks hold of that, are orthogonalized.

    The result depends on nothing but what all ranks know.
    """
    world, me = dist.get_world_size(group), dist.get_rank(group)
    jobs: list[tuple[Key, Job]] = []
    for entry, matrix, held, key in found:
        if key.mode == "blockwise":
            for piece, ranks in held.copies.items():
                if (block := restrict(matrix, piece)) is not None:
                    jobs.append((key, Job(len(jobs), entry, block, held, tuple(ranks))))
        else:
            jobs.append((key, Job(len(jobs), entry, matrix, held)))
    holders = [job.held.holders(job.matrix, key.normuon_beta2 is not None) for key, job in jobs]
    covers = [job.held.covers(job.matrix) for _, job in jobs]
    free = [i for i, (key, _) in enumerate(jobs) if key.mode == "owned"]
    costs = [work(*sorted(jobs[i][1].matrix.size)) for i in free]
    owners = dict(zip(free, assign(costs, [covers[i] for i in free], world), strict=True))
    batches: dict[Key, list[Job]] = defaultdict(list)
    for i, (key, job) in enumerate(jobs):
        those = (owners[i],) if i in owners else job.owners or holders[i]
        if key.mode == "distributed" and covers[i] == holders[i]:
            key = key._replace(mode="duplicated")  # whole wherever it is
        there = key.mode != "distributed" and not set(those) <= set(covers[i])
        back = len(holders[i]) > len(those) or not set(holders[i]) <= set(those)
        m, n = sorted(job.matrix.size)
        batches[key._replace(m=m, n=n, there=there, back=back)].append(job._replace(owners=those))
    order = sorted(batches.items(), key=lambda item: item[0].m * item[0].n * len(item[1]))
    # Nothing hides the first round's way there and the last one's way back, so small ones are at both ends.
    order = [*order[:1], *order[2:], *order[1:2]]
    return [Round(key, each, me, group) for key, these in order for each in _portions(key, these)]


def _portions(key: Key, jobs: Sequence[Job]) -> list[list[Job]]:
    """A batch in as many rounds as keep every owner's matrices within ROUND."""
    by_owner: dict[Any, list[Job]] = defaultdict(list)
    for job in jobs:
        by_owner[job.owners].append(job)
    capacity = max(1, ROUND // (key.m * key.n))
    number = max(-(-len(each) // capacity) for each in by_owner.values())
    portions: list[list[Job]] = [[] for _ in range(number)]
    for each in by_owner.values():
        for k, portion in enumerate(portions):
            portion += each[len(each) * k // number : len(each) * (k + 1) // number]
    return portions
