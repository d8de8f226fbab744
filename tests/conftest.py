"""Shared set-up of the suite."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.counting import Counting

EXTRAS = ("hypothesis", "matplotlib", "rich", "safetensors", "sklearn", "typer")

if find_spec("hypothesis"):
    import hypothesis

    hypothesis.settings.register_profile("default", max_examples=60, deadline=None)
    hypothesis.settings.register_profile("nightly", max_examples=1000, deadline=None)
    hypothesis.settings.load_profile("default")


class OnlyCuda:
    """Where nothing but torch and pytest is installed, the CUDA tests are what can be run."""

    def __init__(self, missing: list[str]) -> None:
        self.missing = missing

    def pytest_report_header(self) -> str:
        return f"only the CUDA tests are collected, for want of {', '.join(self.missing)}"

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        wanted = collection_path.is_dir() or collection_path.name == "test_cuda.py"
        return None if wanted else True


def pytest_configure(config: pytest.Config) -> None:
    missing = [name for name in EXTRAS if find_spec(name) is None]
    if missing:
        config.pluginmanager.register(OnlyCuda(missing))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def counting() -> tuple[str, Counting]:
    """The name of a backend that counts, for `backend=`, and the counter."""
    counter = Counting()
    name = f"counting_{id(counter)}"
    torch._dynamo.register_backend(counter, name)
    return name, counter
