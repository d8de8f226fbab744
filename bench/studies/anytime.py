"""Whether one run with averages replaces a run with a decaying rate for each horizon."""

from __future__ import annotations

import statistics
import tempfile
from typing import NamedTuple

from matplotlib.axes import Axes
from torch import nn

import emajit
from bench.studies.common import (
    BATCH,
    SETTING,
    Data,
    Report,
    Weights,
    digits,
    loss,
    network,
    trained,
)
from emajit import merging, posthoc, schedules

HORIZONS, RATES = (500, 1000, 2000, 4000, 8000), (0.05, 0.1, 0.2, 0.4, 0.8)
SAVED, LENGTHS, EVERY = (0.05, 0.10, 0.20), (0.05, 0.10, 0.15, 0.20), 125
COSINE, LAST = "cosine, a run for each", "one run, the last weights"


class Losses(NamedTuple):
    """The losses on the digits to choose by and on the digits to test on."""

    choice: float
    test: float


Runs = dict[tuple[str, int], list[Losses]]  # of each seed, by the kind of weights and the horizon


def study(seeds: int) -> Report:
    """One run at a constant rate, averaged, against a cosine run for each horizon (2602.03702).

    The averages of several lengths are reconstructed at each horizon from the snapshots of one run.
    The cosine's rate is chosen for each horizon, the constant rate once, for the last horizon and
    the best length there, each by the mean loss on a half of the held-out digits; the table has the
    loss on the other half.
    """
    train, held = digits()
    half = len(held[0]) // 2
    parts = [(held[0][part], held[1][part]) for part in (slice(half), slice(half, None))]
    decayed = {rate: _mean(_decayed(rate, seeds, train, parts)) for rate in RATES}
    constant = {rate: _mean(_constant(rate, seeds, train, parts)) for rate in RATES}
    rates = [min(RATES, key=lambda r, at=at: decayed[r][COSINE, at].choice) for at in HORIZONS]  # type: ignore[misc]
    rate = min(
        RATES,
        key=lambda r: min(f.choice for (_, at), f in constant[r].items() if at == HORIZONS[-1]),
    )
    rows = {COSINE: [decayed[r][COSINE, at].test for r, at in zip(rates, HORIZONS, strict=True)]}
    for name, at in constant[rate]:
        rows.setdefault(name, []).append(constant[rate][name, at].test)

    def draw(axes: Axes) -> None:
        for name, found in rows.items():
            axes.plot(HORIZONS, found, {COSINE: "o-k", LAST: ".:"}.get(name, ".-"), label=name)
        axes.set(xlabel="steps", ylabel="test cross-entropy", xscale="log")
        axes.set_xticks(HORIZONS, [*map(str, HORIZONS)])
        axes.minorticks_off()
        axes.legend(fontsize=8)

    table = [["steps", *map(str, HORIZONS)]]
    table += [[name, *(f"{number:.3f}" for number in found)] for name, found in rows.items()]
    table.append(["rate of the cosine", *map(str, rates)])
    setting = (
        f"{SETTING}, batch {BATCH}, rates from {RATES}, {rate} for the one run; snapshots of "
        f"lengths {SAVED} every {EVERY} steps; {half} digits to choose by, {len(held[0]) - half} "
        f"to test; the mean of {seeds} seeds."
    )
    return Report(table, [setting, "Not tuned: the batch, the lengths, a warm-up."], draw)


def _losses(model: nn.Module, parts: list[Data], weights: Weights | None = None) -> Losses:
    return Losses(*(loss(model, part, weights) for part in parts))


def _mean(runs: Runs) -> dict[tuple[str, int], Losses]:
    return {
        key: Losses(*(statistics.mean(each) for each in zip(*found, strict=True)))
        for key, found in runs.items()
    }


def _decayed(rate: float, seeds: int, train: Data, parts: list[Data]) -> Runs:
    """A run for each horizon."""
    runs: Runs = {}
    for horizon in HORIZONS:

        def cosine(step: int, horizon: int = horizon) -> float:
            return rate * merging.CURVES["cosine"](step / horizon)

        for seed in range(seeds):
            model = network(seed)
            trained(model, train, horizon, seed, cosine)
            runs.setdefault((COSINE, horizon), []).append(_losses(model, parts))
    return runs


def _constant(rate: float, seeds: int, train: Data, parts: list[Data]) -> Runs:
    """One run, with averages of each length at each horizon."""
    runs: Runs = {}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            model = network(seed)
            for horizon, losses in _averaged(model, rate, seed, train, parts, folder).items():
                runs.setdefault((LAST, horizon), []).append(losses)
            saved = posthoc.snapshots(folder)
            for horizon in HORIZONS:
                averages = posthoc.reconstruct(saved, LENGTHS, step=horizon)
                for length, weights in zip(LENGTHS, averages, strict=True):
                    key = f"one run, averaged, length {length:.2f}", horizon
                    runs.setdefault(key, []).append(_losses(model, parts, weights))
    return runs


def _averaged(
    model: nn.Module, rate: float, seed: int, train: Data, parts: list[Data], folder: str
) -> dict[int, Losses]:
    """Train, and save snapshots; the losses of the weights at each horizon."""
    params = dict(model.named_parameters())
    shadows = [emajit.init(params) for _ in SAVED]
    decays = [schedules.power_function(length) for length in SAVED]
    found: dict[int, Losses] = {}

    def average(step: int) -> None:
        emajit.update_many_(shadows, params, step - 1, decays=decays)
        if step % EVERY == 0:
            posthoc.save(folder, shadows, step, sigma_rel=SAVED)
        if step in HORIZONS:
            found[step] = _losses(model, parts)

    trained(model, train, HORIZONS[-1], seed, lambda _: rate, average)
    return found
