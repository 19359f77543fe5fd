# SPDX-License-Identifier: Apache-2.0
"""The scorecard of implementations: reading the suite's closing table, defects, drawing, and what is not installed."""

import json
import subprocess
import sys

import pytest

from conformance import scorecard
from conformance.conftest import CLAUSES

TABLE = """
....F [100%]
=========== clauses of SPEC.md held to some ===========
not run: ORTH-12
CLIP     xfailed      CLIP-1 CLIP-2
CLIP     unsupported  CLIP-3
ORTH     failed       ORTH-10
ORTH     passed       ORTH-1 ORTH-2
ORTH     not run      ORTH-12
SKIP     skipped      SKIP-7
1 failed, 2 xfailed, 2 passed, 1 unsupported, 1 skipped, 85 not run
FAILED conformance/test_orthogonalize.py::test_x - ORTH-3
"""
EXPECTED = {
    **dict.fromkeys(CLAUSES, "not run"),
    "CLIP-1": "failed",
    "CLIP-2": "failed",
    "CLIP-3": "not offered",
    "ORTH-10": "failed",
    "ORTH-1": "held",
    "ORTH-2": "held",
}


def some(**changed):
    return {
        "label": "some",
        "version": "1.2",
        "install": "pip install some",
        "clauses": EXPECTED,
        "defects": [],
        "green": True,
        **changed,
    }


def test_table_is_read():
    assert scorecard.parse(TABLE) == EXPECTED
    assert scorecard.parse("no table") == {}
    assert scorecard.counts(EXPECTED, "CLIP") == "0/2/8"
    assert scorecard.counts(EXPECTED) == f"2/3/{len(CLAUSES) - 5}"


def test_table_is_what_the_suite_prints():
    command = [sys.executable, "-m", "pytest", "conformance/test_spec.py", "conformance/test_scale.py", "-q"]
    command += ["-p", "no:cacheprovider", "--target=conformance.targets.torch_optim:Target"]
    run = subprocess.run(command, cwd=scorecard.HERE.parent, capture_output=True, text=True, check=False)
    found = scorecard.parse(run.stdout)
    assert found["SCALE-1"] == found["DECAY-1"] == "held", run.stdout
    assert found["SCALE-3"] == "not offered"
    assert found["ERR-1"] == "not run"


def test_defects_are_one_for_each_reason():
    found = scorecard.defects("torch_optim", {})
    assert len({each["defect"] for each in found}) == len(found)
    (eps,) = [each for each in found if each["defect"] == "ERR-1: eps is not checked"]
    assert eps["tests"] == 1
    assert eps["shown by"] == (
        'pytest "conformance/test_errors.py::test_constructor_refuses[eps=-1.0]"'
        " --target=conformance.targets.torch_optim:Target --xfails=/dev/null"
    )
    assert scorecard.defects("impl", {}) == []


def test_a_defect_of_some_versions_is_told_where_its_clause_failed():
    """KellerJordan's release cannot step a convolution; the repository, of the same number, can."""
    held = dict.fromkeys(CLAUSES, "held")
    told = [{each["defect"] for each in scorecard.defects("kellerjordan", held | more)} for more in ({}, {"SCALE-3": "failed"})]
    assert [defect.partition(": in some versions ")[0] for defect in told[1] - told[0]] == ["SCALE-3"]
    assert not any("in some versions" in defect for defect in told[0])


def test_every_target_has_its_adapter_and_every_adapter_is_a_target():
    adapters = {path.stem for path in (scorecard.HERE / "targets").glob("*.py")} - {"__init__"}
    assert adapters == set(scorecard.TARGETS)
    lists = {path.stem for path in (scorecard.HERE / "xfails").glob("*.txt")}
    assert lists <= adapters


def test_picture_and_table_of_what_was_found(tmp_path):
    pytest.importorskip("matplotlib")
    defect = {"defect": "ORTH-10: takes anything", "tests": 3, "shown by": "pytest here"}
    missing = some(label="other", clauses={}, problem="not installed")
    results = {"some": some(defects=[defect]), "other": missing, "third": some(label="third", green=False)}
    scorecard.draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    rows = list(scorecard.table(results))
    assert rows[1].split()[:3] == ["some", "1.2", scorecard.counts(EXPECTED)]
    assert rows[3] == "other: not installed; to install it: pip install some"
    assert rows[4].startswith("third 1.2: xfails/third.txt is of another version; ") and len(rows) == 5
    assert "\n## some 1.2\n\n`pip install some`\n\n- **ORTH-10** takes anything (3)<br>`pytest here`" in "\n".join(
        scorecard.page(results)
    )


def test_what_is_committed_is_of_this_suite():
    """A clause that is new, or withdrawn, asks for another run; README and the lists of known failures tell the same."""
    found = json.loads((scorecard.FOLDER / "scorecard.json").read_text())
    assert found.keys() == scorecard.TARGETS.keys()
    for name, each in found.items():
        assert set(each["clauses"]) == set(CLAUSES), name
        assert each["green"], f"{name}: its list of known failures was not exact"
        assert each["defects"] == scorecard.defects(name, each["clauses"]), name
        failed = {id for id, verdict in each["clauses"].items() if verdict == "failed"}
        assert {id for defect in each["defects"] for id in defect["defect"].partition(": ")[0].split(", ")} <= failed, name
    assert (scorecard.FOLDER / "defects.md").read_text() == "\n".join(scorecard.page(found)) + "\n"
    assert "failed" not in found["impl"]["clauses"].values()


def test_without_matplotlib_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="matplotlib"):
        scorecard.draw({"some": some()}, tmp_path / "picture.png")


def test_what_cannot_be_imported_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(scorecard.TARGETS, "no_such", ("no such", "no-such-distribution", "pip install no-such"))
    found = scorecard.measure("no_such")
    assert (found["problem"], found["version"], found["clauses"]) == ("not installed", "", {})
