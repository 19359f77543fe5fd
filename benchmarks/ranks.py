# SPDX-License-Identifier: Apache-2.0
"""Steps of parameters that lie on several ranks as FSDP2 puts them, beside the same steps on one.

    torchrun --nproc-per-node 2 -m benchmarks.ranks

On GPUs with NCCL, without them with gloo and stand-ins that show only that everything works. The table and
benchmarks/results/GPU/ranks-N.json have medians of milliseconds on the slowest rank:

    plain       a step of plain tensors, which every rank takes by itself, in turns with the next two
    alone       the same, as parameters on a mesh of this rank alone
    together    the step of all ranks; efficiency is plain over ranks times together
    host        of that, what the host takes to launch it, behind a GPU that is busy
    prepare     of that, to update directions in place
    orthogonal  from there to results in place, exchange included; its efficiency is held against that of alone
    apply       from there to weights and states
    exchange    the all-to-alls of a step by themselves
    wire        megabytes that a rank sends, beside the least: of each matrix it sends its part, and of its own the others'
"""

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from benchmarks import peers, shapes, timing
from impl.sharded import Sharded

ROUNDS = {True: 20, False: 3}
LEAD = 8  # large products, 1.6 ms each on an H200
COLUMNS = (
    "model", "optimizer", "plain", "alone", "together", "efficiency", "host", "prepare", "orthogonal", "efficiency ", "apply",
    "exchange", "wire", "least",
)  # fmt: skip


class Parts:
    """What a step consists of, by events around our own methods."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, []

    def mark(self) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.device.type == "cuda" else 1e3 * (end - start)

    def medians(self, step: Callable[[], Any], rounds: int) -> list[float]:
        """Milliseconds to update directions, from there to results, and from there to weights."""
        prepare, orthogonalize, apply = Sharded.prepare, Sharded._orthogonalize, Sharded.apply

        def prepared(sharded: Sharded, *args: Any) -> None:
            self.mark()
            prepare(sharded, *args)

        def watched(sharded: Sharded) -> None:
            self.mark()
            orthogonalize(sharded)

        def waited(sharded: Sharded, code: Any) -> None:
            for work, _ in sharded.returning:
                if work is not None:
                    work.wait()
            self.mark()
            apply(sharded, code)
            self.mark()

        with mock.patch.multiple(Sharded, prepare=prepared, _orthogonalize=watched, apply=waited):
            taken({"step": lambda i: step()}, rounds, self.device)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        steps = list(zip(*[iter(self.marks)] * 4, strict=True))[timing.WARM_UP :]
        return [statistics.median(self.between(*each[i : i + 2]) for each in steps) for i in range(3)]


def taken(calls: dict[str, timing.Call], rounds: int, device: torch.device) -> list[float]:
    """Median milliseconds of each, of the slowest rank.

    All ranks begin each call together, and it follows products that take longer than the host takes to launch it, as the
    backward pass of such a model does.
    """
    product, token = timing.large_product(device), torch.zeros(1, device=device)

    def lead() -> None:
        dist.all_reduce(token)
        for _ in range(LEAD):
            product()

    return slowest([statistics.median(times) for times in timing.interleave(calls, rounds, device, lead).values()], device)


def host(step: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """Median milliseconds until a step returns."""
    times = []
    for _ in range(rounds):
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(10**8)  # cycles
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return slowest([1e3 * statistics.median(times)], device)[0]


def exchange(sharded: Sharded) -> Callable[[int], None]:
    """The all-to-alls of a step, with nothing in between."""
    everything = [*sharded.parts.rounds, *sharded.plan.rounds]
    buffers = [
        [torch.zeros(side.size, dtype=each.key.wire, device=sharded.device) for side in (each.held, each.given)]
        for each in everything
    ]

    def run(i: int) -> None:
        works = [each.send(held)[1] for each, (held, _) in zip(everything, buffers, strict=True)]
        works += [each.give(given, held) for each, (held, given) in zip(everything, buffers, strict=True)]
        for work in works:
            if work is not None:
                work.wait()

    return run


def wire(sharded: Sharded) -> tuple[float, float]:
    """Megabytes that this rank sends in a step, and the least that it could."""
    me, sent, least = dist.get_rank(sharded.group), 0, 0
    for each in (*sharded.parts.rounds, *sharded.plan.rounds):
        for side, travels in ((each.sent, each.key.there), (each.given, each.key.back)):
            away = sum(side.sizes) - side.sizes[me] if travels else 0
            sent += away * each.key.wire.itemsize
        for block in each.sent.blocks:
            least += 2 * block.rect.rows * block.rect.columns * (me not in block.job.owners)
        for block in each.given.blocks:
            least += 2 * block.rect.rows * block.rect.columns
        least -= sum(2 * b.rect.rows * b.rect.columns for b in each.held.blocks if b.job.home(me) == me)
    return sent / 1e6, least / 1e6


def slowest(values: list[float], device: torch.device) -> list[float]:
    """The largest of each over all ranks."""
    found = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def measure(name: str, model: shapes.Model, alone: DeviceMesh, mesh: DeviceMesh, device: torch.device) -> list[dict[str, Any]]:
    """A row for each optimizer."""
    rounds, rows = ROUNDS[device.type == "cuda"], []
    for optimizer in ("ours", "dion"):
        gc.collect()
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            rows.append({"model": name, "optimizer": optimizer, **compare(optimizer, model, alone, mesh, device, rounds)})
        except Exception as error:  # a package whose libraries do not load here may raise anything, on all ranks alike
            if optimizer == "ours":
                raise
            rows.append({"model": name, "optimizer": f"{optimizer}: {type(error).__name__}: {error!s:.60}"})
    return rows


def compare(
    optimizer: str, model: shapes.Model, alone: DeviceMesh, mesh: DeviceMesh, device: torch.device, rounds: int
) -> dict[str, float]:
    """One rank's step beside the step of all."""
    steppers = {}
    for name, on in (("plain", None), ("alone", alone), ("together", mesh)):
        made = peers.weights(model, device) if on is None else peers.divided_weights(model, on)
        steppers[name] = peers.ours_step(made) if optimizer == "ours" else peers.dion_ranks(made, on)
    calls: dict[str, timing.Call] = {name: lambda i, s=s: s.step() for name, s in steppers.items()}
    row = dict(zip(calls, taken(calls, rounds, device), strict=True))
    row["efficiency"] = row["plain"] / (mesh.size() * row["together"])
    row["host"] = host(steppers["together"].step, rounds, device)
    if optimizer != "ours":
        return row
    (sharded,) = steppers["together"].plans.values()
    one, parts = (slowest(Parts(device).medians(steppers[name].step, rounds), device) for name in ("alone", "together"))
    row |= dict(zip(("prepare", "orthogonal", "apply"), parts, strict=True))
    row["efficiency "] = one[1] / (mesh.size() * parts[1])
    (row["exchange"],) = taken({"exchange": exchange(sharded)}, rounds, device)
    row["wire"], row["least"] = slowest(list(wire(sharded)), device)
    return row


