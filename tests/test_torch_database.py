# SPDX-License-Identifier: Apache-2.0
"""torch's own database of optimizers, which its wheel brings: the inputs and the errors it asks of a Muon, asked of ours.

The cases that torch runs on it are not in the wheel; `tests/torch_suite.py` runs those.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import _muon

from conformance import accept
from impl import Muon

database = pytest.importorskip("torch.testing._internal.common_optimizers", reason="torch's own tests need expecttest")
TORCHS = next(info for info in database.optim_db if info.optim_cls is torch.optim.Muon)
INPUTS = TORCHS.optim_inputs_func(device="cpu")
ERRORS = TORCHS.optim_error_inputs_func(device="cpu", dtype=torch.float32)
# What torch only warns of: stepped twice, a parameter would move on one gradient as on two.
REFUSED = {"a param group cannot have duplicate parameters": "twice"}


def small(device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False)).to(device)


def loss(model: nn.Module) -> Tensor:
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).device)
    return (model(x) - x[:, :4]).square().mean()


def test_the_database_has_not_shrunk():
    assert len(INPUTS) >= 7 and len(ERRORS) >= 9


@pytest.mark.parametrize("given", INPUTS, ids=lambda given: given.desc)
def test_an_input_lowers_the_loss(given, device):
    model = small(device)
    optimizer = Muon(model.parameters(), **copy.deepcopy(given.kwargs))
    before = loss(model).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert loss(model).item() < before


@pytest.mark.parametrize("given", INPUTS, ids=lambda given: given.desc)
def test_an_input_steps_as_torchs_muon(given, device):
    """With the schedule and the epsilon that torch's has by default, up to the roundings of its products in bfloat16."""
    theirs, ours = small(device), small(device)
    torchs = torch.optim.Muon(theirs.parameters(), **copy.deepcopy(given.kwargs))
    mine = Muon(ours.parameters(), **{"ns_coefficients": "jordan", "eps": _muon.EPS, **copy.deepcopy(given.kwargs)})
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        before = copy.deepcopy(theirs)
        for p, q, old in zip(theirs.parameters(), ours.parameters(), before.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(device)
            q.grad = p.grad.clone()
            q.data.copy_(old)
        torchs.step()
        mine.step()
        for p, q, old in zip(theirs.parameters(), ours.parameters(), before.parameters(), strict=True):
            accept.close(actual=q - old, expected=p - old, dtype=torch.bfloat16)


@pytest.mark.parametrize("given", ERRORS, ids=lambda given: given.optimizer_error_input.desc)
def test_an_error_is_raised_in_torchs_words(given):
    params, options = given.optimizer_error_input.params, given.optimizer_error_input.kwargs
    if issubclass(given.error_type, Warning):
        refused = REFUSED[given.optimizer_error_input.desc]
        with pytest.warns(given.error_type, match=given.error_regex), pytest.raises(ValueError, match=refused):
            Muon(params, **options)
    elif given.error_on == database.OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(given.error_type, match=given.error_regex):
            Muon(params, **options)
    else:
        optimizer = Muon(params, **options)
        with pytest.raises(given.error_type, match=given.error_regex):
            optimizer.step()
