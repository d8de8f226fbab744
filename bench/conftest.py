"""The options of the bench, and its tables at the end."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bench import measure
from bench.measure import Calls, Interleave, Times
from bench.results import Publish, Result, save, setting, table

collect_ignore = [] if find_spec("matplotlib") else ["report.py"]
RESULTS = pytest.StashKey[list[Result]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("emajit")
    group.addoption("--device", default="cpu", help="where the tensors live: cpu, cuda")
    group.addoption("--save", type=Path, help="a JSON file for every round of every comparison")
    group.addoption(
        "--targets", action="store_true", help="fail where a ratio is above what is wanted"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []
    # Its own table has a row a round, in which all contestants run.
    config.option.benchmark_quiet = True


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


@pytest.fixture
def interleave(benchmark: Any, device: str) -> Interleave:
    """`measure.interleave`, known to pytest-benchmark."""

    def run(calls: Calls, rounds: int) -> Times:
        times: Times = benchmark.pedantic(measure.interleave, (calls, rounds, device), rounds=1)
        return times

    return run


@pytest.fixture
def publish(request: pytest.FixtureRequest) -> Publish:
    """Add a result to the tables, and hold it against its targets if that was asked for."""

    def add(result: Result) -> None:
        request.config.stash[RESULTS].append(result)
        if request.config.getoption("--targets"):
            missed = [str(target) for target in result.targets if not target.met]
            assert not missed, "\n".join(missed)

    return add


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    results, device = config.stash[RESULTS], str(config.getoption("--device"))
    for result in results:
        terminalreporter.write_line(table(result))
    if results:
        terminalreporter.write_line(", ".join(f"{k} {v}" for k, v in setting(device).items()))
        path = config.getoption("--save")
        if path:
            save(path, device, results)
