# SPDX-License-Identifier: Apache-2.0
"""Where results are kept and what they say about the machine: the GPU, not the computer around it.

Results of a GPU lie in results/<its name>/, so that --benchmark-compare and --benchmark-compare-fail find those of the same
GPU; where there are none yet, a comparison warns and nothing else. `-k ours` leaves the others' times out of it.
Copies without git may say their commit in BENCHMARK_COMMIT.

On a GPU every run begins with nothing compiled, unless TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR say otherwise.
"""

import os
import platform
import subprocess
import tempfile
import warnings
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from benchmarks import peers

RESULTS = Path(__file__).parent / "results"
DEFAULT_STORAGE = "file://./.benchmarks"


def gpu_name(config: pytest.Config) -> str:
    return torch.cuda.get_device_name() if config.getoption("--gpu") and torch.cuda.is_available() else "cpu"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu"):
        with_nothing_compiled(config)
    option = config.option
    if option.benchmark_storage != DEFAULT_STORAGE:
        return
    folder = RESULTS / "-".join(gpu_name(config).lower().split())
    option.benchmark_storage = f"file://{folder}"
    if option.benchmark_compare_fail and not option.benchmark_compare:
        option.benchmark_compare = True
    if option.benchmark_compare and not list(folder.glob("[0-9]*.json")):
        with warnings.catch_warnings():
            warnings.simplefilter("always")  # pyproject.toml makes them errors
            warnings.warn(f"no results of {gpu_name(config)} to compare with yet", stacklevel=1)
        option.benchmark_compare, option.benchmark_compare_fail = [], None


def with_nothing_compiled(config: pytest.Config) -> None:
    for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        if variable not in os.environ:
            folder = tempfile.TemporaryDirectory(prefix="benchmarks-", ignore_cleanup_errors=True)
            os.environ[variable] = folder.name
            config.add_cleanup(folder.cleanup)


def pytest_sessionstart(session: pytest.Session) -> None:
    storage = session.config._benchmarksession.storage
    if str(RESULTS) in str(storage):
        storage.default_machine_id = None  # a folder for each GPU needs none for each Python inside


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, str]:
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    return {"gpu": gpu_name(config), "torch": torch.__version__, "triton": triton, "python": platform.python_version()}


@pytest.hookimpl(wrapper=True)
def pytest_benchmark_compare_machine_info() -> Generator[None, object, object]:
    """Let another torch or Python be a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        return (yield)


def pytest_benchmark_generate_commit_info() -> dict[str, str]:
    git = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    said = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {"id": os.environ.get("BENCHMARK_COMMIT") or said or "unknown"}


def pytest_benchmark_update_json(output_json: dict) -> None:
    for row in output_json["benchmarks"]:
        del row["options"]  # the same for all, and no part of the result
    output_json["peers"] = peers.versions()


def pytest_report_header(config: pytest.Config) -> str:
    missing = peers.missing(peers.ORTHOGONALIZERS | peers.OPTIMIZERS, config.getoption("--gpu"))
    return "left out: " + ("; ".join(f"{name} ({why})" for name, why in missing.items()) or "nobody")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each case and each implementation that can run here, of the module's CASES and MAKERS."""
    if {"case", "implementation"} <= set(metafunc.fixturenames):
        gpu = metafunc.config.getoption("--gpu")
        makers = metafunc.module.MAKERS
        names = [name for name in makers if name not in peers.missing(makers, gpu)]
        metafunc.parametrize("case, implementation", [(case, name) for case in metafunc.module.CASES[gpu] for name in names])


@pytest.fixture
def together(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The implementations of this run on this case, which are measured in turns."""
    mine = request.node
    same = [item for item in request.session.items if getattr(item, "originalname", None) == mine.originalname]
    return tuple(
        item.callspec.params["implementation"]
        for item in same
        if item.path == mine.path and item.callspec.params["case"] == mine.callspec.params["case"]
    )
