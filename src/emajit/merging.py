r"""Averages over checkpoints of a run: $\theta = \sum_j c_j \theta_j$, leaf by leaf, from files.

The mean of the last checkpoints ("model soup", arXiv 2203.05482; LAWA, 2306.03241), an exponential
average of them, or an emulated decay of the learning rate (WSM, 2507.17634):

    emajit merge --last 5 checkpoints/ -o merged.safetensors
    emajit merge a.pt b.pt c.pt -o merged.pt --coefficients wsm:1-sqrt

Sums are taken in float64 and rounded once. Memory holds one leaf of each source at a time, beside
the mapped files. The result appears whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from emajit import _tree
from emajit.checkpoint import files, like, search, sources, summing
from emajit.checkpoint.saved import TIED

__all__ = ["coefficients", "merge", "newest", "told", "wsm"]

KEY = "emajit.merged"  # in the header of a result


def wsm(decays: Sequence[float]) -> list[float]:
    r"""The coefficients of checkpoints $\theta_0, \dots, \theta_n$ for a decay of the rate.

    A decay $1 \ge w_1 \ge \dots \ge w_n \ge 0$ of the steps between checkpoints would have given
    $\theta_0 + \sum_i w_i (\theta_i - \theta_{i-1})$, had it not changed the gradients. That is
    $\sum_j c_j \theta_j$ with $c_0 = 1 - w_1$, $c_j = w_j - w_{j+1}$ and $c_n = w_n$
    (arXiv 2507.17634).

    >>> wsm([0.75, 0.25])
    [0.25, 0.5, 0.25]
    """
    if not decays:
        raise ValueError("decays: expected one for each step between two checkpoints, found none")
    bounded = [1.0, *map(float, decays), 0.0]
    if not all(a >= b for a, b in pairwise(bounded)):
        raise ValueError(f"decays: expected 1 >= w_1 >= ... >= w_n >= 0, found {[*decays]}")
    return [a - b for a, b in pairwise(bounded)]


CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "1-sqrt": lambda t: 1 - math.sqrt(t),
}


def coefficients(rule: str | Sequence[float], count: int) -> list[float]:
    r"""The coefficients of `count` checkpoints, from the oldest to the newest.

    Args:
        rule: "uniform"; "ema:BETA" for $c_j = (1 - \beta) \beta^{n-j}$, the oldest with
            $\beta^n$; "wsm:linear", "wsm:cosine" or "wsm:1-sqrt" for `wsm` of a curve that falls
            from 1 at the oldest to 0 at the newest, taken in the middle of each step; or the
            numbers, in text with commas.
        count: how many checkpoints there are, at least 1.

    Raises ValueError for another rule, or another number of numbers.

    >>> coefficients("uniform", 4)
    [0.25, 0.25, 0.25, 0.25]
    >>> coefficients("ema:0.5", 3)
    [0.25, 0.25, 0.5]
    >>> coefficients("wsm:linear", 3)
    [0.25, 0.5, 0.25]
    >>> coefficients("2,-1", 2)
    [2.0, -1.0]
    """
    if count < 1:
        raise ValueError("sources: expected checkpoints, found none")
    kind, _, told = rule.partition(":") if isinstance(rule, str) else ("", "", "")
    if rule == "uniform":
        return [1 / count] * count
    if kind == "ema":
        beta = _number(told, rule)
        if not 0 <= beta <= 1:
            raise ValueError(f"coefficients: expected ema:BETA with BETA in [0, 1], found {rule!r}")
        return [beta ** (count - 1)] + [
            (1 - beta) * beta ** (count - 1 - j) for j in range(1, count)
        ]
    if kind == "wsm" and told in CURVES:
        steps = count - 1
        if not steps:
            return [1.0]
        return wsm([CURVES[told]((i + 0.5) / steps) for i in range(steps)])
    if isinstance(rule, str):
        numbers = [_number(each, rule) for each in rule.split(",")]
    else:
        numbers = [float(each) for each in rule]
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(
            f"coefficients: expected {count} finite numbers, one a source, found {numbers}"
        )
    return numbers


def _number(text: str, rule: object) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            "coefficients: expected uniform, ema:BETA, wsm:linear, wsm:cosine, wsm:1-sqrt, or "
            f"numbers with commas, found {rule!r}"
        ) from None


def newest(folder: str | os.PathLike[str], count: int) -> list[Path]:
    """The last `count` checkpoints in a folder, from the oldest to the newest.

    Sorted by their steps if all hold one, else by their names, with numbers in numeric order. A
    link to another of them, or a copy (`last.ckpt`) with the same step and weights, is left out.

    Raises ValueError where there are fewer, or two of one step with different weights, and OSError
    where the folder cannot be read.
    """
    if count < 1:
        raise ValueError(f"last: expected a number of checkpoints, found {count}")
    every = sorted(filter(_is_checkpoint, Path(folder).iterdir()), key=_natural)
    found = [each for each in every if not (each.is_symlink() and each.resolve() in _real(every))]
    steps = {each: _step_of(each) for each in found}
    if all(step is not None for step in steps.values()):
        found = []
        for each in sorted(steps, key=lambda path: steps[path] or 0):
            if found and steps[found[-1]] == steps[each]:
                _check_copies(found[-1], each)
            else:
                found.append(each)
    if len(found) < count:
        raise ValueError(f"{folder}: expected {count} checkpoints, found {len(found)}")
    return found[-count:]


def _real(paths: Sequence[Path]) -> set[Path]:
    return {path.resolve() for path in paths if not path.is_symlink()}


def _check_copies(one: Path, other: Path) -> None:
    """Raise ValueError unless two checkpoints have the same weights."""
    a, b = (
        {(part.path, i): leaf for part in _parts(path) for i, leaf in enumerate(part.values())}
        for path in (one, other)
    )
    if a.keys() != b.keys() or not all(
        leaf.dtype == b[key].dtype and torch.equal(sources.loaded(leaf), sources.loaded(b[key]))
        for key, leaf in a.items()
    ):
        raise ValueError(
            f"{other}: expected one checkpoint of each step, found {one.name} of the same step "
            "with other weights; give the files in their order"
        )


def _parts(path: Path) -> list[search.Part]:
    return search.parts(search.containers(sources.content(path, on_disk=True)))


def _is_checkpoint(path: Path) -> bool:
    if path.name.startswith("."):  # a file that is still being written
        return False
    return path.is_dir() or (path.is_file() and path.suffix in sources.SUFFIXES)


def _step_of(path: Path) -> int | None:
    """The step that a checkpoint holds, or None."""
    found = [search.told(part)[0] for part in _parts(path)] or [None]
    return found[0]


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """A key by which "step-9" comes before "step-10"."""
    pieces = re.split(r"(\d+)", path.name)
    return [(0, int(each)) if each.isdecimal() else (1, each) for each in pieces if each]


def merge(
    checkpoints: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    rule: str | Sequence[float] = "uniform",
    *,
    of: summing.Of | None = None,
    key: str | None = None,
    integers: Literal["last", "equal"] = "last",
    allow_any_sum: bool = False,
    dtype: torch.dtype | None = None,
    base: str | os.PathLike[str] | None = None,
    tell: Callable[[int], object] = lambda _: None,
) -> list[float]:
    r"""Write $\sum_j c_j \theta_j$ over the weights in checkpoints; returns the coefficients.

    Args:
        checkpoints: files or folders, from the oldest to the newest: everything that
            `checkpoint.read` takes, and plain models. They may differ in container, not in names,
            shapes and kind of number.
        out: the file; or a new folder with config and tokenizer, if the first source is a folder
            for `from_pretrained`. A file is written with safetensors, or with `torch.save` if it
            ends in `.bin`, `.ckpt`, `.pt` or `.pth`.
        rule: as in `coefficients`.
        of: "averages" or "trained", where a checkpoint holds both.
        key: the path of the weights, as in `checkpoint.read`.
        integers: "last" takes integer tensors from the last source; with "equal" they must agree.
        allow_any_sum: take coefficients whose sum is not 1.
        dtype: the dtype of floating-point tensors; default, the first source's.
        base: the model of PEFT adapters. The result is this model plus the mean of their products
            $\sum_j c_j s_j B_j A_j$. Without a base A and B are averaged separately, and the
            product of means is not the mean of products.
        tell: called with the number of bytes of each written tensor.

    The header of a safetensors result has the sources' names, sizes and checksums, the coefficients
    and emajit's version; `emajit inspect` shows it.

    Raises:
        ValueError: names, shapes or kinds differ (the message has the first five); a number is not
            finite; the coefficients do not sum to 1; a source changes while it is read, or its
            weights are ambiguous.
        OSError: a file cannot be read or written; FileExistsError for a folder that exists.
    """
    _tree.check_dtype(dtype)
    paths = [Path(each) for each in checkpoints]
    c = coefficients(rule, len(paths))
    if not allow_any_sum and abs(math.fsum(c) - 1) > 1e-9:
        raise ValueError(
            f"coefficients: expected a sum of 1, found {math.fsum(c):g}; to allow it, pass "
            "allow_any_sum=True, on the command line --allow-any-sum"
        )
    out = Path(out)
    if any(out.exists() and out.samefile(path) for path in paths):
        raise ValueError(f"out: expected another place than a source, found {out}")
    held = [summing.Source(path, of, key) for path in paths]
    if base is not None:
        sums: summing.Sum = summing.Deltas(summing.Source(Path(base), of, None), held, c)
    else:
        summing.check_alike(held)
        sums = summing.Sum(held, c, integers)
    forms = {
        name: files.Form(
            form.shape, dtype if dtype and form.dtype.is_floating_point else form.dtype
        )
        for name, form in sums.forms().items()
    }

    def leaf(name: str) -> Tensor:
        return sums.leaf(name, forms[name].dtype)

    def header(*_: object) -> dict[str, str]:
        for source in held:
            source.check_unchanged()
        told = {"format": "pt", KEY: json.dumps(_provenance(held, c))}
        return told | ({TIED: json.dumps(sums.tied)} if sums.tied else {})

    first = Path(base) if base is not None else paths[0]
    if first.is_dir() and not out.suffix:
        like.write_folder_of(
            out, first, lambda path: files.write_leaves(path, forms, leaf, header, tell=tell)
        )
    elif out.suffix in sources.OF_TORCH:
        state = {name: leaf(name) for name in forms if name not in sums.tied}
        state = {name: state[sums.tied.get(name, name)] for name in forms}
        header()
        files.write_torch(out, sums.first.nested(state), tell)
    else:
        files.write_leaves(out, forms, leaf, header, tell=tell)
    return c


def told(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The sources and coefficients in a safetensors result of `merge`; None for other files."""
    path = Path(path)
    if path.is_dir() or not files.is_safetensors(path):
        return None
    with files.opened(path) as file:
        text = (file.metadata() or {}).get(KEY)
    if text is None:
        return None
    try:
        held: dict[str, Any] = json.loads(text)
        for each in held["sources"]:
            float(each["coefficient"]), int(each["bytes"]), each["name"], each["crc32"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: expected the merged sources, found {text:.200}") from None
    return held


def _provenance(held: Sequence[summing.Source], c: Sequence[float]) -> dict[str, Any]:
    try:
        version = metadata.version("emajit")
    except metadata.PackageNotFoundError:
        version = "unknown"
    told = [
        {"name": source.path.name, "bytes": source.size, "crc32": source.crc, "coefficient": x}
        for source, x in zip(held, c, strict=True)
    ]
    return {"sources": told, "step": held[-1].step, "emajit": version}
