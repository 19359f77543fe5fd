# SPDX-License-Identifier: Apache-2.0
"""What a plan must notice between two steps, and what it must leave alone; see conftest.py for where this runs."""

import pytest
import torch
from torch import Tensor, nn

from conformance import accept
from conformance.strategies import tensor
from conformance.targets.impl import Target
from impl import Layout, Muon
from tests.planned import STEPS, accept_same_steps, make, random_gradients, states, weights

pytestmark = pytest.mark.filterwarnings("ignore:Muon has skipped:RuntimeWarning")
SHAPES = [((9, 5), {})]
ALONE = [{"ns_coefficients": (1.5, -0.5, 0.0)}, {"eps": 30.0}, {"adjust_lr_fn": "spectral"}, {"layout": Layout(blocks=3)}]


@pytest.mark.parametrize("news", ALONE, ids=lambda news: next(iter(news)))
def test_an_option_that_changes_alone(device, take, news):
    def change(optimizer: Muon, step: int) -> None:
        optimizer.param_groups[0].update(news if step else {})

    # One quintic: more would amplify what the kernels round.
    accept_same_steps(take, lambda: make(device, SHAPES, ns_steps=1), random_gradients(SHAPES, 2), change)


def test_numbers_that_are_written_to(device, take):
    """A learning rate on the host, and the loss scale."""

    def change(optimizer: Muon, step: int) -> None:
        optimizer.param_groups[0]["lr"].fill_(0.02 * (step + 1))
        optimizer.grad_scale = torch.tensor(4.0**step, device=device)

    accept_same_steps(take, lambda: make(device, SHAPES, lr=torch.tensor(0.0)), random_gradients(SHAPES, 2), change)


def test_parameters_that_change_places(device, take):
    """Two of one form, between groups whose options need no new plan."""
    shapes = [((9, 5), {"lr": 0.1}), ((9, 5), {"weight_decay": 0.5})]

    def change(optimizer: Muon, step: int) -> None:
        first, second = optimizer.param_groups
        first["params"], second["params"] = second["params"], first["params"]

    accept_same_steps(take, lambda: make(device, shapes), random_gradients(shapes, 2), change)


def test_a_parameter_that_moves_to_another_group(device, take):
    shapes = [((9, 5), {"lr": 0.1}), ((9, 5), {"weight_decay": 0.5})]

    def build() -> Muon:
        optimizer = make(device, shapes)
        optimizer.param_groups[0]["params"].append(nn.Parameter(tensor((9, 5), 7).to(device)))
        return optimizer

    def change(optimizer: Muon, step: int) -> None:
        first, second = optimizer.param_groups
        if step:
            second["params"].insert(0, first["params"].pop())

    accept_same_steps(take, build, random_gradients([*shapes, ((9, 5), {})], 2), change)


