"""The `--device` option, and the table at the end."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pytest
import torch

from bench.measure import Times, table

RESULTS = pytest.StashKey[dict[str, Times]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tensors live: cpu, cuda")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = {}
    # Its own table has a row a round, in which all contestants run.
    config.option.benchmark_quiet = True


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


@pytest.fixture
def results(request: pytest.FixtureRequest) -> dict[str, Times]:
    return request.config.stash[RESULTS]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for shape, times in config.stash[RESULTS].items():
        terminalreporter.section(shape)
        terminalreporter.write(table(times))
    if config.stash[RESULTS]:
        terminalreporter.write_line(f"\n{hardware(str(config.getoption('--device')))}")


def hardware(device: str) -> str:
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, {versions}"
    return f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores, {versions}"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
