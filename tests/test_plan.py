# SPDX-License-Identifier: Apache-2.0
"""Steps with a plan, by kernels, against steps without one, by torch; see conftest.py for where this runs."""

import copy
from itertools import chain

import pytest
import torch
from torch import Tensor, nn

from conformance import accept
from conformance.strategies import LAYOUTS, MIXED, tensor
from conformance.targets.impl import Target
from impl import Muon
from tests.planned import STEPS, accept_alike, accept_same_steps, make, random_gradients, states, weights
from tests.poison import INTERPRETED, accept_cast

pytestmark = pytest.mark.filterwarnings("ignore:Muon has skipped:RuntimeWarning")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")
FEW = {"heads in groups", "convolution", "in every expert"}
EVERY = {name: case for name, case in (LAYOUTS | MIXED).items() if not INTERPRETED or name in FEW}


@pytest.mark.parametrize("normuon", [None, 0.9])
@pytest.mark.parametrize("name", EVERY)
def test_layouts(device, take, name, normuon):
    shape, layout = EVERY[name]
    shapes = [(shape, {"layout": layout}), (shape, {"layout": layout, "maximize": True, "nesterov": False})]
    gradients = random_gradients(shapes, 2 if INTERPRETED else 4)
    accept_same_steps(take, lambda: make(device, shapes, normuon_beta2=normuon), gradients)


