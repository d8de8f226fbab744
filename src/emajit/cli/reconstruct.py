"""`emajit reconstruct`: write averages of other lengths, from the snapshots of a run."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from emajit import checkpoint, posthoc
from emajit.checkpoint import files, native
from emajit.checkpoint.saved import opened


def split(words: Iterable[str]) -> tuple[Path, list[float]]:
    """The folder and the lengths among the words of a command, in any order.

    Lengths may also be joined by commas. Raises ValueError where there is not one folder.

    >>> split(["0.06,0.07", "snapshots", "0.08"])[1]
    [0.06, 0.07, 0.08]
    """
    lengths: list[float] = []
    others: list[str] = []
    for word in words:
        try:
            lengths += map(float, word.split(","))
        except ValueError:
            others.append(word)
    if len(others) != 1:
        found = ", ".join(map(repr, others)) or "none"
        raise ValueError(f"expected one folder of snapshots beside the lengths, found {found}")
    return Path(others[0]), lengths


def reconstruct_averages(
    folder: Path,
    sigma_rels: list[float],
    out: Path,
    step: int | None,
    dtype: str,
    plot: bool,
    console: Console,
) -> None:
    """Write the averages of `sigma_rels`: into the file `out`, or several into the folder `out`.

    Raises ValueError and OSError as `posthoc.reconstruct`, and ValueError where `out` cannot be
    written, before any average is read.
    """
    if len(set(map(_name, sigma_rels))) < len(sigma_rels):
        raise ValueError(f"--sigma-rel: expected different lengths, found {sigma_rels}")
    found = posthoc.snapshots(folder)
    if not found:
        raise ValueError(f"{folder}: expected snapshots of emajit.posthoc.save, found none")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        chosen, solutions = posthoc.plan(found, sigma_rels, step)
    for warning in told:
        told_of = f"warning: {warning.message}"
        console.print(told_of, style="yellow", highlight=False, markup=False)
    end = chosen[-1].step if step is None else step
    paths = _paths(out, sigma_rels)
    mine = {snapshot.path.resolve() for snapshot in found}
    if any(path.resolve() in mine for path in paths):
        raise ValueError(f"--out: expected another file than a snapshot, found {out}")
    with opened(chosen[-1].path) as last:
        total = len(last.names())
    with Progress(console=console) as progress:
        task = progress.add_task(f"{len(chosen)} files", total=total)
        averages = posthoc.summed(
            chosen, solutions, getattr(torch, dtype), lambda count: progress.advance(task, count)
        )
    if len(paths) > 1:
        out.mkdir(parents=True, exist_ok=True)
    for path, average, sigma_rel in zip(paths, averages, sigma_rels, strict=True):
        checkpoint.save(path, average, end, metadata={"sigma_rel": repr(sigma_rel)})
    by_length = dict(zip(sigma_rels, solutions, strict=True))
    console.print(_table(paths, by_length, end, len(chosen)))
    if plot:
        from emajit.cli import pictures  # noqa: PLC0415, only this needs matplotlib

        picture = out / "profiles.png" if len(paths) > 1 else _beside(out)
        files.write(picture, lambda file: pictures.draw_profiles(chosen, by_length, end, file))
        console.print(f"Drawn: {picture}", highlight=False, markup=False)


def _table(
    paths: list[Path], solutions: dict[float, posthoc.Solution], step: int, count: int
) -> Table:
    shown = Table(title=f"After {step} steps, from {count} files")
    shown.caption = "error of the profile, relative to its norm"
    for column in ("sigma_rel", "relative error", "file"):
        shown.add_column(column)
    for path, (sigma_rel, solution) in zip(paths, solutions.items(), strict=True):
        shown.add_row(f"{sigma_rel:g}", f"{solution.error:.1e}", escape(str(path)))
    return shown


def _paths(out: Path, sigma_rels: list[float]) -> list[Path]:
    """The files to write; ValueError, before anything is written, if one cannot be."""
    one = len(sigma_rels) == 1
    if one and out.is_dir():
        raise ValueError(f"--out: expected a file to write, found a folder: {out}")
    folder = out.parent if one else _nearest(out)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        found = f"{folder}: {error.strerror}"
        raise ValueError(f"--out: expected a folder to write into, found {found}") from None
    if one:
        native.check_name(out)
        return [out]
    return [out / _name(sigma_rel) for sigma_rel in sigma_rels]


def _beside(out: Path) -> Path:
    return out.with_suffix(".png") if out.suffix == ".safetensors" else Path(f"{out}.png")


def _nearest(folder: Path) -> Path:
    """`folder`, or the nearest of its parents that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _name(sigma_rel: float) -> str:
    return f"sigma-{sigma_rel:g}.safetensors"
