# SPDX-License-Identifier: Apache-2.0
"""The routing table: what happens to every parameter, and why.   [SPEC: ROUTE-7]"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from impl.layout import Layout, cut, matrices
from impl.norms import clipped
from impl.options import algorithms, lr_scale, names

HEADER = ("parameter", "shape", "rule", "algorithm", "matrices", "learning rate", "clipped")


def report(optimizer: Optimizer) -> str:
    """One line for every parameter, then exact totals for each algorithm.

    "matrices" is count x rows x columns of what is orthogonalized by itself; "learning rate" is what its update is
    multiplied with now, scale included, in the same order, and AdamW's last; "clipped" is what of its gradient
    `clip_grad_norm_` and `ChainedOptimizer` clip.
    """
    lines: list[tuple[str, ...]] = [HEADER]
    totals = {"muon": 0, "adamw": 0}
    for index, group in enumerate(optimizer.param_groups):
        for name, p in zip(names(group, index), group["params"], strict=True):
            sizes = orthogonalized(group, p)
            in_muon = sum(count * m * n for (m, n), count in sizes.items())
            totals["muon"] += in_muon
            totals["adamw"] += p.numel() - in_muon
            lr = float(group["lr"])
            rates = [lr * lr_scale(m, n, group["adjust_lr_fn"]) for m, n in sizes]
            rates += [lr * group["adamw_lr_ratio"]] if "adamw" in algorithms(group) else []
            lines.append(
                (
                    name,
                    "x".join(map(str, p.shape)) or "scalar",
                    group.get("rule", "-"),
                    "+".join(sorted(algorithms(group), reverse=True)),
                    " ".join(f"{count}x{m}x{n}" for (m, n), count in sizes.items()) or "-",
                    " ".join(f"{rate:.3g}" for rate in rates),
                    clipped(group),
                )
            )
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    table.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*table, "", *(f"{algorithm}: {n:,} parameters" for algorithm, n in totals.items())])


def orthogonalized(group: dict[str, Any], p: Tensor) -> Counter[tuple[int, int]]:
    """How many matrices of which size (m, n) Muon sees in a parameter of the group."""
    sizes: Counter[tuple[int, int]] = Counter()
    if group["algorithm"] == "muon":
        for section, view in cut(Layout.of(group["layout"]), torch.empty(p.shape, device="meta")):
            if section.algorithm == "muon":
                count, m, n = matrices(section, view).shape
                sizes[m, n] += count
    return sizes
