# SPDX-License-Identifier: Apache-2.0
"""Muon against AdamW: the same model, text, batches, schedule and decay, at three learning rates each.

They are judged at equal steps and at equal time. The second is hard on the slower optimizer: the schedule is made for
equal steps, so when the clock stops its learning rate has not come down to zero yet.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from examples import plots
from examples.run import EVALUATE_EVERY, LR, Run

GRID = {name: (lr / 3, lr, lr * 3) for name, lr in LR.items()}
STEPS = 400


def compare(directory: Path, *, steps: int, seed: int, device: str, data: str | None) -> str:
    """Train the six runs, keep them with a table and a picture in `directory`, and return the table."""
    shared = {"steps": steps, "seed": seed, "device": device, "data": data}
    runs = [Run(optimizer=name, lr=lr, **shared) for name, grid in GRID.items() for lr in grid]
    with tqdm(total=steps * len(runs), unit="step") as bar:
        # By turns, so that whatever else this machine is doing slows all of them alike.
        while not all(run.finished for run in runs):
            for run in runs:
                bar.set_description(f"{run.options['optimizer']} lr {run.options['lr']:g}")
                for _ in range(min(EVALUATE_EVERY, steps - len(run.metrics))):
                    run.advance()
                    bar.update()
    for run in runs:
        kept = directory / f"{run.options['optimizer']}-{run.options['lr']:g}"
        kept.mkdir(exist_ok=True)
        run.save(kept)
    common = min(run.metrics[-1]["seconds"] for run in runs)
    plots.comparison(runs, common, directory / "comparison.png")
    (directory / "table.txt").write_text(table(runs, common) + "\n")
    return table(runs, common)


def loss_at(run: Run, seconds: float) -> float:
    """Validation loss after so much training time, on straight lines between the evaluations."""
    return float(np.interp(seconds, *plots.evaluations(run.metrics, "seconds")))


def final_loss(run: Run) -> float:
    return run.metrics[-1]["val_loss"]


def table(runs: Sequence[Run], common: float) -> str:
    """A line for each run and for each optimizer's best, which may lie further on if it is at an end of its grid."""
    lines = [f"optimizer      lr   seconds   loss at step {runs[0].steps}   loss at {common:.1f} s"]
    for run in runs:
        name, lr, seconds = run.options["optimizer"], run.options["lr"], run.metrics[-1]["seconds"]
        lines.append(f"{name:9}  {lr:6g}  {seconds:8.1f}  {final_loss(run):16.4f}  {loss_at(run, common):14.4f}")
    for name, grid in GRID.items():
        best = min((run for run in runs if run.options["optimizer"] == name), key=final_loss)
        note = "" if best.options["lr"] in grid[1:-1] else " (at an end of its grid)"
        lines.append(f"best of {name}: {final_loss(best):.4f} at lr {best.options['lr']:g}{note}")
    lines.append(f"validation losses in nats per character; unigram entropy {runs[0].unigram_entropy:.4f}")
    return "\n".join(lines)
