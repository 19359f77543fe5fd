# SPDX-License-Identifier: Apache-2.0
"""What only the inside of impl's chains shows, and how they fit into torch; SPEC.md's CLIP is tested in conformance/."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from impl import ChainedOptimizer, Layout, Muon, Section, clip_grad_norm_

pytestmark = pytest.mark.filterwarnings("ignore:ChainedOptimizer has skipped:RuntimeWarning")

MIXED = Layout(sections=(Section(4), Section(2, algorithm="adamw")))


class Operations(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


class Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.step = lambda: optimizer.step()


class Failing(torch.optim.AdamW):
    """Can be told to skip a step, and remembers what it was told."""

    told = None

    def step(self, closure=None):
        self.told = self.found_inf
        raise RuntimeError("on purpose")


def weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(6, 5)) for _ in range(3)]


def give(ps: list[nn.Parameter], seed: int = 1, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator) * scale


def chain_of(ps: list[nn.Parameter], wrap=lambda optimizer: optimizer, layout=MIXED, **policy) -> ChainedOptimizer:
    """Muon, with a parameter of both algorithms unless told otherwise, and fused AdamW."""
    muon = Muon([{"params": ps[:1]}, {"params": ps[1:2], "layout": layout}], lr=0.02)
    return ChainedOptimizer([muon, wrap(torch.optim.AdamW(ps[2:], lr=0.01, fused=True))], **policy)


def snapshot(ps, chain):
    return [p.detach().clone() for p in ps], copy.deepcopy([dict(chain.state.get(p, {})) for p in ps])


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


POLICY = {"clip_grad": 0.5, "grad_norm_skip_threshold": 100.0}


@pytest.mark.parametrize("clip_norm", ["own", "global"])
@pytest.mark.parametrize("layout", [None, MIXED])
def test_on_the_device_and_on_the_host_the_bits_are_the_same(clip_norm, layout):
    ends = []
    for wrap, on_host in ((lambda optimizer: optimizer, False), (Wrapper, True)):
        ps = weights()
        chain = chain_of(ps, wrap, layout, **POLICY, clip_norm=clip_norm)
        for seed, scale in ((1, 1.0), (2, 1e6), (3, 1e-3), (4, float("nan")), (5, 10.0)):
            give(ps, seed, scale)
            with Operations() as operations:
                chain.step()
            assert ("aten::_local_scalar_dense" in operations.names) == on_host
        assert int(chain.skipped) == 2
        ends.append((*snapshot(ps, chain), [p.grad.nan_to_num() for p in ps]))
    assert same(*ends)


def test_told_to_skip_nothing_moves_and_nothing_stays_behind():
    ps = weights()
    chain = chain_of(ps, **POLICY)
    give(ps)
    chain.step()
    before = snapshot(ps, chain)
    give(ps, 2, 1e6)
    gradients = [p.grad.clone() for p in ps]
    chain.step()
    assert same(snapshot(ps, chain), before) and same([p.grad for p in ps], gradients)
    assert int(chain.optimizers[0].skipped["found_inf"]) == int(chain.skipped) == 1
    assert not any(hasattr(member, "found_inf") for member in chain.optimizers)


def test_a_chain_inside_is_told_too():
    ps = weights()
    inner = chain_of(ps, layout=None, log_grad_norm=True)
    chain = ChainedOptimizer([inner], **POLICY)
    give(ps, 2, 1e6)
    with Operations() as operations:
        chain.step()
    assert inner.norms.total is not None, "it steps, and steps its own"
    assert "aten::_local_scalar_dense" not in operations.names
    assert same([p.detach() for p in ps], [p.detach() for p in weights()])


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_torchs_fused_optimizers_are_told_on_the_device(kind):
    ps = weights()
    chain = ChainedOptimizer([kind(ps, fused=True)], **POLICY)
    give(ps, 2, 1e6)
    with Operations() as operations:
        chain.step()
    assert "aten::_local_scalar_dense" not in operations.names
    assert same([p.detach() for p in ps], [p.detach() for p in weights()])


@pytest.mark.parametrize("known", [None, 0.0, 1.0])
def test_found_inf_is_as_it_was_also_after_an_error(known):
    ps = weights()
    failing = Failing(ps[1:2], lr=0.1, fused=True)
    adamw, found_inf = torch.optim.AdamW(ps[2:], fused=True), None if known is None else torch.tensor(known)
    chain = ChainedOptimizer([Muon(ps[:1]), failing, adamw], grad_norm_skip_threshold=100.0)
    for member in chain.optimizers:
        if known is not None:
            member.found_inf = found_inf
    give(ps)
    with pytest.raises(RuntimeError, match="on purpose"):
        chain.step()
    assert float(failing.told) == (known or 0.0)
    assert all(getattr(member, "found_inf", None) is found_inf for member in chain.optimizers)
    assert all(hasattr(member, "found_inf") == (known is not None) for member in chain.optimizers)


@pytest.mark.parametrize("policy", [{}, POLICY], ids=str)
def test_scheduler_over_a_chain_reaches_its_members(policy):
    ps, others = weights(), weights()
    chain, plain = chain_of(ps, **policy), chain_of(others, **policy)
    scheduler = torch.optim.lr_scheduler.LambdaLR(chain, lambda step: 0.5**step)
    for step in range(3):
        assert [g["lr"] for o in chain.optimizers for g in o.param_groups] == [0.02 * 0.5**step] * 2 + [0.01 * 0.5**step]
        for group in plain.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])
        for o, lr in zip(plain.optimizers, (0.02, 0.01), strict=True):
            for group in o.param_groups:
                group["lr"] = lr * 0.5**step
        give(ps, step)
        give(others, step)
        chain.step()
        plain.step()
        scheduler.step()
    assert same(snapshot(ps, chain), snapshot(others, plain))


@pytest.mark.parametrize("policy", [{}, POLICY], ids=str)
def test_under_loss_scaling_a_chain_steps_as_without(policy):
    ps, others = weights(), weights()
    chain, plain = chain_of(ps, **policy), chain_of(others, **policy)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed, factor in ((1, 1.0), (2, float("inf")), (3, 1.0)):
        give(others, seed)
        for p, other in zip(ps, others, strict=True):
            p.grad = other.grad * scaler.scale(torch.ones(())) * factor
        scaler.step(chain)
        scaler.update()
        if factor == 1:
            plain.step()
    assert same(snapshot(ps, chain), snapshot(others, plain)) and int(chain.skipped) == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda chain: pickle.loads(pickle.dumps(chain))])  # noqa: S301
def test_copies_step_as_the_original_does(duplicate):
    ps = weights()
    chain = chain_of(ps, **POLICY, clip_norm="global", floor=0.25)
    torch.optim.lr_scheduler.LambdaLR(chain, lambda step: 0.5)  # wraps `step`
    for seed, scale in ((1, 1.0), (2, 1e6)):
        give(ps, seed, scale)
        chain.step()
    twin = duplicate(chain)
    copies = [p for group in twin.param_groups for p in group["params"]]
    assert not any(p is q for p, q in zip(ps, copies, strict=True)) and same(list(chain.norms), list(twin.norms))
    for parameters, each in ((ps, chain), (copies, twin)):
        give(parameters, 3, 2.0)
        each.step()
    assert same(snapshot(ps, chain), snapshot(copies, twin)) and int(chain.skipped) == int(twin.skipped) == 1
    assert same([p.grad for p in ps], [p.grad for p in copies])


def test_a_chain_is_copied_with_its_model():
    model = nn.Linear(3, 2, bias=False)
    twin, twins_model = copy.deepcopy((ChainedOptimizer([Muon(model.parameters())]), model))
    assert twin.param_groups[0]["params"][0] is twins_model.weight is not model.weight


def test_state_dicts_of_members_may_be_a_tuple():
    chain = chain_of(weights())
    chain.load_state_dict({"optimizers": tuple(chain.state_dict()["optimizers"])})
    with pytest.raises(ValueError, match="of 3 optimizers"):
        chain.load_state_dict({"optimizers": (*chain.state_dict()["optimizers"], {})})


def test_state_dict_round_trip():
    ps = weights()
    chain = chain_of(ps, **POLICY)
    give(ps)
    chain.step()
    others = [nn.Parameter(p.detach().clone()) for p in ps]
    other = chain_of(others, **POLICY)
    other.load_state_dict(copy.deepcopy(chain.state_dict()))
    for parameters, each in ((ps, chain), (others, other)):
        give(parameters, 2)
        each.step()
    assert same(snapshot(ps, chain), snapshot(others, other))


@pytest.mark.parametrize("spoil", [lambda members: members.pop(), lambda members: members.append({}), list.clear])
def test_a_state_dict_of_another_number_of_members_is_refused(spoil):
    chain = chain_of(weights())
    saved = chain.state_dict()
    spoil(saved["optimizers"])
    with pytest.raises(ValueError, match=f"{len(saved['optimizers'])} optimizers but the chain has 2"):
        chain.load_state_dict(saved)
    with pytest.raises(ValueError, match="0 optimizers but the chain has 2"):
        chain.load_state_dict({"optimizers": None})


def test_where_one_member_refuses_its_state_all_keep_theirs():
    ps, others = weights(), weights()
    chain, other = chain_of(ps), chain_of(others)
    for parameters, each, seed in ((ps, chain, 3), (others, other, 7)):
        give(parameters, seed)
        each.step()
    saved = other.state_dict()
    saved["optimizers"][0]["param_groups"][0]["lr"] = 0.5
    saved["optimizers"][1]["param_groups"] = []
    before = snapshot(ps, chain)
    with pytest.raises(ValueError, match="parameter group"):
        chain.load_state_dict(saved)
    assert same(snapshot(ps, chain), before) and chain.param_groups[0]["lr"] == 0.02
    give(ps, 3)
    chain.step()
    twin_ps = weights()
    twin = chain_of(twin_ps)
    for seed in (3, 3):
        give(twin_ps, seed)
        twin.step()
    assert same(snapshot(ps, chain), snapshot(twin_ps, twin))


def test_a_group_is_added_to_a_member():
    ps = weights()
    chain = chain_of(ps)
    with pytest.raises(ValueError, match="one of the chain's optimizers"):
        chain.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})
    chain.optimizers[1].add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})
    assert len(chain.param_groups) == 4


def test_report_says_who_is_clipped():
    ps = weights()
    flagged = torch.optim.SGD([nn.Parameter(torch.zeros(40, 50))])
    flagged.skip_grad_norm_clip = True
    chain = ChainedOptimizer([chain_of(ps), Wrapper(flagged)])
    assert chain.report().splitlines() == [
        "Muon group 0: 30 parameters, clipped: none",
        "Muon group 1: 30 parameters, clipped: adamw",
        "AdamW group 0: 30 parameters, clipped: all",
        "SGD group 0: 2,000 parameters, clipped: none",
    ]


def test_groups_and_state_are_the_members():
    ps = weights()
    chain = chain_of(ps)
    give(ps)
    chain.step()
    assert all(a is b for a, b in zip(chain.param_groups, [g for o in chain.optimizers for g in o.param_groups], strict=True))
    assert chain.state[ps[0]] is chain.optimizers[0].state[ps[0]] and len(chain.state) == 3
    chain.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in ps)
    chain.zero_grad()
    assert all(p.grad is None for p in ps)


def test_hooks_of_members_and_of_the_chain_run():
    ps, ran = weights(), []
    chain = chain_of(ps)
    chain.register_step_pre_hook(lambda *_: ran.append("before"))
    chain.optimizers[0].register_step_post_hook(lambda *_: ran.append("member"))
    chain.register_step_post_hook(lambda *_: ran.append("after"))
    give(ps)
    chain.step()
    assert ran == ["before", "member", "after"]


def embedding() -> nn.Embedding:
    torch.manual_seed(0)
    layer = nn.Embedding(5, 3, sparse=True)
    layer(torch.tensor([1, 1, 4])).square().sum().backward()
    return layer


@pytest.mark.parametrize("policy", [{"clip_grad": 0.5}, {"grad_norm_skip_threshold": 100.0}, {"log_grad_norm": True}], ids=str)
def test_a_sparse_gradient_has_no_norm_and_is_refused_before_anything_has_changed(policy):
    ps, layer = weights(), embedding()
    chain = ChainedOptimizer([Muon(ps[:1]), torch.optim.SparseAdam(layer.parameters(), lr=0.1)], **policy)
    give(ps)
    before, G = [p.detach().clone() for p in (ps[0], layer.weight)], layer.weight.grad.to_dense()
    with pytest.raises(RuntimeError, match="sparse gradients have no norm here"):
        chain.step()
    assert same([p.detach() for p in (ps[0], layer.weight)], before) and same(layer.weight.grad.to_dense(), G)


@pytest.mark.parametrize("policy", [{}, POLICY], ids=str)
def test_an_exempt_sparse_gradient_is_its_members_business(policy):
    layer, plain, ps = embedding(), embedding(), weights()
    give(ps)
    member = torch.optim.SparseAdam(layer.parameters(), lr=0.1)
    member.skip_grad_norm_clip = True
    ChainedOptimizer([member, torch.optim.SGD(ps)], **policy).step()
    torch.optim.SparseAdam(plain.parameters(), lr=0.1).step()
    assert torch.equal(layer.weight, plain.weight)


def test_complex_gradients_are_clipped_too():
    p = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    p.grad = torch.tensor([3 + 4j, 0, 12j], dtype=torch.complex64)
    G = p.grad.clone()
    ChainedOptimizer([torch.optim.SGD([p], lr=1.0)], clip_grad=6.5).step()
    torch.testing.assert_close(p.grad, G / 2)
    torch.testing.assert_close(p.detach(), -G / 2)


def test_norms_of_an_earlier_step_are_gone():
    ps = weights()
    chain = chain_of(ps, log_grad_norm=True)
    give(ps)
    chain.step()
    assert chain.norms.total is not None
    chain.log_grad_norm = False
    chain.step()
    assert list(chain.norms) == [None] * 3


@pytest.mark.parametrize("policy", [{}, {"grad_norm_skip_threshold": 1e9}], ids=str)
def test_a_norm_of_everything_is_not_made_for_a_clipping_that_nobody_asked_for(policy):
    ps = weights()
    chain = chain_of(ps, clip_norm="global", **policy)
    give(ps)
    chain.step()
    assert chain.norms.total is None and chain.norms.clipped is None


def test_zeros_are_clipped_to_zero():
    ps = weights()
    give(ps, scale=0.0)
    clip_grad_norm_(chain_of(ps), 0.0)
    assert all(p.grad.eq(0).all() for p in ps)
