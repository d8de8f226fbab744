"""Interleaved timing: every round calls every contestant once, in a new order."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch

Times = dict[str, list[float]]
LIMIT = "flat lerp_ (the limit)"


def one_round(calls: dict[str, Callable[[], None]], times: Times, device: str) -> None:
    """Time each call once and append the seconds to `times`."""
    for name in random.sample(list(calls), len(calls)):
        synchronize(device)
        began = time.perf_counter()
        calls[name]()
        synchronize(device)
        times[name].append(time.perf_counter() - began)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def table(times: Times) -> str:
    """Median and quartiles in ms, and the ratio to the limit: the median over the rounds."""
    lines = [f"{'':30}{'median ms':>12}{'quartiles':>20}{'to the limit':>15}"]
    for name, seconds in times.items():
        low, median, high = (1e3 * q for q in statistics.quantiles(seconds, n=4))
        ratio = statistics.median(s / t for s, t in zip(seconds, times[LIMIT], strict=True))
        spread = f"{low:.3f} to {high:.3f}"
        lines.append(f"{name:30}{median:12.3f}{spread:>20}{ratio:15.2f}")
    return "\n".join(lines) + "\n"
