# SPDX-License-Identifier: Apache-2.0
"""Two failures of production runs, staged on the small language model: what they do to torch's optimizers and to ours.

    python -m examples.faults [--steps 60] [--out runs/faults]

clip: from a third of the steps on, a hook multiplies the gradient of one weight, the fused gates and up-projections of
the first block's experts, by 2^27. That alone is harmless: the weight is orthogonalized, so how large its gradient is
does not matter. But the norm of all gradients becomes about 4e7, and to clip that to 1, the gradients of all other weights
are multiplied by about 3e-8. They vanish beside the momentum, and Muon's steps, of full length nevertheless, go on in the
directions from before the fault. (Were the gradient so large from the first step on, there would be no such momentum, and
learning would only slow down in a run this short.) `impl.clip_grad_norm_` leaves alone what is orthogonalized.

nan: in one step, one number in one orthogonalized matrix becomes NaN. With `skip_nonfinite=False` it reaches a weight.

All runs share initial weights, batches, decay and a constant learning rate. The verdicts follow from the losses that are
printed, each the mean over a sixth of the steps. Exit status: 0 if they are as expected, else 1.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import impl.stages
from examples import plots
from examples.data import Corpus, InputError, draw, read_text
from examples.model import HybridLM
from examples.run import BALANCE, LR, WEIGHT_DECAY, pieces
from examples.train import RUNS, Parser, number
from impl import Muon, clip_grad_norm_, orthogonalize, param_groups

SEED = 0
STEPS, SEQUENCES = 60, 16  # of a run; in a batch
FACTOR = 2.0**27  # a power of two, so that it rounds nothing
MAX_NORM = 1.0
RATIO = LR["adamw"] / LR["muon"]
HUGE, HEAD = "blocks.0.experts.w13", "lm_head.weight"

BASELINE, GUARDED = "torch's optimizers, no clipping", "guard on (the default)"
CLIP = {
    BASELINE: dict(fault="clip", optimizer="torch", clip=None),
    "torch's optimizers, torch's clipping": dict(fault="clip", optimizer="torch", clip="torch"),
    "our optimizer, torch's clipping": dict(fault="clip", optimizer="ours", clip="torch"),
    "our optimizer, our clipping": dict(fault="clip", optimizer="ours", clip="ours"),
}
NAN = {name: dict(fault="nan", optimizer="ours", clip="ours", guard=on) for name, on in (("guard off", False), (GUARDED, True))}
EXPECTED = dict(zip([*list(CLIP)[1::2], *NAN], ("stalled", "learning", "dead", "surviving"), strict=True))


class Story(NamedTuple):
    """What happened in one run."""

    losses: list[float]  # of each step's batch, before the step
    coefficients: list[float]  # what each step's clipping multiplied gradients with
    notes: list[str]  # what the optimizer warned of, and in which step
    skipped: dict[str, int]  # how many steps, for each reason


def torch_step(model: nn.Module) -> Callable[[], None]:
    """torch.optim.Muon, on each matrix that ours orthogonalizes, and torch.optim.AdamW, for the rest, as one step."""
    fused, chosen = [], {"muon": [], "adamw": []}
    for group in param_groups(model, head=HEAD):
        for _, p in group["params"]:
            views = [(algorithm, nn.Parameter(W)) for algorithm, W in pieces(group, p.detach())]  # in p's own memory
            fused.append((group, p, views))
            for algorithm, W in views:
                chosen[algorithm].append(W)
    muon = torch.optim.Muon(chosen["muon"], lr=LR["muon"], weight_decay=WEIGHT_DECAY)
    adamw = torch.optim.AdamW(chosen["adamw"], lr=LR["muon"] * RATIO, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)

    def step() -> None:
        for group, p, views in fused:
            for (_, W), (_, G) in zip(views, pieces(group, p.grad), strict=True):
                W.grad = G
        muon.step()
        adamw.step()

    return step


@contextmanager
def one_nan() -> Iterator[None]:
    """Meanwhile, the first matrix that our optimizer orthogonalizes gets a NaN in one entry."""
    bad = iter([math.nan])

    def faulty(*args: Any) -> Tensor:
        O = orthogonalize(*args)
        O[0, 0, 0] = next(bad, O[0, 0, 0])
        return O

    with patch.object(impl.stages, "orthogonalize", faulty):
        yield


def train(corpus: Corpus, steps: int, bar: tqdm, *, fault: str, optimizer: str, clip: str | None, guard: bool = True) -> Story:
    """One run with a fault, "clip" or "nan"; optimizer and clipping "torch" or "ours"."""
    torch.manual_seed(SEED)
    model, sampler = HybridLM(len(corpus.alphabet)), torch.Generator().manual_seed(SEED)
    groups = param_groups(model, head=HEAD)
    muon = Muon(groups, lr=LR["muon"], weight_decay=WEIGHT_DECAY, adamw_lr_ratio=RATIO, skip_nonfinite=guard)
    take_step = muon.step if optimizer == "ours" else torch_step(model)
    story = Story([], [], [], {})
    for step in range(1, steps + 1):
        if fault == "clip" and step == fault_at(steps):
            model.get_parameter(HUGE).register_hook(lambda G: G * FACTOR)
        inputs, targets = draw(corpus.train, SEQUENCES, sampler)
        logits, balance = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        model.zero_grad()
        (loss + BALANCE * balance).backward()
        norm = 0.0
        if clip == "torch":
            norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item()
        elif clip == "ours":
            norm = clip_grad_norm_(muon, MAX_NORM).clipped.item()
        trouble = one_nan() if fault == "nan" and step == fault_at(steps) else nullcontext()
        with trouble, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            take_step()
        story.losses.append(loss.item())
        story.coefficients.append(min(1.0, MAX_NORM / norm) if norm else 1.0)
        story.notes.extend(f"step {step}, {w.category.__name__}: {w.message}" for w in caught)
        bar.update()
    return story._replace(skipped={reason: int(count) for reason, count in muon.skipped.items()})


def fault_at(steps: int) -> int:
    """The step, from 1, in which things go wrong."""
    return steps // 3


def means(losses: list[float]) -> tuple[float, float, float]:
    """The loss at first, the mean over a sixth of the steps up to the fault's, and that over the last sixth."""
    fault, window = fault_at(len(losses)), len(losses) // 6
    return losses[0], fmean(losses[fault - window : fault]), fmean(losses[-window:])


