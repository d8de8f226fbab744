r"""Average checkpoints that a run has saved anyway: $\theta = \sum_j c_j \theta_j$, from files.

>>> import tempfile
>>> from pathlib import Path
>>> import torch
>>> from torch import nn
>>> from emajit import merging
>>> model, folder = nn.Linear(8, 1), Path(tempfile.mkdtemp())
>>> for step in range(3):  # train, then
...     torch.save(model.state_dict(), folder / f"step-{step}.pt")
>>> files = merging.newest(folder, 3)
>>> merging.merge(files, folder / "merged.safetensors", "wsm:linear")
[0.25, 0.5, 0.25]

The same on the command line, and with files by name:

```sh
emajit merge --last 3 checkpoints/ -o merged.safetensors --coefficients wsm:linear
emajit merge a.pt b.pt c.pt -o merged.pt
emajit merge --window 1000:5000 averages/ -o merged.safetensors
```

## Which coefficients?

| rule | coefficients | source |
| --- | --- | --- |
| `uniform` | the mean | "model soup" (arXiv 2203.05482), LAWA (2306.03241) |
| `ema:BETA` | an exponential average over the checkpoints | |
| `wsm:linear`, `wsm:cosine`, `wsm:1-sqrt` | an emulated decay of the rate | WSM (2507.17634) |
| numbers | your own, from the oldest to the newest | |

On a small model of digits, merging a run at a constant rate gave a test loss of 0.307, a decaying
rate 0.329 to 0.333, the last weights 0.337; a uniform mean was as good there (3 seeds, nothing
tuned, `python -m bench.studies wsm`).

## Choices

- **Sources**: the files and folders that `emajit.checkpoint.read` takes, and plain models. Where a
  checkpoint holds both kinds of weights, `of="averages"` or `of="trained"` chooses.
- **Adapters** of PEFT: A and B are averaged separately. With `base=MODEL` the mean of their
  products is added to the model.
- **Result**: as its name says, a file of safetensors or of `torch.save`, else like the first
  source. A folder for `from_pretrained` gives another one. `to` chooses otherwise.
- **A stretch of a run**: `--window`, in Python `emajit.posthoc.window`, gives the exact mean of all
  its steps, if means since the start were saved at both ends.

## Limits

- Names, shapes and kinds of number must agree in all sources, coefficients sum to 1, and numbers be
  finite; the error has the first five misfits.
- Sums are taken in float64 and rounded once, or to 16 bits through float32, as torch converts. They
  are taken in pieces of mapped files, which are all the memory that is needed: two sources of 2 GB
  took 23 MB on two cores. Where a tensor has to be loaded (from a folder of
  torch.distributed.checkpoint), memory holds the leaf's sum and one source's leaf;
  before torch 2.11 also what its reader leaves to the garbage collector.
- Checksums take a third of the processor's time without zlib-ng, which the extra `checkpoint`
  brings.
- The result appears whole or not at all. It tells where it comes from: `emajit inspect` shows the
  sources, their coefficients and checksums.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch

from emajit import _tree
from emajit.checkpoint import adapters, files, like, runs, sources, streaming, summing
from emajit.checkpoint.averaged import listed
from emajit.checkpoint.files import load_file
from emajit.checkpoint.saved import MERGED, TIED

__all__ = [  # noqa: RUF022, in the order of use
    "merge",
    "newest",
    "coefficients",
    "wsm",
    "told",
]

Form = Literal["safetensors", "torch", "folder", "distributed"]


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

    Sorted by steps if all hold one, or epochs if all hold these alone, else by names, with numbers
    in numeric order. Where steps and epochs tell two orders, since one of them restarts, names that
    differ in their numbers alone choose one, else the epochs count if a step is there twice. A link
    to another, or a copy (`last.ckpt`) with the same step and weights, is left out.

    Raises ValueError where there are fewer, or two of one step with different weights; where some
    hold no step or, if none does, no number in their names; where steps, epochs and names
    contradict each other; and OSError where the folder cannot be read.
    """
    if count < 1:
        raise ValueError(f"last: expected a number of checkpoints, found {count}")
    held = runs.steps(folder)
    runs.check_order(folder, held)
    found = [*held]
    if len(found) < count:
        raise ValueError(f"{folder}: expected {count} checkpoints, found {len(found)}")
    return found[-count:]


