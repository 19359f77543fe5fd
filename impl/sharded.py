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

from impl.batches import DTYPES, Entry, States, usable
from impl.exchange import Key, rounds
from impl.layout import Layout
from impl.parts import Parts
from impl.placement import Boxes, boxes, group_of, local, own_gradient
from impl.schedules import schedule
from impl.sharded_plan import ShardedPlan
from impl.shards import Matrix, Rect, matrices, rows
from impl.skip import GRADIENT, ORTHOGONALIZATION
from impl.stages import adamw, adamw_magnitudes, descent, number, write
from impl.state import state_dtype

# Options that a Sharded is made for; others may change from step to step.
DECISIVE = ("algorithm", "ns_coefficients", "ns_steps", "eps", "layout", "shard_mode", "normuon_beta2")


def shared(groups: Sequence[Mapping[str, Any]], replicas: dist.ProcessGroup | None) -> dict[Tensor, dist.ProcessGroup]:
    """The parameters that lie on several ranks, with those ranks."""
    stepped = (p for group in groups for p in group["params"] if p.requires_grad or p.grad is not None)
    found = {p: group_of(p, replicas) for p in stepped}
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
        self.noted: list[bool] = []
        self.elementwise: list[tuple[int, Rect | None]] = []  # AdamW's parts, None for the whole of a parameter
        ranks, me = dist.get_process_group_ranks(group), dist.get_rank(group)
        found: list[tuple[int, Matrix, Boxes, Key]] = []
        for i, ((options, p), layout) in enumerate(zip(entries, self.layouts, strict=True)):
            if options["algorithm"] == "adamw":
                self.elementwise.append((i, None))
                continue
            held = boxes(p, layout, ranks)
            plan = schedule(options["ns_coefficients"], options["ns_steps"])
            fast = usable(self.device) and p.dtype in DTYPES and options["shard_mode"] != "distributed"
            wire = torch.float16 if fast else state_dtype(p)
            kind = Key(plan, float(options["eps"]), options["normuon_beta2"], state_dtype(p), wire, options["shard_mode"])
            for matrix in matrices(layout, p.shape):
                if not all(matrix.size):
                    continue
                if matrix.section.algorithm == "muon":
                    found.append((i, matrix, held, kind))
                else:
                    self.elementwise += [(i, rect) for rect in held.of(matrix, me)]
        every = rounds(found, group)
        self.parts = Parts(entries, self.layouts, [each for each in every if each.key.wire == each.key.dtype])
        self.plan = ShardedPlan(entries, self.layouts, [each for each in every if each.key.wire != each.key.dtype], self.device)

    def prepare(self, state: States, grad_scale: Any) -> None:
        """MOM and ORTH of all matrices, and what the decision depends on. Writes nothing of the optimizer's."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a step of parameters that lie on several ranks cannot be captured in a CUDA graph; take it outside"
            )
        self.state = [state[p] for _, p in self.entries]
        self.gradients = [self._gradient(p) for _, p in self.entries]
        self.directions = {
            i: descent(self.entries[i][0], self.gradients[i], state_dtype(self.entries[i][1]), grad_scale)
            for i in {*self.parts.members, *(i for i, _ in self.elementwise)}
        }
        self._note([p.grad is not None for _, p in self.entries])
        self.weights = [local(p).contiguous() for _, p in self.entries]
        self.parts.prepare(self.state, self.directions)
        bits = self.plan.prepare(self.weights, self.gradients, self.state, grad_scale)
        known = torch.cat([self.there, bits])
        telling = dist.all_reduce(known, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.found: list[tuple[int, Tensor]] = []  # parameter number, largest magnitude in what its averages would become
        for i, rect in self.elementwise:
            parts = (self._part(i, T, rect) for T in (self.directions[i], *self._averages(i)))
            self.found += [(i, T) for T in adamw_magnitudes(self.entries[i][0], *parts)]
        if telling is not None:
            telling.wait()
        self.present = known[: len(self.entries)] != 0
        self.plan.again(known[len(self.entries) :])
        self._orthogonalize()

    def _note(self, noted: list[bool]) -> None:
        """Bring to the device which gradients this rank has; nobody waits, and mostly there is nothing to bring."""
        if noted != self.noted:
            self.noted, gpu = noted, self.device.type == "cuda"
            self.there = torch.tensor(noted, dtype=torch.int32, pin_memory=gpu).to(self.device, non_blocking=True)

    def _gradient(self, p: Tensor) -> Tensor:
        """This rank's part of p's gradient; zero where there is none.   [SPEC: DIST-5]"""
        G = own_gradient(p)
        return torch.zeros_like(local(p), memory_format=torch.contiguous_format) if G is None else G.contiguous()

    def _part(self, i: int, T: Tensor, rect: Rect | None) -> Tensor:
        return T if rect is None else rect.of(rows(self.layouts[i], T))

    def _averages(self, i: int) -> list[Tensor]:
        return [local(self.state[i][key]) for key in ("exp_avg", "exp_avg_sq")]

    def _orthogonalize(self) -> None:
        """Bring all rounds to their owners and back; the last work is still under way."""
        self.returning = []
        queue = [(each, held, worker) for worker in (self.parts, self.plan) for each, held in worker.held()]
        under_way = queue[0][0].send(queue[0][1]) if queue else None
        for k, (each, held, worker) in enumerate(queue):
            assert under_way is not None
            got, work = under_way
            if k + 1 < len(queue):
                under_way = queue[k + 1][0].send(queue[k + 1][1])
            if work is not None:
                work.wait()
            given = each.to_give(held)
            worker.solve(each, got, given)
            self.returning.append((each.give(given, held), given))

    def magnitudes(self) -> tuple[list[Tensor], list[Tensor]]:
        """The largest magnitudes of what states would become, and of this rank's orthogonalized updates."""
        states, updates = self.parts.magnitudes()
        more, others = self.plan.magnitudes()
        return [T for _, T in self.found + states] + more, [T for _, T in updates] + others

    def culprits(self) -> list[Tensor]:
        """The parameters in which this rank has found something that is not finite; waits for the device."""
        found = [i for each in (self.found, *self.parts.magnitudes()) for i, T in each if not bool(T.isfinite())]
        return [self.entries[i][1] for i in sorted({*found, *self.plan.culprits()})]

    def apply(self, code: Tensor | None) -> None:
        """VAR to STEP of this rank's parts, as far as the decision allows; frees the memory of the step."""
        for work, _ in self.returning:
            if work is not None:
                work.wait()
        hold = skip = ~self.present
        if code is not None:
            hold, skip = hold | (code >= GRADIENT), skip | (code >= ORTHOGONALIZATION)
        self.parts.apply(self.weights, hold, skip)
        self.plan.apply(self.present, skip, code)
        self._adamw(skip)
        for (_, p), W in zip(self.entries, self.weights, strict=True):
            if W.data_ptr() != local(p).data_ptr():
                local(p).copy_(W)
        self.state, self.weights, self.gradients, self.directions, self.returning = [], [], [], {}, []

    def _adamw(self, skip: Tensor) -> None:
        # On all ranks, those without a part of an AdamW section among them.
        steps = {i: state["step"] + 1 for i, state in enumerate(self.state) if "step" in state}
        for i, rect in self.elementwise:
            options, W, G = self.entries[i][0], self._part(i, self.weights[i], rect), self._part(i, self.directions[i], rect)
            mean, square = (self._part(i, T, rect) for T in self._averages(i))
            old = {"W": W.to(G.dtype), "exp_avg": mean, "exp_avg_sq": square, "G": G}
            new = adamw(options, old, steps[i], number(options["lr"]) * options["adamw_lr_ratio"])
            for target, value in ((W, new["W"]), (mean, new["exp_avg"]), (square, new["exp_avg_sq"])):
                write(target, value.to(target.dtype), skip[i])
        for i, step in steps.items():
            write(self.state[i]["step"], step, skip[i])
