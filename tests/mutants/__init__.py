# SPDX-License-Identifier: Apache-2.0
"""Wrong optimizers, each one edit away from ours, and the clauses that must notice.   `python -m tests.mutants`

Most are bugs that somebody's Muon has had, or a first fix that was wrong; `source` says where. The suite that lets one pass is
wrong itself. tests/test_mutants.py holds the list to what it promises, and kills a few in every run.
"""

import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NEEDED = ("impl", "reference", "conformance", "conftest.py", "pyproject.toml", "SPEC.md")
# The five reports with which this began; see README.md.
SEEDS = ("clipping", "scale", "nonfinite", "experts", "fused")


@dataclass(frozen=True)
class Mutant:
    """`path` of impl with `new` for `old`, which is in it once; the tests of every one of `clauses` must then fail."""

    name: str
    path: str
    old: str
    new: str
    source: str  # a public report or a project, with what was wrong there; "ours" for what only we can get wrong
    clauses: tuple[str, ...]
    seed: str = ""

    @property
    def mutated(self) -> str:
        """The source text of the wrong file; ValueError unless `old` is there exactly once."""
        text = (ROOT / self.path).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.path} has {text.count(self.old)} times what is to be replaced: {self.old!r}")
        return text.replace(self.old, self.new)


def run(mutant: Mutant, folder: Path, profile: str = "suite") -> str:
    """What pytest says of the mutant, in a copy of the repository; RuntimeError unless it ran to its end."""
    for name in NEEDED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / mutant.path).write_text(mutant.mutated, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "conformance", "-q", "-p", "no:cacheprovider"]
    command += [f"--clauses={','.join(mutant.clauses)}", f"--hypothesis-profile={profile}"]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if process.returncode not in (0, 1):
        raise RuntimeError(f"{mutant.name}: {' '.join(command)} ended with {process.returncode}\n{process.stdout[-4000:]}")
    return process.stdout


def kill(mutant: Mutant, folder: Path) -> set[str]:
    """The clauses, of those that should, which fail for the mutant."""
    failed = re.findall(r"^[A-Z]+ +failed +(.*)$", run(mutant, folder, "unshrunk"), re.M)
    return {clause for line in failed for clause in line.split()} & set(mutant.clauses)


def every() -> list[Mutant]:
    """All mutants, module by module."""
    modules = (importlib.import_module(f"{__name__}.{each.name}") for each in pkgutil.iter_modules(__path__))
    return [mutant for module in modules for mutant in getattr(module, "MUTANTS", ())]
