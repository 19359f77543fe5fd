# SPDX-License-Identifier: Apache-2.0
"""What `dump_nonfinite` writes; of several ranks, see test_submeshes.py and test_ranks.py."""

import pytest
import torch
from torch import nn

from impl import Muon, stages
from tests.test_skip import NAN, one_step

pytestmark = pytest.mark.filterwarnings("ignore:Muon has skipped:RuntimeWarning")


def test_the_dump_holds_the_first_failure_and_its_culprits_only(tmp_path):
    names = ["good", "bad"]
    named = [(name, nn.Parameter(torch.ones(2, 3))) for name in names]
    optimizer = Muon(named, dump_nonfinite=tmp_path / "dump.pt")
    one_step(optimizer, torch.ones(2, 3))
    optimizer.found_inf = torch.ones(())
    one_step(optimizer, torch.full((2, 3), NAN))
    assert not list(tmp_path.iterdir()), "what a loss scaler finds is no failure"
    del optimizer.found_inf
    before = optimizer.state[named[1][1]]["momentum_buffer"].clone()
    for value in (NAN, 7.0, float("inf")):
        named[0][1].grad, named[1][1].grad = torch.ones(2, 3), torch.full((2, 3), value)
        optimizer.step()
    dump = torch.load(tmp_path / "dump.pt", weights_only=True)
    assert list(dump) == ["bad"]
    assert dump["bad"]["gradient"].isnan().all()
    assert torch.equal(dump["bad"]["momentum_buffer"], before)


def test_the_dump_holds_what_orthogonalization_spoilt(tmp_path, monkeypatch):
    healthy = stages.orthogonalize
    monkeypatch.setattr(stages, "orthogonalize", lambda X, *plan: healthy(X, *plan) * (NAN if X.shape[-1] == 3 else 1))
    named = [("good", nn.Parameter(torch.ones(2, 2))), ("bad", nn.Parameter(torch.ones(2, 3)))]
    for _, p in named:
        p.grad = torch.ones_like(p)
    Muon(named, dump_nonfinite=tmp_path / "dump.pt").step()
    assert list(torch.load(tmp_path / "dump.pt", weights_only=True)) == ["bad"]


def test_the_dump_names_culprits_by_group_and_place(tmp_path):
    groups = [{"params": [nn.Parameter(torch.ones(2, 3))]} for _ in range(2)]
    one_step(Muon(groups, dump_nonfinite=tmp_path / "dump.pt"), torch.full((2, 3), NAN))
    assert list(torch.load(tmp_path / "dump.pt", weights_only=True)) == ["0.0", "1.0"]


def test_the_dump_holds_gradients_as_they_are_descended(tmp_path):
    """Without the loss scale, so that they are in the unit of the momentum beside them."""
    p = nn.Parameter(torch.ones(2, 3))
    optimizer = Muon([p], dump_nonfinite=tmp_path / "dump.pt", maximize=True)
    optimizer.grad_scale = torch.tensor(4.0)
    one_step(optimizer, torch.tensor([[NAN, 8.0, 8.0]] * 2))
    dump = torch.load(tmp_path / "dump.pt", weights_only=True)
    assert dump["0.0"]["gradient"][:, 1:].eq(-2.0).all()


def test_the_dump_may_have_a_name_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_step(Muon([nn.Parameter(torch.ones(2, 3))], dump_nonfinite="bad.pt"), torch.full((2, 3), NAN))
    assert list(torch.load(tmp_path / "bad.pt", weights_only=True)) == ["0.0"]


def test_the_dump_holds_averages_of_adamw(tmp_path):
    groups = [{"params": [nn.Parameter(torch.ones(2, 3))]}, {"params": [nn.Parameter(torch.ones(3))], "algorithm": "adamw"}]
    optimizer = Muon(groups, dump_nonfinite=tmp_path / "dump.pt")
    p, q = (group["params"][0] for group in optimizer.param_groups)
    p.grad, q.grad = torch.ones(2, 3), torch.tensor([1.0, NAN, 1.0])
    optimizer.step()
    dump = torch.load(tmp_path / "dump.pt", weights_only=True)
    assert {name: sorted(found) for name, found in dump.items()} == {"1.0": ["exp_avg", "exp_avg_sq", "gradient", "step"]}


def test_a_dump_that_cannot_be_written_does_not_stop_the_training(tmp_path):
    where = tmp_path / "nowhere" / "dump.pt"
    with pytest.raises(ValueError, match=f"dump_nonfinite should be a path in a directory that exists but is: {where}"):
        Muon([nn.Parameter(torch.ones(2, 3))], dump_nonfinite=where)
    (tmp_path / "gone").mkdir()
    optimizer = Muon([nn.Parameter(torch.ones(2, 3))], dump_nonfinite=tmp_path / "gone" / "dump.pt")
    (tmp_path / "gone").rmdir()
    with pytest.warns(RuntimeWarning, match="dump_nonfinite could not be written"):
        one_step(optimizer, torch.full((2, 3), NAN))
    one_step(optimizer, torch.full((2, 3), NAN))
    assert int(optimizer.skipped["gradient"]) == 2