def main() -> None:
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo")
    torch._dynamo.config.recompile_limit = 64  # dion compiles for every shape
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    size, rank = dist.get_world_size(), dist.get_rank()
    mesh = DeviceMesh(device.type, torch.arange(size), mesh_dim_names=("ranks",))
    single = [DeviceMesh(device.type, [r], mesh_dim_names=("rank",)) for r in range(size)][rank]
    models = shapes.MODELS if gpu else shapes.TINY_MODELS
    rows = []
    for name, model in models.items():
        rows += measure(name, model, single, mesh, device)
        if rank == 0:
            print(f"{name} done", file=sys.stderr, flush=True)
    if rank == 0:
        print(f"{size} x {torch.cuda.get_device_name() if gpu else 'CPU'}, torch {torch.__version__}; milliseconds, megabytes")
        for row in [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]:
            cells = [row.get(column, "-") for column in COLUMNS]
            print("  ".join((f"{cell:.3g}" if isinstance(cell, float) else str(cell)).ljust(10) for cell in cells).rstrip())
        folder = Path(__file__).parent / "results" / (os.environ.get("BENCHMARK_GPU", "nvidia-h200") if gpu else "cpu")
        if gpu:
            folder.mkdir(parents=True, exist_ok=True)
            told = {"commit": os.environ.get("BENCHMARK_COMMIT"), "torch": torch.__version__, **peers.versions(), "rows": rows}
            (folder / f"ranks-{size}.json").write_text(json.dumps(told, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
