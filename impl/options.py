# SPDX-License-Identifier: Apache-2.0
"""What a parameter group may say. Everything that can be refused is refused here, before anything runs.   [SPEC: ERR]"""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from impl.layout import ALGORITHMS, Layout, check_layout
from impl.placement import SHARD_MODES, check_shards
from impl.schedules import schedule

SCALES = (None, "original", "match_rms_adamw", "spectral", "unit_rms_norm")
SMALLEST = 2.0**-126  # float32's smallest normal number
# Every option of a group.
OPTIONS = (
    "lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn",
    "algorithm", "layout", "shard_mode", "normuon_beta2", "adamw_lr_ratio", "adamw_betas", "adamw_eps", "maximize",
    "skip_grad_norm_clip",
)  # fmt: skip


def names(group: Mapping[str, Any], index: int) -> list[str]:
    """Names of the parameters of the optimizer's group number `index`, for messages: theirs, or "group.position"."""
    return group.get("param_names") or [f"{index}.{i}" for i in range(len(group["params"]))]


def algorithms(group: Mapping[str, Any]) -> set[str]:
    """The algorithms that take part in stepping a parameter of the group."""
    if group["algorithm"] == "adamw":
        return {"adamw"}
    return {section.algorithm for section in Layout.of(group["layout"]).sections} or {"muon"}


def lr_scale(m: int, n: int, adjust_lr_fn: str | None) -> float:
    """What the learning rate of an m x n matrix is multiplied with.   [SPEC: SCALE-1, SCALE-2, SCALE-4]"""
    if adjust_lr_fn in ("match_rms_adamw", "spectral"):
        return (0.2 if adjust_lr_fn == "match_rms_adamw" else 1.0) * math.sqrt(max(m, n))
    ratio = m / n if n else 1.0
    return math.sqrt(ratio if adjust_lr_fn == "unit_rms_norm" else max(1.0, ratio))


def check_options(group: Mapping[str, Any], wait: bool = True) -> None:
    """Raise ValueError for an option outside its range; the first words are torch.optim.Muon's where it has the check.

    Without `wait`, tensors are taken on trust: to look at them would be to wait for their device.
    """
    _check_numbers(group, wait)
    if group["adjust_lr_fn"] not in SCALES:
        raise ValueError(
            f"Adjust learning rate function {group['adjust_lr_fn']} is not supported; adjust_lr_fn is one of {SCALES}"
        )
    for option, choices in (("algorithm", ALGORITHMS), ("shard_mode", SHARD_MODES)):
        if group[option] not in choices:
            raise ValueError(f"{option} should be one of {choices} but is: {group[option]!r}")
    betas = group["adamw_betas"]
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not pair or not all(isinstance(beta, Real) and 0.0 <= float(beta) < 1.0 for beta in betas):
        raise ValueError(f"adamw_betas should be two numbers in [0, 1) but is: {betas}")
    beta2 = group["normuon_beta2"]
    if beta2 is not None and (isinstance(beta2, bool) or not isinstance(beta2, Real) or not 0.0 <= float(beta2) < 1.0):
        raise ValueError(f"normuon_beta2 should be None or a number in [0, 1) but is: {beta2!r}")
    for flag in ("nesterov", "maximize", "skip_grad_norm_clip"):
        if not isinstance(group.get(flag, False), bool):
            raise ValueError(f"{flag} should be True or False but is: {group[flag]!r}")
    if group["algorithm"] == "adamw" and group["layout"] is not None:
        raise ValueError(f"layout has no meaning for algorithm='adamw'; leave it out, found {group['layout']}")
    schedule(group["ns_coefficients"], group["ns_steps"])


def _check_numbers(group: Mapping[str, Any], wait: bool) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, found shape {tuple(lr.shape)}")
    for label, value in (
        ("Learning rate", lr),
        ("momentum", group["momentum"]),
        ("weight decay", group["weight_decay"]),
        ("eps", group["eps"]),
        ("adamw_eps", group["adamw_eps"]),
        ("adamw_lr_ratio", group["adamw_lr_ratio"]),
    ):
        if isinstance(value, Tensor):
            if label in ("eps", "adamw_eps", "adamw_lr_ratio"):
                raise ValueError(f"{label} should be a number but is: {value!r}; lr, momentum, weight_decay may be tensors")
            if not wait:
                continue
        number = value.numel() == 1 and not value.is_complex() if isinstance(value, Tensor) else isinstance(value, Real)
        if not number or not 0.0 <= float(value) < math.inf:
            raise ValueError(f"{label} should be >= 0 but is: {value}")
    if not group["adamw_eps"] >= SMALLEST:
        raise ValueError(f"adamw_eps should be >= {SMALLEST}, or nothing keeps 0 / 0 away, but is: {group['adamw_eps']}")
    momentum = group["momentum"]
    if (wait or not isinstance(momentum, Tensor)) and not momentum < 1:
        raise ValueError(f"momentum should be < 1 but is: {momentum}")


def check_parameters(group: Mapping[str, Any], index: int) -> None:
    """Raise ValueError if a parameter of group number `index` cannot be stepped with its algorithm and layout."""
    if group["normuon_beta2"] is not None and group["shard_mode"] in ("distributed", "blockwise"):
        raise ValueError(f"normuon_beta2 needs whole matrices, with shard_mode='owned', but that is {group['shard_mode']!r}")
    if len({id(p) for p in group["params"]}) != len(group["params"]):
        raise ValueError(f"group {index} holds a parameter twice and would step it twice: {names(group, index)}")
    for name, p in zip(names(group, index), group["params"], strict=True):
        if not (p.is_floating_point() or p.is_complex()):
            raise ValueError(f"parameter {name} should be floating point but is {p.dtype}")
        if isinstance(p, DTensor) and any(place.is_partial() for place in p.placements):
            raise ValueError(f"parameter {name} cannot be stepped, since a weight is no sum over ranks: {p.placements}")
        if group["algorithm"] == "adamw":
            continue
        if group["layout"] is not None:
            check_layout(Layout.of(group["layout"]), p.shape, name)
        elif p.ndim != 2:
            raise ValueError(
                f"Muon only supports 2D parameters whereas we found a parameter with size: {p.size()} ({name}). Put it in "
                "a group with algorithm='adamw' or a layout (experts, convolutions); impl.param_groups(model) does both"
            )
        try:
            check_shards(p, Layout.of(group["layout"]), group["shard_mode"])
        except ValueError as error:
            raise ValueError(f"parameter {name} of shape {tuple(p.shape)} cannot be stepped where it lies: {error}") from error
