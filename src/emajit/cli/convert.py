"""`emajit extract` and `emajit convert`: write the averages of a checkpoint into a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from emajit import checkpoint
from emajit.checkpoint import Averaged
from emajit.checkpoint.layouts import WRITERS
from emajit.cli.inspect import nbytes


def write_averages(
    path: Path,
    found: Averaged,
    names: list[str] | None,
    out: Path,
    layout: str,
    like: Path | None,
    decay: float | None,
    step: int | None,
    dtype: str | None,
    console: Console,
) -> None:
    """Write the averages found in a checkpoint into a file, in a layout of `checkpoint.write`.

    Raises ValueError and OSError as `checkpoint.write`.
    """
    if out.exists() and path.exists() and out.samefile(path):
        raise ValueError(f"--out: expected another file than the checkpoint, found {out}")
    with _progress(found, layout, console) as tell:
        checkpoint.write(
            out,
            found,
            layout=layout,
            names=names,
            like=like,
            decay=decay,
            step=step,
            dtype=None if dtype is None else getattr(torch, dtype),
            tell=tell,
        )
    count = len(found.weights) - len(found.raw_only)
    written = f"{found.layout}: {count:,} averages, written into {out}"
    console.print(written, highlight=False, markup=False)
    if found.raw_only and not WRITERS[layout].by_position and not WRITERS[layout].place:
        shown = ", ".join(found.raw_only[:5]) + (", ..." if len(found.raw_only) > 5 else "")
        none = f"with {len(found.raw_only):,} that are not averages: {shown}"
        console.print(none, highlight=False, markup=False)
    if lost := _lost(found, layout, decay):
        console.print(lost, style="yellow", highlight=False, markup=False, soft_wrap=True)


def _lost(found: Averaged, layout: str, decay: float | None) -> str:
    """A line on the options of diffusers' `EMAModel` that are not carried over, or ""."""
    options = WRITERS[layout].options
    if options and not found.options:
        written = {"decay": found.decay if decay is None else decay, **options}
        told = "the checkpoint does not tell how its decay rises; written with"
        return f"warning: {told} {_shown(written)}"
    if found.options and not options and layout != "state_dict":
        return f"warning: {layout} has no place for {_shown(found.options)}"
    return ""


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in options.items()
    )


@contextmanager
def _progress(found: Averaged, layout: str, console: Console) -> Iterator[Callable[[int], None]]:
    """A bar of the written bytes, which appears with the first write."""
    parts = [found.weights, *([found.raw] if layout == "litema" else [])]
    total = sum(nbytes(tensor) for part in parts for tensor in part.values())
    columns = TextColumn("writing"), BarColumn(), DownloadColumn()
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = progress.add_task("", total=total)

    def tell(size: int) -> None:
        progress.start()
        progress.advance(task, size)

    try:
        yield tell
    finally:
        if progress.live.is_started:
            progress.stop()
