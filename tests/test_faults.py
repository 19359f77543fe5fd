# SPDX-License-Identifier: Apache-2.0
"""The staged failures: verdicts that follow from the losses, torch's optimizers on the same weights, one short command."""

import math

import pytest
import torch

from examples import faults
from examples.model import HybridLM

FALLING = [4.0] * 8 + [4.0 - 0.1 * step for step in range(1, 17)]  # from the fault on


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Small batches, an empty working directory, and the caller's number of threads afterwards."""
    monkeypatch.setattr(faults, "SEQUENCES", 2)
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("share", "verdict"),
    [(1.0, "learning"), (0.6, "learning"), (0.4, "slowed"), (0.05, "stalled"), (-1.0, "stalled"), (math.nan, "stalled")],
)
def test_clip_verdict_is_a_share_of_what_the_baseline_fell(share, verdict):
    fault = faults.fault_at(len(FALLING))
    later = [FALLING[fault - 1] + share * (loss - FALLING[fault - 1]) for loss in FALLING[fault:]]
    assert faults.clip_verdict(FALLING[:fault] + later, FALLING) == verdict


def test_clip_verdict_needs_a_baseline_that_learns():
    assert faults.clip_verdict(FALLING, FALLING[::-1]) == "unclear"


def test_nan_verdict():
    fault = faults.fault_at(len(FALLING))
    dead = FALLING[:fault] + [math.nan] * (len(FALLING) - fault)
    assert faults.nan_verdict(dead, 0) == "dead"
    assert faults.nan_verdict(FALLING, 1) == "surviving"
    assert faults.nan_verdict(FALLING, 0) == "unclear", "nothing was skipped, so there was no fault"
    assert faults.nan_verdict([*FALLING[:-1], math.nan], 1) == "unclear"
    assert faults.nan_verdict(FALLING[::-1], 1) == "unclear"


def test_torchs_optimizers_step_every_weight_of_the_model_in_place():
    torch.manual_seed(0)
    model = HybridLM(11)
    step = faults.torch_step(model)
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step()
    assert all((p != before[name]).all() for name, p in model.named_parameters())
    q = model.blocks[-1].mixer.qkv.weight[:64] - before["blocks.3.mixer.qkv.weight"][:64] * (1 - 0.1 * faults.LR["muon"])
    spectrum = torch.linalg.svdvals(q.detach() / faults.LR["muon"])
    assert 0.3 < spectrum.median() < 1.3, "the queries were orthogonalized by themselves"


def test_a_short_command_tells_and_draws_both_failures(small, capsys):
    status = faults.main(["--steps", "12", "--out", "pictures"])
    out, err = capsys.readouterr()
    assert all((small / "pictures" / name).read_bytes().startswith(b"\x89PNG") for name in ("clip.png", "nan.png"))
    table = {}  # change, coefficient or count, verdict
    for line in out.splitlines():
        table.setdefault(line[:38].strip(), line.split()[-3:])
    coefficients = [table[name][1] for name in faults.CLIP]
    assert coefficients[0] == "none" and all(1e-9 < float(c) < 1e-6 for c in coefficients[1:3]), "clipped for one weight"
    assert float(coefficients[3]) > 0.1, "clipped for its own"
    assert table["guard off"] == ["nan", "0", "dead"] and table[faults.GUARDED][1:] == ["1", "surviving"]
    assert "step 5, RuntimeWarning: Muon has skipped 1 step: in 1 an orthogonalized update" in out
    assert "orthogonalization 1, gradient 0" in out
    assert status == ("not as expected" in err)


def test_an_unexpected_verdict_is_named_and_is_the_exit_status(small, monkeypatch, capsys):
    stories = iter([FALLING] * 4 + [[math.nan] * 24, FALLING])
    monkeypatch.setattr(faults, "train", lambda *args, **kwargs: faults.Story(next(stories), [1.0] * 24, [], {"gradient": 1}))
    assert faults.main([]) == 1
    name = "torch's optimizers, torch's clipping"
    assert f"not as expected: {name}: learning, not stalled\n" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["--steps 5", "--steps many", "--out occupied", "--seed 1"])
def test_a_mistake_is_one_line(arguments, small, capsys):
    (small / "occupied").write_text("a file where the directory should go")
    assert faults.main(arguments.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