def merge(
    checkpoints: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    rule: str | Sequence[float] = "uniform",
    *,
    of: summing.Of | None = None,
    key: str | None = None,
    names: Iterable[str] | torch.nn.Module | None = None,
    integers: Literal["last", "equal"] = "last",
    allow_any_sum: bool = False,
    dtype: torch.dtype | None = None,
    base: str | os.PathLike[str] | None = None,
    to: Form | None = None,
    tell: Callable[[int], object] = lambda _: None,
    expect: Callable[[int], object] = lambda _: None,
) -> list[float]:
    r"""Write $\sum_j c_j \theta_j$ over the weights in checkpoints; returns the coefficients.

    Args:
        checkpoints: files or folders, from the oldest to the newest: everything that
            `checkpoint.read` takes, and plain models. They may differ in container, not in names,
            shapes and kind of number.
        out: the file or the new folder, in the form of `to`. By default its name tells the form
            (`.safetensors`; `.bin`, `.ckpt`, `.pt`, `.pth` for `torch.save`), else the first
            source (the base, if there is one) does.
        rule: as in `coefficients`.
        of: "averages" or "trained", where a checkpoint holds both.
        key: the path of the averages as in `checkpoint.read`, or of a model. With "trained" the
            weights beside the averages at this path are taken.
        names: the model or its names, for averages without names, likewise.
        integers: "last" takes integer tensors from the last source; with "equal" they must agree.
        allow_any_sum: take coefficients whose sum is not 1.
        dtype: the dtype of floating-point tensors; default, the first source's.
        base: the model of PEFT adapters. The result is this model plus the mean of their products
            $\sum_j c_j s_j B_j A_j$. Without a base A and B are averaged separately, and the
            product of means is not the mean of products.
        to: "safetensors"; "torch" for `torch.save`, with the weights below the keys of the first
            source; "folder" for `from_pretrained`, with the config and the tokenizer beside the
            weights in the first source; "distributed" for a folder of torch.distributed.checkpoint.
        tell: called with the number of bytes of each written piece.
        expect: called once, after all checks of the sources' forms and before the first sum, with
            the number of bytes of all of them.

    The header of a safetensors result, and a record in a file of `torch.save`, have the sources'
    names, sizes and checksums, the coefficients, the last step and emajit's version; `emajit
    inspect` shows them. A checksum is the CRC-32 of the weights that were read, in the order of the
    result.

    Raises:
        TypeError: one path in place of a list.
        ValueError: names, shapes or kinds differ (the message has the first five); a number is not
            finite; the coefficients do not sum to 1; a source changes while it is read, or its
            weights are ambiguous.
        OSError: a file cannot be read or written; FileExistsError for a folder that exists.
    """
    _tree.check_dtype(dtype)
    if isinstance(checkpoints, str | os.PathLike):
        raise TypeError(f"checkpoints: expected a list of paths, found one: {str(checkpoints)!r}")
    paths = [Path(each) for each in checkpoints]
    c = coefficients(rule, len(paths))
    if not allow_any_sum and abs(math.fsum(c) - 1) > 1e-9:
        raise ValueError(
            f"coefficients: expected a sum of 1, found {math.fsum(c):g}; to allow it, pass "
            "allow_any_sum=True, on the command line --allow-any-sum"
        )
    out = Path(out)
    for path in [*paths, *([] if base is None else [Path(base)])]:
        if _is_within(out, path):
            raise ValueError(f"out: expected another place than a source, found {out}")
    known = listed(names)
    held = [summing.Source(path, of, key, known) for path in paths]
    if base is not None:
        model = summing.Source(Path(base))
        sums: summing.Sum = adapters.Deltas(model, held, c)
    else:
        model = None
        summing.check_alike(held)
        sums = summing.Sum(held, c, integers)
    result = _Result(held, c, model, sums, dtype)
    first = sums.first.path
    form = to or _form_of(out, first)
    if form == "folder" and not first.is_dir():
        raise ValueError(f"{first}: expected a folder to write one like it, found a file")
    expect(sum(math.prod(form.shape) * form.dtype.itemsize for form in result.forms.values()))
    if form == "folder":
        like.write_folder_of(out, sums.first.folder, lambda path: result.write(path, tell))
    elif form == "torch":
        result.write_torch(out, tell)
    elif form == "distributed":
        _write_distributed(out, result, tell)
    else:
        result.write(out, tell)
    return c


