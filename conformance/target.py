# SPDX-License-Identifier: Apache-2.0
"""What the suite asks of an implementation. `--target=package.module:Name` names a class with these members.

An adapter translates SPEC.md's units into its implementation's own and raises `Unsupported` for what that does not
offer; the closing table then says "unsupported", never "passed". Nothing registers: any importable class will do.
"""

import importlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

Norms = tuple[Tensor | None, Tensor | None, Tensor | None]
Named = Sequence[tuple[str, nn.Parameter]]


class Unsupported(Exception):
    """The implementation offers nothing like this; the clause does not apply to it."""


@dataclass(frozen=True)
class Hyper:
    """Every option of SPEC.md, in its units; there are no defaults, so that nothing is compared by accident."""

    lr: float | Tensor
    weight_decay: float
    momentum: float
    nesterov: bool
    schedule: Any
    steps: int
    eps: float
    adjust_lr_fn: str | None
    algorithm: str
    layout: dict[str, Any] | None
    shard_mode: str
    normuon_beta2: float | None
    adamw_lr_ratio: float
    adamw_betas: tuple[float, float]
    adamw_eps: float
    maximize: bool
    skip_nonfinite: bool  # of the optimizer, not of a group


class Target(Protocol):
    """The adapter of one implementation."""

    name: str
    validates: bool  # whether it checks its arguments; if not, clauses on refusals are unsupported
    skips: bool  # whether it can skip a step; if not, SKIP is unsupported
    shards: bool  # whether it steps DTensors; if not, what is asked of several processes is unsupported

    def precision(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype whose rounding limits an orthogonalization of a `dtype` matrix on the device."""
        ...

    def orthogonalize(self, X: Tensor, schedule: Any, steps: int, eps: float) -> Tensor:
        """ORTH on (m, n) or (B, m, n)."""
        ...

    def optimizer(self, named: Named, hyper: Hyper, process_group: Any = None, replicas: Any = None) -> Optimizer:
        """An optimizer with one group, which skips a step if any rank of the process group would.

        Parameters may be DTensors; if not, they are the same on all ranks of the process group `replicas`.
        """
        ...

    def group(self, named: Named, hyper: Hyper) -> dict[str, Any]:
        """A dict for its `add_param_group`."""
        ...

    def momentum_buffer(self, optimizer: Optimizer, p: Tensor) -> Tensor:
        """M of a parameter, in MOM-1's convention."""
        ...

    def variance_buffer(self, optimizer: Optimizer, p: Tensor) -> Tensor:
        """V of a parameter, in VAR-5's shape."""
        ...

    def clip(self, optimizer: Any, max_norm: float, clip_norm: str, floor: float) -> Norms:
        """Clip the optimizer's gradients in place; total, clipped and threshold norm."""
        ...

    def chain(self, optimizers: Sequence[Any], **policy: Any) -> Any:
        """A chain; `policy` is some of clip_grad, grad_norm_skip_threshold, clip_norm, floor, log_grad_norm."""
        ...

    def norms(self, chain: Any) -> Norms:
        """Of a chain's last step."""
        ...

    def skipped(self, optimizer: Any) -> dict[str, int]:
        """Number of skipped steps for each of SKIP's reasons; of a chain, for "threshold"."""
        ...

    def orthogonalizing(self, poison: float | None) -> AbstractContextManager[list[torch.Size]]:
        """A context that lists the shape of every orthogonalized update, and puts `poison` into one entry of each."""
        ...

    def routes(self, model: nn.Module, **options: Any) -> dict[str, tuple[str, Any]]:
        """Parameter name -> (algorithm, plain layout or None); `options` are `head` and `overrides` of ROUTE."""
        ...

    def report(self, model: nn.Module, **options: Any) -> str:
        """The routing report of an optimizer over the model."""
        ...


class Partial:
    """What most implementations do not offer, for their adapters to inherit."""

    def variance_buffer(self, optimizer: Any, p: Tensor) -> Tensor:
        raise Unsupported("it has no NorMuon")

    def clip(self, optimizer: Any, max_norm: float, clip_norm: str, floor: float) -> Norms:
        raise Unsupported("it clips nothing")

    def chain(self, optimizers: Sequence[Any], **policy: Any) -> Any:
        raise Unsupported("it has no chains")

    def norms(self, chain: Any) -> Norms:
        raise Unsupported("it has no chains")

    def skipped(self, optimizer: Any) -> dict[str, int]:
        raise Unsupported("it skips no steps")

    def routes(self, model: nn.Module, **options: Any) -> dict[str, tuple[str, Any]]:
        raise Unsupported("it has no routing")

    def report(self, model: nn.Module, **options: Any) -> str:
        raise Unsupported("it has no report")


@contextmanager
def watching(module: Any, function: str, poison: float | None) -> Iterator[list[torch.Size]]:
    """`Target.orthogonalizing` for an implementation that calls this function of a module."""
    healthy, shapes = getattr(module, function), []

    def watched(*args: Any, **options: Any) -> Tensor:
        O = healthy(*args, **options)
        shapes.append(O.shape)
        if poison is not None:
            O[(-1,) * O.ndim] = poison
        return O

    with mock.patch.object(module, function, watched):
        yield shapes


def load(path: str) -> Target:
    """The target that `package.module:Name` names."""
    module, _, name = path.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its package warns of when it is imported
        found = importlib.import_module(module)
    return getattr(found, name)()
