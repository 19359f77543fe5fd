# SPDX-License-Identifier: Apache-2.0
"""Text as characters: reading it, splitting it, drawing batches, and the loss that needs no context."""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Generator, Tensor

CONTEXT = 64  # characters that a prediction can look back on, at most


class InputError(ValueError):
    """A mistake at the command line; the message is the one line that is shown."""


def read_text(path: str | None = None) -> str:
    """The UTF-8 text in a file; without one, Python's own help topics: half a million characters, always there."""
    if path is None:
        return "\n".join(topics[name] for name in sorted(topics))
    if not Path(path).is_file():
        raise InputError(f"--data {path}: " + ("not a regular file" if Path(path).exists() else "no such file"))
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--data {path}: not UTF-8 text (byte {error.start})") from None
    if "\0" in text:
        raise InputError(f"--data {path}: a binary file, not text")
    return text


@dataclass(frozen=True)
class Corpus:
    """A text as int64 character ids, (characters,): its last tenth to validate, the rest to train on."""

    alphabet: str
    train: Tensor
    validation: Tensor
    digest: str  # SHA-256 of the text: a run that is resumed must read what it began with

    @classmethod
    def from_text(cls, text: str) -> "Corpus":
        alphabet = "".join(sorted(set(text)))
        ids = {character: i for i, character in enumerate(alphabet)}
        tokens = torch.tensor([ids[character] for character in text], dtype=torch.int64)
        held_out = len(tokens) // 10
        if held_out <= CONTEXT:
            raise InputError(f"the text has {len(text)} characters; at least {10 * (CONTEXT + 1)} are needed")
        return cls(alphabet, tokens[:-held_out], tokens[-held_out:], hashlib.sha256(text.encode()).hexdigest())


def draw(tokens: Tensor, sequences: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (sequences, CONTEXT) each, from uniformly drawn places; targets are one character ahead."""
    starts = torch.randint(len(tokens) - CONTEXT, (sequences, 1), generator=generator)
    windows = tokens[starts + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


def in_order(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (windows, CONTEXT) each: every character once, but for those short of a last window."""
    windows = tokens.unfold(0, CONTEXT + 1, CONTEXT)
    return windows[:, :-1], windows[:, 1:]


def unigram_entropy(tokens: Tensor) -> float:
    """Entropy of the characters' frequencies, in nats: the least loss of a prediction that ignores the context."""
    counts = Counter(tokens.tolist()).values()
    return -sum(n / len(tokens) * math.log(n / len(tokens)) for n in counts)
