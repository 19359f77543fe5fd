# SPDX-License-Identifier: Apache-2.0
"""Taking steps with a target, and with the reference beside it."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from conformance import accept
from conformance.strategies import HYPER, tensor
from conformance.target import Hyper, Named, Target
from conformance.targets.reference import Target as Reference

# Gradients of one step, None where a parameter has none.
Gradients = Sequence[Tensor | None]


def parameters(weights: Sequence[Tensor], device: torch.device | str = "cpu") -> Named:
    """Fresh parameters named w0, w1, ... with these values."""
    return [(f"w{i}", nn.Parameter(W.clone().to(device))) for i, W in enumerate(weights)]


def take(optimizer: Optimizer, named: Named, gradients: Gradients) -> None:
    """One step with these gradients."""
    for (_, p), G in zip(named, gradients, strict=True):
        p.grad = None if G is None else G.clone().to(p.device, p.dtype)
    optimizer.step()


def run(
    target: Target, weights: Sequence[Tensor], steps: Sequence[Gradients], hyper: Hyper, device: torch.device | str = "cpu"
) -> tuple[list[nn.Parameter], Optimizer]:
    """The parameters and the optimizer after these steps."""
    named = parameters(weights, device)
    optimizer = target.optimizer(named, hyper)
    for gradients in steps:
        take(optimizer, named, gradients)
    return [p for _, p in named], optimizer


def expected(weights: Sequence[Tensor], steps: Sequence[Gradients], hyper: Hyper) -> list[Tensor]:
    """What the weights should be after these steps: the reference on float64 copies."""
    wide = [[None if G is None else G.double() for G in gradients] for gradients in steps]
    return [p.detach() for p in run(Reference(), [W.double() for W in weights], wide, hyper)[0]]


def separate(T: Tensor, layout: dict) -> list[tuple[str, Tensor]]:
    """The matrices of a tensor, each on its own, with their algorithms."""
    cut = reference.matrices(tuple(T.shape), **layout)
    return [(algorithm, T.flatten()[index]) for algorithm, indices in cut for index in indices]


def run_fused_and_separate(
    target: Target, device, shape, layout, seed, hyper: Hyper = HYPER, change=lambda G, i: G
) -> tuple[list[Tensor], list[Tensor]]:
    """Take three steps of a fused parameter, and of its matrices as separate parameters; both as lists of matrices."""
    W = tensor(shape, seed)
    gradients = [change(tensor(shape, seed + 1 + i), i) for i in range(3)]
    (fused,), _ = run(target, [W], [[G] for G in gradients], replace(hyper, layout=layout), device)
    pieces = separate(W, layout)
    named = parameters([w for _, w in pieces], device)
    groups = [([n], replace(hyper, algorithm=algorithm)) for n, (algorithm, _) in zip(named, pieces, strict=True)]
    optimizer = target.optimizer(*groups[0])
    for group in groups[1:]:
        optimizer.add_param_group(target.group(*group))
    for G in gradients:
        for (_, p), (_, g) in zip(named, separate(G, layout), strict=True):
            p.grad = g.to(device)
        optimizer.step()
    return [M for _, M in separate(fused.detach().cpu(), layout)], [p.detach().cpu() for _, p in named]


def accept_fused(target: Target, device, shape, layout, seed, hyper: Hyper = HYPER) -> None:
    """A fused parameter steps as its matrices do apart, to the bit, and as the reference does."""
    __tracebackhide__ = True
    for a, b in zip(*run_fused_and_separate(target, device, shape, layout, seed, hyper), strict=True):
        accept.same_bits(actual=a, expected=b)
    W, gradients = tensor(shape, seed), [[tensor(shape, seed + 1 + i)] for i in range(3)]
    hyper = replace(hyper, layout=layout)
    (p,), _ = run(target, [W], gradients, hyper, device)
    accept.step(before=W, actual=p, expected=expected([W], gradients, hyper)[0], precision=target.precision(W.dtype, device))


class Reads(TorchDispatchMode):
    """Notes every operation that brings a tensor's value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "item"}:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def not_waiting(device: str) -> Iterator[list[str]]:
    """What is read on the host inside; on a GPU, waiting for it is an error."""
    with Reads() as reads, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")  # that it is a prototype
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield reads.found
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
