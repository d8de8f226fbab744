"""The pictures that the command draws, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import BinaryIO

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from emajit import posthoc

RAW, AVERAGED, THIRD = "tab:gray", "tab:blue", "tab:orange"


def draw_losses(
    steps: Sequence[int], raw: Sequence[float], averaged: Sequence[float], file: BinaryIO
) -> None:
    """Held-out losses against the step."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, raw, label="raw weights", color=RAW)
    axes.plot(steps, averaged, label="averaged weights", color=AVERAGED)
    axes.set(xlabel="training step", ylabel="held-out denoising loss")
    axes.set_ylim(top=min(raw) * 1.6)
    gain = 1 - averaged[-1] / raw[-1]
    axes.set_title(f"At the end the loss of averaged weights is {gain:.1%} lower")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, format="png", dpi=150)


def draw_digits(grids: dict[str, Tensor], file: BinaryIO) -> None:
    """Sheets of images side by side; each has shape (n, 64), where n is a square."""
    figure = Figure(figsize=(4 * len(grids), 4.4), layout="constrained")
    figure.suptitle("Digits drawn from the same noise")
    for axes, (name, images) in zip(figure.subplots(1, len(grids)), grids.items(), strict=True):
        side = round(len(images) ** 0.5)
        tiles = images.cpu().reshape(side, side, 8, 8)
        tiles = nn.functional.pad(tiles, (1, 1, 1, 1), value=-0.7)
        axes.imshow(tiles.transpose(1, 2).reshape(10 * side, 10 * side).numpy(), cmap="gray_r")
        axes.set_title(f"{name} weights")
        axes.set_axis_off()
    figure.savefig(file, format="png", dpi=150)


def draw_sweep(
    by_length: Mapping[float, float],
    saved: Mapping[float, float],
    trained: float,
    file: BinaryIO,
) -> None:
    """Held-out loss against the averaging length, with the `saved` and the `trained` average."""
    lengths, losses = [*by_length], [*by_length.values()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(lengths, losses, color=AVERAGED, label="reconstructed from the snapshots")
    axes.plot([*saved], [*saved.values()], "o", color=AVERAGED, label="as saved")
    axes.axvspan(min(saved), max(saved), color=AVERAGED, alpha=0.08, label="span of saved lengths")
    best = min(zip(losses, lengths, strict=True))
    axes.plot(best[1], best[0], "*", color=THIRD, markersize=12, label=f"best, {best[1]:.3f}")
    axes.axhline(trained, color=RAW, linestyle="--", label="the average chosen before training")
    axes.set(xlabel="averaging length, relative to the run", ylabel="held-out denoising loss")
    axes.set_xscale("log")
    ticks = [x for x in (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2) if lengths[0] <= x <= lengths[-1]]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set_title("The averaging length, chosen after training")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, format="png", dpi=150)


def draw_profiles(
    chosen: Sequence[posthoc.Snapshot],
    solutions: dict[float, posthoc.Solution],
    step: int,
    file: BinaryIO,
) -> None:
    """For each length the wanted and the achieved profile, and the snapshots' coefficients."""
    figure = Figure(figsize=(9, 2.8 * len(solutions)), layout="constrained")
    rows = figure.subplots(len(solutions), 2, squeeze=False)
    t = torch.linspace(0, step, 1000, dtype=torch.float64)
    gammas = sorted({snapshot.gamma for snapshot in chosen}, reverse=True)
    for (left, right), (sigma_rel, solution) in zip(rows, solutions.items(), strict=True):
        wanted = posthoc.profile(t, step, posthoc.sigma_rel_to_gamma(sigma_rel))
        profiles = [posthoc.profile(t, s.step, s.gamma) for s in chosen]
        achieved = torch.stack(profiles, 1) @ solution.coefficients
        left.plot(t, achieved, color=AVERAGED, label="achieved")
        left.plot(t, wanted, color="black", linestyle=":", label="wanted")
        left.set_title(f"sigma_rel {sigma_rel:g}, error {solution.error:.1e}")
        left.set(ylabel="weight of a step", yticks=[])
        for gamma, color in zip(gammas, cycle((AVERAGED, THIRD, RAW, "tab:green")), strict=False):
            mine = [i for i, snapshot in enumerate(chosen) if snapshot.gamma == gamma]
            label = f"snapshots of {posthoc.gamma_to_sigma_rel(gamma):.3g}"
            heights = [float(solution.coefficients[i]) for i in mine]
            right.plot([chosen[i].step for i in mine], heights, ".-", color=color, label=label)
        right.set_title("coefficients")
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
    for axes in rows[-1]:
        axes.set_xlabel("training step")
    figure.savefig(file, format="png", dpi=150)
