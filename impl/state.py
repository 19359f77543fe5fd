# SPDX-License-Identifier: Apache-2.0
"""What the optimizer keeps for a parameter, and whether a saved state is that.   [SPEC: STATE]"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement
from torch.optim.optimizer import Optimizer

from impl.layout import Layout, Section
from impl.options import algorithms, check_options, check_parameters, names

SQUARES = ("exp_avg_sq", "variance_buffer")


def state_dtype(p: Tensor) -> torch.dtype:
    """float64 for float64 parameters, float32 for all others: half precision forgets small gradients.   [SPEC: MOM-3]"""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def state_keys(group: Mapping[str, Any]) -> tuple[str, ...]:
    """The entries of the state of a parameter of the group.   [SPEC: STATE-1]"""
    taking_part = algorithms(group)
    muon = ("momentum_buffer",) if "muon" in taking_part else ()
    if muon and group["normuon_beta2"] is not None:
        muon += ("variance_buffer",)
    return muon + (("exp_avg", "exp_avg_sq", "step") if "adamw" in taking_part else ())


def form(group: Mapping[str, Any], key: str, p: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    """Shape, dtype and device of an entry of p's state.   [SPEC: STATE-1, VAR-5]"""
    if key == "step":
        return torch.Size(), torch.float32, p.device
    if key == "variance_buffer":
        layout = Layout.of(group["layout"])
        return torch.Size((*(p.shape[:1] if layout.flatten else p.shape[:-1]), layout.columns)), state_dtype(p), p.device
    return p.shape, state_dtype(p), p.device


def new_state(group: Mapping[str, Any], p: Tensor) -> dict[str, Tensor]:
    """A parameter's state before its first step: zeros."""
    forms = {key: form(group, key, p) for key in state_keys(group)}
    return {key: _zeros(key, shape, dtype, device, p) for key, (shape, dtype, device) in forms.items()}


def _zeros(key: str, shape: torch.Size, dtype: torch.dtype, device: torch.device, p: Tensor) -> Tensor:
    if key == "step" or not isinstance(p, DTensor):
        return torch.zeros(shape, dtype=dtype, device=device)
    size = p.to_local().shape
    if key == "variance_buffer":
        size = (*size[: len(shape) - 1], shape[-1])
    zeros = torch.zeros(size, dtype=dtype, device=device)
    whole = torch.empty(shape, device="meta")
    placements = _placements(key, p, len(shape))
    return DTensor.from_local(zeros, p.device_mesh, placements, run_check=False, shape=shape, stride=whole.stride())


def _placements(key: str, p: DTensor, dims: int) -> tuple[Placement, ...]:
    """An entry lies where its parameter does; a variance where the parameter's rows do, on all ranks that share them."""
    if key != "variance_buffer":
        return p.placements
    rows = range(dims - 1)
    return tuple(place if getattr(place, "dim", None) in rows else Replicate() for place in p.placements)


