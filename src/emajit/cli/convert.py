"""`emajit extract` and `emajit convert`: write the averages of a checkpoint into a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
    if found.raw_only and not WRITERS[layout].by_position:
        shown = ", ".join(found.raw_only[:5]) + (", ..." if len(found.raw_only) > 5 else "")
        none = f"with {len(found.raw_only):,} that are not averages: {shown}"
        console.print(none, highlight=False, markup=False)


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
