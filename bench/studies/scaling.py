"""How the decay changes with the batch."""

from __future__ import annotations

import math
import statistics

from matplotlib.axes import Axes

import emajit
from bench.studies.common import BATCH, SETTING, Data, Report, digits, loss, network, trained
from emajit import schedules

BETA, RATE, KAPPAS = 0.9995, 0.02, (1, 4, 16)
SAMPLES, POINTS = 122_880, 12
RULES = "beta^kappa", "the same beta"
Curves = list[list[float]]  # the losses of the average by each rule, at each point


def study(seeds: int) -> Report:
    r"""The average under a batch $\kappa$ times larger: $\beta^\kappa$ (arXiv 2307.13813).

    The rate of SGD is multiplied by $\kappa$. Of each run two averages are kept: with
    $\beta^\kappa$, and with $\beta$ as it was. The figure is the loss of the average at 12 numbers
    of samples; the table has the largest absolute logarithm of its ratio to that of $\kappa = 1$.
    """
    train, test = digits()
    curves = [_mean([_run(kappa, seed, train, test) for seed in range(seeds)]) for kappa in KAPPAS]

    def draw(axes: Axes) -> None:
        samples = [SAMPLES // POINTS * (i + 1) for i in range(POINTS)]
        for kappa, both, colour in zip(KAPPAS, curves, ("0.2", "tab:blue", "tab:red"), strict=True):
            for rule, curve, line in zip(RULES, both, ("-", ":"), strict=True):
                axes.plot(samples, curve, line, color=colour, label=f"kappa = {kappa}, {rule}")
        axes.set(xlabel="samples", ylabel="test cross-entropy of the average", yscale="log")
        axes.legend(fontsize=8)

    rows = [
        [f"kappa = {kappa}", *map(_farthest, both, curves[0])]
        for kappa, both in zip(KAPPAS[1:], curves[1:], strict=True)
    ]
    setting = (
        f"{SETTING}, batch {BATCH} kappa, rate {RATE} kappa, beta {BETA}, {SAMPLES} samples; test "
        f"cross-entropy, the mean of {seeds} seeds."
    )
    return Report([["", *RULES], *rows], [setting, "Not tuned: the rate, the batch, beta."], draw)


def _run(kappa: int, seed: int, train: Data, test: Data) -> Curves:
    model = network(seed)
    params = dict(model.named_parameters())
    constant = schedules.constant(BETA)
    decays = [schedules.scaled(constant, kappa), constant]
    shadows = [emajit.init(params) for _ in decays]
    steps = SAMPLES // (BATCH * kappa)
    curves: Curves = [[] for _ in decays]

    def average(step: int) -> None:
        emajit.update_many_(shadows, params, step - 1, decays=decays)
        if step % (steps // POINTS) == 0:
            for shadow, curve in zip(shadows, curves, strict=True):
                curve.append(loss(model, test, shadow))

    trained(model, train, steps, seed, lambda _: RATE * kappa, average, BATCH * kappa)
    return curves


def _mean(runs: list[Curves]) -> Curves:
    return [
        [statistics.mean(losses) for losses in zip(*curves, strict=True)]
        for curves in zip(*runs, strict=True)
    ]


def _farthest(curve: list[float], other: list[float]) -> str:
    return f"{max(abs(math.log(a / b)) for a, b in zip(curve, other, strict=True)):.3f}"
