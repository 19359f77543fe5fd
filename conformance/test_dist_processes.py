# SPDX-License-Identifier: Apache-2.0
"""DIST on processes, with gloo on a CPU and NCCL on GPUs: the collectives of a step, checkpoints, and ranks that die."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import DeviceMesh

from conformance import accept
from conformance.campaign_ranks import accept_dead, accept_late
from conformance.ranks import Case, Outcome, Weight, alone, assemble, begin, give, outcome, take, together
from conformance.steps import not_waiting
from conformance.strategies import FUSED, HYPER
from conformance.target import Target, Unsupported, load
from conformance.worlds import processes

pytestmark = pytest.mark.dist

WEIGHTS = (Weight((8, 12)), Weight((12, 8), None, "adamw"), Weight((5, 7)), Weight(*FUSED["experts by rows"]))
NORMUON = replace(HYPER, normuon_beta2=0.9)


@pytest.fixture(scope="module")
def ranks(target: Target, device: torch.device) -> int:
    """How many there are: four processes, or one for each GPU."""
    if not target.shards:
        raise Unsupported("it has one process")
    count = torch.cuda.device_count() if device.type == "cuda" else 4
    if count < 2:
        pytest.skip("one GPU is no group of ranks; the threads of test_dist.py share it")
    return count


def cases(ranks: int) -> dict[str, Case]:
    """Placements on all ranks, and every mode."""
    found = {placement: Case((ranks,), (placement,), WEIGHTS, NORMUON) for placement in ("S0", "S1", "R")}
    found["replicas"] = Case((ranks,), (), WEIGHTS, NORMUON)
    if ranks % 2 == 0:
        found["two dimensions"] = Case((2, ranks // 2), ("R", "S0"), WEIGHTS, NORMUON)
        even = tuple(each for each in WEIGHTS if each.shape[0] % ranks == 0)  # torch cuts no others so
        found["tensor parallel"] = Case((ranks // 2, 2), ("F0", "S0"), even, NORMUON)
    experts = ((ranks + 1) * 6, 10), {"blocks": ranks + 1}
    found["more experts than ranks"] = Case((ranks,), ("S0",), (Weight(*experts),), NORMUON)
    for mode in ("duplicated", "distributed", "blockwise"):
        found[mode] = Case((ranks,), ("S0",), WEIGHTS[:3], replace(HYPER, shard_mode=mode))
    return found


def accept_results(found: list[Any], kind: type) -> None:
    """All ranks came to their end."""
    __tracebackhide__ = True
    failed = [str(text) for text in found if not isinstance(text, kind)]
    assert not failed, "\n".join(failed)


def walk(rank: int, path: str, device: str, walks: list[Case]) -> list[Outcome]:
    target = load(path)
    return [together(rank, target, case, device) for case in walks]


@pytest.fixture(scope="module")
def walked(request, ranks, device, tmp_path_factory) -> dict[str, list[list[Outcome]]]:
    """For each case what became of all ranks, three times: as it is, with gradients missing, with a gradient poisoned."""
    named, walks = cases(ranks), []
    for case in named.values():
        walks += [case, replace(case, missing=frozenset((0, rank, i) for rank in range(ranks) for i in (0, 1)))]
        walks += [replace(case, poison=frozenset({(1, ranks - 1, 0)}))]
    path, folder = request.config.getoption("--target"), tmp_path_factory.mktemp("ranks")
    found = processes(ranks, folder, device.type, walk, path, device.type, walks)
    accept_results(found, list)
    return {name: [[each[3 * i + k] for each in found] for k in range(3)] for i, name in enumerate(named)}


@pytest.mark.clause("DIST-1", "DIST-2", "DIST-4")
def test_processes_step_as_one(target: Target, ranks, walked, device):
    for name, case in cases(ranks).items():
        for key, (T, _) in alone(target, case, device).parts.items() if name not in ("distributed", "blockwise") else ():
            accept.same_bits(actual=assemble(walked[name][0], key, T.shape), expected=T)


@pytest.mark.clause("DIST-8")
def test_ranks_run_the_same_collectives(walked):
    for name, found in walked.items():
        names = [[what for what, _ in each.log] for run in found for each in run]
        assert names[0] and accept.equal(names, names[:1] * len(names)), name


@pytest.mark.clause("DIST-8")
def test_collectives_do_not_depend_on_gradients(walked):
    for name, (as_is, missing, poisoned) in walked.items():
        for rank in range(len(as_is)):
            assert accept.equal([missing[rank].log, poisoned[rank].log], [as_is[rank].log] * 2), name


def wait_for_nothing(rank: int, path: str, device: str, ranks: int) -> list[Any]:
    """What a third and a fourth step read on the host, gradients missing in the last; on a GPU, waiting is an error."""
    target, found = load(path), []
    case = Case((ranks,), ("S0",), WEIGHTS, NORMUON, missing=frozenset({(3, rank, 0), (3, 0, 1)}))
    parameters, optimizer = begin(target, case, device)
    for step in range(4):
        give(case, rank, step, parameters)
        with not_waiting(device if step > 1 else "cpu") as reads:
            optimizer.step()
        found += reads if step > 1 else []
    return found


@pytest.mark.clause("SKIP-7")
def test_a_step_waits_for_nothing(request, ranks, device, tmp_path):
    found = processes(ranks, tmp_path, device.type, wait_for_nothing, request.config.getoption("--target"), device.type, ranks)
    accept_results(found, list)
    assert accept.equal(found, [[]] * ranks)


def save_and_load(rank: int, path: str, device: str, folder: str, ranks: int) -> dict[tuple[int, int], Outcome]:
    """Two steps on all ranks, a checkpoint, and from that a third step on fewer ranks; from theirs, a fourth on all."""
    target, found = load(path), {}
    case = Case((ranks,), ("S0",), WEIGHTS, NORMUON, steps=4)
    meshes = {size: DeviceMesh(device, torch.arange(size), mesh_dim_names=("a",)) for size in range(1, ranks + 1)}

    def members(size: int, seed: int) -> tuple[list[nn.Parameter], Any, nn.Module]:
        parameters, optimizer = begin(target, replace(case, mesh=(size,), seed=seed), device, meshes[size])
        model = nn.Module()
        for i, p in enumerate(parameters):
            model.register_parameter(f"w{i}", p)
        return parameters, optimizer, model

    def state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
        names = {"model": dcp_state.get_model_state_dict(model)}
        return names | {"optimizer": dcp_state.get_optimizer_state_dict(model, optimizer)}

    def go_on(before: str, size: int, step: int, after: str | None) -> None:
        if rank < size:
            parameters, optimizer, model = members(size, seed=7)
            untouched = [p.detach().to_local().clone() for p in parameters]  # type: ignore[attr-defined]
            empty = state(model, optimizer)
            for p, W in zip(parameters, untouched, strict=True):
                accept.same_bits(actual=p.to_local(), expected=W)  # type: ignore[attr-defined]
            group = meshes[size].get_group()
            dcp.load(empty, checkpoint_id=f"{folder}/{before}", process_group=group)
            dcp_state.set_model_state_dict(model, empty["model"])
            dcp_state.set_optimizer_state_dict(model, optimizer, empty["optimizer"])
            take(replace(case, mesh=(size,)), rank, step, parameters, optimizer)
            found[size, step] = outcome(target, parameters, optimizer, [])
            if after:
                dcp.save(state(model, optimizer), checkpoint_id=f"{folder}/{after}", process_group=group)
        dist.barrier()

    parameters, optimizer, model = members(ranks, seed=0)
    for step in (0, 1):
        take(case, rank, step, parameters, optimizer)
    dcp.save(state(model, optimizer), checkpoint_id=f"{folder}/all")
    for size in range(1, ranks + 1):
        go_on("all", size, 2, f"on {size}")
    for size in range(1, ranks + 1):
        go_on(f"on {size}", ranks, 3, None)
        found[-size, 3] = found.pop((ranks, 3))
    return found


@pytest.mark.clause("DIST-9")
def test_checkpoints_go_from_any_number_of_ranks_to_any_other(request, target, ranks, device, tmp_path):
    path = request.config.getoption("--target")
    found = processes(ranks, tmp_path, device.type, save_and_load, path, device.type, str(tmp_path), ranks)
    accept_results(found, dict)
    for size in range(1, ranks + 1):
        for step, key in ((2, (size, 2)), (3, (-size, 3))):
            one = alone(target, Case((1,), ("S0",), WEIGHTS, NORMUON, steps=step + 1), device)
            here = [each[key] for each in found if key in each]
            for name, (T, _) in one.parts.items():
                accept.same_bits(actual=assemble(here, name, T.shape), expected=T)


@pytest.mark.clause("DIST-11")
@pytest.mark.parametrize("point", [0, 2, 5])
def test_a_rank_that_dies_makes_the_others_fail(request, ranks, device, tmp_path: Path, point):
    accept_dead(request.config.getoption("--target"), tmp_path, point, ranks, device.type)


@pytest.mark.clause("DIST-11", "DIST-4")
def test_a_rank_that_is_late_changes_nothing(request, ranks, device, tmp_path: Path):
    accept_late(request.config.getoption("--target"), tmp_path, 3, ranks, device.type)
