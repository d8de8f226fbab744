r"""A small diffusion model on scikit-learn's digits, with raw and averaged weights side by side.

The model sees $x_t = \alpha_t x + \sigma_t \epsilon$ with $\alpha_t = \cos(\pi t / 2)$ and
$\sigma_t = \sin(\pi t / 2)$, and predicts the noise $\epsilon$ (DDPM, arXiv 2006.11239; the
cosine schedule is that of arXiv 2102.09672). Samples are drawn with DDIM (arXiv 2010.02502).
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

import emajit
from emajit import checkpoint
from emajit.checkpoint import files

BATCH = 64
LEARNING_RATE = 2e-3
GRID = 8


@dataclass(frozen=True)
class Settings:
    """What one run is made of; raises ValueError, naming the option, for an unusable value."""

    steps: int
    decay: float
    seed: int
    device: str
    out: Path

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--steps: expected an integer >= 1, found {self.steps}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"--decay: expected a number in [0, 1], found {self.decay}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed: expected an integer in [0, 2**63), found {self.seed}")
        try:
            torch.zeros(1, device=self.device).item()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            message = f"--device: expected a usable device, found {self.device!r}: {reason}"
            raise ValueError(message) from None
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.out).close()
        except OSError as error:
            reason = f"{self.out}: {error.strerror}"
            raise ValueError(f"--out: expected a folder to write into, found {reason}") from None


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class History:
    """Held-out losses at some steps, and the seconds of each step and of its average."""

    steps: list[int] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)
    averaged: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    average_seconds: list[float] = field(default_factory=list)

    @property
    def gain(self) -> float:
        """By which share the averaged weights' loss is below that of the raw ones."""
        return 1 - self.averaged[-1] / self.raw[-1]


class Denoiser(nn.Module):
    """A residual MLP over 64 pixels and features of the time."""

    def __init__(self, width: int = 256, blocks: int = 3) -> None:
        super().__init__()
        self.inside = nn.Linear(64 + 16, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 2 * width),
                nn.SiLU(),
                nn.Linear(2 * width, width),
            )
            for _ in range(blocks)
        )
        self.outside = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * math.pi * torch.arange(1, 9, device=t.device)
        h: Tensor = self.inside(torch.cat([x, angles.sin(), angles.cos()], dim=1))
        for block in self.blocks:
            h = h + block(h)
        predicted: Tensor = self.outside(h)
        return predicted


def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    angle = t[:, None] * (math.pi / 2)
    return angle.cos(), angle.sin()


