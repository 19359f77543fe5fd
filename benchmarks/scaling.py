# SPDX-License-Identifier: Apache-2.0
"""What a step's orthogonalization should take on numbers of GPUs that nobody has measured: a prediction.

    python -m benchmarks.scaling

Owners, rounds and bytes are those of `impl.exchange` in worlds that do not exist. Milliseconds come of a model of three terms,
each from benchmarks/results/GPU/ranks-4.json:

    work      what one GPU takes for all, times the share of the rank with the most to do
    exchange  bytes of the rank with the most to send or to get, over the measured rate, or NODE's where ranks span hosts
    slowed    the collectives' kernels take multiprocessors from the products: the part of the exchange that hiding did not gain
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.peers import divided
from benchmarks.shapes import MODELS, Model
from impl import Muon
from impl.exchange import Round
from impl.placement import work
from impl.sharded import Sharded

RESULTS = Path(__file__).parent / "results" / "nvidia-h200"
HOST, NODE = 8, 50e9  # GPUs of a host, and bytes a second between hosts for each, as with 400 Gb/s
NAME = "llama8b-4layers"
COLUMNS = ("layers", "GPUs", "collectives", "work", "MB", "ms", "efficiency")


def rounds(model: Model, world: int) -> Sequence[Round]:
    """Those of a model's weights, each divided by its first dimension among `world` ranks, as rank 0 sees them."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        mesh = DeviceMesh("cpu", torch.arange(world), mesh_dim_names=("ranks",))
        parameters = [torch.nn.Parameter(divided(shape, mesh, torch.empty(1).expand)) for shape in model]
        group = Muon(parameters).param_groups[0]
        return Sharded([(group, p) for p in parameters], mesh.get_group(), None).parts.rounds
    finally:
        dist.destroy_process_group()


def shares(found: Sequence[Round], world: int) -> tuple[float, float]:
    """Of the rank with most of each: its part of all work, and the bytes that it gets, or sends, in float16."""
    todo, entries = [0] * world, [0] * world
    for each in found:
        m, n = each.key.m, each.key.n
        for job in each.jobs:
            todo[job.owners[0]] += work(m, n)
            entries[job.owners[0]] += m * n
    # Of its own matrices it gets what others hold; and of theirs, in return, its own part.
    return max(todo) / sum(todo), 2 * (max(entries) + sum(entries) / world) * (world - 1) / world


def main() -> None:
    row = next(r for r in json.loads((RESULTS / "ranks-4.json").read_text())["rows"] if r["model"] == NAME)
    rate, alone = row["wire"] / row["exchange"] * 1e9, row["efficiency "] * 4 * row["orthogonal"]  # bytes/s, ms
    found = shares(rounds(MODELS[NAME], 4), 4)
    slowed = (row["orthogonal"] - alone * found[0]) / row["exchange"]
    print(f"orthogonalization on one GPU {alone:.1f} ms; exchange {rate / 1e9:.0f} GB/s, slowed {slowed:.2f}; then predicted:")
    print("  ".join(name.ljust(11) for name in COLUMNS).rstrip())
    for layers in (4, 32):
        for world in (2, 4, 8, 64, 1024):
            every = rounds(MODELS[NAME] * (layers // 4), world)
            (share, size), whole = shares(every, world), alone * layers / 4
            exchange = 1e3 * size / (rate if world <= HOST else NODE)
            time = whole * share + slowed * exchange
            cells = (layers, world, 2 + 2 * len(every), f"{share * world:.2f}", f"{size / 1e6:.0f}", f"{time:.1f}")
            print("  ".join(str(cell).ljust(11) for cell in (*cells, f"{whole / world / time:.2f}")).rstrip())


if __name__ == "__main__":
    main()
