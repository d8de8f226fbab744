"""DeepSpeed's ZeRO 3 in the callback for transformers: each of `zero_ranks.CHECKS`, by torchrun.

Only where DeepSpeed is installed, which the extra `test` leaves out. `ranks.py` has the checks of a
stand-in, which run everywhere.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

if not all(map(find_spec, ("transformers", "accelerate", "deepspeed"))):
    pytest.skip("needs transformers, accelerate and deepspeed", allow_module_level=True)

from tests import zero_ranks

ROOT = Path(__file__).parent.parent
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
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        file = [f"--nproc-per-node={world}", zero_ranks.__file__, results, shared]
        environment = {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        done = subprocess.run(
            [*torchrun, *map(str, file)],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert results.exists(), done.stderr[-5000:]
        return dict(json.loads(results.read_text()))

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world"), zero_ranks.ALL)
def test_zero_3(name: str, world: int, told: Told) -> None:
    found = told(world)[f"{name} {world}"]
    assert not found, found
