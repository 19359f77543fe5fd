# SPDX-License-Identifier: Apache-2.0
"""Train a tiny hybrid language model on real text with Muon, or compare Muon with AdamW.

A run leaves its metrics, its routing, its pictures and a checkpoint in runs/NAME. Ctrl-C stops it after the step at hand.
"""

import argparse
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from examples import compare, plots
from examples.data import InputError
from examples.parallel import KINDS, Ranks
from examples.run import LR, TOKENS, Run

RUNS = Path("runs")
STEPS = 500
SAVE_EVERY = 100  # steps


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse's own prints the usage too
        raise InputError(message)


def number(kind: type, accept: Callable[[Any], bool], description: str) -> Callable[[str], Any]:
    """An argparse type: a number that `accept` accepts."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # which no comparison accepts
        if not accept(value):
            raise argparse.ArgumentTypeError(f"{text} is not {description}")
        return value

    return parse


def parse(argv: list[str] | None) -> argparse.Namespace:
    integer, positive, rate = (
        number(int, lambda n: 0 <= n < 2**63, "an integer from 0 to 2^63 - 1"),
        number(int, lambda n: n >= 1, "a positive integer"),
        number(float, lambda x: 0 < x < math.inf, "a positive number"),
    )
    p = Parser(prog="python -m examples.train", description=__doc__, allow_abbrev=False)
    p.add_argument("--optimizer", choices=tuple(LR), default="muon", help="default: muon")
    p.add_argument("--compare", action="store_true", help="both optimizers at three learning rates each")
    p.add_argument("--steps", type=positive, help=f"default: {STEPS}, or {compare.STEPS} for each run of --compare")
    p.add_argument("--seed", type=integer, default=0, help="of initial weights and batches; default: 0")
    p.add_argument("--lr", type=rate, help=f"default: {LR['muon']} for muon, {LR['adamw']} for adamw")
    p.add_argument("--device", default="cpu", help="default: cpu")
    p.add_argument("--data", metavar="FILE", help="UTF-8 text; default: the help topics that come with Python")
    p.add_argument("--name", help="the run goes to runs/NAME, in place of an earlier one; default: the optimizer's")
    p.add_argument("--parallel", choices=KINDS, help="on the processes that torchrun starts; keeps no checkpoints")
    p.add_argument("--resume", metavar="RUN", help="go on with a stopped run, a name or a directory, as it was begun")
    args = p.parse_args(argv)
    changed = {option for option, value in vars(args).items() if value != p.get_default(option)}
    for option, others in (("resume", changed - {"resume"}), ("compare", changed & {"optimizer", "lr", "parallel"})):
        if option in changed and others:
            raise InputError(f"--{option} cannot be combined with " + ", ".join(f"--{o}" for o in sorted(others)))
    return args


def make_directory(name: str) -> Path:
    if name == ".." or Path(name).name != name:
        raise InputError(f"--name {name}: not a plain name")
    (RUNS / name).mkdir(parents=True, exist_ok=True)
    return RUNS / name


@contextmanager
def ctrl_c_noted() -> Iterator[list[int]]:
    """A list that the first Ctrl-C makes true, since half a step cannot be resumed; a second one interrupts at once."""
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def train(run: Run, directory: Path) -> None:
    """Step until the run is finished or Ctrl-C is pressed, with checkpoints in `directory`, one of them at the end."""
    done, total = len(run.metrics) * TOKENS, run.steps * TOKENS
    val_loss = ""
    pause = 0.1 if sys.stderr.isatty() else 10.0  # seconds between lines; a log file needs few
    style = {"unit": "tok", "unit_scale": True, "mininterval": pause}
    first = len(run.metrics) + 1
    quiet = run.ranks is not None and run.ranks.rank > 0
    with ctrl_c_noted() as stop, tqdm(initial=done, total=total, disable=quiet, **style) as bar:
        while not (run.finished or stop):
            row = run.advance()
            if row["val_loss"] is not None:
                val_loss = f", val {row['val_loss']:.3f}"
            bar.set_postfix_str(f"loss {row['train_loss']:.3f}{val_loss}", refresh=False)
            bar.set_description_str(f"step {row['step']}/{run.steps}", refresh=row["step"] == first)
            bar.update(TOKENS)
            if row["step"] % SAVE_EVERY == 0 and not quiet:
                run.save(directory)
        if not quiet:
            run.save(directory)


def present(run: Run, directory: Path) -> None:
    """Leave the routing and the pictures of a finished run, and say how it went and where they are."""
    (directory / "routing.txt").write_text(run.routing + "\n")
    plots.loss(run, directory / "loss.png")
    pictures = "loss.png"
    if run.options["optimizer"] == "muon" and run.ranks is None:
        plots.singular_values(run, directory / "singular_values.png")
        pictures += ", singular_values.png"
    last = run.metrics[-1]
    print(f"validation loss  {last['val_loss']:.4f} nats per character, {last['step']} steps, {last['seconds']:.0f} s")
    print(f"unigram entropy  {run.unigram_entropy:.4f} nats per character: the best loss without context")
    print(f"{directory}: {pictures}")


def command(args: argparse.Namespace) -> int:
    """Do what the command line asks for; the exit status."""
    shared = {"seed": args.seed, "device": args.device, "data": args.data}
    if args.compare:
        directory = make_directory(args.name or "compare")
        print(compare.compare(directory, steps=args.steps or compare.STEPS, **shared))
        print(f"{directory}: comparison.png, table.txt")
        return 0
    if args.resume is not None:
        directory = Path(args.resume) if Path(args.resume).is_dir() else RUNS / args.resume
        run = Run.load(directory)
    else:
        lr = args.lr or LR[args.optimizer]
        ranks = Ranks(args.parallel, args.device) if args.parallel else None
        run = Run(optimizer=args.optimizer, lr=lr, steps=args.steps or STEPS, **shared, ranks=ranks)
        directory = make_directory(args.name or args.optimizer)
    train(run, directory)
    if run.ranks is not None:
        run.ranks.part()
        if run.ranks.rank:
            return 0
    if not run.finished:
        print(f"stopped after step {len(run.metrics)} of {run.steps}; go on with")
        print(f"python -m examples.train --resume {directory}")
        return 130
    present(run, directory)
    return 0


def main(argv: list[str] | None = None) -> int:
    # A second thread gains little on matrices this small and costs much on a busy machine; and with one, the bits of a
    # run do not depend on the number of cores.
    torch.set_num_threads(1)
    try:
        return command(parse(argv))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once: --resume goes on from a run's last checkpoint, --compare starts over", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
