# SPDX-License-Identifier: Apache-2.0
"""The suite's own options, as someone meets them who points it at another implementation."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from conformance import conftest

ROOT = Path(__file__).parent.parent
HELD = "test_scale.py::test_decay_is_decoupled_and_first"


class Item:
    """What the suite looks at of a test."""

    nodeid, path, user_properties = f"conformance/{HELD}", conftest.HERE / "test_scale.py", ()

    def __init__(self) -> None:
        self.marks: list[pytest.MarkDecorator] = []
        self.add_marker = self.marks.append

    def iter_markers(self, name: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(args=("DECAY-1",))]


def collected(**options: object) -> list[Item]:
    """One test, after collection with these options."""
    items = [Item()]
    items[0].user_properties = []
    known = {f"--{name}": value for name, value in options.items()}
    config = SimpleNamespace(getoption=known.get, args=[], stash={conftest.TARGET: SimpleNamespace(name="no_such")})
    conftest.pytest_collection_modifyitems(config, items)
    return items


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("test_scale.py::test_that_was_renamed  # SCALE-1: as ever", "test_that_was_renamed matches no test"),
        (HELD, f"{HELD} is a known failure without a reason"),
        (None, "--xfails: .*known.txt"),
    ],
    ids=["no test", "no reason", "no file"],
)
def test_a_list_of_known_failures_is_of_this_suite(tmp_path, line, message):
    if line is not None:
        (tmp_path / "known.txt").write_text(line)
    with pytest.raises(pytest.UsageError, match=message):
        collected(xfails=str(tmp_path / "known.txt"))


def test_clauses_that_are_not_there_are_named():
    with pytest.raises(pytest.UsageError, match=r"--clauses: SPEC.md does not have \['SCALE-99'\]"):
        collected(clauses="DECAY-1,SCALE-99")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("conformance.targets.no_such:Target", "No module"),
        ("conformance.targets.impl:None_such", "no attribute"),
        ("impl", "no attribute ''"),
        (":Target", "Empty module name"),
    ],
)
def test_a_target_that_is_not_there_is_named(target, message):
    stash, options = {}, {"--target": target}
    config = SimpleNamespace(getoption=options.get, stash=stash, addinivalue_line=lambda *line: None)
    with pytest.raises(pytest.UsageError, match=f"--target={target}: .*{message}.*; expected the package.module:Name of"):
        conftest.pytest_configure(config)


def test_a_known_failure_must_fail_unless_it_is_said_to_come_and_go(tmp_path):
    """A mended defect turns its line red; one at times is a failure either way, one in some versions where it fails."""
    known = tmp_path / "known.txt"
    command = [sys.executable, "-m", "pytest", "conformance/test_scale.py", "-q", "-p", "no:cacheprovider", f"--xfails={known}"]
    said = [("decay", 1, "XPASS(strict)"), ("at times decay", 0, "DECAY    xfailed      DECAY-1")]
    for words, code, told in (*said, ("in some versions decay", 0, "DECAY    passed       DECAY-1")):
        known.write_text(f"{HELD}  # DECAY-1: {words} is scaled")
        run = subprocess.run([*command, "--clauses=DECAY-1"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (run.returncode, told in run.stdout) == (code, True), run.stdout
