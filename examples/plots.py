# SPDX-License-Identifier: Apache-2.0
"""The pictures: the loss of a run, the losses of a comparison, and the singular values of real momentum."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from examples.run import Run
from impl import orthogonalize
from reference import polar_factor

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"  # Okabe and Ito's, which colour-blind readers can tell apart
SHADES = {"muon": ("#7FC4EE", BLUE, "#00304D"), "adamw": ("#F5B183", ORANGE, "#6B2F00")}  # darker as lr grows


def panels(count: int, width: float, title: str) -> tuple[Figure, Sequence[Axes]]:
    """Axes side by side on one vertical scale, `width` inches together."""
    figure = Figure(figsize=(width, 4.2), dpi=150, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, count, squeeze=False, sharey=True)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def evaluations(metrics: list[dict[str, Any]], x: str) -> tuple[list[float], list[float]]:
    """Column `x` and validation loss, of the rows that have one."""
    rows = [row for row in metrics if row["val_loss"] is not None]
    return [row[x] for row in rows], [row["val_loss"] for row in rows]


def loss(run: Run, path: Path) -> None:
    """Training and validation loss against steps, and the line that a model must get below to use context at all."""
    title = f"{run.options['optimizer']}, lr {run.options['lr']:g}: validation loss {run.metrics[-1]['val_loss']:.3f}"
    figure, (ax,) = panels(1, 7, title)
    steps, losses = zip(*((row["step"], row["train_loss"]) for row in run.metrics), strict=True)
    ax.plot(steps, losses, color=BLUE, alpha=0.4, linewidth=1, label="training batch")
    ax.plot(*evaluations(run.metrics, "step"), color=ORANGE, marker="o", markersize=3.5, label="validation")
    ax.axhline(run.unigram_entropy, color=GREY, linestyle="--", label=f"unigram entropy, {run.unigram_entropy:.2f}")
    ax.set(xlabel="step", ylabel="loss (nats per character)", xlim=(0, run.steps * 1.01))
    ax.legend(frameon=False)
    figure.savefig(path)


def comparison(runs: Sequence[Run], common: float, path: Path) -> None:
    """Validation losses against steps and against seconds; `common` is the time that every run reached."""
    figure, axes = panels(2, 10, f"Muon and AdamW, {runs[0].steps} steps at three learning rates each")
    shades = {name: iter(colors) for name, colors in SHADES.items()}
    for run in runs:
        name, lr = run.options["optimizer"], run.options["lr"]
        color, line = next(shades[name]), "-" if name == "muon" else "--"
        for ax, x in zip(axes, ("step", "seconds"), strict=True):
            ax.plot(*evaluations(run.metrics, x), color=color, linestyle=line, label=f"{name}, lr {lr:g}")
    finals = [run.metrics[-1]["val_loss"] for run in runs]
    axes[0].set(xlabel="step", ylabel="validation loss (nats per character)")
    axes[0].set_ylim(min(finals) - 0.05, max(finals) + 0.7)
    axes[0].legend(frameon=False)
    axes[1].set_xlabel("training time (seconds, evaluation not counted)")
    axes[1].axvline(common, color=GREY, linestyle=":")
    axes[1].set_title(f"dotted: {common:.0f} s, reached by all", loc="right", color=GREY, fontsize=9)
    figure.savefig(path)


def singular_values(run: Run, path: Path) -> None:
    """Three matrices of a Muon run: the spectrum of their momentum, orthogonalized, and of the exact polar factor."""
    first, last = run.model.blocks[0], run.model.blocks[-1]
    state = run.optimizer.state
    hidden, d = first.experts.w2.shape[1], last.mixer.qkv.in_features
    matrices = {
        "queries, attention block": state[last.mixer.qkv.weight]["momentum_buffer"][:d],
        "gate of the first expert": state[first.experts.w13]["momentum_buffer"][:hidden],
        "output projection, first block": state[first.mixer.out_proj.weight]["momentum_buffer"],
    }
    figure, axes = panels(3, 12, "Singular values of the momentum, before and after orthogonalization")
    for ax, (name, M) in zip(axes, matrices.items(), strict=True):
        before, after, exact = map(spectrum, (M, orthogonalize(M), polar_factor(M.cpu())))
        index = range(1, len(exact) + 1)
        ax.plot(index, before / before[0], color=GREY, label="before, divided by the largest")
        ax.plot(index, after, color=BLUE, linewidth=2, label="after")
        ax.plot(index, exact, color=ORANGE, linestyle="--", label="exact polar factor, float64")
        ax.set(title=f"{name}, {M.shape[0]} × {M.shape[1]}", xlabel="index", yscale="log")
    axes[0].set_ylabel("singular value")
    axes[0].legend(frameon=False)
    figure.savefig(path)


def spectrum(X: Tensor) -> Tensor:
    """Singular values, largest first, in float64."""
    return torch.linalg.svdvals(X.cpu().double())
