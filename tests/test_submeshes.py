# SPDX-License-Identifier: Apache-2.0
"""Ranks of which each pair, or each one, has weights of its own: what is for some ranks must not reach the others."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard

import impl.skip
from conformance.ranks import spread
from conformance.strategies import tensor
from conformance.worlds import threads
from impl import ChainedOptimizer, Muon, clip_grad_norm_
from impl.exchange import Round


def together() -> DeviceMesh:
    """Ranks 0 and 1, or 2 and 3."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "rank"))["rank"]


def divided(W: Tensor, G: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    """A weight by rows over the mesh, with its gradient."""
    p = nn.Parameter(spread(W, mesh, [Shard(0)]))
    p.grad = spread(G, mesh, [Shard(0)])
    return p


def weights_of_zeros(rank: int) -> Tensor:
    """This pair's part of a weight after a step with a gradient of zeros, with Gram matrices that are summed."""
    p = divided(torch.ones(8, 12), torch.zeros(8, 12), together())
    Muon([p], lr=0.1, weight_decay=0.5, shard_mode="distributed").step()
    return p.detach().to_local()


def test_a_sum_of_zeros_moves_nothing():
    for part in threads(4, weights_of_zeros):
        torch.testing.assert_close(part, torch.full((4, 12), 0.95))


def norms(rank: int, algorithm: str) -> tuple[float, float]:
    """The norm of all gradients where one weight lies on all ranks and one on a pair, and what it should be."""
    meshes = DeviceMesh("cpu", list(range(4))), together()
    found = tensor((8, 6), 0), tensor((4, 6), 1 + rank // 2)
    parameters = [divided(T, T, mesh) for T, mesh in zip(found, meshes, strict=True)]
    total = clip_grad_norm_(Muon(parameters, algorithm=algorithm), 1e9).total
    return float(total), float(torch.cat(found).double().norm())


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_a_norm_counts_weights_on_the_ranks_that_they_are_on(algorithm):
    """Also where all are exempt, and nothing is clipped by it."""
    for found, right in threads(4, norms, algorithm):
        assert found == pytest.approx(right, rel=1e-6)


def chained_parts(rank: int) -> tuple[float, Tensor]:
    """The norm by which a chain clips a weight of AdamW, before one of Muon, on two ranks, and what is left of its gradient."""
    mesh = init_device_mesh("cpu", (2,))
    p, q = (divided(tensor((8, 6), seed), tensor((8, 6), 10 + seed), mesh) for seed in range(2))
    chain = ChainedOptimizer([Muon([{"params": [p], "algorithm": "adamw"}, {"params": [q]}])], clip_grad=0.5)
    chain.step()
    return float(chain.norms.clipped), p.grad.to_local()


def test_a_chain_measures_weights_on_the_ranks_that_they_are_on():
    found, G = threads(2, chained_parts), tensor((8, 6), 10)
    assert [norm for norm, _ in found] == [pytest.approx(float(G.norm()))] * 2
    torch.testing.assert_close(torch.cat([part for _, part in found]), G * 0.5 / G.norm())


def measured_alone(rank: int) -> float:
    """What a chain clips is this rank's own; what lies on both ranks is exempt."""
    p, q = divided(tensor((8, 6), 0), tensor((8, 6), 1), init_device_mesh("cpu", (2,))), nn.Parameter(torch.ones(3))
    q.grad = torch.full((3,), 2.0)
    chain = ChainedOptimizer([Muon([{"params": [p]}, {"params": [q], "algorithm": "adamw"}])], clip_grad=0.5)
    chain.step()
    return float(chain.norms.clipped)


def test_no_norm_travels_that_nothing_is_clipped_by(monkeypatch):
    monkeypatch.setattr(dist, "all_gather", None)
    assert threads(2, measured_alone) == [pytest.approx(12**0.5)] * 2


def weight(algorithm: str, seed: int) -> nn.Parameter:
    p = nn.Parameter(tensor((4, 6), seed))
    p.grad = tensor((4, 6), seed + 1)
    return p


def chained(rank: int, clip_norm: str) -> list[float | None]:
    """Of a chain of which only the last rank has anything to clip."""
    members = [Muon([weight("muon", rank)])] + [Muon([weight("adamw", 7)], algorithm="adamw")] * (rank == 2)
    chain = ChainedOptimizer(members, process_groups=[dist.group.WORLD] * len(members), clip_grad=0.5, clip_norm=clip_norm)
    chain.step()
    return [None if N is None else float(N) for N in chain.norms]


@pytest.mark.parametrize("clip_norm", ["own", "global"])
def test_ranks_that_clip_nothing_measure_with_those_that_do(clip_norm):
    own = float(tensor((4, 6), 8).double().norm())
    total = sum(float(tensor((4, 6), seed).double().square().sum()) for seed in (1, 2, 3, 8)) ** 0.5
    found = threads(3, chained, clip_norm)
    assert all(a == b for a, b in pairwise(found))
    right = (None, own, own) if clip_norm == "own" else (total, total, own)
    assert found[0] == [N if N is None else pytest.approx(N, rel=1e-6) for N in right]


def beside(rank: int) -> float:
    """The total norm of a chain of which one rank has, beside what all exempt, something of its own to clip."""
    members = [Muon([weight("muon", rank)])] + [Muon([weight("adamw", 7)], algorithm="adamw")] * (rank == 1)
    groups = [dist.group.WORLD, None][: len(members)]
    chain = ChainedOptimizer(members, process_groups=groups, clip_grad=0.5, clip_norm="global")
    chain.step()
    return float(chain.norms.total)


def test_ranks_measure_what_others_in_their_process_group_clip_by():
    squares = [float(tensor((4, 6), seed).double().square().sum()) for seed in (1, 2, 8)]
    assert threads(2, beside) == pytest.approx([sum(squares[:2]) ** 0.5, sum(squares) ** 0.5], rel=1e-6)


def late(rank: int) -> tuple[int, str]:
    """The number of silent process groups, and what a step says once a member of one is not exempt any more."""
    apart = dist.new_group([0, 1])
    exempt, clipped = Muon([weight("muon", 0)]), Muon([weight("adamw", 2)], algorithm="adamw")
    chain = ChainedOptimizer([exempt, clipped], process_groups=[apart, dist.group.WORLD], clip_grad=0.5)
    silent = len(chain.silent)
    chain.step()
    exempt.param_groups[0]["skip_grad_norm_clip"] = False
    try:
        chain.step()
    except RuntimeError as error:
        return silent, str(error)
    return silent, ""


def test_what_all_ranks_took_for_exempt_stays_so():
    for silent, told in threads(2, late):
        assert silent == 1 and "build it again" in told


def broken(rank: int) -> dict[str, int]:
    """What a step comes to whose sums of Gram matrices give no number."""
    p = divided(torch.ones(8, 12), tensor((8, 12), 0), together())
    optimizer = Muon([p], lr=0.1, shard_mode="distributed", process_group=dist.new_group(list(range(4))))
    optimizer.step()
    assert p.detach().to_local().eq(1).all()
    return {reason: int(count) for reason, count in optimizer.skipped.items()}


@pytest.mark.filterwarnings("ignore:Muon has skipped:RuntimeWarning")
def test_a_divided_orthogonalization_that_fails_stops_all_of_the_process_group(monkeypatch):
    healthy = Round.orthogonalize_parts

    def poisoned(self: Round, got: Tensor) -> list[Tensor]:
        return [torch.full_like(O, float("nan")) if dist.get_rank() == 1 else O for O in healthy(self, got)]

    monkeypatch.setattr(Round, "orthogonalize_parts", poisoned)
    assert threads(4, broken) == [{"orthogonalization": 1, "gradient": 0, "found_inf": 0}] * 4


def decided(rank: int) -> Tensor:
    """A step that is decided by the ranks of a weight's own mesh, as a process group that was made apart."""
    p = divided(torch.ones(8, 12), tensor((8, 12), 0), init_device_mesh("cpu", (2,)))
    Muon([p], lr=0.1, process_group=dist.new_group([0, 1])).step()
    return p.detach().to_local()


def test_a_process_group_of_the_same_ranks_will_do():
    assert all(not part.eq(1).any() for part in threads(2, decided))


def told(rank: int) -> tuple[int, bool]:
    """A step that the second rank is told to skip, of an optimizer that looks at nothing itself."""
    p = nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    optimizer = Muon([p], skip_nonfinite=False, process_group=dist.group.WORLD)
    optimizer.found_inf = torch.tensor(float(rank == 1))
    optimizer.step()
    return int(optimizer.skipped["found_inf"]), bool(p.eq(1).all())


def test_what_one_rank_is_told_all_do_also_without_a_look_of_their_own():
    assert threads(2, told) == [(1, True)] * 2


def crossing(rank: int) -> None:
    """Weights on the ranks of a row and of a column, neither of which could decide for the other."""
    mesh, T = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")), torch.ones(8, 12)
    with pytest.raises(ValueError, match="give it a process_group of all ranks that should step together"):
        Muon([divided(T, T, mesh["a"]), divided(T, T, mesh["b"])])
    alone = Muon([nn.Parameter(T)])
    with pytest.raises(ValueError, match="give it a process_group"):
        alone.add_param_group({"params": [divided(T, T, mesh["a"]), divided(T, T, mesh["b"])]})
    assert alone.guard.process_group is None  # nothing has changed
    alone.add_param_group({"params": [divided(T, T, mesh["b"])]})
    pair, three = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [1, 2, 3])
    if rank == 1:  # the larger has no more to say than the smaller
        for meshes in ((pair, three), (three, pair)):
            with pytest.raises(ValueError, match="process_group") as caught:
                Muon([divided(T, T, each) for each in meshes])
            new, known = ([0, 1], [1, 2, 3]) if meshes[0] is three else ([1, 2, 3], [0, 1])
            assert str(caught.value) == (
                f"a parameter lies on the ranks {new}, and the optimizer's steps are decided by the ranks {known}; "
                "give it a process_group of all ranks that should step together"
            )


def test_ranks_that_only_overlap_need_a_process_group():
    threads(4, crossing)


def dumped(rank: int, path: Path) -> None:
    """A step that fails, of ranks that decide two by two and name one file."""
    p = divided(torch.ones(8, 12), torch.full((8, 12), float("nan")), together())
    Muon([p], dump_nonfinite=path).step()


@pytest.mark.filterwarnings("ignore:Muon has skipped:RuntimeWarning")
def test_ranks_that_decide_apart_dump_apart(tmp_path):
    threads(4, dumped, tmp_path / "dump")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"dump.rank{rank}" for rank in range(4)]


def test_the_first_rank_of_every_pair_warns(monkeypatch):
    heard: list[int] = []
    monkeypatch.setattr(impl.skip.warnings, "warn", lambda text, *_, **__: heard.append(dist.get_rank()))

    def unheard(rank: int) -> None:
        optimizer = Muon([divided(torch.ones(8, 12), torch.full((8, 12), torch.nan), together())])
        optimizer.step()
        optimizer.state_dict()

    threads(4, unheard)
    assert sorted(heard) == [0, 2]
