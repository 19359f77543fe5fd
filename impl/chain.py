# SPDX-License-Identifier: Apache-2.0
"""Several optimizers that step as one, under one clip policy and one threshold.   [SPEC: CLIP]"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer

from impl.clipping import check_policy, coefficient, scale
from impl.muon import Muon
from impl.norms import GradNorms, Leaf, clipped, device_of, grad_norms, gradients, leaves
from impl.skip import Tally, agree, scalar


class ChainedOptimizer(Optimizer):
    """Steps its members after clipping their gradients together, or skips the step of all.   [SPEC: CLIP]

    It decides first and clips after, so a skipped step leaves gradients as they were. `norms` holds the norms of the last
    step, None for one that nothing used; `skipped` counts the steps that the threshold kept from being taken.

    Args:
        optimizers: torch optimizers; wrappers that hold theirs in `.optimizer`; containers that hold theirs in
            `.optimizers` or `.chained_optimizers`; other chains, without a policy of their own.
        clip_grad: the norm that gradients which are not exempt are brought down to, in their unit; None for no clipping.
        grad_norm_skip_threshold: the largest norm, of gradients that are not exempt, with which a step is taken.
        clip_norm: "own" to clip by the norm of what is clipped, "global" by that of all gradients.
        floor: the smallest factor that gradients are multiplied with.
        log_grad_norm: have `norms.total` in every step.
        process_groups: for each member, the process group over which its gradients are shards, or None. All its ranks
            construct the chain together, with one policy.

    A threshold stays on the device if all members can be told to skip there (Muon, torch's fused Adam and AdamW); otherwise
    it costs one host synchronization a step. Members otherwise decide for themselves: where one decision should hold for all
    parameters, one Muon can step them all. Gradients must be where the innermost optimizers look for them before `step`.

    For a scheduler, `param_groups` and `state` are views of the members'. A state dict holds the members' state dicts.

    Raises:
        ValueError, TypeError: a policy that means nothing, or members that cannot be chained, before anything has changed.
    """

    def __init__(
        self,
        optimizers: Sequence[Any],
        clip_grad: float | None = None,
        grad_norm_skip_threshold: float = math.inf,
        *,
        clip_norm: str = "own",
        floor: float = 0.0,
        log_grad_norm: bool = False,
        process_groups: Sequence[dist.ProcessGroup | None] | None = None,
    ) -> None:
        check_policy("clip_grad", clip_grad, clip_norm, floor)
        if not grad_norm_skip_threshold >= 0:
            raise ValueError(f"grad_norm_skip_threshold should be >= 0 but is: {grad_norm_skip_threshold}")
        self.optimizers = list(optimizers)
        self.process_groups = [None] * len(self.optimizers) if process_groups is None else list(process_groups)
        if len(self.process_groups) != len(self.optimizers) or not self.optimizers:
            raise ValueError(f"found {len(self.optimizers)} optimizers and {len(self.process_groups)} process groups")
        self.clip_grad, self.grad_norm_skip_threshold, self.log_grad_norm = clip_grad, grad_norm_skip_threshold, log_grad_norm
        self.clip_norm, self.floor = clip_norm, floor
        parameters = [p for group in self.param_groups for p in group["params"]]
        if len({id(p) for p in parameters}) != len(parameters):
            raise ValueError("a parameter is in more than one of the optimizers and would be stepped by each")
        self.silent = self._agree_on_silence()
        self.norms = GradNorms(None, None, None)
        self.tally = Tally("ChainedOptimizer", {1: "in {} the norm was above the threshold or no number"}, 2)
        # Sets up what torch's constructor does, but for groups and state, which are the members'.
        self.__setstate__({"defaults": {}})

    def _agree_on_silence(self) -> set[dist.ProcessGroup]:
        """The process groups on none of whose ranks anything is clipped: one all-reduce for each.   [SPEC: CLIP-10]"""
        found = leaves(self)
        silent = set()
        for process_group in dict.fromkeys(leaf.process_group for leaf in found):
            if process_group is not None:
                mine = any(leaf.clips() for leaf in found if leaf.process_group is process_group)
                flag = torch.tensor(mine, dtype=torch.uint8, device=device_of(found))
                silent |= set() if bool(agree(flag, process_group)) else {process_group}
        return silent

    @property
    def param_groups(self) -> tuple[dict[str, Any], ...]:  # type: ignore[override]
        """The groups of all members: the same dicts, so that a scheduler may write to them."""
        return tuple(group for leaf in leaves(self) for group in leaf.optimizer.param_groups)

    @property
    def state(self) -> Mapping[Tensor, Any]:  # type: ignore[override]
        """The state of all parameters, to be read."""
        return MappingProxyType({p: state for leaf in leaves(self) for p, state in leaf.optimizer.state.items()})

    @property
    def skipped(self) -> Tensor:
        """How many steps the threshold kept from being taken: int64, on the device, without waiting for it."""
        return self.tally.counts[1].clone()

    @property
    def clips_itself(self) -> bool:
        """Whether it has a policy of its own, and can be no member of another chain."""
        return self.clip_grad is not None or self.grad_norm_skip_threshold < math.inf

    @property
    def skip_grad_norm_clip(self) -> bool:
        """Whether every member is exempt."""
        return not any(leaf.clips() for member in self.optimizers for leaf in leaves(member))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Decide, clip, step; return the closure's value, if there is one."""
        self.tally.look(wait=False)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = leaves(self)
        watches, clips = self._measure(found)
        skip = self._skip() if watches else None
        if skip is not None and not self._tells():
            if bool(skip):
                return loss
            skip = None
        if clips:
            factor = coefficient(torch.as_tensor(self.norms.clipped), float(self.clip_grad or 0.0), self.floor)
            scale(found, factor if skip is None else torch.where(skip, 1.0, factor))
        counted = [leaf for leaf in found if leaf.clips() or self.clip_norm == "global"] if watches or clips else []
        unseen = [leaf for leaf in counted if not any(True for _ in gradients([leaf]))]
        self._step_members(found, skip)
        if any(True for _ in gradients(unseen)):
            raise RuntimeError(
                "a wrapper gave its optimizer gradients in its own step only, so they were neither measured nor clipped; have "
                "it give them before the chain's step"
            )
        return loss

    def _measure(self, found: list[Leaf]) -> tuple[bool, bool]:
        """Compute the norms that something uses; whether the threshold and clipping do.   [SPEC: CLIP-8]"""
        shared = {leaf.process_group for leaf in found} - {None}
        if any(leaf.process_group in self.silent and leaf.clips() for leaf in found):
            raise RuntimeError("a chain's member was exempt when the ranks built the chain and is not now; build it again")
        any_clipped = any(leaf.clips() for leaf in found) or not shared <= self.silent
        watches = any_clipped and self.grad_norm_skip_threshold < math.inf
        clips = any_clipped and self.clip_grad is not None
        # A rank cannot know what is clipped in process groups that it is not in, but others in its own may.
        by_total = self.clip_norm == "global" and self.clip_grad is not None and (any_clipped or bool(shared))
        total = self.log_grad_norm or by_total
        norms = GradNorms(None, None, None)
        if watches or clips or total:
            threshold, everything = grad_norms(found, 2.0, total, self.silent)
            norms = GradNorms(everything, threshold if self.clip_norm == "own" else everything, threshold)
        self.norms = norms
        return watches, clips

    def _skip(self) -> Tensor:
        """Whether the norm is not below the threshold, counted; a NaN is not."""
        skip = ~(torch.as_tensor(self.norms.threshold) <= self.grad_norm_skip_threshold)
        self.tally.count(skip)
        return skip

    def _tells(self) -> bool:
        """Whether all members can be told to skip on the device, with nothing around them that would do half a step."""
        return all(
            member._tells()
            if isinstance(member, ChainedOptimizer)
            # Not all that say so keep their state: fused SGD leaves a first momentum undefined.
            else isinstance(member, (Muon, torch.optim.Adam)) and getattr(member, "_step_supports_amp_scaling", False)
            for member in self.optimizers
        )

    def _step_members(self, found: list[Leaf], skip: Tensor | None) -> None:
        if skip is None:
            for member in self.optimizers:
                member.step()
            return
        before = [getattr(leaf.optimizer, "found_inf", None) for leaf in found]
        try:
            for leaf, known in zip(found, before, strict=True):
                told = skip.float()
                leaf.optimizer.found_inf = told if known is None else torch.maximum(told, scalar(known, told.device))
            for member in self.optimizers:
                member.step()
        finally:
            for leaf, known in zip(found, before, strict=True):
                if known is None:
                    del leaf.optimizer.found_inf
                else:
                    leaf.optimizer.found_inf = known

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, for every member."""
        for member in self.optimizers:
            member.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the group belongs to a member."""
        raise ValueError("add the group to one of the chain's optimizers; it has to say which one steps it")

    def report(self) -> str:
        """One line for each group: whose it is, how large, and what of its gradients is clipped."""
        self.tally.look(wait=True)
        lines = []
        for leaf in leaves(self):
            for index, group in enumerate(leaf.optimizer.param_groups):
                n = sum(p.numel() for p in group["params"])
                name = f"{type(leaf.optimizer).__name__} group {index}"
                lines.append(f"{name}: {n:,} parameters, clipped: {clipped(group, leaf.exempt)}")
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        """The members' state dicts, in order, under "optimizers"."""
        self.tally.look(wait=True)
        return {"optimizers": [member.state_dict() for member in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` saved; where one member refuses its part, those before it go back to what they had."""
        saved = state_dict.get("optimizers") if isinstance(state_dict, dict) else None
        saved = saved if isinstance(saved, (list, tuple)) else ()
        if len(saved) != len(self.optimizers):
            raise ValueError(f"the state dict is of {len(saved)} optimizers but the chain has {len(self.optimizers)}")
        before = self.state_dict()["optimizers"]
        declared = [group.get("skip_grad_norm_clip", False) for group in self.param_groups]
        for loaded, (member, part) in enumerate(zip(self.optimizers, saved, strict=True)):
            try:
                member.load_state_dict(part)
            except Exception:
                for member, part in zip(self.optimizers[:loaded], before, strict=False):
                    member.load_state_dict(part)
                raise
        for group, exempt in zip(self.param_groups, declared, strict=True):
            group.setdefault("skip_grad_norm_clip", exempt)  # torch takes groups as they were saved

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "step"}  # a scheduler may have wrapped it

    def __deepcopy__(self, memo: dict[int, Any]) -> "ChainedOptimizer":
        # A process group cannot be copied; the copy of a chain measures with the same ranks.
        memo |= {id(process_group): process_group for process_group in self.process_groups if process_group is not None}
        twin = object.__new__(type(self))
        twin.__setstate__(deepcopy(self.__getstate__(), memo))
        return twin
