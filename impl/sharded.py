# SPDX-License-Identifier: Apache-2.0
"""A step of parameters that lie on several ranks: each rank keeps its part of every weight and state, and matrices meet
whole on the rank that orthogonalizes them.   [SPEC: DIST]

The collectives of a step, and their sizes, depend on the parameters alone: one that tells which gradients there are, and
those of exchange.py's rounds. Of a round's two, the first travels while the round before it is orthogonalized, and the
second while the next one is.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from impl.batches import Entry, States
from impl.exchange import Block, Key, Round, rounds
from impl.layout import Layout
from impl.options import lr_scale
from impl.orthogonalize import orthogonalize_batch as orthogonalize
from impl.schedules import schedule
from impl.shards import Boxes, Matrix, Rect, group_of, local, matrices, rows
from impl.skip import GRADIENT, ORTHOGONALIZATION, largest, scalar
from impl.stages import adamw, momentum, normalize_rows, write
from impl.state import state_dtype

# Options that a Sharded is made for; others may change from step to step.
DECISIVE = ("algorithm", "ns_coefficients", "ns_steps", "eps", "layout", "shard_mode", "normuon_beta2")


def direction(group: Mapping[str, Any], p: Tensor, grad_scale: Tensor | float | None) -> Tensor:
    """This rank's part of p's descent gradient, as stages.gradient; zero where there is none.   [SPEC: DIST-5]"""
    G = p.grad
    if isinstance(p, DTensor) and isinstance(G, DTensor) and G.placements != p.placements:
        G = G.redistribute(placements=p.placements)  # a gradient may still have to be summed
    if G is None:
        return torch.zeros_like(local(p), dtype=state_dtype(p), memory_format=torch.contiguous_format)
    G = local(G).to(state_dtype(p)).contiguous()
    if grad_scale is not None:
        G = G / scalar(grad_scale, G.device)
    return -G if group["maximize"] else G


def shared(groups: Sequence[Mapping[str, Any]], replicas: dist.ProcessGroup | None) -> dict[Tensor, dist.ProcessGroup]:
    """The parameters that lie on several ranks, with those ranks."""
    found = {p: group_of(p, replicas) for group in groups for p in group["params"] if p.requires_grad}
    return {p: ranks for p, ranks in found.items() if ranks is not None}


def shardings(
    old: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]], apart: Mapping[Tensor, dist.ProcessGroup]
) -> dict[Any, "Sharded"]:
    """One for the parameters of each set of ranks, the old one where it fits."""
    entries: dict[Any, list[Entry]] = defaultdict(list)
    those: dict[Any, dist.ProcessGroup] = {}
    for group in groups:
        for p in group["params"]:
            if p in apart:
                ranks = tuple(sorted(dist.get_process_group_ranks(apart[p])))
                entries[ranks].append((group, p))
                those.setdefault(ranks, apart[p])
    new = {}
    for ranks, found in entries.items():
        options = [[group[option] for option in DECISIVE] for group in {id(group): group for group, _ in found}.values()]
        key = (repr(options), [(id(group), id(p)) for group, p in found])
        sharded = old.get(ranks)
        new[ranks] = sharded if sharded is not None and sharded.signature == key else Sharded(found, those[ranks], key)
    return new


class Sharded:
    """Prepares and applies `entries`, which lie on the ranks of one process group.

    It has what `plan.Plan` has, and steps its parameters' AdamW sections too.
    """

    def __init__(self, entries: Sequence[Entry], group: dist.ProcessGroup, key: Any) -> None:
        self.entries, self.group, self.signature = entries, group, key
        self.device = local(entries[0][1]).device
        self.layouts = [Layout.of(options["layout"]) for options, _ in entries]
        self.elementwise: list[tuple[int, Rect | None]] = []  # AdamW's parts, None for the whole of a parameter
        ranks, me = dist.get_process_group_ranks(group), dist.get_rank(group)
        found: list[tuple[int, Matrix, Boxes, Key]] = []
        for i, ((options, p), layout) in enumerate(zip(entries, self.layouts, strict=True)):
            if options["algorithm"] == "adamw":
                self.elementwise.append((i, None))
                continue
            held = Boxes(p, layout, ranks)
            plan = schedule(options["ns_coefficients"], options["ns_steps"])
            kind = Key(plan, float(options["eps"]), options["normuon_beta2"], state_dtype(p), options["shard_mode"])
            for matrix in matrices(layout, p.shape):
                if not all(matrix.size):
                    continue
                if matrix.section.algorithm == "muon":
                    found.append((i, matrix, held, kind))
                else:
                    self.elementwise += [(i, rect) for rect in held.of(matrix, me)]
        self.rounds = rounds(found, group, None)

    def prepare(self, state: States, grad_scale: Any) -> None:
        """MOM and ORTH of all matrices, and what the decision depends on. Writes nothing of the optimizer's."""
        self.state = [state[p] for _, p in self.entries]
        present = [p.grad is not None for _, p in self.entries]
        self.present = torch.tensor(present, dtype=torch.uint8, device=self.device)
        self.pending = [dist.all_reduce(self.present, dist.ReduceOp.MAX, group=self.group, async_op=True)]
        self.gradients = [direction(options, p, grad_scale) for options, p in self.entries]
        self.found: list[tuple[int, bool, Tensor]] = []  # parameter number, whether it is an update, largest magnitude
        self.momenta: list[list[Tensor]] = []  # of the blocks of each round
        self.held = [self._direction(each) for each in self.rounds]
        for i, rect in self.elementwise:
            beta2 = self.entries[i][0]["adamw_betas"][1]
            G, mean, square = (self._rows(i, T, rect) for T in (self.gradients[i], *self._averages(i)))
            self.found += [(i, False, largest(G).square() * (1 - beta2) + largest(square) * beta2), (i, False, largest(mean))]
        self._orthogonalize()

    def _rows(self, i: int, T: Tensor, rect: Rect | None) -> Tensor:
        """A part of a tensor that is shaped as parameter number i, or has one number for each of its rows."""
        return T if rect is None else rect.of(rows(self.layouts[i], T))

    def _averages(self, i: int) -> list[Tensor]:
        return [local(self.state[i][key]) for key in ("exp_avg", "exp_avg_sq")]

    def _variance(self, block: Block) -> Tensor:
        """NorMuon's averages of the rows of a part."""
        i, rect, column = block.job.entry, block.rect, block.job.matrix.average
        V = local(self.state[i]["variance_buffer"])
        return V.view(-1, V.shape[-1])[rect.top : rect.top + rect.rows, column : column + 1]

    def _direction(self, each: Round) -> Tensor:
        """A round's parts of U, as they are to be sent."""
        held = torch.empty(each.held.size, dtype=each.key.dtype, device=self.device)
        momenta = []
        for block in each.held.blocks:
            i = block.job.entry
            options, M = self.entries[i][0], self._rows(i, local(self.state[i]["momentum_buffer"]), block.rect)
            M, U = momentum(M, self._rows(i, self.gradients[i], block.rect), options["momentum"], options["nesterov"])
            block.entries(held).copy_(U)
            if block.averages:
                block.average(held, each.key.dtype).copy_(self._variance(block))
            momenta.append(M)
            self.found.append((i, False, largest(M)))
        self.momenta.append(momenta)
        return held

    def _orthogonalize(self) -> None:
        """Bring all rounds to their owners and back; the last work is still under way."""
        under_way = self.rounds[0].send(self.held[0]) if self.rounds else None
        for r, each in enumerate(self.rounds):
            assert under_way is not None
            got, work = under_way
            if r + 1 < len(self.rounds):
                under_way = self.rounds[r + 1].send(self.held[r + 1])
            if work is not None:
                work.wait()
            self.pending.append(each.give(self._solve(each, got), self.held[r]))

    def _solve(self, each: Round, got: Tensor) -> Tensor:
        """ORTH and VAR of the matrices that are this rank's in a round, from what has come and to what is to be given back."""
        key, dtype = each.key, each.key.dtype
        given = got.new_empty(each.given.size)
        if key.mode == "distributed":
            for block, O in zip(each.given.blocks, each.orthogonalize_parts(got), strict=True):
                block.entries(given).copy_(O)
                self.found.append((block.job.entry, True, largest(O)))
            return given
        X = got.new_empty(len(each.mine), key.m, key.n)
        averages = [got.new_empty(job.matrix.rows, 1) for job in each.mine]
        for block in each.got.blocks:
            b = each.index[block.job.number]
            block.place(X[b]).copy_(block.wide(got))
            if block.averages:
                averages[b][block.rect.row : block.rect.row + block.rect.rows] = block.average(got, dtype)
        O = orthogonalize(X, key.schedule, key.eps) if each.mine else X
        for b, job in enumerate(each.mine):
            self.found.append((job.entry, True, largest(O[b])))
            if key.normuon_beta2 is not None:
                upright = (O[b].mT if job.tall else O[b])[None].contiguous()
                N, V = normalize_rows(upright, averages[b][None], key.normuon_beta2)
                O[b], averages[b] = N[0].mT if job.tall else N[0], V[0]
        for block in each.given.blocks:
            b = each.index[block.job.number]
            block.wide(given).copy_(block.place(O[b]))
            if block.averages:
                block.average(given, dtype).copy_(averages[b][block.rect.row : block.rect.row + block.rect.rows])
        return given

    def magnitudes(self) -> tuple[list[Tensor], list[Tensor]]:
        """The largest magnitudes of what states would become, and of this rank's orthogonalized updates."""
        return [T for _, update, T in self.found if not update], [T for _, update, T in self.found if update]

    def culprits(self) -> list[Tensor]:
        """The parameters in which this rank has found something that is not finite; waits for the device."""
        return [self.entries[i][1] for i in sorted({i for i, _, T in self.found if not bool(T.isfinite())})]

    def apply(self, code: Tensor | None) -> None:
        """VAR to STEP of this rank's parts, as far as the decision allows; frees the memory of the step."""
        for work in self.pending:
            if work is not None:
                work.wait()
        skip = self.present == 0
        hold = skip if code is None else skip | (code >= GRADIENT)
        skip = skip if code is None else skip | (code >= ORTHOGONALIZATION)
        weights = [local(p).contiguous() for _, p in self.entries]
        for each, held, momenta in zip(self.rounds, self.held, self.momenta, strict=True):
            for block, M in zip(each.held.blocks, momenta, strict=True):
                i = block.job.entry
                options, lr = self.entries[i][0], self._lr(i)
                write(self._rows(i, local(self.state[i]["momentum_buffer"]), block.rect), M, hold[i])
                if block.averages:
                    write(self._variance(block), block.average(held, each.key.dtype), skip[i])
                scale = lr_scale(block.job.matrix.rows, block.job.matrix.columns, options["adjust_lr_fn"])
                W = self._rows(i, weights[i], block.rect)
                # Products, then a difference: each rounded by itself, so an entry's bits do not depend on its position.
                kept = W.to(each.key.dtype) * (1 - lr * options["weight_decay"])
                write(W, kept.sub_(block.entries(held) * (lr * scale)).to(W.dtype), skip[i])
        self._adamw(weights, skip)
        for (_, p), W in zip(self.entries, weights, strict=True):
            if W.data_ptr() != local(p).data_ptr():
                local(p).copy_(W)
        self.state, self.gradients, self.momenta, self.held, self.pending = [], [], [], [], []

    def _lr(self, i: int) -> Any:
        # In float64, so that 1 - lr * weight_decay is right whatever the dtype of a tensor lr.
        lr = self.entries[i][0]["lr"]
        return lr.reshape(()).double() if isinstance(lr, Tensor) else lr

    def _adamw(self, weights: list[Tensor], skip: Tensor) -> None:
        # On all ranks, those without a part of an AdamW section among them.
        steps = {i: state["step"] + 1 for i, state in enumerate(self.state) if "step" in state}
        for i, rect in self.elementwise:
            options, W = self.entries[i][0], self._rows(i, weights[i], rect)
            mean, square = (self._rows(i, T, rect) for T in self._averages(i))
            G = self._rows(i, self.gradients[i], rect)
            old = {"W": W.to(G.dtype), "exp_avg": mean, "exp_avg_sq": square, "G": G}
            new = adamw(options, old, steps[i], self._lr(i) * options["adamw_lr_ratio"])
            for target, value in ((W, new["W"]), (mean, new["exp_avg"]), (square, new["exp_avg_sq"])):
                write(target, value.to(target.dtype), skip[i])
        for i, step in steps.items():
            write(self.state[i]["step"], step, skip[i])
