"""`emajit inspect`: show the averages in a checkpoint, and the trained weights beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from emajit import merging
from emajit.checkpoint import Averaged, Candidate
from emajit.checkpoint.reading import dtypes_of, inspected

_SAMPLED = 2**14  # numbers of a tensor that a distance compares
_SHOWN = 40  # modules, without a depth


def show_averages(
    path: Path,
    names: Path | None,
    key: str | None,
    raw_key: str | None,
    depth: int | None,
    sigma_rel: str | None,
    *,
    as_json: bool,
    console: Console,
) -> None:
    """Show the candidates of a checkpoint and the average that is read, or print both as JSON.

    Several averages are shown side by side. Raises ValueError and OSError as `checkpoint.read`.
    """
    if merged := merging.told(path):
        text = json.dumps(merged, indent=2)
        table = text if as_json else _merged(path, merged)
        console.print(table, highlight=False, soft_wrap=as_json)
        return
    options: dict[str, Any] = {"names": names_in(names), "key": key, "raw_key": raw_key}
    rows, found = inspected(path, **options, sigma_rel=_lengths(sigma_rel))
    modules = {} if found is None else _distances(found, depth)
    if as_json:
        told = {"candidates": [_as_dict(row) for row in rows], "average": _told(found, modules)}
        console.print(json.dumps(told, indent=2), highlight=False, markup=False, soft_wrap=True)
        return
    if found is None or len(rows) > 1:
        console.print(_table(path, rows), highlight=False)
    if found is None:
        console.print("choose one with --key PATH", highlight=False, markup=False)
        return
    console.print(_summary(path, found), highlight=False)
    if modules:
        console.print(_shown(modules), highlight=False)


def _merged(path: Path, told: Mapping[str, Any]) -> Table:
    """The sources of a file of `emajit merge`."""
    step = "" if told.get("step") is None else f", step {told['step']}"
    by = escape(f"by emajit {told.get('emajit')}{step}")
    table = Table(title=f"{escape(str(path))} is merged", caption=by)
    for column in ("checkpoint", "MiB", "crc32", "coefficient"):
        table.add_column(column, justify="left" if column == "checkpoint" else "right")
    based = [{**told["base"], "coefficient": "base"}] if "base" in told else []
    for each in [*based, *told["sources"]]:
        size, share = f"{each['bytes'] / 2**20:,.1f}", each["coefficient"]
        share = share if isinstance(share, str) else f"{share:.6g}"
        table.add_row(escape(str(each["name"])), size, escape(str(each["crc32"])), share)
    return table


def names_in(file: Path | None) -> list[str] | None:
    """The names in a text file, one a line; None without a file.

    Raises ValueError for a file that is not text, and OSError for one that cannot be read.
    """
    if file is None:
        return None
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (IsADirectoryError, UnicodeDecodeError):
        wanted = r'"\n".join(name for name, _ in model.named_parameters())'
        raise ValueError(
            f"--names: expected a text file, one name a line, as {wanted} gives it, found {file}"
        ) from None
    return [name for line in text.splitlines() if (name := line.strip())]


def _lengths(text: str | None) -> list[float] | None:
    """The numbers in a text, joined by commas; ValueError for others."""
    try:
        return None if text is None else [float(each) for each in text.split(",")]
    except ValueError:
        raise ValueError(f"--sigma-rel: expected numbers joined by commas, found {text}") from None


def nbytes(tensor: Tensor) -> int:
    """The bytes of a dense tensor of this shape and dtype; a sparse tensor has no `nbytes`."""
    return tensor.numel() * tensor.element_size()


def _table(path: Path, rows: list[Candidate]) -> Table:
    table = Table(title=f"Weights in {escape(str(path))}")
    for column in ("key", "tensors", "numbers", "MiB", "dtype", "read as an average because"):
        is_number = column in ("tensors", "numbers", "MiB")
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for key, tensors, why in rows:
        sizes = _count(tensors)
        cells = [f"{sizes['tensors']:,}", f"{sizes['numbers']:,}", f"{sizes['bytes'] / 2**20:,.1f}"]
        dtypes = ", ".join(sizes["dtypes"])
        table.add_row(escape(key) or '"" (the file)', *cells, dtypes, escape(why))
    return table


def _summary(path: Path, found: Averaged) -> Table:
    averages, alone = _averages(found), [n for n in _averages(found) if n not in found.raw]
    summary = Table(title=f"The average in {escape(str(path))}", show_header=False)
    summary.add_row("layout", escape(found.layout))
    summary.add_row("read from", escape(found.path) or "(the file)")
    summary.add_row("because", escape(found.why))
    if found.raw_path:
        summary.add_row("trained weights at", escape(found.raw_path))
    summary.add_row("step", "unknown" if found.step is None else f"{found.step:,}")
    summary.add_row("decay", "unknown" if found.decay is None else f"{found.decay:g}")
    if length := _length(found):
        summary.add_row("length", length)
    summary.add_row("averaged", _sizes(averages.values()))
    rest = [found.weights[name] for name in found.raw_only]
    summary.add_row("trained only", _sizes(rest) + _named(found.raw_only))
    if found.raw and alone:
        summary.add_row("averaged only", _sizes(averages[n] for n in alone) + _named(alone))
    summary.add_row("in neither", _tensors(found.others))
    return summary


def _named(names: Iterable[str]) -> str:
    shown = [*names]
    more = ", ..." if len(shown) > 3 else ""
    return f": {escape(', '.join(shown[:3]))}{more}" if shown else ""


def _length(found: Averaged) -> str:
    """The length of an average, if its decay or its profile is known."""
    if found.sigma_rel is not None:
        return f"{found.sigma_rel:g} of the run (sigma_rel)"
    updates = _updates(found)
    return "" if updates is None else f"{updates:,.0f} updates, 1 / (1 - decay)"


def _updates(found: Averaged) -> float | None:
    if found.decay is None or not 0 <= found.decay < 1:
        return None
    return 1 / (1 - found.decay)


def _averages(found: Averaged) -> dict[str, Tensor]:
    return {n: v for n, v in found.weights.items() if n not in found.raw_only}


def _count(tensors: Iterable[Tensor]) -> dict[str, Any]:
    held = [*tensors]
    return {
        "tensors": len(held),
        "numbers": sum(tensor.numel() for tensor in held),
        "bytes": sum(map(nbytes, held)),
        "dtypes": dtypes_of(held),
    }


def _sizes(tensors: Iterable[Tensor]) -> str:
    count = _count(tensors)
    if not count["tensors"]:
        return "none"
    kinds = f", {' and '.join(count['dtypes'])}" if count["dtypes"] else ""
    size = f"{count['bytes'] / 2**20:,.1f} MiB"
    return f"{_tensors(count['tensors'])}, {count['numbers']:,} numbers, {size}{kinds}"


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count:,} tensors" if count else "none"


def _as_dict(row: Candidate) -> dict[str, Any]:
    return {"key": row.path, **_count(row.tensors), "why": row.why or None}


def _told(found: Averaged | None, modules: Mapping[str, float | None]) -> dict[str, Any] | None:
    if found is None:
        return None
    fields = "path", "raw_path", "why", "layout", "step", "decay", "sigma_rel", "others"
    return {
        **{name: getattr(found, name) for name in fields},
        "averaged": _count(_averages(found).values()),
        "trained_only": [*found.raw_only],
        "averaged_only": [n for n in _averages(found) if found.raw and n not in found.raw],
        "length": _updates(found),
        "distances": {  # JSON has no NaN
            module: distance if distance is None or math.isfinite(distance) else None
            for module, distance in modules.items()
        },
    }


def _distances(found: Averaged, depth: int | None) -> dict[str, float | None]:
    r"""$\|s - p\| / \|p\|$ of averages $s$ and trained weights $p$, by module and over all.

    Only the first numbers of a larger tensor are compared, so that a file of gigabytes is not read.
    None where $p$ is zero.
    """
    averages = {name: v for name, v in _averages(found).items() if name in found.raw}
    if depth is None and _count_of_modules(averages, None) > _SHOWN:
        depth = 1
        while _count_of_modules(averages, depth) < _count_of_modules(averages, depth + 1) <= _SHOWN:
            depth += 1
    squares: dict[str, list[float]] = {}
    for name, average in averages.items():
        if average.is_floating_point():
            scale = max(1.0, average.numel() / _SAMPLED)
            s, p = (_sample(tensor) for tensor in (average, found.raw[name]))
            both = float((s - p).square().sum()), float(p.square().sum())
            for module in dict.fromkeys(["all", _module(name, depth)]):
                sums = squares.setdefault(module, [0.0, 0.0])
                squares[module] = [sum_ + scale * x for sum_, x in zip(sums, both, strict=True)]
    return {
        module: (apart / size) ** 0.5 if size else None for module, (apart, size) in squares.items()
    }


def _count_of_modules(names: Iterable[str], depth: int | None) -> int:
    return len({_module(name, depth) for name in names})


def _sample(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)[:_SAMPLED].double()


def _shown(modules: Mapping[str, float | None]) -> Table:
    table = Table(title="Distance of the averages from the trained weights", min_width=56)
    table.caption = "relative to the norm of the trained weights; an estimate for large tensors"
    table.add_column("module")
    table.add_column("distance", justify="right")
    for name, distance in modules.items():
        table.add_row(escape(name), "" if distance is None else f"{distance:.2%}")
    return table


def _module(name: str, depth: int | None) -> str:
    """The first `depth` parts of a name ("all" for 0); without a depth, up to its first number."""
    if depth == 0:
        return "all"
    modules = name.split(".")[:-1]
    if depth is None:
        ends = [i + 1 for i, part in enumerate(modules) if part.isdigit()]
        depth = ends[0] if ends else len(modules)
    return ".".join(modules[:depth]) or name
