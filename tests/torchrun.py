"""Run a script on several processes of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def results(world: int, file: Path, out: Path, *args: object, **environment: str) -> dict[str, str]:
    """What a script that `torchrun` starts in so many processes has written into `out`, as JSON.

    `out` is its first argument, `args` are the others.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={world}", file, out, *args]
    ours = {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command)],
        env=os.environ | ours | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert out.exists(), done.stderr[-5000:]
    return dict(json.loads(out.read_text()))
