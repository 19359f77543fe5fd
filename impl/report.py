# SPDX-License-Identifier: Apache-2.0
"""The routing table: what happens to every parameter, and why.   [SPEC: ROUTE-7]"""

import torch
from torch.optim.optimizer import Optimizer

from impl.layout import Layout, cut, matrices
from impl.options import lr_scale, names

HEADER = ("parameter", "shape", "rule", "algorithm", "matrices", "learning rate")


def report(optimizer: Optimizer) -> str:
    """One line for every parameter, then exact totals for each algorithm.

    "matrices" is count x rows x columns of what is orthogonalized by itself; "learning rate" is what its update is
    multiplied with now, scale included.
    """
    lines: list[tuple[str, ...]] = [HEADER]
    totals = {"muon": 0, "adamw": 0}
    for index, group in enumerate(optimizer.param_groups):
        for name, p in zip(names(group, index), group["params"], strict=True):
            parts = _parts(group, p)
            for algorithm, _, _, numel in parts:
                totals[algorithm] += numel
            shape = "x".join(map(str, p.shape)) or "scalar"
            used, cut_into, rates, _ = ([*dict.fromkeys(map(str, column))] for column in zip(*parts, strict=True))
            lines.append((name, shape, group.get("rule", "-"), "+".join(used), " ".join(cut_into), " ".join(rates)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    table.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*table, "", *(f"{algorithm}: {n:,} parameters" for algorithm, n in totals.items())])


def _parts(group: dict, p: torch.Tensor) -> list[tuple[str, str, str, int]]:
    """(algorithm, matrices, learning rate, number of entries) of every section of p."""
    lr = float(group["lr"])
    adamw_lr = f"{lr * group['adamw_lr_ratio']:.3g}"
    if group["algorithm"] == "adamw":
        return [("adamw", "-", adamw_lr, p.numel())]
    parts = []
    for section, view in cut(Layout.of(group["layout"]), torch.empty(p.shape, device="meta")):
        B, m, n = matrices(section, view).shape
        if section.algorithm == "adamw":
            parts.append(("adamw", "-", adamw_lr, view.numel()))
        else:
            parts.append(("muon", f"{B}x{m}x{n}", f"{lr * lr_scale(m, n, group['adjust_lr_fn']):.3g}", view.numel()))
    return parts
