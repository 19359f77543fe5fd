# SPDX-License-Identifier: Apache-2.0
"""The list of wrong optimizers holds what it promises, and some of them, others in every run, are killed."""

import ast
import os
import random
import re
from collections import Counter

import pytest

from conformance.conftest import CLAUSES
from tests.mutants import SEEDS, every, kill, run
from tests.mutants.__main__ import page

MUTANTS = every()
# Other ones in every run, but the same ones in all of a run's processes.
SAMPLE = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID")).sample(MUTANTS, min(3, len(MUTANTS)))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_one_edit_that_python_accepts(mutant):
    assert mutant.path.startswith("impl/") and mutant.old != mutant.new
    ast.parse(mutant.mutated)
    assert mutant.source and mutant.seed in ("", *SEEDS)
    assert mutant.clauses and len(set(mutant.clauses)) == len(mutant.clauses)


def test_every_clause_has_a_mutant_that_breaks_it():
    assert {clause for mutant in MUTANTS for clause in mutant.clauses} == set(CLAUSES)


def test_there_are_enough_of_every_kind():
    seeds = Counter(mutant.seed for mutant in MUTANTS)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 50
    assert sum(len(mutant.clauses) > 1 for mutant in MUTANTS) >= 45
    assert all(seeds[seed] >= 4 for seed in SEEDS), seeds


@pytest.mark.parametrize("mutant", SAMPLE, ids=lambda mutant: mutant.name)
def test_a_random_mutant_is_killed(mutant, tmp_path):
    assert kill(mutant, tmp_path) == set(mutant.clauses)


def test_a_failure_names_its_clause_and_shows_a_shrunken_case(tmp_path):
    mutant = next(mutant for mutant in MUTANTS if "SCALE-1" in mutant.clauses)
    told = run(mutant, tmp_path)
    assert f"SCALE-1 {CLAUSES['SCALE-1']}" in told and re.search("Falsifying example|Failing test case", told)


def test_page_shows_who_is_alive():
    first, second = MUTANTS[:2]
    text = page({first: set(first.clauses), second: set()})
    assert "1 of 2 wrong optimizers are noticed" in text
    assert text.count('class="killed"') == len(first.clauses) and text.count('class="alive"') == len(second.clauses)
