# SPDX-License-Identifier: Apache-2.0
"""The pictures: the loss of a run, the losses of a comparison, the singular values of real momentum, and two faults."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
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
SMOOTH = 5  # batches, in the pictures of faults


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


def clip_fault(losses: Mapping[str, list[float]], fault: int, path: Path) -> None:
    """The losses of four runs, by label, the baseline first and ours last; from step `fault` on, one gradient is huge."""
    title = "One weight's gradient becomes huge, but harmless. Torch's clipping then undoes the training, ours does not."
    ax, save = around(fault, f"from step {fault} on, one weight's\ngradient is $2^{{27}}$ times as large", title, path)
    styles = ((GREY, "--"), (ORANGE, "-"), (SHADES["adamw"][2], "-"), (BLUE, "-"))
    ends = {}
    for (label, values), (color, line) in zip(losses.items(), styles, strict=True):
        ends[label] = draw(ax, values, color, line)[-1], color
    label_ends(ax, ends, len(values))
    save()


def nan_fault(losses: Mapping[str, list[float]], fault: int, path: Path) -> None:
    """The losses of two runs, by label, without the guard and with it; in step `fault`, one number becomes NaN."""
    title = "A single NaN: without the guard, the run is lost; with it, one step is"
    ax, save = around(fault, f"step {fault}: NaN in one\nentry of one update", title, path)
    (off, dead), (on, alive) = losses.items()
    means = draw(ax, alive, BLUE, "-")
    draw(ax, dead, ORANGE, "--")
    label_ends(ax, {on: (means[-1], BLUE)}, len(alive))
    end = fault, means[fault - 1]
    ax.plot(*end, color=ORANGE, marker="x", markersize=11, markeredgewidth=3)
    text = f"{off},\nthe loss is NaN from here on"
    ax.annotate(text, end, (10, 14), textcoords="offset points", color=ORANGE)
    save()


def around(fault: int, text: str, title: str, path: Path) -> tuple[Axes, Callable[[], None]]:
    """Axes for losses against steps, with a line at the fault that `text` tells of; and what saves the picture."""
    figure, (ax,) = panels(1, 10, title)
    ax.set(xlabel="step", ylabel=f"loss (nats per character), mean of {SMOOTH} batches")
    ax.axvline(fault, color=GREY, linestyle=":")
    ax.annotate(text, (fault, 0.98), (6, 0), ax.get_xaxis_transform(), "offset points", color=GREY, va="top")
    return ax, lambda: figure.savefig(path)


def draw(ax: Axes, losses: list[float], color: str, line: str) -> list[float]:
    """Draw the running mean of losses, and return it."""
    means = [fmean(losses[max(0, i - SMOOTH) : i]) for i in range(1, len(losses) + 1)]
    ax.plot(range(1, len(means) + 1), means, color=color, linestyle=line, linewidth=2)
    return means


def label_ends(ax: Axes, texts: Mapping[str, tuple[float, str]], x: float) -> None:
    """Write each text, of a height and a color, to the right of x, moved up where the one below is too near."""
    ax.set_xlim(0, x)
    low, high = ax.get_ylim()
    y = -math.inf
    for text, (height, color) in sorted(texts.items(), key=lambda item: item[1]):
        y = max(height, y + 0.11 * (high - low))
        ax.annotate(text, (x, y), (8, 0), textcoords="offset points", color=color, va="center", annotation_clip=False)
