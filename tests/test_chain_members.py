# SPDX-License-Identifier: Apache-2.0
"""Members that a chain must not trust, lose or half-step: what a hostile reading of it found."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from conformance.worlds import threads
from impl import ChainedOptimizer, Muon, clip_grad_norm_
from impl.norms import leaves

INF = float("inf")


def weight(size: float, shape: tuple[int, ...] = (4, 6)) -> nn.Parameter:
    p = nn.Parameter(torch.zeros(shape))
    p.grad = torch.full(shape, size)
    return p


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:ChainedOptimizer has skipped:RuntimeWarning")
def test_fused_sgd_is_not_told_to_skip_its_first_step():
    """It would leave its momentum undefined."""
    p = weight(1e6, (1000,))
    chain = ChainedOptimizer([torch.optim.SGD([p], lr=0.1, momentum=0.9, fused=True)], grad_norm_skip_threshold=10.0)
    chain.step()
    assert not chain.state
    p.grad = torch.zeros(1000)
    chain.step()
    assert torch.equal(p, torch.zeros(1000))


def test_an_inner_chain_measures_over_the_outer_ones_process_group(alone, monkeypatch):
    p, calls = weight(1.0), []
    gather = dist.all_gather
    monkeypatch.setattr(dist, "all_gather", lambda *args, **options: (calls.append(options["group"]), gather(*args, **options)))
    inner = ChainedOptimizer([torch.optim.SGD([p])])
    ChainedOptimizer([inner], clip_grad=0.1, process_groups=[alone]).step()
    clip_grad_norm_(inner, 0.1, process_group=alone)
    assert calls == [alone, alone]


def test_what_was_exempt_on_all_ranks_stays_exempt(alone):
    muon = Muon([weight(1.0)])
    chain = ChainedOptimizer([muon], clip_grad=0.1, process_groups=[alone])
    muon.add_param_group({"params": [weight(1.0, (3,))], "algorithm": "adamw"})
    with pytest.raises(RuntimeError) as caught:
        chain.step()
    told = "a chain's member was exempt when the ranks built the chain and is not now; build it again"
    assert str(caught.value) == told


def test_chains_with_process_groups_can_be_copied(alone):
    chain = ChainedOptimizer([Muon([weight(1.0)]), torch.optim.SGD([weight(1.0)])], clip_grad=0.1, process_groups=[alone, None])
    twin = copy.deepcopy(chain)
    twin.step()
    assert twin.process_groups == [alone, None]
    assert not any(state for state in chain.state.values())


class Master:
    """Gives the optimizer inside its gradients in its own step, too late for a chain."""

    def __init__(self, p: nn.Parameter) -> None:
        self.model, self.main = p, nn.Parameter(p.detach().clone())
        self.optimizer = torch.optim.SGD([self.main])

    def step(self) -> None:
        self.main.grad = self.model.grad
        self.optimizer.step()


@pytest.mark.parametrize("policy", [{"clip_grad": 1.0}, {"grad_norm_skip_threshold": 1.0}], ids=str)
def test_gradients_that_come_too_late_to_be_clipped_are_an_error(policy):
    told = (
        "^a wrapper gave its optimizer gradients in its own step only, so they were neither measured nor clipped; "
        "have it give them before the chain's step$"
    )
    with pytest.raises(RuntimeError, match=told):
        ChainedOptimizer([Master(weight(1e6))], **policy).step()
    ChainedOptimizer([Master(weight(1e6))]).step()
    first, second = Master(weight(1e6)), Master(weight(1e6))
    first.skip_grad_norm_clip = second.skip_grad_norm_clip = True
    ChainedOptimizer([first, torch.optim.SGD([weight(0.1)])], **policy).step()
    with pytest.raises(RuntimeError, match="neither measured nor clipped"):
        ChainedOptimizer([second, torch.optim.SGD([weight(0.1)])], **policy, clip_norm="global").step()


def test_a_declaration_outlives_an_older_checkpoint():
    def chain():
        return ChainedOptimizer([torch.optim.AdamW([{"params": [weight(1.0)], "skip_grad_norm_clip": True}])], clip_grad=1.0)

    old = chain().state_dict()
    del old["optimizers"][0]["param_groups"][0]["skip_grad_norm_clip"]
    loaded = chain()
    loaded.load_state_dict(old)
    assert loaded.report().endswith("clipped: none")
    del loaded.param_groups[0]["skip_grad_norm_clip"]
    loaded.load_state_dict(chain().state_dict())
    assert loaded.report().endswith("clipped: none"), "what a checkpoint declares"


def test_members_are_those_that_it_was_given():
    members, groups = [torch.optim.SGD([weight(1.0)])], [None]
    chain = ChainedOptimizer(members, process_groups=groups)
    members.append(torch.optim.SGD([weight(1.0)]))
    groups.append(None)
    assert len(chain.optimizers) == len(chain.process_groups) == 1


def test_the_host_hears_of_steps_above_the_threshold():
    p = weight(INF)
    chain = ChainedOptimizer([torch.optim.SGD([p])], grad_norm_skip_threshold=1.0)
    chain.step()
    for count in (1, 2, 4):
        while int(chain.skipped) < count:
            chain.step()
        with pytest.warns(RuntimeWarning, match=f"has skipped {count} steps?: in {count} the norm was above the threshold"):
            chain.state_dict()
    chain.state_dict()


def test_groups_and_state_of_a_chain_are_not_to_be_written():
    chain = ChainedOptimizer([torch.optim.SGD([weight(1.0)])])
    with pytest.raises(TypeError):
        chain.state[nn.Parameter(torch.zeros(1))] = {}
    with pytest.raises(AttributeError):
        chain.param_groups.append({})


@pytest.mark.parametrize("saved", [None, [], {}, {"optimizers": []}, {"state": {}, "param_groups": []}])
def test_what_is_no_state_dict_of_the_chain_is_refused(saved):
    with pytest.raises(ValueError, match="0 optimizers but the chain has 1"):
        ChainedOptimizer([torch.optim.SGD([weight(1.0)])]).load_state_dict(saved)


def test_a_parameter_that_two_members_share_is_clipped_once():
    p = weight(1.0)
    clip_grad_norm_(SimpleNamespace(optimizers=[torch.optim.SGD([p]), torch.optim.SGD([p])]), 0.5)
    assert torch.linalg.vector_norm(p.grad).item() == pytest.approx(0.5)


@pytest.mark.parametrize("broken", [{}, {"state": {}}, None, {"state": {}, "param_groups": []}], ids=str)
def test_members_go_back_whatever_the_error_of_a_later_one(broken):
    """A member of torch's has KeyErrors, TypeErrors and ValueErrors for what is no state dict."""
    first, second = (torch.optim.SGD([weight(1.0)], lr=0.1) for _ in range(2))
    chain = ChainedOptimizer([first, second])
    saved = chain.state_dict()
    saved["optimizers"][0]["param_groups"][0]["lr"] = 0.7
    saved["optimizers"][1] = broken
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        chain.load_state_dict(saved)
    assert first.param_groups[0]["lr"] == 0.1


