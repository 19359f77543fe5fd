# SPDX-License-Identifier: Apache-2.0
"""Several ranks: threads of this process, which cost little, or processes of their own."""

import faulthandler
import os
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch._C._distributed_c10d import HashStore, _set_thread_isolation_mode  # type: ignore[attr-defined]
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed import multi_threaded_pg as threaded
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from conformance.target import Unsupported

TIMEOUT = timedelta(seconds=float(os.environ.get("RANKS_TIMEOUT", "15")))
if not hasattr(threaded.ThreadLocalWorld, "comms"):  # torch 2.11 asks for it and has it not
    threaded.ThreadLocalWorld.comms = []  # type: ignore[attr-defined]


def _of_rows(self: Any, data: Any, work: Callable[..., Any] = threaded.ReduceScatter.work) -> Any:
    """A reduce-scatter whose input has a row for each rank, which gloo and NCCL take as well."""
    return work(self, [(out, [[part.reshape(out[0].shape) for part in parts]]) for out, (parts,) in data])


threaded.ReduceScatter.work = _of_rows  # type: ignore[method-assign]


class Hang(BaseException):
    """Ranks wait for each other. It is no Exception, or else Hypothesis would wait again and again for the smallest one."""


class Log(TorchDispatchMode):
    """Lists the collectives that run inside, and their bytes; of real process groups, not of threads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does with its parts comes here again
        if func.namespace in ("c10d", "_c10d_functional"):
            self.collective(func.__name__, sum(T.nbytes for T in pytree.tree_leaves(args) if isinstance(T, Tensor)))
        return func(*args, **(kwargs or {}))

    def collective(self, name: str, size: int) -> None:
        """One is about to run."""
        self.found.append((name, size))


def threads(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of function(rank, *arguments) on ranks that are threads, which have four times TIMEOUT."""
    if torch.cuda.is_available():
        torch.cuda.init()  # or else each thread would be told to choose a device
    with FakeTensorMode():
        pass  # it would have every thread put something global in order where a CUDA build finds no GPU
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
            with suppress(RuntimeError):  # several threads may be at it
                threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            with suppress(Exception):  # the error that counts has been noted
                dist.destroy_process_group()

    try:
        each = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for thread in each:
            thread.start()
        end = time.monotonic() + 4 * TIMEOUT.total_seconds()
        for thread in each:
            thread.join(max(0.0, end - time.monotonic()))
        if hung := [rank for rank, thread in enumerate(each) if thread.is_alive()]:
            hang = Hang(f"ranks {hung} were still at it after {4 * TIMEOUT.total_seconds():.0f} s")
            threaded.ProcessLocalGroup.exception_handle(hang)
            for thread in each:
                thread.join()
            raise hang
    finally:
        _set_thread_isolation_mode(False)
        threaded._uninstall_threaded_pg()
    if errors:
        raise next((error for error in errors if not isinstance(error, SystemExit)), errors[0])
    return results


def processes(size: int, folder: Path, device: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of function(rank, *arguments) on ranks that are processes, with a GPU each if `device` is "cuda".

    The result of a rank that raised is its error's text, that of one that was killed None; twice TIMEOUT is given to all.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["conformance.ranks"])
    store = folder / f"{function.__name__}-{len(list(folder.iterdir()))}"
    ranks = [context.Process(target=_process, args=(r, size, str(store), device, function, arguments)) for r in range(size)]
    for process in ranks:
        process.start()
    end = time.monotonic() + 2 * TIMEOUT.total_seconds()
    for process in ranks:
        process.join(max(0.0, end - time.monotonic()))
    hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for rank in hung:
        ranks[rank].kill()
    if hung:
        raise TimeoutError(f"ranks {hung} were still at it after {2 * TIMEOUT.total_seconds():.0f} s")
    found = [Path(f"{store}.{rank}") for rank in range(size)]
    results = [torch.load(path, weights_only=False) if path.exists() else None for path in found]
    if any(isinstance(text, str) and "target.Unsupported" in text for text in results):
        raise Unsupported("it does not step these parameters on several ranks")
    return results


def _process(rank: int, size: int, store: str, device: str, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    options: dict[str, Any] = {"backend": "gloo"}
    if device == "cuda":
        torch.cuda.set_device(rank)
        options = {"backend": "nccl", "device_id": torch.device("cuda", rank)}
        # When a collective has timed out, the watchdog is to end the process without a long farewell.
        os.environ |= {"TORCH_NCCL_DUMP_ON_TIMEOUT": "0", "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1000"}
    dist.init_process_group(init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT, **options)
    if device == "cuda":  # NCCL's first collective waits, without a timeout, for ranks that may have died before it
        dist.all_reduce(torch.zeros(1, device="cuda"))
        torch.cuda.synchronize()
    faulthandler.dump_traceback_later(1.9 * TIMEOUT.total_seconds())  # to say where it hangs
    try:
        result = function(rank, *arguments)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, f"{store}.{rank}.tmp")
    os.replace(f"{store}.{rank}.tmp", f"{store}.{rank}")
    os._exit(0)  # without taking leave of ranks that are gone
