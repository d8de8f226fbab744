"""`emajit inspect`: the averages in a checkpoint, shown as tables."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from emajit import checkpoint
from emajit.checkpoint import Averaged


def show_averages(path: Path, names: Path | None, console: Console) -> None:
    """Show layout, step, decay and sizes, and the distance of the averages to the trained weights.

    Raises ValueError and OSError as `checkpoint.read`.
    """
    found = checkpoint.read(path, names=names_in(names))
    averages = {n: v for n, v in found.weights.items() if n not in found.raw_only}
    summary = Table(title=escape(str(path)), show_header=False)
    summary.add_row("layout", escape(found.layout))
    summary.add_row("step", "not told" if found.step is None else f"{found.step:,}")
    summary.add_row("decay", "not told" if found.decay is None else f"{found.decay:g}")
    summary.add_row("averaged", _sizes(averages))
    summary.add_row("trained only", _sizes({name: found.weights[name] for name in found.raw_only}))
    summary.add_row("neither", f"{found.others:,} tensors")
    console.print(summary, highlight=False)
    if found.raw:
        console.print(_distances(averages, found), highlight=False)


def names_in(file: Path | None) -> list[str] | None:
    """The names in a text file, one a line; None without a file.

    Raises ValueError for a file that is not text, and OSError for one that cannot be read.
    """
    if file is None:
        return None
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"--names: expected a text file, one name a line, found {file}") from None
    return [name for line in text.splitlines() if (name := line.strip())]


def nbytes(tensor: Tensor) -> int:
    """The bytes of a dense tensor of this shape and dtype; a sparse tensor has no `nbytes`."""
    return tensor.numel() * tensor.element_size()


def _sizes(tensors: dict[str, Tensor]) -> str:
    numbers = sum(tensor.numel() for tensor in tensors.values())
    size = sum(map(nbytes, tensors.values())) / 2**20
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    kinds = f", {' and '.join(dtypes)}" if dtypes else ""
    return f"{len(tensors):,} tensors, {numbers:,} numbers, {size:,.1f} MiB{kinds}"


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
    """A name up to its first number, such as `model.diffusion_model.input_blocks.3`."""
    parts = name.split(".")
    ends = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: ends[0] + 1] if ends else parts[:-1]) or name