def test_a_count_that_was_read_stays_as_it_was():
    chain = ChainedOptimizer([torch.optim.SGD([weight(INF)])], grad_norm_skip_threshold=1.0)
    before = chain.skipped
    chain.step()
    assert (int(before), int(chain.skipped)) == (0, 1)


def test_a_chain_inside_that_cannot_be_told_is_not_stepped():
    ps = [weight(1e6), weight(1e6)]
    inner = ChainedOptimizer([Muon(ps[:1]), torch.optim.SGD(ps[1:], lr=0.1)])
    chain = ChainedOptimizer([inner], grad_norm_skip_threshold=1.0)
    chain.step()
    assert int(chain.skipped) == 1 and not any(p.any() for p in ps)


def test_a_closure_may_make_the_gradients():
    p = weight(0.0)

    def closure() -> torch.Tensor:
        loss = (p - 1).square().sum()
        loss.backward()
        return loss

    assert float(ChainedOptimizer([Muon([p])]).step(closure).detach()) == 24 and p.ne(0).all()


def test_the_next_step_tells_of_one_above_the_threshold():
    chain = ChainedOptimizer([torch.optim.SGD([weight(INF)])], grad_norm_skip_threshold=1.0)
    chain.step()
    with pytest.warns(RuntimeWarning) as found:
        chain.step()
    told = (
        "ChainedOptimizer has skipped 1 step: in 1 the norm was above the threshold or no number (see ChainedOptimizer.skipped)"
    )
    assert [str(each.message) for each in found] == [told]