def check_step(group: Mapping[str, Any], states: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
    """Raise RuntimeError if a parameter of the group that has a gradient cannot be stepped.   [SPEC: ERR-3]"""
    keys = state_keys(group)
    for p in group["params"]:
        if p.grad is None:
            continue
        if p.is_complex():
            raise RuntimeError("Muon does not support complex parameters; use torch.view_as_real on the weight")
        if p.grad.layout != torch.strided:
            raise RuntimeError("Muon does not support sparse gradients; route this parameter to another optimizer")
        state = states.get(p, {})
        if state and state.keys() != set(keys):
            raise RuntimeError(
                f"a group's options ask for state {keys} but {tuple(state)} was made with others; put them back, or make a "
                "new optimizer"
            )
        for key, value in state.items():
            if (value.shape, value.dtype, value.device) != form(group, key, p):
                was = f"{p.dtype} {tuple(p.shape)} on {p.device}"
                raise RuntimeError(f"a parameter is {was} and was not when its {key} was made")


def plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group as a state dict holds it: layouts as dicts, a scheduler's NumPy numbers as Python's.   [SPEC: STATE-3]"""
    return {option: _plain(value) for option, value in group.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, (Layout, Section)):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(_plain, value))
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


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


def restore(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Put back the dtypes that torch's loading has cast away."""
    ids = (i for group in saved["param_groups"] for i in group["params"])
    for i, (group, p) in zip(ids, ((g, p) for g in optimizer.param_groups for p in g["params"]), strict=True):
        for key, value in saved["state"].get(i, {}).items():
            _, dtype, device = form(group, key, p)
            optimizer.state[p][key] = torch.as_tensor(value).detach().to(device, dtype, copy=True).contiguous()


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
        if twice := [i for i, count in Counter(group["params"]).items() if count > 1 or i in known]:
            raise ValueError(f"group {index} of the state dict has parameters that came before: {twice}")
        known.update(group["params"])
        _check_group(index, group, our)
        label = names({**our, "param_names": our.get("param_names") or group.get("param_names")}, index)
        for name, i, p in zip(label, group["params"], our["params"], strict=True):
            if saved["state"]:
                _check_entry(name, saved["state"].get(i), our, p)
    if extra := saved["state"].keys() - known:
        raise ValueError(f"the state dict holds state for parameters {sorted(map(str, extra))} that none of its groups has")


def _check_group(index: int, group: Mapping[str, Any], our: Mapping[str, Any]) -> None:
    theirs, mine = group.get("param_names"), our.get("param_names")
    if theirs and mine and theirs != mine:
        wrong = [f"{b!r} where the optimizer has {a!r}" for a, b in zip(mine, theirs, strict=True) if a != b]
        raise ValueError(f"group {index} of the state dict names its parameters otherwise: {', '.join(wrong)}")
    check_options(group)
    check_parameters({**group, "params": our["params"]}, index)
    if state_keys(group) != state_keys(our) or Layout.of(group["layout"]) != Layout.of(our["layout"]):
        kind = "algorithm={algorithm!r}, layout={layout}, normuon_beta2={normuon_beta2}"
        raise ValueError(
            f"group {index} of the state dict is for {kind.format(**group)} but the optimizer has {kind.format(**our)}"
        )


def _check_entry(name: str, entry: Mapping[str, Any] | None, our: Mapping[str, Any], p: Tensor) -> None:
    expected = state_keys(our)
    if entry is None:
        if p.requires_grad:
            raise ValueError(f"the state dict has no state for parameter {name}, expected {expected}")
        return
    if set(entry) != set(expected):
        raise ValueError(f"state of parameter {name} should have the entries {expected} but has {tuple(entry)}")
    for key, value in entry.items():
        where = f"state {key!r} of parameter {name}"
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.device.type == "meta"):
            raise ValueError(f"{where} should be a dense tensor with values but is: {value.layout} on {value.device}")
        if key == "step":
            number = value.ndim == 0 and not value.is_complex() if isinstance(value, Tensor) else isinstance(value, Real)
            if not number or not 0 <= float(value) < float("inf"):
                raise ValueError(f"{where} should be a count >= 0 but is: {value}")
            continue
        shape, dtype, _ = form(our, key, p)
        if not isinstance(value, Tensor) or value.shape != shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{where} should have shape {tuple(shape)} but is: {found}")
        _check_place(where, key, value, p)
        # A wider dtype than ours would lose bits, an integer is no momentum at all.
        if not value.is_floating_point() or torch.promote_types(value.dtype, dtype) != dtype:
            raise ValueError(f"{where} should be {dtype} or narrower but is: {value.dtype}")
        if not bool(value.isfinite().all()) or (key in SQUARES and bool((value < 0).any())):
            raise ValueError(f"{where} is not finite or an average of squares is negative; it would poison the weights")


def _check_place(where: str, key: str, value: Tensor, p: Tensor) -> None:
    # A whole tensor would be taken for a rank's part of it, and the parts of another mesh for those of ours.
    found = (value.device_mesh.mesh.tolist(), value.placements) if isinstance(value, DTensor) else None
    right = (p.device_mesh.mesh.tolist(), _placements(key, p, value.ndim)) if isinstance(p, DTensor) else None
    if found != right:
        kinds = [f"a DTensor on ranks {lies[0]} placed as {lies[1]}" if lies else "a plain tensor" for lies in (right, found)]
        raise ValueError(
            f"{where} should be {kinds[0]}, as the parameter is, but is {kinds[1]}; redistribute() it, or let "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict divide a whole state"
        )
