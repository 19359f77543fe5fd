# SPDX-License-Identifier: Apache-2.0
"""Break a step in every way, everywhere, and see what is left: `python -m conformance.campaign [--target=module:Name]`.

A fault is one number that is not finite, at one site of one step of an optimizer with both algorithms in four groups.
It is detected if the optimizer counts one skipped step, for the right reason. It corrupts if any weight or state then
differs in a bit from what SPEC.md's SKIP says, or if later steps do not go on as they would have.
"""

import argparse
import copy
import itertools
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

import reference
from conformance import accept
from conformance.steps import parameters, take
from conformance.strategies import DTYPES, HYPER, LAYOUTS, MIXED, tensor
from conformance.target import Named, Target, load

# Where a fault strikes -> the reason that the optimizer is to count.
SITES = {
    "gradient": "gradient",
    "momentum": "gradient",
    "orthogonalized update": "orthogonalization",
    "AdamW gradient": "gradient",
}
VALUES = (float("nan"), float("inf"), float("-inf"))


@dataclass(frozen=True)
class Fault:
    """One number that is not finite: where, what, and in what kind of parameter."""

    site: str
    value: float
    dtype: torch.dtype
    layout: str


def faults() -> Iterator[Fault]:
    """Every site, value, dtype and layout."""
    yield from itertools.starmap(Fault, itertools.product(SITES, VALUES, DTYPES, LAYOUTS | MIXED))


def scene(target: Target, layout: str, dtype: torch.dtype, device: Any) -> tuple[Named, Optimizer]:
    """Four parameters in four groups, two steps old: of the layout, a plain matrix, NorMuon's, AdamW's."""
    shape, cut = (LAYOUTS | MIXED)[layout]
    kinds = [
        (shape, replace(HYPER, layout=cut)),
        ((5, 7), HYPER),
        ((6, 4), replace(HYPER, normuon_beta2=0.95)),
        ((9,), replace(HYPER, algorithm="adamw")),
    ]
    named = parameters([tensor(shape, i, dtype) for i, (shape, _) in enumerate(kinds)], device)
    optimizer = target.optimizer(named[:1], kinds[0][1])
    for pair, (_, hyper) in zip(named[1:], kinds[1:], strict=True):
        optimizer.add_param_group(target.group([pair], hyper))
    for seed in (10, 20):
        take(optimizer, named, gradients(named, seed))
    return named, optimizer


def gradients(named: Named, seed: int) -> list[Tensor]:
    """One for each parameter, finite."""
    return [tensor(tuple(p.shape), seed + i, p.dtype) for i, (_, p) in enumerate(named)]


def everything(named: Named, optimizer: Optimizer) -> dict[str, Any]:
    """A copy of every weight and state."""
    return {name: copy.deepcopy({"weight": p.detach(), **optimizer.state[p]}) for name, p in named}


def orthogonalized(fault: Fault) -> int:
    """The last entry of the first parameter that Muon steps."""
    shape, layout = (LAYOUTS | MIXED)[fault.layout]
    return max(int(index.max()) for algorithm, index in reference.matrices(shape, **layout) if algorithm == "muon")


def strike(target: Target, fault: Fault, named: Named, optimizer: Optimizer, seed: int) -> None:
    """One step with the fault in it."""
    step = gradients(named, seed)
    if fault.site == "gradient":
        step[0].view(-1)[orthogonalized(fault)] = fault.value
    elif fault.site == "AdamW gradient":
        step[-1][seed % len(step[-1])] = fault.value
    elif fault.site == "momentum":
        target.momentum_buffer(optimizer, named[0][1]).view(-1)[orthogonalized(fault)] = fault.value
    with target.orthogonalizing(fault.value if fault.site == "orthogonalized update" else None):
        take(optimizer, named, step)


def run(target: Target, fault: Fault, seed: int = 30, device: Any = "cpu") -> tuple[bool, bool]:
    """Whether a fault was detected, and whether it has corrupted anything."""
    named, optimizer = scene(target, fault.layout, fault.dtype, device)
    twins, twin = copy.deepcopy((named, optimizer))
    if fault.site == "orthogonalized update":
        # The twin takes up the same momentum, and nothing else, in a step of its own.
        with target.orthogonalizing(None):
            kept = everything(named, optimizer)
            take(twin, twins, gradients(twins, seed))
        for name, p in twins:
            with torch.no_grad():
                p.copy_(kept[name]["weight"])
            for key, value in twin.state[p].items():
                if key != "momentum_buffer":
                    value.copy_(kept[name][key])
    before = target.skipped(optimizer)
    strike(target, fault, named, optimizer, seed)
    after = target.skipped(optimizer)
    detected = after == {**before, SITES[fault.site]: before[SITES[fault.site]] + 1}
    if fault.site == "momentum":  # the fault was in the state itself: take it out again
        M = target.momentum_buffer(optimizer, named[0][1])
        M.view(-1)[orthogonalized(fault)] = target.momentum_buffer(twin, twins[0][1]).view(-1)[orthogonalized(fault)]
    same = accept.equal(everything(named, optimizer), everything(twins, twin))
    for later in (seed + 10, seed + 20):
        take(optimizer, named, gradients(named, later))
        take(twin, twins, gradients(twins, later))
    return detected, not (same and accept.equal(everything(named, optimizer), everything(twins, twin)))


def main() -> int:
    """Print one line with the counts; 0 if every fault was detected and none has corrupted anything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", default="conformance.targets.impl:Target", help="package.module:Name of an adapter")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)  # that a step was skipped is what is counted here
    target, every = load(options.target), list(faults())
    detected = corrupting = 0
    for done, fault in enumerate(every, start=1):
        found, corrupts = run(target, fault, device=options.device)
        detected, corrupting = detected + found, corrupting + corrupts
        if not found or corrupts:
            sys.stderr.write(f"{fault}: {'detected' if found else 'not detected'}{', state-corrupting' * corrupts}\n")
        if done % 60 == 0:
            sys.stderr.write(f"{done} of {len(every)} faults\n")
    sys.stdout.write(f"injected, detected, state-corrupting = {len(every)}, {detected}, {corrupting}\n")
    return 0 if (detected, corrupting) == (len(every), 0) else 1


if __name__ == "__main__":
    sys.exit(main())
