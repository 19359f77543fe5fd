# SPDX-License-Identifier: Apache-2.0
"""The same training run on several processes, which torchrun starts: what of the model and of a batch each of them has.

Everything is arranged so that the losses are those of one process, but for the order in which sums are taken.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from examples.data import InputError
from examples.model import HybridLM, MixtureOfExperts

KINDS = ("fsdp", "ddp", "tp")


def total(load: Tensor) -> Tensor:
    """Tokens for each expert, over all ranks."""
    load = load.clone()
    dist.all_reduce(load)
    return load


class Ranks:
    """The processes of a run.

    "fsdp" divides every weight by its first dimension and "ddp" none, and both divide batches; "tp" divides the weights of
    the mixers' projections and gives every process the whole batch.
    """

    def __init__(self, kind: str, device: str) -> None:
        if "RANK" not in os.environ:
            raise InputError(f"--parallel {kind}: start it as torchrun --nproc-per-node 2 -m examples.train --parallel {kind}")
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        else:
            dist.init_process_group("gloo")  # the default is of the GPUs alone where there are any
        self.kind, self.mesh = kind, init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("ranks",))
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def divide(self, model: HybridLM) -> nn.Module:
        """Divide the model in place; what to call instead of it."""
        if self.kind == "tp":
            return self._tensor_parallel(model, self.mesh)
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                module.total = total
        if self.kind == "ddp":
            return DistributedDataParallel(model)
        for block in model.blocks:
            fully_shard(block, mesh=self.mesh)
        return fully_shard(model, mesh=self.mesh)

    def _tensor_parallel(self, model: HybridLM, mesh: DeviceMesh) -> nn.Module:
        for block in model.blocks:
            into = "in_proj" if hasattr(block.mixer, "in_proj") else "qkv"
            plan = {into: ColwiseParallel(output_layouts=Replicate()), "out_proj": RowwiseParallel(input_layouts=Replicate())}
            parallelize_module(block.mixer, mesh, plan)
        return model

    def share(self, batch: Tensor) -> Tensor:
        """This process's sequences of a batch."""
        if self.kind == "tp":
            return batch
        if len(batch) % self.size:
            raise InputError(f"--parallel {self.kind}: {len(batch)} sequences cannot be divided among {self.size} processes")
        return batch.chunk(self.size)[self.rank]

    def part(self) -> None:
        """Take leave of the others."""
        dist.barrier()
        dist.destroy_process_group()

    def mean(self, loss: Tensor) -> Tensor:
        """A loss over the whole batch."""
        loss = loss.detach().clone()
        dist.all_reduce(loss)
        return loss / self.size
