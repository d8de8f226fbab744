"""Interleaved timing, where every round calls every contestant once, in a new order; and memory."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

Calls = dict[str, Callable[[], object]]
Times = dict[str, list[float]]
Interleave = Callable[[Calls, int], Times]


def interleave(
    calls: Calls, rounds: int, device: str, prepare: Callable[[str], object] = lambda _: None
) -> Times:
    """The seconds of each call in each round, after `prepare` of its name.

    On a GPU it is called ten times in a row: as in a training, the host may run ahead.
    """
    times: Times = {name: [] for name in calls}
    several = 10 if device.startswith("cuda") else 1
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            prepare(name)
            synchronize(device)
            began = time.perf_counter()
            for _ in range(several):
                calls[name]()
            synchronize(device)
            times[name].append((time.perf_counter() - began) / several)
    return times


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def ratio(times: Times, name: str, other: str) -> float:
    """Of one's time to another's, the median over the rounds."""
    rounds = zip(times[name], times[other], strict=True)
    return float(statistics.median(a / b for a, b in rounds))


def peak_memory(call: Callable[[], object], device: str) -> int:
    """The most bytes that a call holds beside what was there before."""
    if device.startswith("cuda"):
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
