"""A merge of checkpoints, against reading the same files and writing one of them."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench.measure import Calls, interleave, ratio
from bench.results import Publish, Result, Target
from emajit import merging

LEAVES, ROUNDS = 16, 5
COPY, MERGE = "cat, then dd conv=fsync", "emajit.merging.merge"
STATUS = Path("/proc/self/status")


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux, to empty the cache and tell memory")
@pytest.mark.parametrize("cache", ["warm", "cold"])
@pytest.mark.parametrize(
    ("sources", "dtype", "gigabytes"), [(2, torch.float32, 2), (5, torch.bfloat16, 1)]
)
def test_merge(
    cache: str, sources: int, dtype: torch.dtype, gigabytes: int, tmp_path: Path, publish: Publish
) -> None:
    """Both are written through to the disk. The memory is the process's own, without mapped files.

    Cold sources are not in the page cache; a virtual machine's host may still have them.
    """
    count = gigabytes * 10**9 // dtype.itemsize // LEAVES
    paths = [tmp_path / f"{i}.safetensors" for i in range(sources)]
    for i, path in enumerate(paths):
        generator = torch.Generator().manual_seed(i)
        leaves = (torch.randn(count, generator=generator).to(dtype) for _ in range(LEAVES))
        save_file({f"w{j}": leaf for j, leaf in enumerate(leaves)}, path)
    copied, merged = tmp_path / "copied", tmp_path / "merged.safetensors"
    command = f"cat {shlex.join(map(str, paths))} > /dev/null && dd bs=4M conv=fsync status=none "
    command += shlex.join([f"if={paths[0]}", f"of={copied}"])
    peaks = [0]

    def merge() -> None:
        before = own_memory()
        merging.merge(paths, merged, tell=lambda _: peaks.append(own_memory() - before))

    def prepare(_: str) -> None:
        for out in (copied, merged):
            out.unlink(missing_ok=True)
        os.sync()
        for path in paths:
            read_or_drop(path, is_warm=cache == "warm")

    def copy() -> None:
        subprocess.run(["/bin/sh", "-c", command], check=True)  # noqa: S603, ours

    calls: Calls = {COPY: copy, MERGE: merge}
    times = interleave(calls, ROUNDS, "cpu", prepare)
    title = f"{sources} sources of {gigabytes} GB, {str(dtype)[6:]}, {cache} cache"
    result = Result("merge", title, COPY, times, {MERGE: max(peaks)})
    result.targets = [
        Target(f"{MERGE} to {COPY}", ratio(times, MERGE, COPY), 1.3),
        Target("memory to two leaves in float64", max(peaks) / (2 * 8 * count), 1),
    ]
    publish(result)
    for path in paths:
        path.unlink()


def read_or_drop(path: Path, *, is_warm: bool) -> None:
    """Bring a file into the page cache, or out of it."""
    with path.open("rb", buffering=0) as file:
        if is_warm:
            while file.read(2**24):
                pass
        else:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def own_memory() -> int:
    return int(STATUS.read_text().split("RssAnon:")[1].split()[0]) * 1024
