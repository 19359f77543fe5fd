# SPDX-License-Identifier: Apache-2.0
"""STATE: what is kept, saved and loaded."""

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.optimizer import Optimizer

from conformance import accept
from conformance.steps import parameters, run, take
from conformance.strategies import DTYPES, HYPER, seeds, shapes, tensor
from conformance.target import Hyper, Named, Target

SHAPE = (6, 4)
MIXED = replace(HYPER, layout={"sections": [{"rows": 4}, {"rows": 2, "algorithm": "adamw"}]})
ADAMW = replace(HYPER, algorithm="adamw")
hypers = pytest.mark.parametrize("hyper", [HYPER, MIXED, ADAMW], ids=["muon", "mixed", "adamw"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def stepped(target: Target, device, hyper: Hyper, dtype=torch.float32, seed=0, count=2) -> tuple[Named, Optimizer]:
    """Parameters and an optimizer after one step."""
    named = parameters([tensor(SHAPE, seed + i, dtype) for i in range(count)], device)
    optimizer = target.optimizer(named, hyper)
    take(optimizer, named, gradients(seed, dtype, count))
    return named, optimizer


def gradients(seed: int, dtype: torch.dtype = torch.float32, count: int = 2) -> list[torch.Tensor]:
    return [tensor(SHAPE, seed + 50 + i, dtype) for i in range(count)]


def file_of(state: dict) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@pytest.mark.clause("STATE-1")
@dtypes
@hypers
def test_state_is_complete_and_typed(target: Target, device, dtype, hyper):
    named = parameters([tensor(SHAPE, i, dtype) for i in range(3)], device)
    optimizer = target.optimizer(named, hyper)
    named[2][1].requires_grad_(False)
    take(optimizer, named, [tensor(SHAPE, 9, dtype), None, None])
    keys = set() if hyper is ADAMW else {"momentum_buffer"}
    keys |= set() if hyper is HYPER else {"exp_avg", "exp_avg_sq", "step"}
    for _, p in named[:2]:
        state = optimizer.state[p]
        assert set(state) == keys
        for key in keys:
            wide = torch.float64 if dtype == torch.float64 and key != "step" else torch.float32
            accept.dtype(actual=state[key], at_least=wide, shape=() if key == "step" else p.shape)
    assert not optimizer.state.get(named[2][1]), "a parameter that requires no gradient has state"


@pytest.mark.clause("STATE-1")
@hypers
def test_no_gradient_no_state(target: Target, device, hyper):
    named = parameters([tensor(SHAPE, 0)], device)
    optimizer = target.optimizer(named, hyper)
    optimizer.step()
    assert not any(optimizer.state.values())


@pytest.mark.clause("STATE-1", "STATE-2")
def test_a_group_added_late_is_saved_too(target: Target, device):
    named, optimizer = stepped(target, device, HYPER)
    late = parameters([tensor(SHAPE, 8)], device)
    optimizer.add_param_group(target.group([("late", late[0][1])], HYPER))
    fresh = target.optimizer(named, HYPER)
    fresh.add_param_group(target.group([("late", late[0][1])], HYPER))
    fresh.load_state_dict(optimizer.state_dict())
    assert accept.equal(fresh.state_dict(), optimizer.state_dict())


@pytest.mark.clause("STATE-2")
@hypers
def test_loaded_state_is_a_copy(target: Target, device, hyper):
    named, optimizer = stepped(target, device, hyper)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    other = target.optimizer(named, hyper)
    other.load_state_dict(saved)
    take(other, named, gradients(5))
    assert accept.equal(saved, kept)


@pytest.mark.clause("STATE-2", "STATE-3")
@dtypes
@hypers
@given(seed=seeds)
def test_resuming_changes_no_bit(target: Target, device, dtype, hyper, seed):
    named, optimizer = stepped(target, device, hyper, dtype, seed)
    saved = torch.load(file_of(optimizer.state_dict()), weights_only=True)
    others = parameters([p.detach() for _, p in named], device)
    fresh = target.optimizer(others, hyper)
    fresh.load_state_dict(saved)
    for i in range(2):
        take(optimizer, named, gradients(seed + i, dtype))
        take(fresh, others, gradients(seed + i, dtype))
    for (_, p), (_, q) in zip(named, others, strict=True):
        accept.same_bits(actual=q, expected=p)
        assert accept.equal(fresh.state[q], optimizer.state[p])


@pytest.mark.clause("STATE-3")
@hypers
def test_state_dict_is_plain_data_and_deterministic(target: Target, device, hyper):
    _, optimizer = stepped(target, device, hyper)
    first, second = optimizer.state_dict(), optimizer.state_dict()
    assert accept.equal(first, second)
    loaded = torch.load(file_of(first), weights_only=True)
    assert accept.equal(loaded, first)

    def check(value):
        assert value is None or isinstance(value, (torch.Tensor, int, float, str, bool, dict, list, tuple)), repr(value)
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
            check(part)

    check(first)


@pytest.mark.clause("STATE-3")
def test_a_number_of_numpys_is_plain_data(validating: Target, device):
    _, optimizer = stepped(validating, device, HYPER)
    for number in (np.float64(0.5), np.int64(0)):  # as a scheduler may leave it
        optimizer.param_groups[0]["lr"] = number
        assert torch.load(file_of(optimizer.state_dict()), weights_only=True)["param_groups"][0]["lr"] == number


def corrupt(edit):
    """A function that edits a copy of a state dict."""

    def edited(saved: dict) -> dict:
        saved = copy.deepcopy(saved)
        edit(saved)
        return saved

    return edited


# What may have happened to a checkpoint -> how, and what the message has to name.
CORRUPTIONS = {
    "entry missing": (lambda s: s["state"].pop(1), "w1"),
    "buffer missing": (lambda s: s["state"][1].pop("momentum_buffer"), "w1"),
    "buffer extra": (lambda s: s["state"][0].update(stray=torch.zeros(SHAPE)), "stray"),
    "buffer misshapen": (lambda s: s["state"][0].update(momentum_buffer=torch.zeros(4, 6)), "w0"),
    "buffer of another kind": (lambda s: s["state"][0].update(momentum_buffer="nothing"), "w0"),
    "buffer of integers": (lambda s: s["state"][0].update(momentum_buffer=torch.zeros(SHAPE, dtype=torch.int64)), "w0"),
    "buffer wider": (lambda s: s["state"][0].update(momentum_buffer=torch.zeros(SHAPE, dtype=torch.float64)), "float64"),
    "buffer not finite": (lambda s: s["state"][1]["momentum_buffer"].fill_(float("nan")), "w1"),
    "names permuted": (lambda s: s["param_groups"][0]["param_names"].reverse(), "w1"),
    "parameter missing": (lambda s: s["param_groups"][0]["params"].pop(), "group"),
    "state of an unknown parameter": (lambda s: s["state"].update({7: s["state"][0]}), "7"),
    "group missing": (lambda s: s["param_groups"].pop(), "group"),
    "learning rate negative": (lambda s: s["param_groups"][0].update(lr=-1.0), "-1"),
    "momentum not a number": (lambda s: s["param_groups"][0].update(momentum=float("nan")), "nan"),
    "no state at all": (lambda s: s.pop("state"), "state"),
}


@pytest.mark.clause("STATE-4")
@pytest.mark.parametrize(("edit", "word"), CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_corrupt_state_is_refused_and_nothing_changes(validating: Target, device, edit, word):
    named, optimizer = stepped(validating, device, HYPER)
    saved = corrupt(edit)(optimizer.state_dict())
    take(optimizer, named, gradients(3))

    def unchanged():
        return copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for _, p in named]

    accept.refuses(lambda: optimizer.load_state_dict(saved), ValueError, word, unchanged=unchanged)


@pytest.mark.clause("STATE-4")
def test_state_of_another_algorithm_is_refused(validating: Target, device):
    _, adamw = stepped(validating, device, ADAMW)
    named = parameters([tensor(SHAPE, 0), tensor(SHAPE, 1)], device)
    optimizer = validating.optimizer(named, HYPER)
    accept.refuses(lambda: optimizer.load_state_dict(adamw.state_dict()), ValueError, "adamw")


@pytest.mark.clause("STATE-4")
@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (lambda s: s["param_groups"][0].update(layout=None), "layout"),
        (lambda s: s["param_groups"][0]["layout"].update(blocks=2), "layout"),
        (lambda s: s["state"][0].update(step=torch.tensor(-1.0)), "step"),
        (lambda s: s["state"][0].update(step=torch.tensor(float("inf"))), "step"),
        (lambda s: s["state"][0]["exp_avg_sq"].fill_(-1.0), "exp_avg_sq"),
        (lambda s: s["state"][1].pop("exp_avg"), "w1"),
    ],
    ids=["no layout", "another layout", "step negative", "steps without end", "squares negative", "average missing"],
)
def test_corrupt_state_of_sections_is_refused(validating: Target, device, edit, word):
    named, optimizer = stepped(validating, device, MIXED)
    saved = corrupt(edit)(optimizer.state_dict())

    def unchanged():
        return copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for _, p in named]

    accept.refuses(lambda: optimizer.load_state_dict(saved), ValueError, word, unchanged=unchanged)


