"""`emajit merge`: average several checkpoints into one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from emajit import merging


def merge_checkpoints(
    sources: list[Path],
    out: Path,
    rule: str,
    last: int | None,
    dtype: str | None,
    console: Console,
    **options: Any,
) -> None:
    """Merge the sources, or the `last` checkpoints in a folder, and show the coefficients.

    Raises ValueError and OSError as `merging.merge`.
    """
    if last is not None:
        if len(sources) != 1 or not sources[0].is_dir():
            raise ValueError(f"--last: expected one folder of checkpoints, found {len(sources)}")
        sources = merging.newest(sources[0], last)
    shares = merging.coefficients(rule, len(sources))
    table = Table("checkpoint", "coefficient")
    for source, share in zip(sources, shares, strict=True):
        table.add_row(escape(source.name), f"{share:.6g}")
    console.print(table, highlight=False)
    if options["base"] is None and any(
        (source / "adapter_config.json").is_file() for source in sources
    ):
        told = (
            "note: A and B of these adapters are averaged apart, and the product of means is not "
            "the mean of products; --base MODEL merges the products"
        )
        console.print(told, style="yellow", highlight=False, markup=False)
    columns = TextColumn("merging"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        merging.merge(
            sources,
            out,
            shares,
            dtype=None if dtype is None else getattr(torch, dtype),
            tell=lambda size: progress.advance(task, size),
            **options,
        )
    console.print(f"written into {out}", highlight=False, markup=False)