class _Result:
    """A sum over sources, and where it comes from."""

    def __init__(
        self,
        held: Sequence[summing.Source],
        c: Sequence[float],
        base: summing.Source | None,
        sums: summing.Sum,
        dtype: torch.dtype | None,
    ) -> None:
        self._held, self._c, self._base, self.sums = held, c, base, sums
        self.forms = {
            name: files.Form(shape, dtype if dtype and own.is_floating_point else own)
            for name, (shape, own) in sums.forms().items()
        }

    def write(self, path: Path, tell: Callable[[int], object]) -> None:
        """Write a file of safetensors."""
        tied = {TIED: json.dumps(self.sums.tied)} if self.sums.tied else {}

        def header() -> dict[str, str]:
            return {"format": "pt", **self._provenance(), **tied}

        streaming.write_safetensors(path, self.forms, self._pieces, header, tell)

    def write_torch(self, path: Path, tell: Callable[[int], object]) -> None:
        """Write a file of `torch.save`."""
        of, tied = self.sums.first.nested, self.sums.tied
        streaming.write_torch(path, self.forms, tied, of, self._pieces, self._provenance, tell)

    def _pieces(self, name: str) -> Iterator[streaming.Piece]:
        return self.sums.pieces(name, self.forms[name].dtype)

    def _provenance(self) -> dict[str, str]:
        """Raises ValueError where a source has changed meanwhile."""
        base = [] if self._base is None else [self._base]
        for source in [*base, *self._held]:
            source.check_unchanged()
        try:
            version = metadata.version("emajit")
        except metadata.PackageNotFoundError:
            version = "unknown"
        names = runs.told_apart([source.path.resolve() for source in self._held])
        told: dict[str, Any] = {
            "sources": [_record(*each) for each in zip(self._held, names, self._c, strict=True)],
            "step": self._held[-1].step,
            "emajit": version,
        }
        if base:
            told["base"] = _record(base[0], base[0].path.resolve().name, 1.0)
        return {MERGED: json.dumps(told)}


def _is_within(out: Path, source: Path) -> bool:
    """Whether `out` is a source, or would be in one."""
    places = [out.resolve(), *(out.resolve().parents if source.is_dir() else ())]
    return source.resolve() in places


def _form_of(out: Path, first: Path) -> Form:
    """The form that a name tells, else that of the first source."""
    if out.suffix in sources.OF_TORCH:
        return "torch"
    if out.suffix == ".safetensors":
        return "safetensors"
    if first.is_dir():
        return "distributed" if (first / ".metadata").is_file() else "folder"
    return "safetensors" if files.is_safetensors(first) else "torch"


def _write_distributed(out: Path, result: _Result, tell: Callable[[int], object]) -> None:
    """A folder of torch.distributed.checkpoint, from a file that is mapped meanwhile."""
    from emajit.checkpoint import sharded  # noqa: PLC0415, half a second for this alone

    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        result.write(Path(folder, "merged"), tell)
        sharded.write(out, result.sums.first.nested(load_file(Path(folder, "merged"))))


def told(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The sources and coefficients in a result of `merge`; None for other files and folders."""
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        return told(found[0]) if len(found) == 1 else None
    text = _text_of(path)
    if text is None:
        return None
    try:
        held: dict[str, Any] = json.loads(text)
        for each in [*held["sources"], *([held["base"]] if "base" in held else [])]:
            float(each["coefficient"]), int(each["bytes"]), each["name"], each["crc32"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: expected the merged sources, found {text:.200}") from None
    return held


def _text_of(path: Path) -> str | None:
    if files.is_safetensors(path):
        with files.opened(path) as file:
            told: str | None = (file.metadata() or {}).get(MERGED)
            return told
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.partition("/")[2] == MERGED]
        return archive.read(names[0]).decode(errors="replace") if names else None


def _record(source: summing.Source, name: str, x: float) -> dict[str, Any]:
    return {"name": name, "bytes": source.size, "crc32": source.crc, "coefficient": x}
