# SPDX-License-Identifier: Apache-2.0
"""Ours takes the steps of other Muons, written here from their publications in float64, and goes on from their state."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from conformance import accept
from impl import Muon, import_state, like
from impl.schedules import POLAR_EXPRESS, YOU

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
SHAPES = ((6, 6), (4, 9), (9, 4))
LR, DECAY, MU = 0.02, 0.3, 0.9


def iterate(X: Tensor, coefficients: Any, norm: Tensor) -> Tensor:
    """The textbook iteration, without a transpose."""
    X = X / norm
    for a, b, c in coefficients:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


class Rule(NamedTuple):
    """Another's step: momentum as a sum or an average, orthogonalization, and the factor on the learning rate."""

    summed: bool
    nesterov: bool
    orthogonalize: Callable[[Tensor], Tensor]
    scale: Callable[[int, int], float]

    def step(self, W: Tensor, M: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        M = MU * M + G if self.summed else MU * M + (1 - MU) * G
        U = M if not self.nesterov else G + MU * M if self.summed else (1 - MU) * G + MU * M
        return W * (1 - LR * DECAY) - LR * self.scale(*W.shape) * self.orthogonalize(U), M


def added(X: Tensor, coefficients: Any, eps: float, margin: float = 1.0) -> Tensor:
    return iterate(X, coefficients, margin * X.norm() + eps)


def floored(X: Tensor, coefficients: Any, eps: float) -> Tensor:
    return iterate(X, coefficients, X.norm().clamp(min=eps))


def clamped(m: int, n: int) -> float:
    return max(1, m / n) ** 0.5


RULES = {
    "torch": Rule(False, True, partial(floored, coefficients=JORDAN, eps=1e-7), clamped),
    "keller": Rule(False, True, partial(added, coefficients=JORDAN, eps=1e-7), clamped),
    "moonlight": Rule(True, True, partial(added, coefficients=JORDAN, eps=1e-7), lambda m, n: 0.2 * math.sqrt(max(m, n))),
    "dion": Rule(True, False, partial(added, coefficients=POLAR_EXPRESS, eps=1e-8, margin=1.02), lambda m, n: math.sqrt(m / n)),
    "megatron": Rule(False, False, partial(floored, coefficients=YOU, eps=1e-7), lambda m, n: math.sqrt(max(m, n))),
}
STATE = {"torch": "momentum_buffer", "keller": "momentum_buffer", "moonlight": "momentum_buffer", "dion": "momentum"}
STATE["megatron"] = "momentum_buffer"
# What remains of an epsilon that is added to norms of 30 and more, as some do and we do not: 1e-7 / 30, times a step of 0.02.
CLOSE = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


def normal(seed: int, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def ours(origin: str, weights: list[Tensor]) -> tuple[list[nn.Parameter], Muon]:
    made = [nn.Parameter(W.clone()) for W in weights]
    return made, Muon(made, lr=LR, weight_decay=DECAY, momentum=MU, **like(origin))


def take(made: list[nn.Parameter], optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> None:
    for p, G in zip(made, gradients, strict=True):
        p.grad = G.to(p.dtype)
    optimizer.step()


@pytest.mark.parametrize(
    ("origin", "size"), [*((origin, 100.0) for origin in RULES), ("torch", 1e-8), ("megatron", 1e-8)]
)  # with the last two, an epsilon that is a floor decides
def test_like_takes_the_steps_of_its_origin(origin, size):
    theirs = normal(0)
    made, optimizer = ours(origin, theirs)
    momenta = [torch.zeros_like(W) for W in theirs]
    for step in range(4):
        gradients = normal(1 + step, size)
        take(made, optimizer, gradients)
        theirs, momenta = map(list, zip(*map(RULES[origin].step, theirs, momenta, gradients), strict=True))
        for p, W in zip(made, theirs, strict=True):
            CLOSE(p.detach(), W)


@pytest.mark.parametrize("origin", RULES)
def test_a_checkpoint_of_the_origin_goes_on(origin):
    theirs, momenta = normal(0), [torch.zeros_like(W) for W in normal(0)]
    for step in range(3):
        theirs, momenta = map(list, zip(*map(RULES[origin].step, theirs, momenta, normal(1 + step, 100.0)), strict=True))
    made, optimizer = ours(origin, theirs)
    order = [2, 0, 1]  # another order than ours
    state = {i: {STATE[origin]: momenta[k]} for i, k in enumerate(order)}
    import_state(optimizer, {"state": state, "param_groups": []}, [made[k] for k in order], origin)
    take(made, optimizer, normal(9))
    for p, W, M, G in zip(made, theirs, momenta, normal(9), strict=True):
        CLOSE(p.detach(), RULES[origin].step(W, M, G)[0])


@pytest.mark.parametrize("size", [1.0, 1e-8])  # with the second, torch's epsilon decides
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
def test_steps_are_torchs_up_to_its_precision(size, nesterov, adjust_lr_fn):
    options = {"lr": LR, "weight_decay": DECAY, "momentum": MU, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    before = [W.float() for W in normal(0)]
    theirs, mine = ([nn.Parameter(W.clone()) for W in before] for _ in range(2))
    pair = (theirs, torch.optim.Muon(theirs, **options)), (mine, Muon(mine, **{**like("torch"), **options}))
    for step in range(3):
        for made, optimizer in pair:
            take(made, optimizer, normal(1 + step, size))
    for W, p, q in zip(before, mine, theirs, strict=True):
        accept.step(before=W, actual=q, expected=p.double(), precision=torch.bfloat16)
        assert not p.equal(q)  # it works in bfloat16


def test_torchs_checkpoint_goes_on():
    before = [W.float() for W in normal(0)]
    theirs, mine = ([nn.Parameter(W.clone()) for W in before] for _ in range(2))
    torchs, optimizer = torch.optim.Muon(theirs, LR, DECAY, MU), Muon(mine, LR, DECAY, MU, **like("torch"))
    for step in range(3):
        take(theirs, torchs, normal(1 + step))
    for p, q in zip(mine, theirs, strict=True):
        p.data.copy_(q.data)
    import_state(optimizer, torchs.state_dict(), mine, "torch")
    before = [p.detach().clone() for p in mine]
    for made, each in ((theirs, torchs), (mine, optimizer)):
        take(made, each, normal(5))
    for W, p, q in zip(before, mine, theirs, strict=True):
        accept.step(before=W, actual=q, expected=p.double(), precision=torch.bfloat16)


@pytest.mark.parametrize("nesterov", [True, False])
def test_with_the_identity_as_schedule_it_is_sgd(nesterov):
    """p(x) = x, and a floor above every norm: the update is the momentum over that floor."""
    floor = 2.0**10
    weights = [W for W in normal(0) if W.shape[0] == W.shape[1]]
    theirs, mine = ([nn.Parameter(W.clone()) for W in weights] for _ in range(2))
    options = {"ns_coefficients": (1.0, 0.0, 0.0), "ns_steps": 1, "eps": floor, "nesterov": nesterov}
    muon = Muon(mine, lr=LR * floor, weight_decay=0.0, momentum=MU, **options)
    sgd = torch.optim.SGD(theirs, lr=LR * (1 - MU), momentum=MU, nesterov=nesterov)
    for step in range(4):
        for made, optimizer in ((mine, muon), (theirs, sgd)):
            take(made, optimizer, [G for G in normal(1 + step) if G.shape[0] == G.shape[1]])
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("origin", "states"),
    [
        ("keller", {"exp_avg": 2.0, "exp_avg_sq": 3.0, "step": 7}),
        ("moonlight", {"moment1": 2.0, "moment2": 3.0, "step": 7}),
        ("dion", {"momentum": 2.0, "variance": 3.0, "step_dev": torch.tensor(7.0)}),
    ],
)
def test_states_of_its_adamw_come_along(origin, states):
    p = nn.Parameter(torch.ones(3))
    optimizer = Muon([p], algorithm="adamw", **like(origin))
    state = {key: torch.full((3,), value) if isinstance(value, float) else value for key, value in states.items()}
    import_state(optimizer, {"state": {0: state}}, [p], origin)
    found = optimizer.state[p]
    assert (found["exp_avg"] == 2).all() and (found["exp_avg_sq"] == 3).all() and found["step"].item() == 7
    assert {T.dtype for T in found.values()} == {torch.float32}


def test_options_are_their_users_own():
    before = dict(like("torch"))
    like("torch")["eps"] = 1.0
    assert like("torch") == before


def test_what_cannot_be_imported_is_refused_and_changes_nothing():
    made, optimizer = ours("dion", normal(0))
    state = {i: {"momentum": torch.ones_like(W)} for i, W in enumerate(made)}
    with pytest.raises(ValueError, match=r"origin should be one of torch, keller.* but is: 'kellr'"):
        like("kellr")
    with pytest.raises(ValueError, match=r"params should hold every parameter of the optimizer, but 0.2 is missing"):
        import_state(optimizer, {"state": state}, made[:2], "dion")
    with pytest.raises(
        ValueError, match=r"keller's state of parameter 0.0 should have 'momentum_buffer' but has \['momentum'\]"
    ):
        import_state(optimizer, {"state": state}, made, "keller")
    for nothing in ({}, {"state": None}, {"state": [1]}):
        with pytest.raises(ValueError, match="state_dict should have a dict of states by number under 'state'"):
            import_state(optimizer, nothing, made, "dion")
    for bad in (None, "a word"):
        with pytest.raises(ValueError, match=f"dion's 'momentum' of parameter 0.1 should be a tensor but is: {bad!r}"):
            import_state(optimizer, {"state": state | {1: {"momentum": bad}}}, made, "dion")
    with pytest.raises(ValueError, match="momentum_buffer"):
        import_state(optimizer, {"state": state | {1: {"momentum": torch.ones(2, 2)}}}, made, "dion")
    assert not any(optimizer.state.values())


def test_a_parameter_without_state_begins_anew():
    made, optimizer = ours("dion", normal(0))
    import_state(optimizer, {"state": {0: {"momentum": torch.ones_like(made[0])}}}, made, "dion")
    first, *others = (optimizer.state[p]["momentum_buffer"] for p in made)
    CLOSE(first, torch.full_like(first, 1 - MU))
    assert not any(M.any() for M in others)


def test_a_sum_becomes_an_average_by_the_momentum_of_its_group():
    params = [nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    optimizer = Muon([{"params": [p], "momentum": beta} for p, beta in zip(params, (0.5, 0.75), strict=True)], momentum=0.9)
    import_state(optimizer, {"state": {i: {"momentum_buffer": torch.ones(2, 3)} for i in range(2)}}, params, "moonlight")
    assert [optimizer.state[p]["momentum_buffer"].unique().tolist() for p in params] == [[0.5], [0.25]]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
def test_a_momentum_that_is_a_tensor_changes_no_shape_and_no_dtype(shape):
    p = nn.Parameter(torch.ones(2, 3))
    optimizer = Muon([p], momentum=torch.full(shape, 0.75, dtype=torch.float64))
    import_state(optimizer, {"state": {0: {"momentum_buffer": torch.ones(2, 3)}}}, [p], "moonlight")
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.full((2, 3), 0.25))


def test_frozen_parameters_keep_what_they_have_and_get_nothing_else():
    params = [nn.Parameter(torch.ones(2, 3), requires_grad=i == 2) for i in range(3)]
    optimizer = Muon(params)
    import_state(optimizer, {"state": {i: {"momentum_buffer": torch.full((2, 3), float(i))} for i in (1, 2)}}, params, "keller")
    assert [i for i, p in enumerate(params) if optimizer.state.get(p)] == [1, 2]
    assert [optimizer.state[p]["momentum_buffer"].unique().tolist() for p in params[1:]] == [[1], [2]]


def test_a_narrow_sum_is_widened_before_it_becomes_an_average():
    p = nn.Parameter(torch.ones(2, 3))
    optimizer, M = Muon([p], momentum=0.95), torch.full((2, 3), 1 / 3, dtype=torch.bfloat16)
    import_state(optimizer, {"state": {0: {"momentum_buffer": M}}}, [p], "moonlight")
    accept.same_bits(actual=optimizer.state[p]["momentum_buffer"], expected=(1 - 0.95) * M.float())


def test_like_has_the_adamw_of_its_origin():
    keys = ("adamw_betas", "adamw_eps")
    found = {origin: tuple(like(origin)[key] for key in keys if key in like(origin)) for origin in RULES}
    published = {"keller": ((0.9, 0.95), 1e-10), "moonlight": ((0.9, 0.95), 1e-8), "dion": ((0.9, 0.95), 1e-8)}
    assert found == {"torch": (), "megatron": (), **published}
