# SPDX-License-Identifier: Apache-2.0
"""The specification against everything that claims to follow it."""

import doctest
import re
from pathlib import Path

import pytest

from conformance import accept
from conformance.conftest import CLAUSES, HERE

pytestmark = pytest.mark.suite
SPEC = HERE.parent / "SPEC.md"


def cited(folder: Path, pattern: str) -> set[str]:
    text = "\n".join(path.read_text() for path in folder.glob(pattern))
    return set(re.findall(r"\b([A-Z]+-\d+)\b", text))


def test_examples_run():
    result = doctest.testfile(str(SPEC), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted >= 8
    assert result.failed == 0


def test_ids_are_unique_and_numbered_without_holes():
    ids = re.findall(r"^- \*\*([A-Z]+)-(\d+)\*\*", SPEC.read_text(), re.M)
    for section in dict(ids):
        assert [int(n) for s, n in ids if s == section] == list(range(1, sum(s == section for s, _ in ids) + 1))
    assert len(ids) == len(CLAUSES)


def test_every_clause_names_predicates_that_exist():
    for id, text in CLAUSES.items():
        names = re.findall(r"`accept\.(\w+)`", text.partition("Accept:")[2])
        assert names, f"{id} names no predicate"
        assert all(callable(getattr(accept, name, None)) for name in names), f"{id} names {names}"


def test_every_clause_has_a_test():
    tests = "\n".join(path.read_text() for path in HERE.glob("test_*.py"))
    marked = {id for marks in re.findall(r"mark\.clause\(([^)]*)\)", tests) for id in re.findall(r"[A-Z]+-\d+", marks)}
    assert marked == set(CLAUSES)


def test_reference_cites_only_clauses_that_exist():
    found = cited(HERE.parent / "reference", "*.py") & {
        id for id in cited(HERE.parent / "reference", "*.py") if id[-1].isdigit()
    }
    sections = {id.partition("-")[0] for id in CLAUSES}
    unknown = {id for id in found if id.partition("-")[0] in sections} - set(CLAUSES)
    assert not unknown
    assert {"ORTH-1", "MOM-1", "SCALE-1", "DECAY-1", "LAYOUT-1", "STEP-8"} <= found


def test_tests_hold_no_tolerance():
    for path in HERE.glob("test_*.py"):
        found = re.findall(r"\b(?:atol|rtol|allclose|assert_close|approx)\b", path.read_text())
        assert not found or path == Path(__file__), f"{path.name} holds {found}"