@pytest.mark.parametrize("options", [{"nesterov": False, "maximize": True}, {"adjust_lr_fn": "match_rms_adamw", "eps": 1e-3}])
@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02), torch.tensor([[0.02]])], ids=["number", "tensor", "matrix"])
def test_options(device, take, options, lr):
    shapes = [((24, 40), {}), ((40, 24), {"weight_decay": 0.0, "momentum": 0.5}), ((7,), {"algorithm": "adamw"})]
    lr = lr.to(device) if isinstance(lr, Tensor) else lr
    accept_same_steps(take, lambda: make(device, shapes, lr=lr, **options), random_gradients(shapes, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_of_every_dtype(device, take, dtype):
    shapes = [((24, 40), {}), ((33, 17), {})]
    accept_same_steps(take, lambda: make(device, shapes, dtype), random_gradients(shapes, 2))


@pytest.mark.parametrize(
    ("weight", "dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float64),
    ],
)
def test_gradients_of_another_dtype(device, take, weight, dtype):
    """A gradient can be wider or narrower than its parameter where torch allows it (`grad_dtype`, torch 2.11)."""
    p = nn.Parameter(tensor((8, 8), 0).to(device, weight))
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch knows no grad_dtype")

    def build() -> Muon:
        q = nn.Parameter(p.detach().clone())
        q.grad_dtype = dtype
        return Muon([q], lr=0.02, ns_coefficients="jordan", ns_steps=STEPS)

    def change(optimizer: Muon, step: int) -> None:
        optimizer.param_groups[0]["params"][0].grad = tensor((8, 8), step).to(device, dtype)

    accept_same_steps(take, build, [[None], [None]], change)


def test_dtypes_that_change_between_steps(device, take):
    """First the weight's, which somebody casts, then its gradient's, where torch allows that."""
    shapes = [((24, 40), {}), ((9, 5), {})]
    dtypes = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch knows no grad_dtype")

    def change(optimizer: Muon, step: int) -> None:
        weight, gradient = dtypes[step]
        for i, group in enumerate(optimizer.param_groups):
            (p,) = group["params"]
            p.grad = None
            p.data, p.grad_dtype = p.data.to(weight), None
            p.grad = tensor(tuple(p.shape), 10 * step + i).to(device, gradient)

    accept_same_steps(take, lambda: make(device, shapes), [[None, None]] * len(dtypes), change)


def test_missing_and_late_gradients(device, take):
    shapes = [((24, 40), {}), ((24, 40), {}), ((9, 5), {"normuon_beta2": 0.9}), ((24, 40), {"normuon_beta2": 0.9})]
    gradients = random_gradients(shapes, 4)
    for step, i in ((0, 0), (1, 0), (1, 3), (2, 1), (3, 2)):
        gradients[step][i] = None
    accept_same_steps(take, lambda: make(device, shapes), gradients)


def test_many_gradients_that_go_missing(device, take):
    """Kernels are told eight addresses at a time, and eight times none as well."""
    shapes = [((4, 24), {})] * 20
    gradients = random_gradients(shapes, 3)
    gradients[1][:16] = [None] * 16
    accept_same_steps(take, lambda: make(device, shapes), gradients)


@pytest.mark.parametrize("scale", [3.0, [3.0]], ids=str)
def test_the_loss_scale(device, take, scale):
    shapes = [((24, 40), {}), ((5,), {"algorithm": "adamw"})]

    def change(optimizer: Muon, step: int) -> None:
        optimizer.grad_scale = torch.tensor(scale, device=device)
        optimizer.found_inf = torch.tensor(float(step == 1), device=device)

    fast = accept_same_steps(take, lambda: make(device, shapes), random_gradients(shapes), change)
    assert fast.skipped["found_inf"] == 1


def test_a_decision_is_of_its_step_alone(device, take):
    """Also where later steps have nothing to decide."""
    shapes = [((24, 40), {}), ((9, 5), {"normuon_beta2": 0.9})]

    def change(optimizer: Muon, step: int) -> None:
        optimizer.found_inf = torch.ones((), device=device) if step == 1 else None

    accept_same_steps(take, lambda: make(device, shapes, skip_nonfinite=False), random_gradients(shapes), change)


def test_options_that_change_between_steps(device, take):
    shapes = [((24, 40), {}), ((10, 10), {"normuon_beta2": 0.9}), ((24, 40), {})]

    def change(optimizer: Muon, step: int) -> None:
        news = [
            {"lr": 0.1, "weight_decay": 0.5}, {"momentum": 0.3, "normuon_beta2": 0.5}, {"maximize": True}, {"nesterov": False},
            {"ns_steps": 2}, {"eps": 1.0, "adjust_lr_fn": "match_rms_adamw"},
            {"lr": torch.tensor(0.05, device=device)}, {"lr": 0.1},
        ]  # fmt: skip
        optimizer.param_groups[(0, 1, 2, 0, 1, 2, 0, 0)[step]].update(news[step])

    accept_same_steps(take, lambda: make(device, shapes), random_gradients(shapes, 8), change)


def test_what_replays_have_overwritten_is_written_again(device, take, capturing):
    shapes = [((9, 5), {})] * 8  # whose weights are a block of addresses that does not change by itself
    gradients = random_gradients(shapes, 4)
    fast, slow = make(device, shapes), make(device, shapes)
    before = weights(slow)
    take(False, slow, gradients)
    take(True, fast, gradients[:1])
    (plan,) = fast.plans.values()
    with capturing():
        take(True, fast, gradients[1:2])
    for each in gradients[2:]:
        plan.operands.pointers.zero_()
        plan.operands.hyper.zero_()
        take(True, fast, [each])
    assert [*fast.plans.values()] == [plan]
    accept_alike(fast, slow, before)


def test_a_plan_made_in_a_capture_is_left_to_its_graph(device, take, capturing):
    shapes = [((24, 40), {})]
    optimizer = make(device, shapes)
    with capturing():
        take(True, optimizer, random_gradients(shapes, 1))
    (plan,) = optimizer.plans.values()
    take(True, optimizer, random_gradients(shapes, 2))
    (later,) = optimizer.plans.values()
    assert later is not plan and later.before is plan and not later.captured


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_step_that_is_not_taken_writes_nothing(device, take, bad):
    shapes = [((24, 40), {}), ((9, 5), {"normuon_beta2": 0.9}), ((5,), {"algorithm": "adamw"})]
    optimizer = take(True, make(device, shapes), random_gradients(shapes, 1))
    keys = ("momentum_buffer", "variance_buffer", "exp_avg", "exp_avg_sq", "step")
    before = [weights(optimizer), *(states(optimizer, key) for key in keys)]
    for i in range(3):
        gradients = random_gradients(shapes, 1)
        gradients[0][i].flatten()[-1] = bad
        take(True, optimizer, gradients)
    after = [weights(optimizer), *(states(optimizer, key) for key in keys)]
    for a, b in zip(chain(*after), chain(*before), strict=True):
        accept.same_bits(actual=a, expected=b)
    take(True, optimizer, random_gradients(shapes, 1))
    assert optimizer.skipped == {"gradient": 3, "orthogonalization": 0, "found_inf": 0}
    assert not any(a.equal(b) for a, b in zip(weights(optimizer), before[0], strict=True))


def test_the_culprit_is_known(device, take):
    shapes = [((24, 40), {}), ((24, 40), {}), ((9, 5), {})]
    gradients = random_gradients(shapes, 1)
    gradients[0][1][3, 3] = NAN
    optimizer = take(True, make(device, shapes), random_gradients(shapes, 1))
    for group, G in zip(optimizer.param_groups, gradients[0], strict=True):
        group["params"][0].grad = G.to(device)
    (plan,) = optimizer.plans.values()
    plan.prepare(optimizer.state, None)
    assert [id(p) for p in plan.culprits()] == [id(optimizer.param_groups[1]["params"][0])]
    plan.apply(torch.full((), 2, dtype=torch.uint8, device=device))
    optimizer.param_groups[1]["params"][0].grad = torch.ones(24, 40, device=device)
    with Target().orthogonalizing(NAN):  # of a gradient with which nothing is wrong
        plan.prepare(optimizer.state, None)
    assert [id(p) for p in plan.culprits()] == [id(group["params"][0]) for group in optimizer.param_groups]
    plan.apply(torch.full((), 1, dtype=torch.uint8, device=device))


def test_a_parameter_that_lies_across_is_stepped_without_a_plan(device, take):
    shapes = [((24, 40), {}), ((9, 5), {})]

    def build() -> Muon:
        optimizer = make(device, shapes)
        p = optimizer.param_groups[1]["params"][0]
        p.data = p.data.mT.contiguous().mT
        return optimizer

    accept_same_steps(take, build, random_gradients(shapes, 2))


def test_memory_and_plan_between_steps(device, take):
    shapes = [((24, 40), {}), ((9, 5), {"normuon_beta2": 0.9})]
    optimizer = make(device, shapes)
    seen = []

    def change(optimizer: Muon, step: int) -> None:
        group = optimizer.param_groups[0]
        group.update([{}, {"lr": 0.3}, {"momentum": 0.1, "weight_decay": 0.0, "maximize": True}, {"ns_steps": 2}, {}][step])
        seen.extend(optimizer.plans.values())

    gradients = random_gradients(shapes, 5)
    gradients[2][0] = None
    take(True, optimizer, gradients, change)
    (last,) = optimizer.plans.values()
    assert seen[0] is seen[1] is seen[2] and last is seen[3] is not seen[2], "kept but for new ns_steps"
    assert last.arena.untyped_storage().size() == 0 and last.gradients == []
    optimizer.add_param_group({"params": [nn.Parameter(tensor((4, 4), 0).to(device))]})
    take(True, optimizer, [[*each, tensor((4, 4), 1)] for each in gradients[:1]])
    assert next(iter(optimizer.plans.values())) is not last


def test_a_copy_has_a_plan_of_its_own(device, take):
    shapes = [((24, 40), {}), ((5,), {"algorithm": "adamw"})]
    optimizer = take(True, make(device, shapes), random_gradients(shapes, 1))
    copied = copy.deepcopy(optimizer)
    (plan,) = optimizer.plans.values()
    assert not copied.plans
    old = weights(optimizer)
    take(True, copied, random_gradients(shapes, 1))
    assert next(iter(copied.plans.values())) is not plan is next(iter(optimizer.plans.values()))
    for a, b in zip(weights(optimizer), old, strict=True):
        accept.same_bits(actual=a, expected=b)
    take(True, optimizer, random_gradients(shapes, 1))
    for a, b in zip(weights(optimizer), weights(copied), strict=True):
        accept.same_bits(actual=a, expected=b)


def test_a_loaded_state_and_moved_tensors_are_read_again(device, take):
    shapes = [((24, 40), {"normuon_beta2": 0.9})]
    gradients = random_gradients(shapes)
    straight = take(True, make(device, shapes), gradients)
    optimizer = take(True, make(device, shapes), gradients[:1])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    p = optimizer.param_groups[0]["params"][0]
    p.data = p.data.clone()
    take(True, optimizer, gradients[1:])
    accept_cast(p.detach(), weights(straight)[0])


def test_matrices_in_chunks_step_the_same(device, take, monkeypatch):
    from impl.kernels import iteration

    shapes = [((5 * 24, 40), {"layout": {"blocks": 5}}), ((24, 40), {}), ((40, 24), {"normuon_beta2": 0.9})]
    gradients = random_gradients(shapes, 1 if INTERPRETED else 3)
    together = take(True, make(device, shapes), gradients)
    monkeypatch.setattr(iteration, "SCRATCH", 4 * iteration.scratch_numbers(24, 40))
    apart = take(True, make(device, shapes), gradients)
    assert len(next(iter(apart.plans.values())).prepares) > len(next(iter(together.plans.values())).prepares)
    for a, b in zip(weights(apart), weights(together), strict=True):
        accept.same_bits(actual=a, expected=b)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("normuon", [None, 0.9])
def test_a_captured_step_is_an_eager_step(device, normuon):
    shapes = [((24, 40), {}), ((130, 64), {}), ((7,), {"algorithm": "adamw"})]
    hyper = {
        name: torch.tensor(value, device=device) for name, value in (("lr", 0.02), ("weight_decay", 0.1), ("momentum", 0.9))
    }
    rates = [(0.02, 0.1, 0.9), (0.05, 0.0, 0.5), (0.001, 0.3, 0.95), (0.02, 0.1, 0.9)]
    gradients = random_gradients(shapes, 4)
    results = []
    for captured in (False, True):
        optimizer = make(device, shapes, normuon_beta2=normuon, **hyper)
        parameters = [group["params"][0] for group in optimizer.param_groups]
        for p, (shape, _) in zip(parameters, shapes, strict=True):
            p.grad = torch.zeros(shape, device=device)
        graph = torch.cuda.CUDAGraph()
        for step, each in enumerate(gradients):
            for T, value in zip(hyper.values(), rates[step], strict=True):
                T.fill_(value)
            for p, G in zip(parameters, each, strict=True):
                p.grad.copy_(G)
            if captured and step == 1:
                with torch.cuda.graph(graph):
                    optimizer.step()
            if captured and step:
                graph.replay()
            else:
                optimizer.step()
        results.append([*weights(optimizer), *states(optimizer, "momentum_buffer"), *states(optimizer, "variance_buffer")])
    for a, b in zip(*results, strict=True):
        accept.same_bits(actual=a, expected=b)
