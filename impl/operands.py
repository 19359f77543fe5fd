# SPDX-License-Identifier: Apache-2.0
"""What the kernels of a step work on: where every tensor is, and the options that may change from step to step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from impl.skip import scalar

STEPPED = ("lr", "weight_decay", "momentum")  # options that may change from step to step
Launches = list[Callable[[], None]]
Group = Mapping[str, Any]
Form = tuple[int, int, torch.dtype, torch.dtype]  # rows, columns, dtypes of weight and gradient


def groups_of(entries: Sequence[tuple[Group, Tensor]]) -> list[Group]:
    """Each group once, in order."""
    return list({id(group): group for group, _ in entries}.values())


def orthogonalize(launches: Sequence[Callable[[], None]], Q: Tensor) -> None:
    """Run the launches of a batch; Q is the last one's left factor, (B, m, m) but for padding."""
    for run in launches:
        run()


class Operands:
    """Weights, momenta, gradients and NorMuon's averages of `count` parameters in `groups`, by address."""

    def __init__(self, count: int, groups: Sequence[Group], scaled: bool, device: torch.device) -> None:
        self.count, self.groups, self.device = count, groups, device
        self.hyper = torch.zeros(len(groups), 4, dtype=torch.float64, device=device)
        self.values: list[list[float | None]] = [[None] * 4 for _ in groups]
        self.addresses = [0] * (4 * count)
        self.pointers = torch.zeros(4 * count + 8, dtype=torch.int64, device=device)
        self.grad_scale = torch.ones((), dtype=torch.float32, device=device) if scaled else None

    def source(self, group: int, form: Form, tall: bool, aligned: bool, table: Tensor) -> Any:
        """What kernels are told of matrices of a group; see kernels/prepare.py."""
        from impl.kernels.prepare import Source

        hyper, nesterov = self.hyper[group], self.groups[group]["nesterov"]
        return Source(table, self.pointers, self.count, *form, tall, True, nesterov, aligned, hyper, self.grad_scale)

    def read(self, groups: Sequence[Group], tensors: Sequence[Tensor | None], grad_scale: Any, again: bool) -> None:
        """Tell the kernels where everything is in this step, and the options.

        Args:
            tensors: all weights, then all momenta, gradients, and averages.
            again: also what they have been told already, as in a CUDA graph, whose replays repeat it.
        """
        from impl.kernels.places import point

        self.groups = groups
        addresses = [0 if T is None else T.data_ptr() for T in tensors]
        point(self.pointers, [-1] * len(addresses) if again else self.addresses, addresses)
        self.addresses = addresses
        if self.grad_scale is not None:
            self.grad_scale.copy_(scalar(grad_scale, self.device))
        for values, hyper, group in zip(self.values, self.hyper, groups, strict=True):
            options = [*(group[option] for option in STEPPED), -1.0 if group["maximize"] else 1.0]
            for i, option in enumerate(options):
                if isinstance(option, Tensor) and option.is_cuda:
                    hyper[i].copy_(option.reshape(()))
                    values[i] = None
                elif again or values[i] != float(option):
                    values[i] = number = float(option)
                    hyper[i].fill_(number)
