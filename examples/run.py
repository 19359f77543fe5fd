# SPDX-License-Identifier: Apache-2.0
"""One training run, a step at a time: model, optimizer, schedule, sampler, and the checkpoint that holds them all."""

import csv
import math
import os
import pickle
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from examples.data import CONTEXT, Corpus, InputError, draw, in_order, read_text, unigram_entropy
from examples.model import HybridLM
from examples.parallel import Ranks
from impl import Layout, Muon, param_groups
from impl.layout import cut, matrices

SEQUENCES = 32  # in a batch
TOKENS = SEQUENCES * CONTEXT  # in a step
EVALUATE_EVERY = 50  # steps
BALANCE = 0.01  # weight of the load-balancing loss
WEIGHT_DECAY = 0.1
LR = {"muon": 0.03, "adamw": 0.012}  # each optimizer's best at 300 steps, to a factor of 2
COLUMNS = ("step", "seconds", "train_loss", "val_loss", "lr")
PARTS = ("model", "optimizer", "scheduler")


def make_optimizer(name: str, model: nn.Module, lr: float, ranks: Ranks | None = None) -> torch.optim.Optimizer:
    """Muon, routed by the model's own declarations; or AdamW, with the same decay, for every parameter."""
    replicas = None if ranks is None else dist.group.WORLD
    if name == "muon":
        groups = param_groups(model, head="lm_head.weight")
        # The ratio of the two learning rates that are best here gives AdamW's share of the parameters AdamW's own best.
        options = {"lr": lr, "weight_decay": WEIGHT_DECAY, "adamw_lr_ratio": LR["adamw"] / LR["muon"]}
        return Muon(groups, **options, replicas=replicas)
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)


def pieces(group: Mapping[str, Any], T: Tensor) -> list[tuple[str, Tensor]]:
    """What Muon steps separately in a tensor of a parameter's shape: each matrix and each AdamW section, with its algorithm."""
    if group["algorithm"] == "adamw":
        return [("adamw", T)]
    return [(section.algorithm, W) for section, view in cut(Layout.of(group["layout"]), T) for W in matrices(section, view)]


def warmup_then_linear(step: int, steps: int) -> float:
    """The factor on the learning rate at `step`, from 0: up during a twentieth of the steps, then straight to zero."""
    warmup = math.ceil(steps / 20)
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


def check_device(name: str) -> None:
    """Refuse a device to which no number can be brought and back."""
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError):
        raise InputError(f"--device {name}: no device that PyTorch can use here; try cpu") from None


class Run:
    """So many steps of one optimizer on one text.

    `metrics` has a row of COLUMNS for each step taken: seconds of training until then, evaluation not counted; losses
    in nats per character, `val_loss` where it was measured and else None; the learning rate of the step.
    """

    def __init__(
        self, *, optimizer: str, lr: float, steps: int, seed: int, device: str, data: str | None, ranks: Ranks | None = None
    ) -> None:
        self.steps, self.device = steps, device
        self.options = {"optimizer": optimizer, "lr": lr, "steps": steps, "seed": seed, "device": device, "data": data}
        check_device(device)
        self.corpus = Corpus.from_text(read_text(data))
        self.unigram_entropy = unigram_entropy(self.corpus.validation)
        torch.manual_seed(seed)
        self.model = HybridLM(len(self.corpus.alphabet)).to(device)
        self.ranks, self.called = ranks, self.model if ranks is None else ranks.divide(self.model)
        self.optimizer = make_optimizer(optimizer, self.model, lr, ranks)
        # Now, because the report shows learning rates and the schedule is about to change them.
        self.routing = self.optimizer.report() if optimizer == "muon" else "AdamW steps every parameter."
        self.scheduler = LambdaLR(self.optimizer, partial(warmup_then_linear, steps=steps))
        self.sampler = torch.Generator().manual_seed(seed)
        self.metrics: list[dict[str, Any]] = []

    @property
    def finished(self) -> bool:
        return len(self.metrics) == self.steps

    def advance(self) -> dict[str, Any]:
        """Take one step, evaluate if that is due, and return the new row of `metrics`."""
        step = len(self.metrics) + 1
        began = time.perf_counter()
        (lr,) = set(self.scheduler.get_last_lr())
        loss = self.step()
        seconds = time.perf_counter() - began + (self.metrics[-1]["seconds"] if self.metrics else 0.0)
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss} at step {step}; try an --lr below {self.options['lr']:g}")
        if (skipped := self.skipped()) > step / 2:
            raise InputError(f"{skipped} of {step} steps came to nothing finite; try an --lr below {self.options['lr']:g}")
        due = step % EVALUATE_EVERY == 0 or step == self.steps
        row = dict(zip(COLUMNS, (step, seconds, loss, self.evaluate() if due else None, lr), strict=True))
        self.metrics.append(row)
        return row

    def step(self) -> float:
        """One step of everything; the batch's loss before it."""
        inputs, targets = (t.to(self.device) for t in draw(self.corpus.train, SEQUENCES, self.sampler))
        if self.ranks is not None:
            inputs, targets = self.ranks.share(inputs), self.ranks.share(targets)
        logits, balance = self.called(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        (loss + BALANCE * balance).backward()
        self.optimizer.step()
        self.scheduler.step()
        loss = loss if self.ranks is None else self.ranks.mean(loss)
        return loss.item()  # waits for the device, which keeps the caller's clock honest

    def skipped(self) -> int:
        """How many steps Muon has skipped."""
        return sum(int(count) for count in self.optimizer.skipped.values()) if isinstance(self.optimizer, Muon) else 0

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss on the validation text."""
        total, count = 0.0, 0
        for inputs, targets in zip(*(t.split(4 * SEQUENCES) for t in in_order(self.corpus.validation)), strict=True):
            logits, _ = self.called(inputs.to(self.device))
            losses = F.cross_entropy(logits.flatten(0, 1), targets.to(self.device).flatten(), reduction="sum")
            total, count = total + losses.item(), count + targets.numel()
        return total / count

    def save(self, directory: Path) -> None:
        """Write `metrics.csv` and, with one process, `checkpoint.pt`, which appears whole or not at all if the process dies."""
        if self.ranks is None:
            self._save_checkpoint(directory)
        with open(directory / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.metrics)

    def _save_checkpoint(self, directory: Path) -> None:
        state = {part: getattr(self, part).state_dict() for part in PARTS}
        state |= {"sampler": self.sampler.get_state(), "metrics": self.metrics}
        state |= {"options": self.options, "digest": self.corpus.digest}
        torch.save(state, directory / "checkpoint.tmp")
        os.replace(directory / "checkpoint.tmp", directory / "checkpoint.pt")

    @classmethod
    def load(cls, directory: Path) -> "Run":
        """The run that `save` wrote, which goes on exactly as if it had never stopped."""
        path = directory / "checkpoint.pt"
        if not path.is_file():
            raise InputError(f"--resume {directory}: there is no checkpoint.pt in it")
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            run = cls(**state["options"])
            if state["digest"] != run.corpus.digest:
                raise InputError(f"--resume {directory}: the text has changed since the run began")
            for part in PARTS:
                getattr(run, part).load_state_dict(state[part])
            run.sampler.set_state(state["sampler"])
            run.metrics = state["metrics"]
        except InputError:
            raise
        except (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, TypeError, ValueError):
            raise InputError(f"--resume {directory}: checkpoint.pt is damaged, or of another version of this") from None
        return run
