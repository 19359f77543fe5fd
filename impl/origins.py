# SPDX-License-Identifier: Apache-2.0
"""Other Muons: the options with which ours takes their steps, and how to go on from their checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from impl.muon import Muon
from impl.options import names
from impl.state import new_state


class Origin(NamedTuple):
    """`options` that make its rule, and the names of its states in the order of KEYS.

    Its momentum is an average, as ours is, or a sum, which is 1 / (1 - momentum) times that.
    """

    options: dict[str, Any]
    states: tuple[str, str, str, str]
    average: bool = True


KEYS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "step")
JORDAN = {"ns_coefficients": "jordan", "ns_steps": 5, "nesterov": True, "adjust_lr_fn": "original"}
# Rules as published: torch 2.13, KellerJordan/Muon 857d1ad, Moonlight c2ad5b2, dion 0.1.0, Megatron with
# Emerging-Optimizers 0.3. What three of them add to the norm, 1e-7 or 1e-8, is left out; the others floor it, and so do we.
ORIGINS = {
    "torch": Origin(JORDAN | {"eps": 1e-7}, KEYS),
    "keller": Origin(JORDAN | {"adamw_betas": (0.9, 0.95), "adamw_eps": 1e-10}, KEYS),
    "moonlight": Origin(
        JORDAN | {"adjust_lr_fn": "match_rms_adamw", "adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8},
        ("momentum_buffer", "moment1", "moment2", "step"),
        average=False,
    ),
    "dion": Origin(
        {"ns_coefficients": "polar_express", "ns_steps": 5, "nesterov": False, "adjust_lr_fn": "unit_rms_norm"}
        | {"adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8},
        ("momentum", "momentum", "variance", "step_dev"),
        average=False,
    ),
    "megatron": Origin(
        {"ns_coefficients": "you", "ns_steps": 5, "nesterov": False, "adjust_lr_fn": "spectral", "eps": 1e-7}, KEYS
    ),
}


def _origin(name: str) -> Origin:
    if name not in ORIGINS:
        raise ValueError(f"origin should be one of {', '.join(ORIGINS)} but is: {name!r}")
    return ORIGINS[name]


def like(origin: str) -> dict[str, Any]:
    """Options for `Muon` and its groups, which then takes the steps of another: schedule, momentum's form, scale, epsilons.

    `lr`, `weight_decay` and `momentum` are the user's: `Muon(groups, lr=0.02, **like("keller"))`.

    Args:
        origin: "torch" (torch.optim.Muon), "keller" (KellerJordan/Muon), "moonlight", "dion", "megatron".
    """
    return dict(_origin(origin).options)


def import_state(optimizer: Muon, state_dict: Mapping[str, Any], params: Sequence[Tensor], origin: str) -> None:
    """Load the state dict of another Muon, or raise ValueError and change nothing. Options stay the optimizer's.

    Args:
        params: the parameters in the order that the other optimizer had them in, which its state dict numbers; those that
            it had no state for are to be left out of `state_dict["state"]`, and begin anew. KellerJordan's MuonWithAuxAdam
            sorts each group that it orthogonalizes by size, `sorted(group, key=lambda p: p.size(), reverse=True)`.
        origin: as in `like`. A momentum that is a sum is multiplied by 1 - momentum of the parameter's group.
    """
    other, theirs = _origin(origin), state_dict.get("state")
    if not isinstance(theirs, Mapping):
        raise ValueError(f"state_dict should have a dict of states by number under 'state' but has: {theirs!r:.80}")
    position = {id(p): i for i, p in enumerate(params)}
    saved: dict[int, dict[str, Any]] = {}
    number = 0
    for g, group in enumerate(optimizer.param_groups):
        for name, p in zip(names(group, g), group["params"], strict=True):
            found = theirs.get(position.get(id(p)))
            if id(p) not in position:
                raise ValueError(f"params should hold every parameter of the optimizer, but {name} is missing")
            state = new_state(group, p)
            for key, their in zip(KEYS, other.states, strict=True):
                if found is None or key not in state:
                    continue
                if their not in found:
                    raise ValueError(f"{origin}'s state of parameter {name} should have {their!r} but has {sorted(found)}")
                if not isinstance(found[their], (Tensor, int, float)):
                    raise ValueError(
                        f"{origin}'s {their!r} of parameter {name} should be a tensor but is: {found[their]!r:.80}"
                    )
                factor = 1 - float(group["momentum"]) if key == "momentum_buffer" and not other.average else 1
                state[key] = factor * torch.as_tensor(found[their]).to(state[key].device, state[key].dtype)
            if found is not None or p.requires_grad:
                saved[number] = state
            number += 1
    optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
