# SPDX-License-Identifier: Apache-2.0
"""How many collectives a step takes, and how large they are, counted in a world of 1024 ranks that does not exist."""

import time
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import impl.parts
from conformance.ranks import where
from conformance.worlds import Log
from impl import Layout, Muon
from impl.options import SHARD_MODES

WORLD = 1024
LLAMA = (*2 * ((4096, 4096),), *2 * ((1024, 4096),), *2 * ((14336, 4096),), (4096, 14336))  # a layer of Llama 3 8B


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    yield DeviceMesh("cpu", torch.arange(WORLD), mesh_dim_names=("ranks",))
    dist.destroy_process_group()


def divided(shape: tuple[int, ...], mesh: DeviceMesh) -> DTensor:
    """Zeros, this rank's part alone."""
    whole = torch.empty(shape, device="meta")
    own = torch.zeros([part.stop - part.start for part in where(whole.shape, mesh, [Shard(0)])])
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def collectives(mesh: DeviceMesh, shapes: list[tuple[int, ...]], cls: type = Muon, **options) -> list[tuple[str, int]]:
    """Those of a second step, with the bytes that this rank puts in."""
    parameters = [nn.Parameter(divided(shape, mesh)) for shape in shapes]
    optimizer = cls(parameters, **options)
    for p, shape in zip(parameters, shapes, strict=True):
        p.grad = divided(shape, mesh)
    log = Log()

    def all_to_all(output, source, *args, **kwargs):  # the fake one refuses an empty source
        log.found.append(("all_to_all", source.nbytes))
        output.zero_()
        return mock.Mock()

    with (
        mock.patch.object(dist, "all_to_all_single", all_to_all),
        mock.patch.object(impl.parts, "orthogonalize", lambda X, *schedule: X),
    ):
        optimizer.step()
        log.found.clear()
        with log:
            optimizer.step()
    return [(name.partition("_.")[0], size) for name, size in log.found]


def test_two_for_each_shape_and_two_more(mesh):
    for layers in (1, 4):
        found = [name for name, _ in collectives(mesh, list(LLAMA * layers))]
        assert len({tuple(sorted(shape)) for shape in LLAMA}) == 3
        assert found == ["allreduce", *["all_to_all"] * 6, "allreduce"]


def test_torchs_muon_takes_eleven_for_each_matrix(mesh):
    found = [name for name, _ in collectives(mesh, [(4096, 16), (1024, 64)], torch.optim.Muon) if "reduce" in name]
    assert len(found) == 11 * 2


def test_a_rank_sends_its_own_parts_and_one_byte(mesh):
    """A part is filled up to rows of 8 numbers; rank 0 owns the first matrix, and gives it back."""
    found = collectives(mesh, [(8 * WORLD, 16)] * 3)
    assert found == [("allreduce", 4 * 3), ("all_to_all", 4 * 3 * 8 * 16), ("all_to_all", 4 * 8 * WORLD * 16), ("allreduce", 1)]


def test_what_stays_in_its_parts_does_not_travel(mesh):
    """A number for each matrix, and a Gram matrix of each for every quintic, are summed."""
    found = collectives(mesh, [(8 * WORLD, 16)] * 3, shard_mode="distributed")
    assert found == [("allreduce", 4 * size) for size in (3, 3, *[3 * 16 * 16] * 5)] + [("allreduce", 1)]


@pytest.mark.parametrize("mode", SHARD_MODES)
def test_experts_that_lie_whole_do_not_travel(mesh, mode):
    found = collectives(mesh, [(WORLD, 8, 16)] * 2, layout=Layout(blocks=WORLD), shard_mode=mode)
    assert [size for _, size in found] == [4 * 2, 1]


def test_a_large_model_is_planned_in_seconds(mesh):
    """48 layers of 128 experts: 18,000 matrices."""
    began = time.perf_counter()
    found = collectives(mesh, [(128 * 8, 4)] * 48 * 3, layout=Layout(blocks=128))
    assert [name for name, _ in found] == ["allreduce", "all_to_all", "all_to_all", "allreduce"]
    assert time.perf_counter() - began < 30
