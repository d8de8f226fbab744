"""Shared set-up of the suite."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.counting import Counting

EXTRAS = ("hypothesis", "matplotlib", "rich", "safetensors", "sklearn", "typer")
ABSENT = {name for name in ("lightning", "transformers") if find_spec(name) is None}

if find_spec("hypothesis"):
    import hypothesis

    hypothesis.settings.register_profile("default", max_examples=60, deadline=None)
    hypothesis.settings.register_profile("nightly", max_examples=1000, deadline=None)
    hypothesis.settings.load_profile("default")

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Several of pytest's processes share the cores, and so do the processes that tests start.
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))

# What takes longest comes first, lest one process be left with it when the others are done.
LONG = ["test_sharded", "test_compile", "test_demo", "test_torch"]


class OnlyInstalled:
    """Collects no integration of what is not installed, and only the CUDA tests without extras."""

    def __init__(self) -> None:
        self.missing = [name for name in EXTRAS if find_spec(name) is None]

    def pytest_report_header(self) -> str:
        if not self.missing:
            return ""
        return f"only the CUDA tests are collected, for want of {', '.join(self.missing)}"

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        if self.missing and collection_path.is_file() and collection_path.name != "test_cuda.py":
            return True
        is_integration = collection_path.parent.name == "integrations"
        return (is_integration and collection_path.stem in ABSENT) or None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(OnlyInstalled())
    if config.getoption("dist", "no") == "load":  # as -n has it
        config.option.dist = "loadfile"  # what tests of a file share is made once
        config.option.loadscopereorder = False


def by_length(item: pytest.Item) -> int:
    return LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if workers:
        items.sort(key=by_length)
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True, scope="module")
def _freeze() -> None:
    """What is imported stays: no collection needs to look at its million objects again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Operators of small models gain nothing from a second one, and wait for it on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def counting() -> tuple[str, Counting]:
    """The name of a backend that counts, for `backend=`, and the counter."""
    counter = Counting()
    name = f"counting_{id(counter)}"
    torch._dynamo.register_backend(counter, name)
    return name, counter
