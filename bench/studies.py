r"""Claims on averages of weights, tried on scikit-learn's digits: `python -m bench.studies wsm`.

Each study prints a table, and writes it and a picture into `bench/results/`.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from emajit import merging

RESULTS = Path(__file__).parent / "results"
NOISE = 0.2  # the share of labels that are drawn anew, once
BATCH, RATE = 8, 0.1
BEFORE, AFTER, CHECKPOINTS = 4000, 2000, 20
Data = tuple[Tensor, Tensor]


def digits() -> tuple[Data, Data]:
    """1200 digits to train on, a fifth of their labels random, and 597 to test."""
    generator = torch.Generator().manual_seed(0)
    held = load_digits()
    x = torch.tensor(held.data, dtype=torch.float32) / 16
    y = torch.tensor(held.target)
    order = torch.randperm(len(x), generator=generator)
    x, y = x[order], y[order]
    drawn = torch.rand(len(y), generator=generator) < NOISE
    noisy = torch.where(drawn, torch.randint(10, y.shape, generator=generator), y)
    return (x[:1200], noisy[:1200]), (x[1200:], y[1200:])


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def trained(
    model: nn.Module,
    data: Data,
    steps: int,
    seed: int,
    rate: Callable[[int], float],
    after: Callable[[int], object] = lambda _: None,
) -> None:
    """Train by SGD without momentum; `after` each step is told how many there were."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters())
    for step in range(steps):
        batch = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        cross_entropy(model(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        after(step + 1)


@torch.no_grad()
def loss(model: nn.Module, data: Data) -> float:
    return float(cross_entropy(model(data[0]), data[1]))


def wsm(seeds: int) -> tuple[dict[str, list[float]], list[str]]:
    """Merged checkpoints of a constant rate, against rates that decay (arXiv 2507.17634).

    After 4000 steps at a constant rate: 2000 more with 20 checkpoints, merged by the coefficients
    of a decay; or 2000 more in which the rate decays by that curve.
    """
    train, test = digits()
    losses: dict[str, list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = network()
        trained(model, train, BEFORE, seed, lambda _: RATE)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        for name, curve in merging.CURVES.items():
            model.load_state_dict(start)
            trained(model, train, AFTER, seed + 100, lambda i, c=curve: RATE * c(i / AFTER))  # type: ignore[misc]
            losses.setdefault(f"rate decayed, {name}", []).append(loss(model, test))
        model.load_state_dict(start)
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, "0.safetensors")]
            save_file(start, paths[0])

            def keep(step: int) -> None:
                if step % (AFTER // CHECKPOINTS) == 0:
                    paths.append(Path(folder, f"{step}.safetensors"))  # noqa: B023
                    save_file(model.state_dict(), paths[-1])  # noqa: B023

            trained(model, train, AFTER, seed + 100, lambda _: RATE, keep)
            losses.setdefault("constant rate, the last weights", []).append(loss(model, test))
            for rule in (*(f"wsm:{name}" for name in merging.CURVES), "uniform"):
                merging.merge(paths, Path(folder, "merged.safetensors"), rule)
                model.load_state_dict(load_file(Path(folder, "merged.safetensors")))
                losses.setdefault(f"constant rate, merged {rule}", []).append(loss(model, test))
    setting = (
        f"MLP 64-128-10 on digits, {NOISE:.0%} of the training labels random, SGD without "
        f"momentum, batch {BATCH}, rate {RATE}; {BEFORE} steps, then {AFTER} more with "
        f"{CHECKPOINTS} checkpoints; test cross-entropy, {seeds} seeds."
    )
    return losses, [
        setting,
        "Not tuned: the rate, the batch, the lengths, the number of checkpoints.",
    ]


STUDIES = {"wsm": wsm}


def main() -> int:
    """Run a study, print its table, write `study-NAME.md` and `study-NAME.png`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    losses, setting = STUDIES[arguments.study](arguments.seeds)
    seconds = time.perf_counter() - start
    rows = ["| | mean | from | to |", "| --- | --- | --- | --- |"]
    rows += [
        f"| {name} | {statistics.mean(found):.3f} | {min(found):.3f} | {max(found):.3f} |"
        for name, found in losses.items()
    ]
    claim = (STUDIES[arguments.study].__doc__ or "").strip()
    when = f"{datetime.now(tz=UTC).date()}, {platform.machine()}, torch {torch.__version__}"
    told = "\n".join(line.strip() for line in claim.splitlines())
    page = "\n\n".join([f"# {arguments.study}", told, "\n".join(rows), *setting])
    page += (
        f"\n\nRun in {seconds:.0f} s on one thread, {when}.\n\n![](study-{arguments.study}.png)\n"
    )
    print(page)  # noqa: T201, it is what the command is for
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"study-{arguments.study}.md").write_text(page)
    draw(losses, "test cross-entropy", RESULTS / f"study-{arguments.study}.png")
    return 0


def draw(losses: dict[str, list[float]], label: str, path: Path) -> None:
    mpl.use("Agg")
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for i, (name, found) in enumerate(losses.items()):
        colour = "tab:blue" if "merged" in name else "tab:orange" if "decayed" in name else "0.3"
        axes.plot(found, [i] * len(found), "o", color=colour, alpha=0.5)
        axes.plot(statistics.mean(found), i, "|", color=colour, markersize=18, markeredgewidth=2)
    axes.set_yticks(range(len(losses)), [*losses])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
