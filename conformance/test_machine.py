# SPDX-License-Identifier: Apache-2.0
"""A run in which anything may happen, in any order, beside the reference, which replays the steps that were taken."""

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import reference
from conformance import accept
from conformance.campaign import gradients
from conformance.steps import parameters, take
from conformance.strategies import HYPER, seeds, tensor
from conformance.target import Target
from conformance.targets.reference import Target as Reference

pytestmark = pytest.mark.filterwarnings("ignore:.*skipped:RuntimeWarning")
# float64, in which target and reference differ by rounding alone however long the run.
SHAPES = ((5, 7), (6, 4), (9,))
HYPERS = (HYPER, replace(HYPER, normuon_beta2=0.9), replace(HYPER, algorithm="adamw"))
bad = st.sampled_from([float("nan"), float("inf"), float("-inf")])
# Which parameters have a gradient.
present = st.tuples(*[st.booleans()] * len(SHAPES))


def build(target, hypers, device):
    named = parameters([tensor(shape, i, torch.float64) for i, shape in enumerate(SHAPES)], device)
    optimizer = target.optimizer(named[:1], hypers[0])
    for pair, hyper in zip(named[1:], hypers[1:], strict=True):
        optimizer.add_param_group(target.group([pair], hyper))
    return named, optimizer


class Machine(RuleBasedStateMachine):
    target: Target
    device: torch.device

    def __init__(self):
        super().__init__()
        self.named, self.optimizer = build(self.target, HYPERS, self.device)
        # The reference is never told of what it should skip.
        self.replay, self.right = build(Reference(), [replace(hyper, skip_nonfinite=False) for hyper in HYPERS], "cpu")
        for group in self.right.param_groups:
            for p in group["params"]:
                self.right.initialize(p, group)
        self.initial = [p.detach().clone() for _, p in self.replay]
        self.skipped = {"found_inf": 0, "gradient": 0, "orthogonalization": 0}

    def draw(self, seed, present):
        return [G if there else None for G, there in zip(gradients(self.named, seed), present, strict=True)]

    @rule(seed=seeds, present=present)
    def step(self, seed, present):
        step = self.draw(seed, present)
        take(self.optimizer, self.named, step)
        take(self.right, self.replay, step)

    @rule(seed=seeds, where=st.integers(0, len(SHAPES) - 1), value=bad)
    def poisoned_gradient(self, seed, where, value):
        step = gradients(self.named, seed)
        step[where].view(-1)[seed % step[where].numel()] = value
        take(self.optimizer, self.named, step)
        self.skipped["gradient"] += 1

    @rule(seed=seeds, present=present.filter(lambda there: there[0] or there[1]), value=bad)
    def poisoned_orthogonalization(self, seed, present, value):
        step = self.draw(seed, present)
        with self.target.orthogonalizing(value):
            take(self.optimizer, self.named, step)
        self.skipped["orthogonalization"] += 1
        for (_, p), G, hyper in zip(self.replay, step, HYPERS, strict=True):
            if G is not None and hyper.algorithm == "muon":
                M = self.right.state[p]["momentum_buffer"]
                M.copy_(reference.momentum(M, G, hyper.momentum, hyper.nesterov)[0])

    @rule(seed=seeds, present=present)
    def told(self, seed, present):
        self.optimizer.found_inf = torch.ones((), device=self.device)
        take(self.optimizer, self.named, self.draw(seed, present))
        self.optimizer.found_inf = None
        self.skipped["found_inf"] += 1

    @rule(seed=seeds, clip=st.sampled_from([0.1, 1.0, 100.0]))
    def clipped(self, seed, clip):
        step = gradients(self.named, seed)
        for (_, p), G in zip(self.named, step, strict=True):
            p.grad = G.to(self.device)
        self.target.clip(self.optimizer, clip, "own", 0.0)
        self.optimizer.step()
        step[-1] *= reference.clip_coefficient(math.hypot(*step[-1].tolist()), clip, 0.0)
        take(self.right, self.replay, step)

    @rule(seed=seeds, threshold=st.sampled_from([1.0, 3.0, 10.0]), clip=st.sampled_from([None, 0.5]))
    def chained(self, seed, threshold, clip):
        chain = self.target.chain([self.optimizer], clip_grad=clip, grad_norm_skip_threshold=threshold)
        step = gradients(self.named, seed)
        for (_, p), G in zip(self.named, step, strict=True):
            p.grad = G.to(self.device)
        chain.step()
        norm = math.hypot(*step[-1].tolist())
        assert self.target.skipped(chain) == {"threshold": int(norm > threshold)}
        if norm > threshold:
            for (_, p), G in zip(self.named, step, strict=True):
                accept.same_bits(actual=p.grad, expected=G)
            self.skipped["found_inf"] = self.target.skipped(self.optimizer)["found_inf"]
            return
        step[-1] *= reference.clip_coefficient(norm, clip or math.inf, 0.0)
        take(self.right, self.replay, step)

    @rule(lr=st.sampled_from([0.0, 0.01, 0.1]))
    def learning_rate(self, lr):
        for group in (*self.optimizer.param_groups, *self.right.param_groups):
            group["lr"] = lr

    @rule()
    def save_and_load(self):
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        named, fresh = build(self.target, HYPERS, self.device)
        with torch.no_grad():
            for (_, p), (_, q) in zip(named, self.named, strict=True):
                p.copy_(q)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        self.named, self.optimizer = named, fresh
        self.skipped = dict.fromkeys(self.skipped, 0)

    @rule()
    def deep_copy(self):
        self.named, self.optimizer = copy.deepcopy((self.named, self.optimizer))

    @invariant()
    def agrees(self):
        precision = self.target.precision(torch.float64, self.device)
        for (_, p), (_, q), before in zip(self.named, self.replay, self.initial, strict=True):
            accept.step(before=before, actual=p, expected=q, precision=precision)
        assert self.target.skipped(self.optimizer) == self.skipped


@pytest.mark.clause("SKIP-1", "SKIP-2", "SKIP-5", "SKIP-6", "CLIP-1", "CLIP-2", "CLIP-7", "STATE-2", "STATE-5")
def test_any_run_is_the_run_of_its_accepted_steps(skipping: Target, device):
    class Bound(Machine):
        pass

    Bound.target, Bound.device = skipping, device
    run_state_machine_as_test(Bound, settings=settings(max_examples=40, stateful_step_count=15))
