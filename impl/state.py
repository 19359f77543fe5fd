# SPDX-License-Identifier: Apache-2.0
"""What the optimizer keeps for a parameter, and whether a saved state is that.   [SPEC: STATE]"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from impl.layout import Layout
from impl.options import algorithms, check_options, check_parameters, names


def state_dtype(p: Tensor) -> torch.dtype:
    """float64 for float64 parameters, float32 for all others: half precision forgets small gradients.   [SPEC: MOM-3]"""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def state_keys(group: Mapping[str, Any]) -> tuple[str, ...]:
    """The entries of the state of a parameter of the group.   [SPEC: STATE-1]"""
    taking_part = algorithms(group)
    muon = ("momentum_buffer",) if "muon" in taking_part else ()
    return muon + (("exp_avg", "exp_avg_sq", "step") if "adamw" in taking_part else ())


def placement(key: str, p: Tensor) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of an entry of p's state: a step count is float32 on the CPU, the rest goes with the parameter."""
    return (torch.float32, torch.device("cpu")) if key == "step" else (state_dtype(p), p.device)


def new_state(group: Mapping[str, Any], p: Tensor) -> dict[str, Tensor]:
    """A parameter's state before its first step: zeros, of its shape but for the step count."""
    state = {}
    for key in state_keys(group):
        dtype, device = placement(key, p)
        state[key] = torch.zeros(() if key == "step" else p.shape, dtype=dtype, device=device)
    return state


def whole(optimizer: Optimizer, saved: Any) -> dict[str, Any]:
    """`saved` with our options where a group of it has none, or ValueError naming what is wrong with it.   [SPEC: STATE-4]

    An option may be missing because the state is torch.optim.Muon's, or older than the option.
    """
    ours = optimizer.param_groups
    try:
        groups = saved["param_groups"]
        if len(groups) != len(ours):
            raise ValueError(f"the state dict has {len(groups)} parameter groups but the optimizer has {len(ours)}")
        options = [{k: v for k, v in our.items() if k not in ("params", "param_names")} for our in ours]
        groups = [{**mine, **group} for mine, group in zip(options, groups, strict=True)]
        complete = {**saved, "param_groups": groups}
        _check(optimizer, complete)
        return complete
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the state dict is not that of an optimizer, with 'state' and 'param_groups': {error!r}") from error


def _check(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    known: set[Any] = set()
    for index, (group, our) in enumerate(zip(saved["param_groups"], optimizer.param_groups, strict=True)):
        if len(group["params"]) != len(our["params"]):
            raise ValueError(
                f"group {index} of the state dict has {len(group['params'])} parameters but the optimizer's has "
                f"{len(our['params'])}"
            )
        if len(group.get("param_names") or group["params"]) != len(group["params"]):
            raise ValueError(f"group {index} of the state dict has another number of names than of parameters")
        known.update(group["params"])
        _check_group(index, group, our)
        label = names({**our, "param_names": our.get("param_names") or group.get("param_names")}, index)
        for name, i, p in zip(label, group["params"], our["params"], strict=True):
            if saved["state"]:
                _check_entry(name, saved["state"].get(i), state_keys(our), p)
    if extra := saved["state"].keys() - known:
        raise ValueError(f"the state dict holds state for parameters {sorted(map(str, extra))} that none of its groups has")


def _check_group(index: int, group: Mapping[str, Any], our: Mapping[str, Any]) -> None:
    theirs, mine = group.get("param_names"), our.get("param_names")
    if theirs and mine and theirs != mine:
        wrong = [f"{b!r} where the optimizer has {a!r}" for a, b in zip(mine, theirs, strict=True) if a != b]
        raise ValueError(f"group {index} of the state dict names its parameters otherwise: {', '.join(wrong)}")
    check_options(group)
    if (group["algorithm"], Layout.of(group["layout"])) != (our["algorithm"], Layout.of(our["layout"])):
        raise ValueError(
            f"group {index} of the state dict is for algorithm={group['algorithm']!r}, layout={group['layout']} but the "
            f"optimizer has algorithm={our['algorithm']!r}, layout={our['layout']}"
        )
    check_parameters({**group, "params": our["params"]}, index)


def _check_entry(name: str, entry: Mapping[str, Any] | None, expected: tuple[str, ...], p: Tensor) -> None:
    if entry is None:
        if p.requires_grad:
            raise ValueError(f"the state dict has no state for parameter {name}, expected {expected}")
        return
    if set(entry) != set(expected):
        raise ValueError(f"state of parameter {name} should have the entries {expected} but has {tuple(entry)}")
    for key, value in entry.items():
        where = f"state {key!r} of parameter {name}"
        if key == "step":
            if not isinstance(value, (int, float, Tensor)) or not 0 <= float(value) < float("inf"):
                raise ValueError(f"{where} should be a count >= 0 but is: {value}")
            continue
        if not isinstance(value, Tensor) or value.shape != p.shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{where} should have shape {tuple(p.shape)} but is: {found}")
        # A wider dtype than ours would lose bits, an integer is no momentum at all.
        if not value.is_floating_point() or torch.promote_types(value.dtype, state_dtype(p)) != state_dtype(p):
            raise ValueError(f"{where} should be {state_dtype(p)} or narrower but is: {value.dtype}")
        if not bool(value.isfinite().all()) or (key == "exp_avg_sq" and bool((value < 0).any())):
            raise ValueError(f"{where} is not finite or an average of squares is negative; it would poison the weights")
