"""Options and settings of the whole suite.

One torch thread per process: the workers of xdist share the machine, and results do not depend on how many cores it has.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# fixed draws on every change; HYPOTHESIS_PROFILE=deep explores
settings.register_profile("fast", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("deep", deadline=None, max_examples=2000, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="seed of sample inputs (default 0)")


def pytest_report_header(config: pytest.Config) -> str:
    return f"v4: seed {config.getoption('--seed')}, torch {torch.__version__}"


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """Seed of sample inputs."""
    return int(request.config.getoption("--seed"))
