# SPDX-License-Identifier: Apache-2.0
"""How far is each schedule from the polar factor on the momentum of a real run?   [SPEC: ORTH, the choice of l]

    python -m examples.schedules [--steps 300]

trains the example, takes the singular values of every Muon matrix's momentum along the way, and prints the relative
Frobenius distance ||p(x) - 1|| / sqrt(rank) that a schedule p leaves on them: averaged over all matrices at each of
five moments, the mean of those, and the worst matrix at the end. A schedule acts on singular values alone, so this is
exact. Matrices whose momentum is still zero are left out.
"""

import argparse

import numpy as np
import torch

from examples.run import Run, pieces
from impl import Muon
from reference import Schedule, schedule
from reference.schedules import polar_express_s4

# Lower bounds to try for a number of steps.
CANDIDATES = {
    3: (1e-2, 1.5e-2, 2e-2, 3e-2, 5e-2),
    4: (3e-3, 5e-3, 7e-3, 1e-2, 1.5e-2),
    5: (1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 5e-3),
    6: (3e-4, 5e-4, 7e-4, 1e-3, 1.5e-3),
}
# What a schedule of `steps` should never do worse than: the distance on a Gaussian 1024 x 1024 matrix (ORTH-2).
GAUSS = np.linalg.svd(np.random.default_rng(0).standard_normal((1024, 1024)), compute_uv=False)


def spectra(optimizer: Muon) -> list[np.ndarray]:
    """Singular values of the momentum of every matrix that Muon orthogonalizes."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"] if group["algorithm"] == "muon" else ():
            parts = pieces(group, optimizer.state[p]["momentum_buffer"])
            found += [torch.linalg.svdvals(M.double()).numpy() for algorithm, M in parts if algorithm == "muon"]
    return [s for s in found if s[0] > 0]


def distance(p: Schedule, s: np.ndarray) -> float:
    """Relative distance between the spectral map of p and the polar factor, for singular values s."""
    return float(np.sqrt(np.mean((p(s / (p.margin * p.size(s))) - 1) ** 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    run = Run(optimizer="muon", lr=0.02, steps=steps, seed=0, device="cpu", data=None)
    samples = {max(1, steps * percent // 100): [] for percent in (1, 10, 30, 60, 100)}
    while not run.finished:
        run.advance()
        if (step := len(run.metrics)) in samples:
            samples[step] = spectra(run.optimizer)
            print(f"step {step}: {len(samples[step])} matrices, loss {run.metrics[-1]['train_loss']:.3f}", flush=True)

    def show(name: str, p: Schedule) -> None:
        errors = [[distance(p, s) for s in found] for found in samples.values()]
        cells = "".join(f"{np.mean(e):8.3f}" for e in errors)
        low, high = p.band(0.01)
        mean = np.mean([np.mean(e) for e in errors])
        print(f"{name:28}{cells}{mean:8.4f}{np.max(errors[-1]):8.3f}{distance(p, GAUSS):8.3f}   [{low:.3f}, {high:.3f}]")

    print(
        f"\n{'schedule':28}"
        + "".join(f"{f'at {step}':>8}" for step in samples)
        + "    mean   worst   gauss   band on [0.01, 1]"
    )
    for name in ("jordan", "you", "polar_express"):
        show(name, schedule(name, 5))
    for count, lowers in CANDIDATES.items():
        for lower in lowers:
            show(f"polar_express_s4 {count} l={lower:g}", Schedule(polar_express_s4(lower, count), "schatten4"))


if __name__ == "__main__":
    main()
