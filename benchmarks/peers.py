# SPDX-License-Identifier: Apache-2.0
"""Ours and the others, each called as its documentation says. What cannot be imported is left out, by name.

A maker imports, compiles nothing yet, and returns a function: X (B, m, n) -> the orthogonalized batch, or an optimizer of
the given weights. Only what is in `ON_GPU` needs a GPU.

Sources: torch.optim.Muon; github.com/microsoft/dion; github.com/Dao-AILab/gram-newton-schulz, whose products are those of
github.com/Dao-AILab/quack; github.com/NVIDIA-NeMo/Emerging-Optimizers.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from importlib import metadata
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import impl
from benchmarks.shapes import Model
from impl.schedules import JORDAN, POLAR_EXPRESS

Orthogonalize = Callable[[Tensor], Tensor]
T = TypeVar("T")
LR, DECAY = 0.02, 0.1


def ours(steps: int = 5) -> Orthogonalize:
    return partial(impl.orthogonalize, ns_steps=steps)


def torch_muon() -> Orthogonalize:
    """torch.optim.Muon's iteration, which takes one matrix at a time."""
    from torch.optim._muon import _zeropower_via_newtonschulz as iterate

    return lambda X: torch.stack([iterate(x, JORDAN, 5, 1e-7) for x in X])


def dense(X: Tensor) -> Tensor:
    """Five polar-express steps in bfloat16, each three batched products that know of no symmetry."""
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    X = (X / (1.02 * torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


def dense_compiled() -> Orthogonalize:
    return torch.compile(dense, dynamic=False)


def dion() -> Orthogonalize:
    """What dion.Muon(use_triton=True) runs."""
    from dion.polar_express import polar_express_triton

    return polar_express_triton


def dion_aol() -> Orthogonalize:
    """Four steps after a scaling by rows, which is why its polar factor is another one."""
    from dion.newton_schulz_triton import newton_schulz_triton_fast

    return newton_schulz_triton_fast


def gram_newton_schulz(compiled: bool) -> Orthogonalize:
    from gram_newton_schulz import GramNewtonSchulz

    return GramNewtonSchulz(compile_kwargs={"fullgraph": True, "dynamic": False} if compiled else None)


def emerging() -> Orthogonalize:
    """Its kernels run at the "medium" precision of float32 products, a setting of the whole process."""
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz

    def orthogonalize(X: Tensor) -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            return newton_schulz(X, 5, coefficient_type="polar_express", use_syrk=True)
        finally:
            torch.set_float32_matmul_precision(before)

    return orthogonalize


def weights(model: Model, device: torch.device) -> list[nn.Parameter]:
    """A parameter for each shape, with a gradient, both normal; the same for everyone."""
    generator = torch.Generator(device).manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator, device=device) * 0.02) for shape in model]
    for W in made:
        W.grad = torch.randn(W.shape, generator=generator, device=device)
    return made


def divided(shape: tuple[int, ...], mesh: DeviceMesh, part: Callable[[tuple[int, ...]], Tensor]) -> DTensor:
    """A tensor whose first dimension is divided as FSDP2 does; `part` makes this rank's, of a shape."""
    own, _ = compute_local_shape_and_global_offset(shape, mesh, [Shard(0)])
    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(part(own), mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def divided_weights(model: Model, mesh: DeviceMesh) -> list[nn.Parameter]:
    """A parameter for each shape, divided, with a gradient; both normal."""
    generator = torch.Generator(mesh.device_type).manual_seed(dist.get_rank())
    normal = partial(torch.randn, generator=generator, device=mesh.device_type)
    made = [nn.Parameter(divided(shape, mesh, normal) * 0.02) for shape in model]
    for W in made:
        W.grad = divided(tuple(W.shape), mesh, normal)
    return made


def ours_step(made: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups: dict[int, list[nn.Parameter]] = {}
    for W in made:
        groups.setdefault(W.shape[0] if W.ndim == 3 else 1, []).append(W)
    return impl.Muon([{"params": g, "layout": impl.Layout(blocks=E)} for E, g in groups.items()], lr=LR, weight_decay=DECAY)


def torch_step(made: list[nn.Parameter]) -> torch.optim.Optimizer:
    """torch.optim.Muon knows no stacked experts, so each is a parameter of its own."""
    matrices = []
    for W in made:
        for w, g in zip(W.detach().view(-1, *W.shape[-2:]), W.grad.view(-1, *W.shape[-2:]), strict=True):
            matrices.append(nn.Parameter(w))
            matrices[-1].grad = g
    return torch.optim.Muon(matrices, lr=LR, weight_decay=DECAY)


def dion_ranks(made: list[nn.Parameter], mesh: DeviceMesh | None) -> torch.optim.Optimizer:
    """On the ranks of a mesh, or on plain tensors."""
    from dion import Muon

    return Muon(made, mesh, lr=LR, weight_decay=DECAY, nesterov=True, use_gram_newton_schulz=True)


def dion_step(gram: bool) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    from dion import Muon

    if gram:
        gram_newton_schulz(compiled=False)  # dion itself would notice only when it is asked for an optimizer
    return partial(Muon, lr=LR, weight_decay=DECAY, nesterov=True, use_triton=True, use_gram_newton_schulz=gram)


ORTHOGONALIZERS = {
    "ours": ours,
    "ours-4": partial(ours, steps=4),
    "torch": torch_muon,
    "dense": lambda: dense,
    "dense-compiled": dense_compiled,
    "dion": dion,
    "dion-aol": dion_aol,
    "gram-ns": partial(gram_newton_schulz, compiled=False),
    "gram-ns-compiled": partial(gram_newton_schulz, compiled=True),
    "emerging": emerging,
}
OPTIMIZERS = {
    "ours": lambda: ours_step,
    "torch": lambda: torch_step,
    "dion": partial(dion_step, gram=False),
    "dion-gram-ns": partial(dion_step, gram=True),
}
ON_GPU = {"dense-compiled", "dion", "dion-aol", "gram-ns", "gram-ns-compiled", "emerging", "dion-gram-ns"}


@lru_cache
def problem(make: Callable) -> str:
    """Why a maker cannot work here; empty if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make()
    except Exception as error:  # a package whose libraries do not load here may raise anything
        return str(error).partition("\n")[0] or type(error).__name__
    return ""


def missing(makers: dict[str, Callable], gpu: bool) -> dict[str, str]:
    """Those that cannot run here, and why."""
    why = {name: "needs a GPU" if name in ON_GPU and not gpu else problem(make) for name, make in makers.items()}
    return {name: reason for name, reason in why.items() if reason}


def versions() -> dict[str, str]:
    """Of the packages that hold the others, where they are installed."""
    found = {}
    for package in ("dion", "gram-newton-schulz", "quack-kernels", "nvidia-cutlass-dsl", "emerging-optimizers"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def measured(result: T | str, implementation: str, case: str) -> T:
    """The result, if it is no traceback: with one, ours fails, and a peer is skipped with its last line."""
    if not isinstance(result, str):
        return result
    if implementation.startswith("ours"):
        pytest.fail(result)
    pytest.skip(f"{implementation} on {case}: {result.strip().splitlines()[-1]}")
