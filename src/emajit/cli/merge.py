"""`emajit merge`: average several checkpoints into one file."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from emajit import merging, posthoc
from emajit.checkpoint import runs


def merge_checkpoints(
    sources: list[Path],
    out: Path,
    rule: str | None,
    last: int | None,
    window: str | None,
    dtype: str | None,
    console: Console,
    **options: Any,
) -> None:
    """Merge the sources, or some of those in a folder, and show the coefficients.

    Raises ValueError and OSError as `merging.merge`.
    """
    sources, shares, told = _chosen(sources, rule, last, window)
    if window is not None:
        options |= {"of": options["of"] or "averages"}
    columns = TextColumn("merging"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task("", total=None)
    with ExitStack() as bar:

        def expect(size: int) -> None:
            _show(sources, shares, told, console, is_whole=options["base"] is not None)
            progress.update(task, total=size)
            bar.enter_context(progress)

        merging.merge(
            sources,
            out,
            shares,
            dtype=None if dtype is None else getattr(torch, dtype),
            tell=lambda size: progress.advance(task, size),
            expect=expect,
            **options,
        )
    console.print(f"written into {out}", highlight=False, markup=False)


def _show(
    sources: list[Path], shares: list[float], told: str, console: Console, *, is_whole: bool
) -> None:
    """Show what is merged."""
    if told:
        console.print(told, highlight=False, markup=False)
    table = Table("checkpoint", "coefficient")
    for name, share in zip(runs.told_apart(sources), shares, strict=True):
        table.add_row(escape(name), f"{share:.6g}")
    console.print(table, highlight=False)
    if not is_whole and any((source / "adapter_config.json").is_file() for source in sources):
        told = (
            "note: A and B of these adapters are averaged apart, and the product of means is not "
            "the mean of products; --base MODEL merges the products"
        )
        console.print(told, style="yellow", highlight=False, markup=False)


def _chosen(
    sources: list[Path], rule: str | None, last: int | None, window: str | None
) -> tuple[list[Path], list[float], str]:
    """The checkpoints, their coefficients, and a word on how they were found."""
    if window is not None:
        if last is not None or rule is not None:
            raise ValueError("--window: expected neither --last nor --coefficients beside it")
        start, stop = _steps(window)
        given = sources
        if len(sources) == 1 and sources[0].is_dir():
            found = posthoc.snapshots(sources[0])
            given = [each.path for each in found] or [*runs.checkpoints(sources[0])]
        shares = posthoc.window_of(given, start, stop)
        return [*shares], [*shares.values()], f"the mean of the steps {start + 1} to {stop}"
    told = ""
    if last is not None:
        if len(sources) != 1 or not sources[0].is_dir():
            what = f"{len(sources)} sources" if len(sources) != 1 else f"a file: {sources[0]}"
            raise ValueError(f"--last: expected one folder of checkpoints, found {what}")
        held = runs.steps(sources[0])
        sources = merging.newest(sources[0], last)
        moments = [each for each in held.values() if each is not None]
        by = "names" if not moments else "epochs" if moments[0].step is None else "steps"
        told = f"the last {last} of {len(held)} checkpoints, by their {by}"
        if moments:
            told += f": {', '.join(str(held[each]) for each in sources)}"
    return sources, merging.coefficients(rule or "uniform", len(sources)), told


def _steps(window: str) -> tuple[int, int]:
    start, _, stop = window.partition(":")
    if not (start.isdecimal() and stop.isdecimal()):
        raise ValueError(f"--window: expected START:STOP in steps, found {window!r}")
    return int(start), int(stop)