def clip_verdict(losses: list[float], baseline: list[float]) -> str:
    """Judged by how far the loss fell after the fault, as a share of how far the baseline's did."""
    (_, before, after), (_, baseline_before, baseline_after) = means(losses), means(baseline)
    fell, expected = before - after, baseline_before - baseline_after
    if not expected > 0:
        return "unclear"  # not even the baseline learned
    return "learning" if fell > 0.5 * expected else "slowed" if fell >= 0.1 * expected else "stalled"


def nan_verdict(losses: list[float], skipped: int) -> str:
    """Judged by the losses after the fault, which are those of the steps after it, and by the steps that were skipped."""
    later = [math.isfinite(loss) for loss in losses[fault_at(len(losses)) :]]
    _, before, after = means(losses)
    return "dead" if not any(later) else "surviving" if all(later) and skipped == 1 and after < before else "unclear"


def tell(stories: Mapping[str, Story], verdicts: Mapping[str, str], title: str, cells: Mapping[str, Any]) -> None:
    """Print a table, with `cells` as a column of its own, and whatever the optimizers warned of."""
    print(f"{'mean losses':38}{'at first':>8}{'before':>9}{'at end':>9}{'change':>9}{title:>13}  verdict")
    for name, story in stories.items():
        first, before, after = means(story.losses)
        numbers = f"{first:8.3f}{before:9.3f}{after:9.3f}{after - before:+9.3f}".replace("+nan", " nan")
        print(f"{name:38}{numbers}{cells[name]:>13}  {verdicts[name]}")
    print("".join(f"{name}, {note}\n" for name, story in stories.items() for note in story.notes), end="")