def digits(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images of shape (n, 64) in [-1, 1]: four fifths to train on, one fifth held out."""
    images = torch.from_numpy(load_digits().data).float() / 8 - 1
    images = images[torch.randperm(len(images), generator=generator)]
    held_out = len(images) // 5
    return images[held_out:], images[:held_out]


def loss_of(model: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The mean squared error of the predicted noise."""
    alpha, sigma = alpha_sigma(t)
    return nn.functional.mse_loss(model(alpha * x + sigma * eps, t), eps)


def train(
    settings: Settings, model: Denoiser, tell: Callable[[History], None]
) -> tuple[dict[str, Tensor], History]:
    """Train `model`; the averaged weights, and what happened on the way."""
    device = torch.device(settings.device)
    generator = torch.Generator().manual_seed(settings.seed)
    images, held_out = (part.to(device) for part in digits(generator))
    judged = held_out.repeat(8, 1)
    judged_at = ((torch.arange(len(judged)) + 0.5) / len(judged)).to(device)
    judged_noise = torch.randn(judged.shape, generator=generator).to(device)

    @torch.no_grad()
    def held_out_loss(weights: dict[str, Tensor]) -> float:
        def weighted(x: Tensor, t: Tensor) -> Tensor:
            predicted: Tensor = functional_call(model, weights, (x, t))
            return predicted

        return loss_of(weighted, judged, judged_at, judged_noise).item()

    params: dict[str, Tensor] = dict(model.named_parameters())
    shadow = emajit.init(params)
    decay = emajit.schedules.warmup(settings.decay)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    history = History()
    interval = max(1, settings.steps // 60)
    for step in range(settings.steps):
        began = clock(device)
        batch = images[torch.randint(len(images), (BATCH,), generator=generator).to(device)]
        t = torch.rand(BATCH, generator=generator).to(device)
        noise = torch.randn(batch.shape, generator=generator).to(device)
        optimizer.zero_grad()
        loss_of(model, batch, t, noise).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        trained = clock(device)
        emajit.update_(shadow, params, step, decay=decay)
        averaged = clock(device)
        history.step_seconds.append(averaged - began)
        history.average_seconds.append(averaged - trained)
        if (step + 1) % interval == 0 or step + 1 == settings.steps:
            history.steps.append(step + 1)
            history.raw.append(held_out_loss(params))
            history.averaged.append(held_out_loss(shadow))
        tell(history)
    return shadow, history


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def sample(model: Denoiser, noise: Tensor, steps: int = 60) -> Tensor:
    """Images of shape (n, 64) from noise of that shape."""
    x = noise
    times = torch.linspace(0.99, 0.0, steps + 1, device=noise.device)
    for now, following in pairwise(times):
        t, later = now.expand(len(x)), following.expand(len(x))
        eps = model(x, t)
        alpha, sigma = alpha_sigma(t)
        clean = ((x - sigma * eps) / alpha).clamp(-1, 1)
        alpha, sigma = alpha_sigma(later)
        x = alpha * clean + sigma * eps
    return x


def draw_losses(history: History, file: BinaryIO) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(history.steps, history.raw, label="raw weights", color="tab:gray")
    axes.plot(history.steps, history.averaged, label="averaged weights", color="tab:blue")
    axes.set(xlabel="training step", ylabel="held-out denoising loss")
    axes.set_ylim(top=min(history.raw) * 1.6)
    axes.set_title(f"At the end the loss of averaged weights is {history.gain:.1%} lower")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, format="png", dpi=150)


def draw_samples(grids: dict[str, Tensor], file: BinaryIO) -> None:
    figure = Figure(figsize=(4 * len(grids), 4.4), layout="constrained")
    figure.suptitle("Digits drawn from the same noise")
    for axes, (name, images) in zip(figure.subplots(1, len(grids)), grids.items(), strict=True):
        tiles = nn.functional.pad(images.cpu().reshape(GRID, GRID, 8, 8), (1, 1, 1, 1), value=-0.7)
        axes.imshow(tiles.transpose(1, 2).reshape(10 * GRID, 10 * GRID).numpy(), cmap="gray_r")
        axes.set_title(f"{name} weights")
        axes.set_axis_off()
    figure.savefig(file, format="png", dpi=150)


def table(history: History) -> Table:
    step, average = (
        statistics.median(seconds) for seconds in (history.step_seconds, history.average_seconds)
    )
    shown = Table(title=f"After {history.steps[-1]} steps")
    shown.add_column("weights")
    shown.add_column("held-out loss", justify="right")
    shown.add_column("difference", justify="right")
    shown.add_column("cost a step", justify="right")
    shown.add_row("raw", f"{history.raw[-1]:.4f}", "", f"{1e3 * (step - average):.2f} ms")
    shown.add_row(
        "averaged",
        f"{history.averaged[-1]:.4f}",
        f"{-history.gain:+.1%}",
        f"+ {1e3 * average:.3f} ms ({average / (step - average):.1%})",
    )
    return shown


def run(settings: Settings, console: Console) -> History:
    """Train, show the table, and write the pictures and the averaged weights into `out`."""
    torch.manual_seed(settings.seed)
    model = Denoiser().to(settings.device)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("held-out loss {task.fields[losses]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=settings.steps, losses="")

        def tell(history: History) -> None:
            if history.raw:
                losses = f"raw {history.raw[-1]:.4f}, averaged {history.averaged[-1]:.4f}"
                progress.update(task, losses=losses)
            progress.advance(task)

        shadow, history = train(settings, model, tell)

    noise = torch.randn(GRID**2, 64, generator=torch.Generator().manual_seed(settings.seed + 1))
    noise = noise.to(settings.device)
    grids = {"raw": sample(model, noise)}
    with emajit.ema_scope(model, shadow):
        grids["averaged"] = sample(model, noise)
    files.write(settings.out / "losses.png", lambda file: draw_losses(history, file))
    files.write(settings.out / "samples.png", lambda file: draw_samples(grids, file))
    checkpoint.save(settings.out / "averaged.safetensors", shadow, settings.steps)
    console.print(table(history))
    console.print(
        f"Written into {settings.out}: losses.png, samples.png, averaged.safetensors",
        highlight=False,
    )
    return history
