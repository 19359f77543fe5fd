# SPDX-License-Identifier: Apache-2.0
"""clip_grad_norm_ without a chain: what it takes, and over which ranks."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from conformance.worlds import threads
from impl import Layout, Muon, Section, clip_grad_norm_
from tests.test_chain import Operations, chain_of, give, same, weights
from tests.test_chain_members import INF, weight


def test_clip_grad_norm_takes_groups_and_refuses_a_norm_that_is_not_finite_on_request():
    ps = weights()
    give(ps)
    chain = chain_of(ps)
    groups = [{**group, "params": [nn.Parameter(p.detach().clone()) for p in group["params"]]} for group in chain.param_groups]
    give([p for group in groups for p in group["params"]])
    with Operations() as operations:
        assert same(list(clip_grad_norm_(groups, 0.5)), list(clip_grad_norm_(chain, 0.5)))
    assert "aten::_local_scalar_dense" not in operations.names, "without error_if_nonfinite nobody waits"
    assert same([p.grad for g in groups for p in g["params"]], [p.grad for p in ps])
    assert same(list(clip_grad_norm_(chain.param_groups, torch.inf)), list(clip_grad_norm_(chain, torch.inf)))
    with pytest.raises(TypeError, match=r"takes the optimizer, .* in place of its parameters"):
        clip_grad_norm_(iter(ps), 1.0)
    ps[0].grad[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"norm of order 2\.0 of the gradients is nan, so they cannot be clipped"):
        clip_grad_norm_(chain, 0.1, error_if_nonfinite=True)
    total = clip_grad_norm_(chain, 0.1, torch.inf, clip_norm="global").total
    assert total.isnan()


@pytest.mark.parametrize("bad", [-1.0, 1.0, 3.0, float("nan")])
def test_norms_are_of_order_two_or_infinity(bad):
    with pytest.raises(ValueError, match="norm_type"):
        clip_grad_norm_(chain_of(weights()), 1.0, bad)


@pytest.mark.parametrize(
    "what", [[torch.optim.SGD([weight(1.0)])], weight(1.0), [weight(1.0)]], ids=["optimizers", "one", "some"]
)
def test_what_is_to_be_clipped_is_one_optimizers(what):
    with pytest.raises(TypeError, match=r"takes the optimizer, .* in place of its parameters; .* a ChainedOptimizer"):
        clip_grad_norm_(what, 1.0)


def test_a_wrapper_may_show_the_groups_of_its_optimizer():
    exempt = torch.optim.SGD([weight(1.0)])
    exempt.skip_grad_norm_clip = True
    norms = clip_grad_norm_(SimpleNamespace(optimizer=exempt, param_groups=exempt.param_groups), 0.5)
    assert norms.threshold == 0 and exempt.param_groups[0]["params"][0].grad.eq(1).all()


def complex_shards(rank: int) -> float:
    """The norm of a complex gradient, of which each of two ranks has a half; it is clipped to half of it."""
    mesh, values = DeviceMesh("cpu", [0, 1]), torch.tensor([[0, 3 + 4j], [12j, 0]], dtype=torch.complex64)[rank]
    p = nn.Parameter(DTensor.from_local(torch.zeros_like(values), mesh, [Shard(0)], run_check=False))
    p.grad = DTensor.from_local(values.clone(), mesh, [Shard(0)], run_check=False)
    total = clip_grad_norm_(torch.optim.SGD([p]), 6.5).total
    torch.testing.assert_close(p.grad.to_local(), values / 2)
    return float(total)


def test_complex_gradients_have_a_norm_over_all_ranks():
    assert threads(2, complex_shards) == [13.0, 13.0]


def in_sections(rank: int, place: Placement) -> list[float]:
    """A gradient of a divided weight, placed otherwise: rows, of which AdamW steps the last two, after clipping by half."""
    mesh = DeviceMesh("cpu", [0, 1])
    p = nn.Parameter(DTensor.from_local(torch.ones(4, 3), mesh, [Shard(0)], run_check=False))
    p.grad = DTensor.from_local(torch.full((8, 3), 0.5 if place.is_partial() else 1.0), mesh, [place], run_check=False)
    clip_grad_norm_(Muon([p], layout=Layout(sections=(Section(6), Section(2, "adamw")))), 6**0.5 / 2)
    return p.grad.full_tensor()[:, 0].tolist()


@pytest.mark.parametrize("place", [Partial(), Replicate()], ids=str)
def test_sections_of_gradients_that_are_placed_otherwise(place):
    assert threads(2, in_sections, place) == [[1, 1, 1, 1, 1, 1, 0.5, 0.5]] * 2


def with_an_empty_part(rank: int) -> float:
    mesh = DeviceMesh("cpu", [0, 1, 2])
    own = torch.zeros(1 if rank < 2 else 0, 6)
    p = nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=torch.Size((2, 6)), stride=(6, 1)))
    p.grad = DTensor.from_local(torch.ones(2, 6), mesh, [Partial()], run_check=False)
    return float(clip_grad_norm_(torch.optim.SGD([p]), 1.0).total)


def test_the_norm_of_a_sum_of_which_a_rank_has_nothing():
    assert threads(3, with_an_empty_part) == [3 * 12**0.5] * 3


@pytest.mark.parametrize("attribute", ["optimizers", "chained_optimizers"])
def test_a_container_may_show_the_first_of_its_optimizers(attribute):
    members = [torch.optim.SGD([weight(1.0)]) for _ in range(2)]
    assert clip_grad_norm_(SimpleNamespace(optimizer=members[0], **{attribute: members}), 0.5).total == 48**0.5


def test_an_optimizer_may_be_iterated_over():
    class Container(torch.optim.SGD):
        def __iter__(self):
            return iter([self])

    assert clip_grad_norm_(Container([weight(1.0)]), 0.5).clipped == 24**0.5
    for attribute in ("optimizer", "optimizers", "chained_optimizers"):
        members = [torch.optim.SGD([weight(1.0)])]
        several = type("Several", (list,), {attribute: members[0] if attribute == "optimizer" else members})()
        assert clip_grad_norm_(several, 0.5).clipped == 24**0.5


def test_norms_may_be_of_another_order():
    ps = [weight(1.0), weight(4.0)]
    assert [float(N) for N in clip_grad_norm_(torch.optim.SGD(ps), 2.0, INF)] == [4.0] * 3
    assert [float(p.grad.max()) for p in ps] == [0.5, 2.0]
    ps = [weight(1.0), weight(4.0)]
    groups = [{"params": ps[:1]}, {"params": ps[1:], "skip_grad_norm_clip": True}]
    assert [float(N) for N in clip_grad_norm_(torch.optim.SGD(groups), 2.0, INF, clip_norm="global")] == [4.0, 4.0, 1.0]
    assert [float(p.grad.max()) for p in ps] == [0.5, 4.0]


def test_the_norm_of_what_is_infinite_is_infinite():
    assert [float(N) for N in clip_grad_norm_(torch.optim.SGD([weight(INF), weight(1.0)]), 1.0)] == [INF] * 3
