r"""A small diffusion model on scikit-learn's digits, with raw and averaged weights side by side.

The model sees $x_t = \alpha_t x + \sigma_t \epsilon$ with $\alpha_t = \cos(\pi t / 2)$ and
$\sigma_t = \sin(\pi t / 2)$, and predicts the noise $\epsilon$ (DDPM, arXiv 2006.11239; the
cosine schedule is that of arXiv 2102.09672). Samples are drawn with DDIM (arXiv 2010.02502).

Started by torchrun, the processes train one model on a share of each batch.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch import distributed as dist
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import emajit
from emajit import checkpoint, posthoc, schedules
from emajit.checkpoint import files
from emajit.cli import pictures

BATCH = 64
LEARNING_RATE = 2e-3
GRID = 8
TRACKED = [0.05, 0.10]
SWEEP = [0.02 * 1.08**i for i in range(33)]  # to 0.23
SNAPSHOTS = "snapshots"


@dataclass(frozen=True)
class Settings:
    """The settings of one run; raises ValueError, with the option, for an unusable value."""

    steps: int
    decay: float
    seed: int
    device: str
    out: Path
    posthoc: bool = False

    @property
    def snapshot_interval(self) -> int:
        """Steps between two snapshots: 32 or 33 of them in a run."""
        return max(1, self.steps // 32)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--steps: expected an integer >= 1, found {self.steps}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"--decay: expected a number in [0, 1], found {self.decay}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed: expected an integer in [0, 2**63), found {self.seed}")
        try:
            torch.zeros(1, device=self.device).item()
        except (RuntimeError, AssertionError, ModuleNotFoundError) as error:
            reason = str(error).splitlines()[0][:200]
            message = f"--device: expected a usable device, found {self.device!r}: {reason}"
            raise ValueError(message) from None
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.out).close()
        except OSError as error:
            reason = f"{self.out}: {error.strerror}"
            raise ValueError(f"--out: expected a folder to write into, found {reason}") from None


def default_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


@contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """The rank of this process, and the number of processes that torchrun has started."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield 0, 1
        return
    dist.init_process_group()
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


@dataclass
class History:
    """Held-out losses at some steps, the seconds of each step and of its averages, snapshots."""

    averages: int
    steps: list[int] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)
    averaged: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    average_seconds: list[float] = field(default_factory=list)
    snapshots: list[Path] = field(default_factory=list)

    @property
    def gain(self) -> float:
        """How far the averaged weights' loss is below the raw weights' loss, relative to it."""
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