@pytest.mark.clause("STATE-2")
@given(shape=shapes, seed=seeds, widths=st.permutations([torch.float32, torch.bfloat16]))
def test_learning_rate_comes_back(target: Target, device, shape, seed, widths):
    named = parameters([tensor(shape, seed, widths[0])], device)
    optimizer = target.optimizer(named, HYPER)
    optimizer.param_groups[0]["lr"] = 0.125
    other = target.optimizer(named, HYPER)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.125


@pytest.mark.clause("STATE-5")
@hypers
def test_deep_copy_steps_alike(target: Target, device, hyper):
    named, optimizer = stepped(target, device, hyper)
    twin_named, twin = copy.deepcopy((named, optimizer))
    take(optimizer, named, gradients(7))
    take(twin, twin_named, gradients(7))
    for (_, p), (_, q) in zip(named, twin_named, strict=True):
        assert p is not q
        accept.same_bits(actual=q, expected=p)
    if target.skips:
        twin.found_inf = torch.ones((), device=device)
        twin.step()
        assert not any(target.skipped(optimizer).values()), "the copy's skipped step was counted by the original"


@pytest.mark.clause("STATE-6")
@hypers
@dtypes
def test_a_step_that_creates_state_changes_no_weight(target: Target, device, hyper, dtype):
    W = tensor(SHAPE, 0, dtype)
    (p,), optimizer = run(target, [W], [[torch.zeros_like(W)]], replace(hyper, lr=0.0), device)
    accept.same_bits(actual=p, expected=W)
    assert optimizer.state[p]