def test_parameters_of_one_size_that_change_places(device, take):
    """And have other shapes."""

    def build() -> Muon:
        parameters = [nn.Parameter(tensor(shape, 3).to(device)) for shape in ((9, 5), (5, 9))]
        return Muon(parameters, lr=0.02, ns_coefficients="jordan", ns_steps=STEPS)

    def change(optimizer: Muon, step: int) -> None:
        parameters = optimizer.param_groups[0]["params"]
        if step:
            parameters.reverse()
        for i, p in enumerate(parameters):
            p.grad = tensor(tuple(p.shape), i).to(device)

    accept_same_steps(take, build, [[None, None]] * 3, change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_goes_missing_needs_no_new_plan(device, take, dtype):
    seen, gradients = [], random_gradients(SHAPES * 2, 2)
    gradients[1][0] = None
    optimizer = take(True, make(device, SHAPES * 2, dtype), gradients, lambda each, step: seen.extend(each.plans.values()))
    assert seen[0] is next(iter(optimizer.plans.values()))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_is_not_the_kernels(device, take, default):
    shapes = [((9, 5), {}), ((24, 40), {"normuon_beta2": 0.9})]

    def change(optimizer: Muon, step: int) -> None:
        optimizer.grad_scale = torch.tensor(3.7, dtype=torch.float32, device=device)

    torch.set_default_dtype(default)
    try:
        accept_same_steps(take, lambda: make(device, shapes), random_gradients(shapes, 2), change)
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_epsilon_that_changes_a_little(device, take):
    def change(optimizer: Muon, step: int) -> None:
        optimizer.param_groups[0]["eps"] = 1.5 + step * 1e-5

    fast, seen = make(device, SHAPES), []
    take(True, fast, random_gradients(SHAPES, 2), lambda *each: (change(*each), seen.extend(fast.plans.values())))
    assert seen[0] is not next(iter(fast.plans.values()))


def test_normuon_without_a_memory(device, take):
    accept_same_steps(take, lambda: make(device, SHAPES, normuon_beta2=0.0), random_gradients(SHAPES, 2))


def test_a_gradient_that_lies_across(device, take):
    def change(optimizer: Muon, step: int) -> None:
        p = optimizer.param_groups[0]["params"][0]
        p.grad = p.grad.mT.contiguous().mT

    accept_same_steps(take, lambda: make(device, SHAPES), random_gradients(SHAPES, 1), change)


@pytest.mark.parametrize(("which", "entries"), [("weight", 1), ("weight", 2), ("gradient", 1), ("momentum", 1)])
def test_tensors_that_are_no_longer_aligned(device, take, which, entries):
    """A plan for tensors at multiples of 16 bytes moves 16 bytes at a time."""
    shapes, seen = [((8, 16), {})], []

    def off(T: Tensor) -> Tensor:
        return torch.cat([T.new_zeros(entries), T.flatten()])[entries:].view(T.shape)

    def change(optimizer: Muon, step: int) -> None:
        seen.extend(optimizer.plans.values())
        p = optimizer.param_groups[0]["params"][0]
        state = optimizer.state[p]
        if step and which == "weight":
            p.data = off(p.data)
        elif step and which == "gradient":
            p.grad = off(p.grad)
        elif step:
            state["momentum_buffer"] = off(state["momentum_buffer"])

    fast = accept_same_steps(take, lambda: make(device, shapes), random_gradients(shapes, 2), change)
    assert seen[0] is not next(iter(fast.plans.values()))


def test_what_the_kernels_do_not_step_beside_what_they_do(device, take):
    """A frozen parameter, an empty one, and float64."""
    shapes = [((9, 5), {}), ((9, 5), {}), ((0, 5), {}), ((9, 5), {})]
    gradients = random_gradients(shapes, 1)
    gradients[0][1] = None

    def build() -> Muon:
        optimizer = make(device, shapes)
        frozen, _, wide = (group["params"][0] for group in optimizer.param_groups[1:])
        frozen.requires_grad_(False)
        wide.data = wide.data.double()
        return optimizer

    accept_same_steps(take, build, gradients)


def test_heads_of_an_odd_size_in_an_aligned_section(device, take):
    shapes = [((16, 16), {"layout": {"sections": [{"rows": 16, "head_dim": 4}]}})]
    accept_same_steps(take, lambda: make(device, shapes), random_gradients(shapes, 1))


def test_a_failed_orthogonalization_leaves_the_new_momentum(device, take):
    """And nothing else of the step."""
    shapes = [((24, 40), {}), ((9, 5), {"normuon_beta2": 0.9})]
    gradients = random_gradients(shapes, 1)
    fast, slow = make(device, shapes), take(False, make(device, shapes), gradients)
    before = weights(fast)
    with Target().orthogonalizing(float("nan")):
        take(True, fast, gradients)
    assert fast.skipped == {"gradient": 0, "orthogonalization": 1, "found_inf": 0}
    after = [*weights(fast), *states(fast, "momentum_buffer"), *states(fast, "variance_buffer")]
    expected = [*before, *states(slow, "momentum_buffer"), torch.zeros(9, 1, device=device)]
    for a, b in zip(after, expected, strict=True):
        accept.same_bits(actual=a, expected=b)


@pytest.mark.parametrize("made", [True, False])
def test_plans_of_graphs_outlive_those_that_follow(device, take, capturing, made):
    """Whether a plan was made in a capture, or before it."""
    gradients = random_gradients(SHAPES, 1)
    optimizer = make(device, SHAPES) if made else take(True, make(device, SHAPES), gradients)
    with capturing():
        take(True, optimizer, gradients)
    (plan,) = optimizer.plans.values()
    for eps in (1.0, 2.0):
        optimizer.param_groups[0]["eps"] = eps
        take(True, optimizer, gradients)
    (later,) = optimizer.plans.values()
    assert later is not plan is later.before
