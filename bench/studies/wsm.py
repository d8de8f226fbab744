"""Whether merging checkpoints replaces a decaying rate."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from matplotlib.axes import Axes
from safetensors.torch import load_file, save_file

from bench.studies.common import BATCH, SETTING, Report, digits, loss, network, told, trained
from emajit import merging

RATE = 0.1
BEFORE, AFTER, CHECKPOINTS = 4000, 2000, 20
COLOURS = {"merged": "tab:blue", "decayed": "tab:orange"}


def study(seeds: int) -> Report:
    """Merged checkpoints of a constant rate, against rates that decay (arXiv 2507.17634).

    After 4000 steps at a constant rate: 2000 more with 20 checkpoints, merged by the coefficients
    of a decay; or 2000 more in which the rate decays by that curve.
    """
    train, test = digits()
    losses: dict[str, list[float]] = {}
    for seed in range(seeds):
        model = network(seed)
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
                merged = load_file(Path(folder, "merged.safetensors"))
                losses.setdefault(f"constant rate, merged {rule}", []).append(
                    loss(model, test, merged)
                )

    def draw(axes: Axes) -> None:
        for i, (name, found) in enumerate(losses.items()):
            colour = next((c for word, c in COLOURS.items() if word in name), "0.3")
            axes.plot(found, [i] * len(found), "o", color=colour, alpha=0.5)
            axes.plot(statistics.mean(found), i, "|", color=colour, ms=18, mew=2)
        axes.set_yticks(range(len(losses)), [*losses])
        axes.invert_yaxis()
        axes.set_xlabel("test cross-entropy")

    setting = (
        f"{SETTING}, batch {BATCH}, rate {RATE}; {BEFORE} steps, then {AFTER} more with "
        f"{CHECKPOINTS} checkpoints; test cross-entropy, {seeds} seeds."
    )
    table = [["", "mean", "from", "to"], *([name, *told(found)] for name, found in losses.items())]
    left = "Not tuned: the rate, the batch, the lengths, the number of checkpoints."
    return Report(table, [setting, left], draw)
