"""What the bench found, as tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.measure import Times, ratio


@dataclass
class Target:
    """A ratio, and the most that it is meant to be."""

    what: str
    found: float
    wanted: float

    @property
    def met(self) -> bool:
        return self.found <= self.wanted

    def __str__(self) -> str:
        verdict = "met" if self.met else "MISSED"
        return f"{self.what}: {self.found:.2f}, wanted at most {self.wanted:.2f}: {verdict}"


@dataclass
class Result:
    """Of one comparison: seconds in each round, and what else was measured."""

    suite: str
    title: str
    baseline: str
    times: Times
    memory: dict[str, int] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)

    def ratio(self, name: str) -> float:
        """To the baseline, the median over the rounds."""
        return ratio(self.times, name, self.baseline)

    def milliseconds(self, name: str) -> tuple[float, float, float]:
        """Median and quartiles."""
        seconds = self.times[name]
        if len(seconds) < 2:
            return (1e3 * seconds[0],) * 3
        low, median, high = statistics.quantiles(seconds, n=4)
        return 1e3 * median, 1e3 * low, 1e3 * high


Publish = Callable[[Result], None]


def table(result: Result) -> str:
    """As Markdown."""
    memory = bool(result.memory)
    head = ["", "median ms", "quartiles", f"to {result.baseline}"] + ["peak MiB"] * memory
    lines = [head, ["---"] * len(head)]
    for name in result.times:
        median, low, high = result.milliseconds(name)
        middle, spread = digits(median), f"{digits(low)} to {digits(high)}"
        line = [name, middle, spread, f"{result.ratio(name):.2f}"]
        lines.append(line + [f"{result.memory.get(name, 0) / 2**20:.1f}"] * memory)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rows = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    targets = [f"- {target}" for target in result.targets]
    return "\n".join([f"### {result.title}", "", *rows, "", *targets, *[""] * bool(targets)])


def digits(number: float) -> str:
    """Three of them, without an exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def setting(device: str) -> dict[str, str]:
    """Where and with what."""
    if device.startswith("cuda"):
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return {
        "hardware": hardware,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def processor() -> str:
    """What the machine calls its processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def save(path: Path, device: str, results: list[Result]) -> None:
    """As JSON, with every round."""
    content = {"setting": setting(device), "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(content))


def load(path: Path) -> tuple[dict[str, str], list[Result]]:
    """What `save` wrote."""
    content = json.loads(path.read_text())
    results = [
        Result(**(one | {"targets": [Target(**target) for target in one["targets"]]}))
        for one in content["results"]
    ]
    return content["setting"], results
