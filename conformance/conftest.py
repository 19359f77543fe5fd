# SPDX-License-Identifier: Apache-2.0
"""The suite's machinery: which target, which clauses a test speaks for, which failures are known, what held."""

import functools
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, reject, settings
from hypothesis.errors import Unsatisfiable

from conformance.target import Target, Unsupported, load

HERE = Path(__file__).parent
CLAUSES = dict(re.findall(r"^- \*\*([A-Z]+-\d+)\*\* (\((?:MUST|SHOULD)\) .*)$", (HERE.parent / "SPEC.md").read_text(), re.M))

KNOWN = """known failures, 'test id  # CLAUSE: reason' a line, which must fail; or may, if the reason has 'at times' in it, and
count as failures then, or 'in some versions', and count as what they are [conformance/xfails/NAME.txt]"""

TARGET = pytest.StashKey[Target]()
# Outcomes of the tests of every clause, and what a clause counts as: the first of ORDER that any of its tests had.
OUTCOMES: dict[str, set[str]] = defaultdict(set)
ORDER = ("failed", "xfailed", "passed", "unsupported", "skipped")

# Reproducible by default, so that a list of known failures does not flicker; but Hypothesis also draws numbers that it finds
# in sources, so that these change its examples. --hypothesis-profile=deep explores, and "unshrunk" asks only whether any fails.
settings.register_profile(
    "suite",
    derandomize=True,
    max_examples=20,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,  # one that is Unsupported is no group of errors
)
settings.register_profile("unshrunk", settings.get_profile("suite"), phases=[Phase.explicit, Phase.generate])
settings.register_profile("deep", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--target", default="conformance.targets.impl:Target", help="package.module:Name of an adapter")
    parser.addoption("--clauses", metavar="IDS", help="only the tests of these clauses of SPEC.md, as in ORTH-3,STEP-10")
    parser.addoption("--xfails", help=KNOWN)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "clause(id, ...): the clauses of SPEC.md that a test holds the target to")
    config.addinivalue_line("markers", "dist: a test on several ranks")
    config.addinivalue_line("markers", "suite: a test of the suite itself, not of a target")
    try:
        config.stash[TARGET] = load(str(config.getoption("--target")))
    except (ImportError, AttributeError, ValueError) as error:
        path = config.getoption("--target")
        raise pytest.UsageError(f"--target={path}: {error}; expected the package.module:Name of an adapter") from error


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> Target:
    return request.config.stash[TARGET]


@pytest.fixture
def validating(target: Target) -> Target:
    """The target, for tests of what it refuses."""
    if not target.validates:
        raise Unsupported("it does not check its arguments")
    return target


@pytest.fixture
def skipping(target: Target) -> Target:
    """The target, for tests of steps that are not taken."""
    if not target.skips:
        raise Unsupported("it cannot skip a step")
    return target


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if item.path.is_relative_to(HERE)]
    for item in mine:
        clauses = [id for mark in item.iter_markers("clause") for id in mark.args]
        if unknown := set(clauses) - CLAUSES.keys():
            raise pytest.UsageError(f"{item.nodeid} cites {sorted(unknown)}, which SPEC.md does not have")
        if not clauses and not item.get_closest_marker("suite"):
            raise pytest.UsageError(f"{item.nodeid} cites no clause of SPEC.md")
        item.user_properties.append(("clauses", " ".join(clauses)))
    _mark_known_failures(config, mine)
    if asked := config.getoption("--clauses"):
        if unknown := set(asked.split(",")) - CLAUSES.keys():
            raise pytest.UsageError(f"--clauses: SPEC.md does not have {sorted(unknown)}")
        kept = [item for item in items if set(asked.split(",")) & set(_clauses(item))]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def _mark_known_failures(config: pytest.Config, items: list[pytest.Item]) -> None:
    given = config.getoption("--xfails")
    path = Path(given or HERE / "xfails" / f"{config.stash[TARGET].name}.txt")
    if not path.exists() and not given:
        return
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise pytest.UsageError(f"--xfails: {error}") from error
    # A part of a file may have been asked for; a line about the rest is not wrong then.
    whole = {item.path.name for item in items if not any("::" in arg for arg in config.args)}
    for line in lines:
        name, _, reason = (part.strip() for part in line.partition("#"))
        if name and not reason:
            raise pytest.UsageError(f"{path}: {name} is a known failure without a reason")
        matching = [item for item in items if item.nodeid.rpartition("conformance/")[2] == name]
        if name.partition("::")[0] in whole and not matching:
            raise pytest.UsageError(f"{path}: {name} matches no test")
        for item in matching:
            may = "at times" in reason or "in some versions" in reason
            item.add_marker(pytest.mark.xfail(reason=reason, strict=not may))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Of Hypothesis' examples those count that are supported; a test is unsupported if none of the first ones is."""
    handle = getattr(getattr(item, "obj", None), "hypothesis", None)
    if handle is None:
        return (yield)
    test, refusals, counted = handle.inner_test, [], []

    @functools.wraps(test)
    def of_what_it_offers(*args: Any, **options: Any) -> None:
        try:
            test(*args, **options)
        except Unsupported as error:
            refusals.append(error)
            if not counted and len(refusals) == 40:
                pytest.skip("none is supported")  # which Hypothesis takes for the end
            reject()
        except Exception:
            counted.append(False)
            raise
        counted.append(True)

    handle.inner_test = of_what_it_offers
    try:
        return (yield)
    except (Unsatisfiable, pytest.skip.Exception):
        if counted or not refusals:
            raise
        raise refusals[0] from None
    finally:
        handle.inner_test = test


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if call.excinfo is not None and call.excinfo.errisinstance(Unsupported):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"unsupported: {call.excinfo.value}")
        report.user_properties.append(("unsupported", ""))
    elif report.failed and (ids := _clauses(report)):
        report.sections.insert(0, ("the clause", "\n".join(f"{id} {CLAUSES[id]}" for id in ids)))
    return report


def _clauses(test: pytest.Item | pytest.TestReport) -> list[str]:
    return next((str(value).split() for key, value in test.user_properties if key == "clauses"), [])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    known = getattr(report, "wasxfail", None)
    outcome = report.outcome if known is None or (report.passed and "in some versions" in known) else "xfailed"
    if ("unsupported", "") in report.user_properties:
        outcome = "unsupported"
    for clause in _clauses(report):
        OUTCOMES[clause].add(outcome)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not OUTCOMES:
        return
    verdict = {id: next((o for o in ORDER if o in OUTCOMES[id]), "not run") for id in CLAUSES}
    write = terminalreporter.write_line
    terminalreporter.section(f"clauses of SPEC.md held to {config.stash[TARGET].name}")
    if missing := [id for id, outcome in verdict.items() if outcome == "not run"]:
        write("not run: " + " ".join(missing), yellow=True)
    for section in dict.fromkeys(id.partition("-")[0] for id in CLAUSES):
        rows = [(id, o) for id, o in verdict.items() if id.startswith(section + "-")]
        for outcome in (*ORDER, "not run"):
            ids = [id for id, o in rows if o == outcome]
            if ids:
                write(f"{section:8} {outcome:12} {' '.join(ids)}", red=outcome == "failed", green=outcome == "passed")
    count = {o: sum(v == o for v in verdict.values()) for o in (*ORDER, "not run")}
    write(", ".join(f"{n} {o}" for o, n in count.items() if n))
