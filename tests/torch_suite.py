# SPDX-License-Identifier: Apache-2.0
"""The cases that torch runs on each of its optimizers, run on impl.Muon, for those who have a checkout of torch.

    python -m tests.torch_suite PYTORCH/test/test_optim.py

The checkout should be of the torch that is installed. The exit status is 0 if at least LEAST cases ran and each came out
as it should, 1 if not.
"""

import copy
import importlib.util
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from torch.testing._internal.common_optimizers import optim_db

from impl import Muon

LEAST = 39
# Cases that ours is to fail: what is then raised, and why. To pass one of them, or to fail it otherwise, is a failure.
DIFFERENCES = {
    "test_errors_Muon_cpu_float32": (
        "holds a parameter twice",
        "torch's only warns of a parameter given twice; test_torch_database.py asks for the other errors of this case",
    ),
}


class Sibling(ModuleType):
    """Stands for a file beside test_optim.py, from which that only passes on test classes; here they have no tests."""

    __path__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Outcomes(unittest.TextTestResult):
    """Keeps the cases that passed as well."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.passed: list[unittest.TestCase] = []

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.passed.append(test)


def load(path: Path) -> ModuleType:
    """test_optim.py, with impl.Muon in place of every optimizer of torch's database and described as torch's Muon is."""
    ours = copy.copy(next(info for info in optim_db if info.optim_cls.__name__ == "Muon"))
    ours.optim_cls = Muon
    optim_db[:] = [ours]  # in place: the file takes the list itself, and its cases their names from the class
    for name in ("optim", "optim.test_lrscheduler", "optim.test_optim", "optim.test_swa_utils"):
        sys.modules[name] = Sibling(name)
    spec = importlib.util.spec_from_file_location("torch_test_optim", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def cases(module: ModuleType) -> Iterator[unittest.TestCase]:
    """TestOptimRenewed's cases for an optimizer of the database, on each device; others of its cases test nothing of ours."""
    for name, found in sorted(vars(module).items()):
        if name.startswith("TestOptimRenewed") and isinstance(found, type) and issubclass(found, unittest.TestCase):
            for case in unittest.defaultTestLoader.loadTestsFromTestCase(found):
                if "_Muon_" in case.id():
                    yield case


def outcomes(result: Outcomes) -> dict[str, list[str]]:
    """What to say of the cases that passed, failed, differ as expected, or were skipped."""
    found: dict[str, list[str]] = {"passed": [], "failed": [], "differ as expected": [], "skipped": []}
    for case in result.passed:
        if name(case) in DIFFERENCES:
            found["failed"].append(f"{name(case)} passed, contrary to its line in DIFFERENCES")
        else:
            found["passed"].append(name(case))
    for case, traceback in result.failures + result.errors:
        words, reason = DIFFERENCES.get(name(case), (None, ""))
        if words and words in traceback:
            found["differ as expected"].append(f"{name(case)}: {reason}")
        else:
            found["failed"].append(name(case))
    found["skipped"] = [name(case) for case, _ in result.skipped]
    return found


def name(case: unittest.TestCase) -> str:
    return case.id().rpartition(".")[2]


def main(path: Path) -> int:
    suite = unittest.TestSuite(cases(load(path)))
    found = outcomes(unittest.TextTestRunner(resultclass=Outcomes).run(suite))
    skipped = len(found.pop("skipped"))
    ran = sum(map(len, found.values()))
    report = [
        f"{ran} ran: " + ", ".join(f"{len(lines)} {outcome}" for outcome, lines in found.items()) + f"; {skipped} skipped"
    ]
    report += [f"{outcome}: {line}" for outcome in ("failed", "differ as expected") for line in found[outcome]]
    if ran < LEAST:
        report.append(f"too few: torch's file has at least {LEAST} cases for Muon")
    sys.stdout.write("\n".join(report) + "\n")
    return int(bool(found["failed"]) or ran < LEAST)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv.pop())))
