# SPDX-License-Identifier: Apache-2.0
"""That the runner of torch's own cases counts right, on a file of the same form with cases of our own."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

torch_suite = pytest.importorskip("tests.torch_suite", reason="torch's own tests need expecttest")
ROOT = Path(__file__).parent.parent
FORM = """
from optim.test_lrscheduler import TestLRScheduler
from torch.testing._internal.common_device_type import instantiate_device_type_tests, onlyCUDA
from torch.testing._internal.common_optimizers import optim_db, optims
from torch.testing._internal.common_utils import TestCase, parametrize


class TestOptimRenewed(TestCase):
    @parametrize("i", range({passing}))
    @optims(optim_db)
    def test_passing(self, device, dtype, optim_info, i):
        self.assertEqual((optim_info.name, optim_info.optim_cls.__module__), ("Muon", "impl.muon"))

    @onlyCUDA
    @optims(optim_db)
    def test_elsewhere(self, device, dtype, optim_info):
        pass

    def test_of_nothing_of_ours(self, device):
        self.fail("it should not run")
{more}

instantiate_device_type_tests(TestOptimRenewed, globals(), only_for="cpu")
"""
CASE = """
    @optims(optim_db)
    def {name}(self, device, dtype, optim_info):
        {body}
"""
FAILS = CASE.format(name="test_failing", body="self.fail()")
DIFFERS, CHANGED, AGREES = (
    CASE.format(name="test_errors", body=body)
    for body in ('raise ValueError("group 0 holds a parameter twice")', 'raise ValueError("group 0")', "pass")
)
ENOUGH = torch_suite.LEAST


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Callable[[int, str], Path]]:
    """Writes a test_optim.py; what running it here changes is undone."""

    def form(passing: int, more: str) -> Path:
        path = tmp_path / "test_optim.py"
        path.write_text(FORM.format(passing=passing, more=more), encoding="utf-8")
        return path

    before = torch_suite.optim_db[:]
    yield form
    torch_suite.optim_db[:] = before
    for module in [name for name in sys.modules if name.partition(".")[0] in ("optim", "torch_test_optim")]:
        del sys.modules[module]


@pytest.mark.parametrize(
    ("passing", "more", "status", "lines"),
    [
        (ENOUGH, "", 0, [f"{ENOUGH} ran: {ENOUGH} passed, 0 failed, 0 differ as expected; 1 skipped"]),
        (ENOUGH - 1, "", 1, [f"{ENOUGH - 1} ran: {ENOUGH - 1} passed, 0 failed", "too few"]),
        (ENOUGH, FAILS, 1, [f"{ENOUGH + 1} ran: {ENOUGH} passed, 1 failed", "failed: test_failing_Muon_cpu_float32"]),
        (
            ENOUGH - 1,
            DIFFERS,
            0,
            [f"{ENOUGH} ran: {ENOUGH - 1} passed, 0 failed, 1 differ", "differ as expected: test_errors_Muon"],
        ),
        (
            ENOUGH,
            CHANGED,
            1,
            [f"{ENOUGH + 1} ran: {ENOUGH} passed, 1 failed, 0 differ", "failed: test_errors_Muon_cpu_float32"],
        ),
        (ENOUGH, AGREES, 1, [f"{ENOUGH + 1} ran: {ENOUGH} passed, 1 failed, 0 differ", "float32 passed, contrary"]),
    ],
    ids=["enough", "too few", "one fails", "one differs as expected", "one differs otherwise", "one no longer differs"],
)
def test_status_and_counts(passing, more, status, lines, write, capsys):
    assert torch_suite.main(write(passing, more)) == status
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(lines)
    assert [expected for line, expected in zip(out, lines, strict=True) if expected not in line] == []


def test_as_a_command(write):
    command = [sys.executable, "-m", "tests.torch_suite", str(write(1, FAILS))]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1, process.stderr
    assert process.stdout.startswith("2 ran: 1 passed, 1 failed")
    assert "AssertionError" in process.stderr
