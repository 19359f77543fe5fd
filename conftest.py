# SPDX-License-Identifier: Apache-2.0
"""`--gpu` for every folder: the same tests on the first CUDA device."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run on the first CUDA device; an error where there is none")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu") and not torch.cuda.is_available():
        raise pytest.UsageError("--gpu: torch sees no CUDA device here; leave it out to run on the CPU")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cuda" if request.config.getoption("--gpu") else "cpu")
