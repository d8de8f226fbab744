"""`emajit demo`: one training run, and what each feature of emajit is worth on it.

Started by torchrun, the processes train one model on a share of each batch; the first of them shows
and writes.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import emajit
from emajit import checkpoint, merging, posthoc, schedules
from emajit.checkpoint import files
from emajit.cli import pictures
from emajit.cli.diffusion import BATCH, Denoiser, Trial, loss_of, sample

LEARNING_RATE = 2e-3
GRID = 8
TRACKED = [0.05, 0.10]  # the lengths of the averages in the snapshots
SWEEP = [0.02 * 1.16**i for i in range(17)]  # to 0.21
SNAPSHOTS = 16  # in a run
CHECKPOINTS, MERGED = 32, 8  # in a run, and the last of them


@dataclass(frozen=True)
class Settings:
    """The settings of one run; raises ValueError, with the option, for an unusable value."""

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
    """Held-out losses at some steps, and the seconds of each step and of its averages."""

    steps: list[int] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)
    averaged: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    averaging: list[float] = field(default_factory=list)
    stochastic: list[float] = field(default_factory=list)

    @property
    def gain(self) -> float:
        """How far the averaged weights' loss is below the raw weights' loss, relative to it."""
        return 1 - self.averaged[-1] / self.raw[-1]


class Averages:
    """The average of a run, the other averages of the table, and files of the run in `folder`."""

    def __init__(self, params: dict[str, Tensor], settings: Settings, folder: Path) -> None:
        self.params, self.settings, self.folder = params, settings, folder
        self.shadow = emajit.init(params)
        self.nearest, self.stochastic = (
            emajit.init(params, dtype=torch.bfloat16) for _ in range(2)
        )
        self.tracked = [emajit.init(params) for _ in TRACKED]
        self.checkpoints: list[Path] = []

    def update(self, step: int, history: History) -> None:
        decay, device = (
            schedules.warmup(self.settings.decay),
            next(iter(self.params.values())).device,
        )
        times = [clock(device)]
        emajit.update_(self.shadow, self.params, step, decay=decay)
        times.append(clock(device))
        emajit.update_(self.stochastic, self.params, step, decay=decay, rounding="stochastic")
        times.append(clock(device))
        others = [self.nearest, *self.tracked]
        decays = [decay, *map(schedules.power_function, TRACKED)]
        emajit.update_many_(others, self.params, step, decays=decays)
        history.averaging.append(times[1] - times[0])
        history.stochastic.append(times[2] - times[1])

    def keep(self, steps: int) -> None:
        """Save snapshots and checkpoints after some of the steps; the last checkpoints stay."""
        last = steps == self.settings.steps
        if last or steps % max(1, self.settings.steps // SNAPSHOTS) == 0:
            folder = self.folder / "snapshots"
            posthoc.save(folder, self.tracked, steps, sigma_rel=TRACKED, dtype=torch.float16)
        if last or steps % max(1, self.settings.steps // CHECKPOINTS) == 0:
            self.checkpoints.append(self.folder / f"step-{steps}.pt")
            torch.save(self.params, self.checkpoints[-1])
            for old in self.checkpoints[:-MERGED]:
                old.unlink()
            del self.checkpoints[:-MERGED]

    def merged(self) -> dict[str, Tensor]:
        """The mean of the last checkpoints."""
        out = self.folder / "merged.safetensors"
        merging.merge(self.checkpoints, out)
        return load_file(out)


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train(
    settings: Settings, trial: Trial, averages: Averages, tell: Callable[[History], None]
) -> History:
    """Train the model and average its weights."""
    model, device, history = trial.model, trial.device, History()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    parallel = model if trial.ranks == 1 else DistributedDataParallel(model)
    interval = max(20, settings.steps // 30)  # a loss takes as long as some steps
    for step in range(settings.steps):
        began = clock(device)
        images, t, noise = trial.batch()
        optimizer.zero_grad()
        share = len(images) * trial.ranks / BATCH  # the processes' gradients are averaged
        (share * loss_of(parallel, images, t, noise)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        history.training.append(clock(device) - began)
        averages.update(step, history)
        if trial.rank == 0:
            averages.keep(step + 1)
        if (step + 1) % interval == 0 or step + 1 == settings.steps:
            history.steps.append(step + 1)
            history.raw.append(trial.loss(averages.params))
            history.averaged.append(trial.loss(averages.shadow))
        tell(history)
    return history


def sweep(trial: Trial, folder: Path) -> tuple[dict[float, float], dict[float, float]]:
    """Held-out losses by length: of reconstructed averages, and of those in the last snapshots."""
    found = posthoc.snapshots(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lengths with a large error are left out
        _, solutions = posthoc.plan(found, SWEEP, None)
        lengths = [x for x, s in zip(SWEEP, solutions, strict=True) if s.error < 0.05]
        averages = posthoc.reconstruct(found, lengths)
    saved = {
        posthoc.gamma_to_sigma_rel(snapshot.gamma): trial.loss(load_file(snapshot.path))
        for snapshot in found
        if snapshot.step == found[-1].step
    }
    return dict(zip(lengths, map(trial.loss, averages), strict=True)), saved


def table(
    trial: Trial, averages: Averages, history: History, by_length: dict[float, float]
) -> Table:
    """What each feature is worth, and what it takes."""
    step, average, noise = (
        1e3 * statistics.median(seconds)
        for seconds in (history.training, history.averaging, history.stochastic)
    )
    shown = Table(title=f"Held-out loss after {history.steps[-1]:,} steps")
    shown.add_column("weights")
    shown.add_column("loss", justify="right")
    shown.add_column("to raw", justify="right")
    shown.add_column("what they take")

    def add(weights: str, loss: float, takes: str) -> None:
        shown.add_row(weights, f"{loss:.4f}", f"{loss / history.raw[-1] - 1:+.1%}", takes)

    def more(time: float) -> str:
        return f"+ {time:.2f} ms ({time / step:.1%})"

    shown.add_row("raw", f"{history.raw[-1]:.4f}", "", f"{step:.2f} ms a step")
    add("averaged", history.averaged[-1], more(average))
    add("in bfloat16, to nearest", trial.loss(averages.nearest), "half the memory")
    add("in bfloat16, stochastic", trial.loss(averages.stochastic), f"as above, {more(noise)}")
    if by_length:
        length = min(by_length, key=by_length.__getitem__)
        takes = f"snapshots at {SNAPSHOTS} steps"
        add(f"length {length:.3f}, chosen after", by_length[length], takes)
    takes = "no average while training"
    add(f"mean of {len(averages.checkpoints)} checkpoints", trial.loss(averages.merged()), takes)
    return shown


def run(settings: Settings, console: Console) -> History:
    """Train, show the table, and write the pictures and the averaged weights into `out`.

    With several processes, the first shows and writes.
    """
    torch.manual_seed(settings.seed)
    model = Denoiser().to(settings.device)
    with tempfile.TemporaryDirectory(prefix="emajit-demo-") as folder:
        averages = Averages(dict(model.named_parameters()), settings, Path(folder))
        with processes() as (rank, ranks):
            trial = Trial(settings.seed, model, rank, ranks)
            history = watched(settings, trial, averages, console)
        if rank == 0:
            show(settings, trial, averages, history, console)
    return history


def watched(settings: Settings, trial: Trial, averages: Averages, console: Console) -> History:
    """Train with a progress bar."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[losses]}"),
    )
    shown = Progress(*columns, console=console, disable=trial.rank > 0, transient=True)
    with shown as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "an average in .* stalls")  # as the table shows
        task = progress.add_task("", total=settings.steps, losses="")

        def tell(history: History) -> None:
            if history.raw:
                losses = f"raw {history.raw[-1]:.4f}, averaged {history.averaged[-1]:.4f}"
                progress.update(task, losses=losses)
            progress.advance(task)

        return train(settings, trial, averages, tell)


