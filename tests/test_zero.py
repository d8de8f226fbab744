"""DeepSpeed's ZeRO 3 in the callback for transformers: each of `zero_ranks.CHECKS`, by torchrun.

Only where DeepSpeed is installed, which the extra `test` leaves out. `ranks.py` has the checks of a
stand-in, which run everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

if not all(map(find_spec, ("transformers", "accelerate", "deepspeed"))):
    pytest.skip("needs transformers, accelerate and deepspeed", allow_module_level=True)

from tests import torchrun, zero_ranks

Told = Callable[[int], dict[str, str]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What each check has raised, by the number of processes."""
    shared = tmp_path_factory.mktemp("shared")

    @functools.cache
    def run(world: int) -> dict[str, str]:
        if world != zero_ranks.WORLDS[0]:
            run(zero_ranks.WORLDS[0])
        results = shared / f"results-{world}.json"
        file = Path(zero_ranks.__file__)
        return torchrun.results(world, file, results, shared, DS_ACCELERATOR="cpu")

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world"), zero_ranks.ALL)
def test_zero_3(name: str, world: int, told: Told) -> None:
    found = told(world)[f"{name} {world}"]
    assert not found, found
