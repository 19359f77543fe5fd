# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the benchmarks, and the report, on results made up here."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy, peers, report, scaling, shapes, timing
from impl.schedules import POLAR_EXPRESS

CPU = torch.device("cpu")


def test_models_have_the_parameters_that_they_are_known_by():
    millions = {name: shapes.parameters(model) / 1e6 for name, model in shapes.MODELS.items()}
    assert millions == pytest.approx({"gpt2-124m": 85, "qwen3moe-1layer": 623, "llama8b-4layers": 872}, rel=1e-2)
    for model in shapes.MODELS.values():
        assert sum(map(shapes.entries, shapes.batches(model))) == shapes.parameters(model)


@pytest.mark.parametrize("batch", [*shapes.BATCHES.values(), *shapes.TINY_BATCHES.values()])
@pytest.mark.parametrize("steps", [3, 4, 5, 6])
def test_floor_lies_below_the_textbook(batch, steps):
    B, m, n = batch
    assert shapes.dense_operations(batch, steps) == shapes.dense_operations((B, n, m), steps)
    assert shapes.least_operations(batch, steps) < shapes.dense_operations(batch, steps)


def test_operations_of_small_cases():
    assert shapes.dense_operations((1, 1, 1)) == 30
    assert shapes.least_operations((1, 2, 2)) == 20 * 2**3  # both forms alike where m = n
    assert shapes.least_operations((3, 1, 100)) == 3 * (6 * 100 + 14)
    assert shapes.operations_floor([(1, 1, 1)] * 2, flops=10.0) == pytest.approx(4.0)
    assert shapes.bytes_floor(5, 20, bandwidth=50.0) == pytest.approx(2.0)


def test_everyone_takes_turns():
    seen = []
    calls = {name: lambda i, name=name: seen.append((i, name)) for name in "abc"}
    times = timing.interleave(calls, 4, CPU)
    assert {name: len(ms) for name, ms in times.items()} == {"a": 4, "b": 4, "c": 4}
    turns = [name for _, name in seen[3 * timing.WARM_UP :]]
    assert "".join(turns) == "abcbcacababc"


def test_replayed_times_reach_the_benchmark():
    class Benchmark:
        def pedantic(self, play, rounds):
            self.times = []
            for _ in range(rounds):
                start = timing.clock()
                play()
                self.times.append(timing.clock() - start)

    benchmark = Benchmark()
    timing.replay(benchmark, [3.0, 1.0, 2.0])
    assert benchmark.times == pytest.approx([3e-3, 1e-3, 2e-3])


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_polar_factor_is_that_of_the_svd(shape):
    X = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    U, _, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    polar = accuracy.polar_factor(X)
    assert accuracy.relative_error(U @ Vh, polar) < 1e-10
    assert accuracy.direction_error(-7.0 * U @ Vh, polar) == pytest.approx(2.0)
    assert accuracy.relative_error(0 * polar, polar) == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(2, 8, 24), (2, 24, 8)])
def test_dense_iteration_is_the_schedule(shape):
    X = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    s = S / (1.02 * torch.linalg.vector_norm(S, dim=-1, keepdim=True))
    for a, b, c in POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    assert accuracy.relative_error(peers.dense(X), (U * s[:, None]) @ Vh) < 0.06  # bfloat16


def test_what_cannot_be_imported_is_left_out():
    def absent():
        raise ImportError("no such package\nand more")

    makers = {"ours": peers.ours, "absent": absent, "dion": peers.dion}
    assert peers.missing(makers, gpu=False) == {"absent": "no such package", "dion": "needs a GPU"}


def result(medians: dict[tuple[str, str, str], float], day: int, commit: str = "abc") -> dict:
    info = {"error": 0.02, "operations_floor_ms": 0.4, "bytes_floor_ms": 0.1, "transient_bytes_per_parameter": None}
    return {
        "machine_info": {"gpu": "A <GPU>", "torch": "2", "triton": "3"},
        "commit_info": {"id": commit},
        "datetime": f"2026-01-{day:02}T00:00:00",
        "benchmarks": [
            {
                "name": f"{test}[{case}-{name}]",
                "params": {"case": case, "implementation": name},
                "extra_info": info,
                "stats": {"median": 1e-3 * ms},
            }
            for (test, case, name), ms in medians.items()
        ]
        + [{"name": "test_other[x]", "params": None, "extra_info": {}, "stats": {"median": 1.0}}],
    }


def write(path: Path, content: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_report_is_one_page_with_its_picture(tmp_path):
    test = "test_orthogonalize"
    slow = {(test, "square", "ours"): 2.0, (test, "square", "torch"): 30.0, (test, "square", "dion"): 3.0}
    first = write(tmp_path / "gpu/0001_a.json", result(slow, 1))
    second = write(
        tmp_path / "gpu/0002_b.json", result({(test, "square", "ours"): 1.5, ("test_step", "model", "ours"): 4.0}, 2)
    )
    write(tmp_path / "gpu/0003_c.json", result({(test, "square", "ours"): 9.0}, 1, "other commit"))
    assert report.newest(tmp_path) == [first, second]
    report.main([str(first), str(second)])
    html = (tmp_path / "gpu/report.html").read_text(encoding="utf-8")
    assert "<td>1.5</td><td>0.50</td>" in html and "<td>30</td><td>10.00</td>" in html and "A &lt;GPU&gt;" in html
    assert "src=" in html and html.count("src=") == html.count('src="data:image/png;base64,')
    assert (tmp_path / "gpu/speed.png").read_bytes().startswith(b"\x89PNG")


def test_report_without_results_says_so(tmp_path):
    with pytest.raises(SystemExit, match="no results"):
        report.newest(tmp_path)
    with pytest.raises(SystemExit, match="no measurements"):
        report.main([str(write(tmp_path / "gpu/0001_a.json", result({}, 1)))])


def test_best_peer_is_not_ours():
    assert report.best_peer({"ours": {"ms": 1.0}, "ours-4": {"ms": 0.5}}) is None
    assert math.isclose(report.best_peer({"ours": {"ms": 1.0}, "a": {"ms": 3.0}, "b": {"ms": 2.0}}), 2.0)


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_of_a_prediction_are_those_that_were_sent(world):
    (row,) = [r for r in measured(world) if (r["model"], r["optimizer"]) == (scaling.NAME, "ours")]
    share, size = scaling.shares(scaling.rounds(shapes.MODELS[scaling.NAME], world), world)
    assert math.isclose(size, 1e6 * row["wire"]) and math.isclose(share, 1 / world, rel_tol=0.01)


def measured(world: int) -> list[dict]:
    return json.loads((scaling.RESULTS / f"ranks-{world}.json").read_text())["rows"]
