"""`emajit inspect`, `extract` and `convert`: the averages of a checkpoint, shown or in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor

from emajit import checkpoint
from emajit.checkpoint import Averaged, formats


def inspect(path: Path, names: Path | None, console: Console) -> None:
    """Show layout, step, decay and sizes, and how far averages and trained weights are apart.

    Raises ValueError and OSError as `checkpoint.read`.
    """
    found = checkpoint.read(path, names=_lines(names))
    averages = {n: v for n, v in found.weights.items() if n not in found.raw_only}
    told = Table(title=escape(str(path)), show_header=False)
    told.add_row("layout", escape(found.layout))
    told.add_row("step", "not told" if found.step is None else f"{found.step:,}")
    told.add_row("decay", "not told" if found.decay is None else f"{found.decay:g}")
    told.add_row("averaged", _sizes(averages))
    told.add_row("trained only", _sizes({name: found.weights[name] for name in found.raw_only}))
    told.add_row("neither", f"{found.others:,} tensors")
    console.print(told, highlight=False)
    if found.raw:
        console.print(_distances(averages, found), highlight=False)


def _sizes(tensors: dict[str, Tensor]) -> str:
    numbers = sum(tensor.numel() for tensor in tensors.values())
    size = sum(map(_nbytes, tensors.values())) / 2**20
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    kinds = f", {' and '.join(dtypes)}" if dtypes else ""
    return f"{len(tensors):,} tensors, {numbers:,} numbers, {size:,.1f} MiB{kinds}"


def _nbytes(tensor: Tensor) -> int:
    """As a dense one has, which a sparse one does not tell."""
    return tensor.numel() * tensor.element_size()


def _distances(averages: dict[str, Tensor], found: Averaged) -> Table:
    r"""$\|s - p\| / \|p\|$ of averages $s$ and trained weights $p$, for each block of a model."""
    squares: dict[str, list[float]] = {}
    for name, average in averages.items():
        raw = found.raw.get(name)
        if raw is not None and average.is_floating_point():
            block = squares.setdefault(_block(name), [0.0, 0.0])
            block[0] += float((average.double() - raw.double()).square().sum())
            block[1] += float(raw.double().square().sum())
    table = Table(title="Distance of averaged and trained weights, relative to the trained ones")
    table.add_column("block")
    table.add_column("distance", justify="right")
    for name, (apart, size) in squares.items():
        table.add_row(escape(name), f"{(apart / size) ** 0.5:.2%}" if size else "")
    return table


def _block(name: str) -> str:
    """Up to the first number of a name: `model.diffusion_model.input_blocks.3` of what is in it."""
    parts = name.split(".")
    ends = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: ends[0] + 1] if ends else parts[:-1]) or name


def extract(
    path: Path,
    names: Path | None,
    out: Path,
    layout: str,
    decay: float | None,
    step: int | None,
    dtype: str | None,
    console: Console,
) -> None:
    """Write the averages of a checkpoint into a file, in a layout of `checkpoint.write`.

    Raises ValueError and OSError as `checkpoint.read` and `checkpoint.write`.
    """
    if out.exists() and path.exists() and out.samefile(path):
        raise ValueError(f"--out: expected another file than the checkpoint, found {out}")
    listed = _lines(names)
    found = checkpoint.read(path, names=listed)
    with _told(found, layout, console) as tell:
        checkpoint.write(
            out,
            found,
            layout=layout,
            names=listed,
            decay=decay,
            step=step,
            dtype=None if dtype is None else getattr(torch, dtype),
            tell=tell,
        )
    count = len(found.weights) - len(found.raw_only)
    written = f"{found.layout}: {count:,} averages, written into {out}"
    console.print(written, highlight=False, markup=False)
    if found.raw_only and layout not in formats.BY_POSITION:
        shown = ", ".join(found.raw_only[:5]) + (", ..." if len(found.raw_only) > 5 else "")
        none = f"with {len(found.raw_only):,} that are none: {shown}"
        console.print(none, highlight=False, markup=False)


@contextmanager
def _told(found: Averaged, layout: str, console: Console) -> Iterator[Callable[[int], None]]:
    """A bar of the bytes that are written, from the first on."""
    parts = [found.weights, *([found.raw] if layout == "litema" else [])]
    total = sum(_nbytes(tensor) for part in parts for tensor in part.values())
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


def _lines(names: Path | None) -> list[str] | None:
    if names is None:
        return None
    try:
        text = names.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"--names: expected a text file, one name a line, found {names}") from None
    return [name for line in text.splitlines() if (name := line.strip())]