def show(
    settings: Settings, trial: Trial, averages: Averages, history: History, console: Console
) -> None:
    """Show the table, and write pictures and weights."""
    model, out = trial.model, settings.out
    noise = torch.randn(GRID**2, 64, generator=torch.Generator().manual_seed(settings.seed + 1))
    noise = noise.to(settings.device)
    grids = {"raw": sample(model, noise)}
    with emajit.ema_scope(model, averages.shadow):
        grids["averaged"] = sample(model, noise)
    losses = history.steps, history.raw, history.averaged
    files.write(out / "losses.png", lambda file: pictures.draw_losses(*losses, file))
    files.write(out / "samples.png", lambda file: pictures.draw_digits(grids, file))
    by_length, saved = sweep(trial, averages.folder / "snapshots")
    if by_length:
        curve = by_length, saved, history.averaged[-1]
        files.write(out / "lengths.png", lambda file: pictures.draw_sweep(*curve, file))
    checkpoint.save(out / "averaged.safetensors", averages.shadow, settings.steps)
    console.print(table(trial, averages, history, by_length), highlight=False)
    written = ["losses.png", "samples.png", *(["lengths.png"] if by_length else [])]
    written.append("averaged.safetensors")
    told = f"Written into {out}: {', '.join(written)}"
    console.print(told, highlight=False, markup=False)
