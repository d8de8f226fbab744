"""What the studies share: noisy digits, a network, its training, and how a study tells."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

NOISE = 0.2  # the share of labels that are drawn anew, once
BATCH = 8
SETTING = (
    f"MLP 64-128-10 on digits, {NOISE:.0%} of the training labels random, SGD without momentum"
)
Data = tuple[Tensor, Tensor]
Weights = dict[str, Tensor]


class Report(NamedTuple):
    """What a study has found: a table with its first row, how it was set, and a picture."""

    table: list[list[str]]
    setting: list[str]
    draw: Callable[[Axes], object]


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


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def trained(
    model: nn.Module,
    data: Data,
    steps: int,
    seed: int,
    rate: Callable[[int], float],
    after: Callable[[int], object] = lambda _: None,
    batch: int = BATCH,
) -> None:
    """Train by SGD without momentum; `after` each step is told how many there were."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters())
    for step in range(steps):
        chosen = torch.randint(len(x), (batch,), generator=generator)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        cross_entropy(model(x[chosen]), y[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        after(step + 1)


@torch.no_grad()
def loss(model: nn.Module, data: Data, weights: Weights | None = None) -> float:
    """The loss of a model, with other weights if given."""
    predicted = model(data[0]) if weights is None else functional_call(model, weights, (data[0],))
    return float(cross_entropy(predicted, data[1]))


def told(found: Sequence[float]) -> list[str]:
    return [f"{number:.3f}" for number in (statistics.mean(found), min(found), max(found))]
