# SPDX-License-Identifier: Apache-2.0
"""The suite's own options, as someone meets them who points it at another implementation."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HELD = "test_scale.py::test_decay_is_decoupled_and_first"


def suite(*options):
    command = [sys.executable, "-m", "pytest", "conformance/test_scale.py", "-q", "-p", "no:cacheprovider", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return run.returncode, run.stdout + run.stderr


@pytest.fixture
def known(tmp_path):
    def write(text):
        path: Path = tmp_path / "known.txt"
        path.write_text(text)
        return f"--xfails={path}"

    return write


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("test_scale.py::test_that_was_renamed  # SCALE-1: as ever", "test_that_was_renamed matches no test"),
        (HELD, f"{HELD} is a known failure without a reason"),
    ],
    ids=["no test", "no reason"],
)
def test_a_list_of_known_failures_is_of_this_suite(known, line, message):
    code, told = suite("--collect-only", known(line))
    assert (code, message in told) == (4, True), told


def test_a_list_that_is_not_there(tmp_path):
    code, told = suite("--collect-only", f"--xfails={tmp_path / 'none.txt'}")
    assert (code, "none.txt" in told) == (4, True), told


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--target=conformance.targets.no_such:Target", "ERROR: --target=conformance.targets.no_such:Target: No module named"),
        ("--target=conformance.targets.impl:None_such", "ERROR: --target=conformance.targets.impl:None_such:"),
        ("--clauses=SCALE-1,SCALE-99", "--clauses: SPEC.md does not have ['SCALE-99']"),
    ],
    ids=["no module", "no class", "no clause"],
)
def test_what_is_not_there_is_named(option, message):
    code, told = suite("--collect-only", option)
    assert (code, message in told) == (4, True), told


def test_a_known_failure_must_fail_unless_it_does_so_at_times(known):
    """A mended defect turns its line red; one that comes and goes counts as a failure either way."""
    code, told = suite("--clauses=DECAY-1", known(f"{HELD}  # DECAY-1: decay is scaled"))
    assert code == 1 and "XPASS(strict)" in told, told
    code, told = suite("--clauses=DECAY-1", known(f"{HELD}  # DECAY-1: at times decay is scaled"))
    assert code == 0, told
    assert "DECAY    xfailed      DECAY-1" in told, told
