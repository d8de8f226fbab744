"""Run the bench and write its tables and plots: `python -m bench.report`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from bench.contestants import LIMIT, OURS
from bench.results import Result, load, table

HERE = Path(__file__).parent
COLOURS = {
    LIMIT: "0.2",
    "torch._foreach_lerp_": "0.6",
    "emajit.update_": "tab:blue",
    "emajit.LitEma": "tab:cyan",
    "AveragedModel, multi_avg_fn": "tab:orange",
    "LitEma as published": "tab:red",
}
TITLES = {
    "update": "One update",
    "backends": "Backends",
    "mixed": "A float32 shadow of bfloat16 parameters",
    "several": "Three averages of the same parameters",
    "rounding": "Rounding of 16-bit shadows",
    "fused": "Fused with the optimizer",
    "bandwidth": "Bandwidth",
    "compilation": "The first call, a float32 shadow of bfloat16 parameters",
    "merge": "A merge of checkpoints",
    "size": "Cost against the number of elements, in 32 tensors",
    "tensors": "Cost against the number of tensors, of 2^20 elements together",
}


def main() -> int:
    """Write `bench/results/HARDWARE.json`, `.md` and three plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--results", type=Path, help="a JSON file of an earlier run, to draw again")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="the folder to write to")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    source = arguments.results or arguments.out / "last.json"
    if arguments.results is None:
        options = ["--device", arguments.device, "--save", str(source.resolve())]
        code = pytest.main([str(HERE), "-q", "-p", "no:cacheprovider", *options])
        if code:
            return int(code)
    setting, results = load(source)
    name = re.sub(r"[^a-z0-9]+", "-", setting["hardware"].lower()).strip("-")
    (arguments.out / f"{name}.md").write_text(page(setting, results, name))
    mpl.use("Agg")
    curves(results, "size", "elements in 32 tensors", arguments.out / f"{name}-size.png")
    curves(
        results,
        "tensors",
        "tensors of 2^20 elements together",
        arguments.out / f"{name}-tensors.png",
    )
    bars(results, arguments.out / f"{name}-peers.png")
    return 0


def page(setting: dict[str, str], results: list[Result], name: str) -> str:
    """All tables, and what of the targets was met."""
    targets = [target for result in results for target in result.targets]
    met = sum(target.met for target in targets)
    parts = [
        f"# {setting['hardware']}",
        (
            f"torch {setting['torch']}, Python {setting['python']}, {setting['date']}. Medians of "
            "interleaved rounds; ratios are medians of the ratios within a round. Of "
            f"{len(targets)} targets {met} are met."
        ),
        f"![Against its peers]({name}-peers.png)",
        f"![Against the number of elements]({name}-size.png)",
        f"![Against the number of tensors]({name}-tensors.png)",
    ]
    for suite, title in TITLES.items():
        chosen = [result for result in results if result.suite == suite]
        if chosen:
            parts += [f"## {title}", *(table(result).rstrip() for result in chosen)]
    return "\n\n".join(parts) + "\n"


def curves(results: list[Result], suite: str, label: str, path: Path) -> None:
    """Milliseconds against what the titles of a suite count."""
    chosen = sorted((r for r in results if r.suite == suite), key=lambda r: int(r.title))
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, colour in COLOURS.items():
        milliseconds = [result.milliseconds(name)[0] for result in chosen]
        axes.plot(
            [int(result.title) for result in chosen],
            milliseconds,
            "o-",
            color=colour,
            markersize=4,
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ms for one update")
    tidy(axes)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def bars(results: list[Result], path: Path) -> None:
    """The time of each contestant, as a multiple of emajit.update_'s."""
    chosen = [result for result in results if result.suite == "update"]
    ours = {contestant.name for contestant in OURS}
    figure, grid = plt.subplots(2, 3, figsize=(13, 7), layout="constrained", sharey=True)
    for axes, result in zip(grid.flat, chosen, strict=False):
        names = [name for name in result.times if name not in (LIMIT, "emajit.update")][::-1]
        median = {name: result.milliseconds(name)[0] for name in names}
        lengths = [median[name] / median["emajit.update_"] for name in names]
        colours = ["tab:blue" if name in ours else "0.7" for name in names]
        drawn = axes.barh(names, lengths, color=colours)
        axes.bar_label(drawn, [f"{median[name]:.3g} ms" for name in names], padding=3, fontsize=8)
        axes.set_xlim(0, max(lengths) * 1.25)
        axes.set_title(result.title, fontsize=10)
        tidy(axes)
    for axes in grid.flat[len(chosen) :]:
        axes.set_visible(False)
    figure.supxlabel("time of one update, relative to emajit.update_", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
