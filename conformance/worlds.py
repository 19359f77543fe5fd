# SPDX-License-Identifier: Apache-2.0
"""Several ranks: threads of this process, which cost little, or processes of their own."""

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch._C._distributed_c10d import HashStore, _set_thread_isolation_mode  # type: ignore[attr-defined]
from torch.testing._internal.distributed import multi_threaded_pg as threaded
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

TIMEOUT = timedelta(seconds=30)


class Log(TorchDispatchMode):
    """Lists the collectives that run inside, and their bytes; of real process groups, not of threads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = pytree.tree_leaves(args)
            self.found.append((func.__name__, sum(T.nbytes for T in tensors if isinstance(T, Tensor))))
        return func(*args, **(kwargs or {}))


def threads(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of function(rank, *arguments) on ranks that are threads."""
    threaded.ProcessLocalGroup.reset()
    threaded._install_threaded_pg()
    _set_thread_isolation_mode(True)
    store, results, errors = HashStore(), [None] * size, []

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
            results[rank] = function(rank, *arguments)
        except BaseException as error:  # SystemExit ends the others
            errors.append(error)
            threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            dist.destroy_process_group()

    try:
        each = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for thread in each:
            thread.start()
        for thread in each:
            thread.join()
    finally:
        _set_thread_isolation_mode(False)
        threaded._uninstall_threaded_pg()
    if errors:
        raise next((error for error in errors if not isinstance(error, SystemExit)), errors[0])
    return results


def processes(size: int, store: Path, device: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of function(rank, *arguments) on ranks that are processes, with a GPU each if `device` is "cuda"."""
    mp.spawn(_process, (size, str(store), device, function, arguments), nprocs=size)  # type: ignore[attr-defined]
    return [torch.load(f"{store}.{rank}", weights_only=False) for rank in range(size)]


def _process(rank: int, size: int, store: str, device: str, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    options = {"init_method": f"file://{store}", "rank": rank, "world_size": size, "timeout": TIMEOUT}
    dist.init_process_group("nccl" if device == "cuda" else "gloo", **options)
    torch.save(function(rank, *arguments), f"{store}.{rank}.tmp")
    os.replace(f"{store}.{rank}.tmp", f"{store}.{rank}")
    dist.destroy_process_group()