def tell_clip(stories: dict[str, Story], path: Path) -> dict[str, str]:
    """Print and draw the runs of the first fault; the verdicts."""
    baseline = stories[BASELINE].losses
    fault = fault_at(len(baseline))
    verdicts = {name: clip_verdict(story.losses, baseline) for name, story in stories.items()}
    middle = {name: median(story.coefficients[fault - 1 :]) for name, story in stories.items()}
    cells = {name: "1" if factor == 1 else f"{factor:.1e}" for name, factor in middle.items()} | {BASELINE: "none"}
    print(f"clip: from step {fault} on, the gradient of {HUGE} is multiplied by 2^27, which alone does no harm (first line).")
    print(f"Clipping to norm {MAX_NORM:g} multiplies gradients by a coefficient; its median from then on is shown.")
    print("Learning: the loss falls by more than half of the first line's change. Stalled: not even by a tenth, or it rises.")
    tell(stories, verdicts, "coefficient", cells)
    labels = {name: f"{name}:\n{verdicts[name]}, clip coefficient {cell}" for name, cell in cells.items()}
    plots.clip_fault({labels[name]: story.losses for name, story in stories.items()}, fault, path)
    return verdicts


def tell_nan(stories: dict[str, Story], path: Path) -> dict[str, str]:
    """Print and draw the runs of the second fault; the verdicts."""
    fault = fault_at(len(stories[GUARDED].losses))
    skipped = {name: sum(story.skipped.values()) for name, story in stories.items()}
    verdicts = {name: nan_verdict(story.losses, skipped[name]) for name, story in stories.items()}
    print(f"\nnan: in step {fault}, one entry of one orthogonalized matrix becomes NaN.")
    tell(stories, verdicts, "skipped", skipped)
    print(f"{GUARDED}, optimizer.skipped: " + ", ".join(f"{key} {count}" for key, count in stories[GUARDED].skipped.items()))
    labels = {name: f"{name}:\n{verdicts[name]}, steps skipped: {count}" for name, count in skipped.items()}
    plots.nan_fault({labels[name]: story.losses for name, story in stories.items()}, fault, path)
    return verdicts


def run(steps: int, directory: Path) -> int:
    """Both faults; the exit status."""
    directory.mkdir(parents=True, exist_ok=True)
    corpus = Corpus.from_text(read_text())
    stories = {}
    pause = 0.1 if sys.stderr.isatty() else 10.0  # seconds between lines; a log file needs few
    with tqdm(total=steps * len(CLIP | NAN), unit="step", mininterval=pause) as bar:
        for name, options in (CLIP | NAN).items():
            bar.set_description(name)
            stories[name] = train(corpus, steps, bar, **options)
    verdicts = tell_clip({name: stories[name] for name in CLIP}, directory / "clip.png")
    verdicts |= tell_nan({name: stories[name] for name in NAN}, directory / "nan.png")
    print(f"{directory}: clip.png, nan.png")
    wrong = [f"{name}: {verdicts[name]}, not {verdict}" for name, verdict in EXPECTED.items() if verdicts[name] != verdict]
    if wrong:
        print("not as expected: " + "; ".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    torch.set_num_threads(1)  # as examples.train, so that the bits do not depend on the number of cores
    enough = number(int, lambda n: n >= 6, "an integer of at least 6")
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m examples.faults", description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("--steps", type=enough, default=STEPS, help=f"of each of the six runs; default: {STEPS}")
    parser.add_argument("--out", type=Path, default=RUNS / "faults", help="directory of the pictures; default: runs/faults")
    try:
        args = parser.parse_args(argv)
        return run(args.steps, args.out)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
