# SPDX-License-Identifier: Apache-2.0
"""The examples: the model against naive forms of itself, exact resumption, files left behind, errors in one line."""

import csv
import math
import os
import signal
import sys
from pathlib import Path
from subprocess import PIPE, Popen
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from examples.compare import table
from examples.data import CONTEXT, Corpus, draw, in_order, unigram_entropy
from examples.model import HybridLM, MixtureOfExperts, gated_delta_rule, swiglu
from examples.run import Run, warmup_then_linear
from examples.train import main

TEXT = "".join(f"{i} times {i} is {i * i}, and that is all. " for i in range(200))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a short text in it, and one thread, which is what the command sets."""
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(before)


def start_command(folder, *arguments):
    command = [sys.executable, "-m", "examples.train", *arguments]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return Popen(command, cwd=folder, env=env, text=True, stdout=PIPE, stderr=PIPE)


def bits(state):
    """The same nest of containers with each tensor as its dtype and bytes, which == can compare."""
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [bits(value) for value in state]
    return (state.dtype, state.numpy().tobytes()) if isinstance(state, torch.Tensor) else state


def assert_same_run(a, b):
    """Two checkpoints agree in every bit but the time it took."""
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (a, b))
    for row in a["metrics"] + b["metrics"]:
        del row["seconds"]
    assert a.keys() == b.keys() >= {"model", "optimizer", "scheduler", "sampler", "metrics", "options"}
    for part in a:
        assert bits(a[part]) == bits(b[part]), part


def test_gated_delta_rule_is_the_recurrence():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 17, 5, dtype=torch.float64)
    beta, log_alpha = torch.rand(2, 17, dtype=torch.float64), -3 * torch.rand(2, 17, dtype=torch.float64)
    log_alpha[:, 9] = -1e4  # forgets everything; above the diagonal, the exponential of the difference is infinite
    S, expected = torch.zeros(2, 5, 5, dtype=torch.float64), []
    for t in range(17):
        S = log_alpha[:, t, None, None].exp() * S
        u = beta[:, t, None, None] * (v[:, t, :, None] - S @ k[:, t, :, None])
        S = S + u * k[:, t, None, :]
        expected.append((S @ q[:, t, :, None]).squeeze(-1))
    o = gated_delta_rule(q, k, v, beta, log_alpha.requires_grad_())
    torch.testing.assert_close(o, torch.stack(expected, 1))
    o.sum().backward()
    assert log_alpha.grad.isfinite().all()


def test_experts_are_the_sum_over_each_tokens_two_best():
    torch.manual_seed(0)
    layer, x = MixtureOfExperts(d=12, experts=8, hidden=6), torch.randn(40, 12)
    y, balance = layer(x)
    w13, w2 = layer.w13.view(8, 12, 12), layer.w2.view(8, 12, 6)
    scores = layer.router(x).softmax(-1)
    for i, token in enumerate(x):
        weight, best = scores[i].topk(2)
        expected = sum(w * swiglu(token, w13[e], w2[e]) for w, e in zip(weight / weight.sum(), best, strict=True))
        torch.testing.assert_close(y[i], expected)
    load = F.one_hot(scores.topk(2).indices, 8).float().mean((0, 1))
    torch.testing.assert_close(balance, 8 * (load * scores.mean(0)).sum())


def test_a_future_token_does_not_change_past_logits():
    torch.manual_seed(0)
    model = HybridLM(vocabulary=11)
    tokens = torch.randint(11, (2, CONTEXT))
    changed = tokens.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 11
    before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :40], after[:, :40], rtol=0, atol=1e-5)
    assert ((before - after)[:, 40:].abs().amax(-1) > 1e-4).all(), "every later position can see the change"


def test_unigram_entropy():
    assert unigram_entropy(torch.tensor([0, 1, 0, 0])) == pytest.approx(math.log(4) - 0.75 * math.log(3))
    assert unigram_entropy(torch.tensor([5, 5, 5])) == 0


def test_corpus_splits_and_windows():
    corpus = Corpus.from_text(TEXT)
    restored = "".join(corpus.alphabet[i] for i in torch.cat([corpus.train, corpus.validation]))
    assert restored == TEXT and len(corpus.validation) == len(TEXT) // 10
    inputs, targets = in_order(corpus.validation)
    assert torch.equal(inputs.flatten(), corpus.validation[: inputs.numel()])
    assert torch.equal(targets.flatten(), corpus.validation[1 : inputs.numel() + 1])
    inputs, targets = draw(torch.arange(CONTEXT + 2), 50, torch.Generator().manual_seed(0))
    assert set(inputs[:, 0].tolist()) == {0, 1} and torch.equal(inputs + 1, targets)


def test_learning_rate_rises_then_falls_to_almost_zero():
    factors = [warmup_then_linear(step, steps=100) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and max(factors) == 1
    assert factors[4:] == sorted(factors[4:], reverse=True) and 0 < factors[-1] < 0.02
    assert warmup_then_linear(0, steps=1) == 1


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(optimizer, folder):
    def new():
        return Run(optimizer=optimizer, lr=0.01, steps=5, seed=3, device="cpu", data="text.txt")

    for name, stops in (("straight", [5]), ("resumed", [0, 2, 5])):
        (folder / name).mkdir()
        run = new()
        for stop in stops:
            while len(run.metrics) < stop:
                run.advance()
            run.save(folder / name)
            run = Run.load(folder / name)
        assert run.finished
    assert_same_run(folder / "straight", folder / "resumed")
    assert not torch.equal(run.model.lm_head.weight, new().model.lm_head.weight), "the steps did something"


def test_a_run_learns_and_leaves_its_files(folder, capsys):
    assert main(["--steps", "12", "--data", "text.txt", "--name", "short"]) == 0
    directory = folder / "runs" / "short"
    rows = list(csv.DictReader((directory / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert float(rows[-1]["val_loss"]) < float(rows[0]["train_loss"]) - 0.5
    assert "blocks.0.experts.w13" in (directory / "routing.txt").read_text()
    files = {"checkpoint.pt", "metrics.csv", "routing.txt", "loss.png", "singular_values.png"}
    assert {path.name for path in directory.iterdir()} == files
    assert all((directory / name).read_bytes().startswith(b"\x89PNG") for name in files if name.endswith(".png"))
    printed = capsys.readouterr().out
    losses = float(rows[-1]["val_loss"]), unigram_entropy(Corpus.from_text(TEXT).validation)
    assert all(part in printed for part in [*map("{:.4f}".format, losses), "runs/short", "loss.png", "singular_values.png"])


def test_ctrl_c_then_resume_on_the_command_line(folder):
    options = ["--steps", "16", "--data", "text.txt", "--seed", "1"]
    straight = start_command(folder, *options, "--name", "straight")
    stopped = start_command(folder, *options, "--name", "stopped")
    seen = ""
    while "step " not in seen and stopped.poll() is None:
        seen += stopped.stderr.read(1)
    stopped.send_signal(signal.SIGINT)
    out, err = stopped.communicate()
    assert stopped.returncode == 130 and "--resume runs/stopped" in out and "Traceback" not in err, err
    assert 0 < len(torch.load(folder / "runs/stopped/checkpoint.pt")["metrics"]) < 16

    resumed = start_command(folder, "--resume", "stopped")
    for process in (straight, resumed):
        _, err = process.communicate()
        assert process.returncode == 0, err
    assert_same_run(folder / "runs/straight", folder / "runs/stopped")


def test_comparison(folder):
    assert main(["--compare", "--steps", "2", "--data", "text.txt"]) == 0
    lines = (folder / "runs/compare/table.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines[1:7]] == ["muon"] * 3 + ["adamw"] * 3
    assert (folder / "runs/compare/comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_compares_at_equal_time_and_flags_a_best_at_the_edge():
    def run(optimizer, lr, seconds, losses):
        rows = [{"seconds": seconds * i, "val_loss": loss} for i, loss in enumerate(losses, 1)]
        return SimpleNamespace(options={"optimizer": optimizer, "lr": lr}, metrics=rows, steps=2, unigram_entropy=3.0)

    slow, fast = run("muon", 0.03, 10, [4.0, 1.0]), run("adamw", 0.004, 8, [3.0, 2.0])
    runs = [slow, run("muon", 0.01, 10, [4.0, 1.5]), fast, run("adamw", 0.008, 8, [4.0, 2.5])]
    lines = table(runs, common=16.0).splitlines()
    assert lines[1].split() == ["muon", "0.03", "20.0", "1.0000", "2.2000"]
    assert lines[5].endswith("at lr 0.03") and lines[6].endswith("at lr 0.004 (at an end of its grid)")


BAD_FILES = {
    "binary": b"\x80\xff" * 1000,
    "short.txt": b"too short",
    "damaged/checkpoint.pt": b"PK not really",
    "runs/occupied": b"a file where the directory should go",
}
MISTAKES = {  # what the message says, and the command lines that earn it
    "not a positive integer": ("--steps 0", "--steps many"),
    "not a positive number": ("--lr -0.1", "--lr nan", "--lr inf"),
    "not an integer from 0": ("--seed -1", "--seed 99999999999999999999"),
    "no device that": ("--device abacus", "--device cuda:99", "--device meta"),
    "try an --lr below": ("--data text.txt --steps 40 --lr 1e30",),
    "no such file": ("--data missing.txt",),
    "not a regular file": ("--data .",),
    "not UTF-8": ("--data binary",),
    "at least 650 are needed": ("--data short.txt",),
    "not a plain name": ("--name ../elsewhere", "--name ..", "--name /"),
    "File exists": ("--name occupied --data text.txt",),
    "no checkpoint.pt": ("--resume nowhere", "--resume ."),
    "is damaged": ("--resume damaged",),
    "cannot be combined": ("--resume damaged --steps 3", "--compare --lr 0.1"),
}


@pytest.mark.filterwarnings("ignore:Muon has skipped:RuntimeWarning")
@pytest.mark.parametrize(("message", "arguments"), [(m, a) for m, commands in MISTAKES.items() for a in commands])
def test_a_mistake_is_one_line(message, arguments, folder, capsys):
    for name, content in BAD_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    assert main(arguments.split()) == 2
    *progress, line = capsys.readouterr().err.splitlines()
    assert not progress or "1e30" in arguments, "nothing but the message, except where training had begun"
    assert line.startswith("error: ") and message in line


def test_a_mistake_on_the_real_command_line(folder):
    process = start_command(folder, "--device", "cuda:99")
    out, err = process.communicate()
    assert process.returncode == 2 and out == ""
    assert len(err.splitlines()) == 1 and err.startswith("error: --device cuda:99: "), err


def test_resuming_from_something_else_is_refused(folder, capsys):
    Run(optimizer="muon", lr=0.01, steps=2, seed=0, device="cpu", data="text.txt").save(folder)
    (folder / "text.txt").write_text(TEXT + "More.")
    assert main(["--resume", str(folder)]) == 2
    assert "the text has changed" in capsys.readouterr().err
    state = torch.load(folder / "checkpoint.pt")
    del state["model"]["norm.weight"]
    (folder / "text.txt").write_text(TEXT)
    torch.save(state, folder / "checkpoint.pt")
    assert main(["--resume", str(folder)]) == 2
    assert "is damaged" in capsys.readouterr().err