class Trial:
    """The data of a run: training batches, and the held-out loss of any weights."""

    def __init__(self, settings: Settings, model: Denoiser, rank: int = 0, ranks: int = 1) -> None:
        self.model, self.device = model, torch.device(settings.device)
        self.rank, self.ranks = rank, ranks
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.images, held_out = (part.to(self.device) for part in digits(self.generator))
        self.judged = held_out.repeat(8, 1)
        count = len(self.judged)
        self.judged_at = ((torch.arange(count) + 0.5) / count).to(self.device)
        self.judged_noise = self.noise(self.judged.shape)

    def noise(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def batch(self) -> tuple[Tensor, ...]:
        """Images, times and noise: this process's share of a batch."""
        chosen = torch.randint(len(self.images), (BATCH,), generator=self.generator)
        images = self.images[chosen.to(self.device)]
        t = torch.rand(BATCH, generator=self.generator).to(self.device)
        return tuple(
            part[self.rank :: self.ranks] for part in (images, t, self.noise(images.shape))
        )

    @torch.no_grad()
    def loss(self, weights: dict[str, Tensor]) -> float:
        def weighted(x: Tensor, t: Tensor) -> Tensor:
            predicted: Tensor = functional_call(self.model, weights, (x, t))
            return predicted

        return loss_of(weighted, self.judged, self.judged_at, self.judged_noise).item()


def train(
    settings: Settings, trial: Trial, tell: Callable[[History], None]
) -> tuple[dict[str, Tensor], History]:
    """Train the model; returns the averaged weights and the history."""
    model, device = trial.model, trial.device
    params: dict[str, Tensor] = dict(model.named_parameters())
    decays = [schedules.warmup(settings.decay)]
    if settings.posthoc:
        decays += [schedules.power_function(sigma_rel) for sigma_rel in TRACKED]
    shadows = [emajit.init(params) for _ in decays]
    shadow, *tracked = shadows
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    parallel = model if trial.ranks == 1 else DistributedDataParallel(model)
    history = History(len(decays))
    interval = max(1, settings.steps // 60)
    for step in range(settings.steps):
        began = clock(device)
        images, t, noise = trial.batch()
        optimizer.zero_grad()
        share = len(images) * trial.ranks / BATCH  # the processes' gradients are averaged
        (share * loss_of(parallel, images, t, noise)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        trained = clock(device)
        emajit.update_many_(shadows, params, step, decays=decays)
        averaged = clock(device)
        history.step_seconds.append(averaged - began)
        history.average_seconds.append(averaged - trained)
        if (step + 1) % interval == 0 or step + 1 == settings.steps:
            history.steps.append(step + 1)
            history.raw.append(trial.loss(params))
            history.averaged.append(trial.loss(shadow))
        if (
            trial.rank == 0
            and tracked
            and (step + 1 == settings.steps or (step + 1) % settings.snapshot_interval == 0)
        ):
            folder = settings.out / SNAPSHOTS
            saved = posthoc.save(folder, tracked, step + 1, sigma_rel=TRACKED, dtype=torch.float16)
            history.snapshots += saved
        tell(history)
    return shadow, history


def sweep(trial: Trial, found: list[posthoc.Snapshot]) -> tuple[list[float], list[float]]:
    """Lengths that the snapshots allow, and the held-out loss of each average."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lengths with a large error are left out
        _, solutions = posthoc.plan(found, SWEEP, None)
        lengths = [x for x, s in zip(SWEEP, solutions, strict=True) if s.error < 0.05]
        averages = posthoc.reconstruct(found, lengths)
    return lengths, [
        trial.loss({name: leaf.to(trial.device) for name, leaf in average.items()})
        for average in averages
    ]


def tracked_losses(
    trial: Trial, found: list[posthoc.Snapshot], like: dict[str, Tensor]
) -> dict[float, float]:
    """The lengths of the last snapshots, with the held-out loss of each saved average."""
    narrow = {name: leaf.cpu().half() for name, leaf in like.items()}
    losses = {}
    for snapshot in (s for s in found if s.step == found[-1].step):
        average, _ = checkpoint.load(snapshot.path, narrow)
        weights = {name: leaf.to(trial.device, torch.float32) for name, leaf in average.items()}
        losses[posthoc.gamma_to_sigma_rel(snapshot.gamma)] = trial.loss(weights)
    return losses


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


def table(history: History) -> Table:
    step, average = (
        statistics.median(seconds) for seconds in (history.step_seconds, history.average_seconds)
    )
    several = f" for {history.averages}" if history.averages > 1 else ""
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
        f"+ {1e3 * average:.3f} ms ({average / (step - average):.1%}){several}",
    )
    return shown


def run(settings: Settings, console: Console) -> History:
    """Train, show the table, and write the pictures and the averaged weights into `out`.

    With several processes, the first shows and writes.
    """
    torch.manual_seed(settings.seed)
    model = Denoiser().to(settings.device)
    with processes() as (rank, ranks):
        trial = Trial(settings, model, rank, ranks)
        shadow, history = watched(settings, trial, console)
    if rank == 0:
        show(settings, trial, shadow, history, console)
    return history


def watched(
    settings: Settings, trial: Trial, console: Console
) -> tuple[dict[str, Tensor], History]:
    """Train with a progress bar."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("held-out loss {task.fields[losses]}"),
    )
    with Progress(*columns, console=console, disable=trial.rank > 0) as progress:
        task = progress.add_task("", total=settings.steps, losses="")

        def tell(history: History) -> None:
            if history.raw:
                losses = f"raw {history.raw[-1]:.4f}, averaged {history.averaged[-1]:.4f}"
                progress.update(task, losses=losses)
            progress.advance(task)

        return train(settings, trial, tell)


def show(
    settings: Settings, trial: Trial, shadow: dict[str, Tensor], history: History, console: Console
) -> None:
    """Show the table, and write pictures and weights."""
    model = trial.model
    noise = torch.randn(GRID**2, 64, generator=torch.Generator().manual_seed(settings.seed + 1))
    noise = noise.to(settings.device)
    grids = {"raw": sample(model, noise)}
    with emajit.ema_scope(model, shadow):
        grids["averaged"] = sample(model, noise)
    written = ["losses.png", "samples.png", "averaged.safetensors"]
    losses = history.steps, history.raw, history.averaged
    files.write(settings.out / written[0], lambda file: pictures.draw_losses(*losses, file))
    files.write(settings.out / written[1], lambda file: pictures.draw_digits(grids, file))
    checkpoint.save(settings.out / written[2], shadow, settings.steps)
    console.print(table(history))
    if settings.posthoc:
        written += ["posthoc.png", f"{SNAPSHOTS}/"]
        # Without the snapshots of an earlier run into the same folder.
        mine = [
            s for s in posthoc.snapshots(settings.out / SNAPSHOTS) if s.path in history.snapshots
        ]
        lengths, after = sweep(trial, mine)
        saved = tracked_losses(trial, mine, shadow)
        curve = lengths, after, saved, history.averaged[-1]
        files.write(settings.out / written[3], lambda file: pictures.draw_sweep(*curve, file))
        best = min(zip(after, lengths, strict=True))
        console.print(
            f"From the snapshots alone, the best average is of length {best[1]:.3f} of the run: "
            f"held-out loss {best[0]:.4f}",
            highlight=False,
        )
    told = f"Written into {settings.out}: {', '.join(written)}"
    console.print(told, highlight=False, markup=False)