@pytest.mark.filterwarnings("ignore:ChainedOptimizer has skipped:RuntimeWarning")
@pytest.mark.parametrize(("size", "skipped"), [(0.0, 0), (1e-30, 1)])
def test_a_threshold_may_be_zero(size, skipped):
    chain = ChainedOptimizer([torch.optim.SGD([weight(size)])], grad_norm_skip_threshold=0.0)
    chain.step()
    assert int(chain.skipped) == skipped


def test_all_members_before_the_one_that_refuses_go_back():
    members = [torch.optim.SGD([weight(1.0)], lr=0.1) for _ in range(3)]
    chain = ChainedOptimizer(members)
    saved = chain.state_dict()
    for part in saved["optimizers"]:
        part["param_groups"][0]["lr"] = 0.7
    saved["optimizers"][2]["param_groups"] = []
    with pytest.raises(ValueError, match="parameter group"):
        chain.load_state_dict(saved)
    assert [member.param_groups[0]["lr"] for member in members] == [0.1] * 3


def test_groups_of_others_may_have_algorithms_too():
    p = weight(1.0)
    assert clip_grad_norm_(torch.optim.SGD([{"params": [p], "algorithm": "muon"}]), 0.5).threshold == pytest.approx(24**0.5)
    assert torch.linalg.vector_norm(p.grad).item() == pytest.approx(0.5)


def two_groups_of_the_same_ranks(rank: int) -> list[float]:
    """In the first of which all is exempt."""
    first, second = dist.new_group([0, 1]), dist.new_group([0, 1])
    members = [Muon([weight(1.0)]), torch.optim.SGD([weight(3.0 if rank else 4.0)])]
    chain = ChainedOptimizer(members, clip_grad=0.5, process_groups=[first, second])
    chain.step()
    return [float(chain.norms.threshold), float(members[1].param_groups[0]["params"][0].grad[0, 0])]


def test_process_groups_of_the_same_ranks_are_one():
    threshold = 5 * 24**0.5
    expected = [[threshold, size * 0.5 / threshold] for size in (4, 3)]
    for found, right in zip(threads(2, two_groups_of_the_same_ranks), expected, strict=True):
        assert found == pytest.approx(right)


def test_a_chain_says_whether_all_in_it_is_exempt():
    groups = [{"params": [weight(1.0)], "skip_grad_norm_clip": flag} for flag in (True, False)]
    for some, exempt in ((groups[:1], True), (groups, False)):
        assert ChainedOptimizer([torch.optim.SGD(copy.deepcopy(some))]).skip_grad_norm_clip is exempt


def test_the_innermost_process_group_is_a_members_own(alone):
    own = dist.new_group([0])
    inner = ChainedOptimizer([torch.optim.SGD([weight(1.0)]) for _ in range(2)], process_groups=[own, None])
    assert [leaf.process_group for leaf in leaves(ChainedOptimizer([inner], process_groups=[alone]))] == [own, alone]


def test_before_the_first_step_there_are_no_norms():
    assert list(ChainedOptimizer([torch.optim.SGD([weight(1.0)])], log_grad_norm=True).norms) == [None] * 3


@pytest.mark.filterwarnings("ignore:Using backward")
def test_norms_have_no_graph():
    p = nn.Parameter(torch.ones(3))
    p.square().sum().backward(create_graph=True)
    graph, chain = p.grad.grad_fn, ChainedOptimizer([torch.optim.SGD([p])], clip_grad=0.5, log_grad_norm=True)
    assert not any(N.requires_grad for N in clip_grad_norm_(torch.optim.SGD([p]), 1.0))
    chain.step()
    assert not any(N.requires_grad for N in chain.norms) and p.grad.grad_fn is graph


def test_a_gradient_counts_also_where_its_weight_is_frozen():
    """An optimizer steps by whatever gradient is there."""
    p, frozen = weight(1.0), weight(1.0).requires_grad_(False)
    before = p.grad.clone()
    norms = clip_grad_norm_(torch.optim.SGD([p, frozen]), 0.5)
    assert float(norms.clipped) == pytest.approx(float(torch.cat([before, before]).norm()))
    assert torch.equal(frozen.grad, p.grad) and not torch.equal(frozen.grad, before)


@pytest.mark.parametrize("known", [0.0, 1.0])
def test_what_a_member_was_told_may_be_a_number(known):
    p = weight(1.0)
    muon = Muon([{"params": [p], "skip_grad_norm_clip": False}])
    muon.found_inf = known
    ChainedOptimizer([muon], grad_norm_skip_threshold=100.0).step()
    assert bool(p.any()) != bool(known)
