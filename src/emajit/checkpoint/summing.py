"""The weights of checkpoints, leaf by leaf, and their sum."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from emajit import _alias, _paths, _torch, _tree
from emajit.checkpoint import files, partners, reading, search, sources
from emajit.checkpoint.averaged import Names, NotOneError, not_means
from emajit.checkpoint.streaming import Piece

Of = Literal["averages", "trained"]
ZERO_CRC = "00000000"
_NO_NAMES = Names(None, [])
# Numbers: fewer than torch would divide among threads, which wait for each other for a minute where
# the checksums have a core (2 GB on 2 cores, torch 2.13: 62 s by pieces of 2^16, 2 s by these).
_PART = 2**15 - 1024
# Numbers of one call: operators take many parts at once, since Python runs one thread at a time
# between them (float32, 2 cores: one thread 5.6 GB/s, two part by part 5.4, two by these 9.0).
PIECE = 8 * _PART


class Source:
    """The weights of one checkpoint, read leaf by leaf."""

    def __init__(
        self, path: Path, of: Of | None = None, key: str | None = None, names: Names = _NO_NAMES
    ) -> None:
        self.path, self.crc = path, ZERO_CRC
        self._stats = _stats(path)
        self.size = sum(size for _, size, _ in self._stats)
        tree = sources.content(path, on_disk=True)
        with reading.told_of(path):
            searched = reading.searched_in(tree, path.name)
            weights = _weights(path, searched, of, key, names)
            reading.check_beside(searched.walked, {*map(id, weights.tensors.values())})
        self.keys, self.tensors, self.step = weights[:3]
        for name, value in self.tensors.items():
            if not hasattr(value, "emajit_place"):  # on the disk
                files.check_dense(f"{path}: {name!r}", value)
        self.not_means = weights.not_means
        self.folder = _folder_of(path, weights.place)

    def leaf(self, name: str) -> Tensor:
        """A leaf in host memory, or mapped from the disk."""
        return sources.loaded(self.tensors[name]).detach().resolve_neg()

    def mapped(self, name: str) -> Tensor | None:
        """A leaf, flat and without a copy; None where it has to be loaded or copied."""
        value: Tensor = self.tensors[name]
        return value.detach().view(-1) if value.is_contiguous() and not value.is_meta else None

    def note(self, value: Tensor) -> None:
        """Add the bytes of a contiguous tensor to the checksum."""
        self.crc = files.checksum(value, int(self.crc, 16))

    def nested(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """A state nested below the keys at which this source has its weights."""
        nested: dict[str, Any] = dict(state)
        for key in reversed(self.keys):
            nested = {key: nested}
        return nested

    def check_unchanged(self) -> None:
        if _stats(self.path) != self._stats:
            raise ValueError(f"{self.path}: expected an unchanged file, found it changed meanwhile")


def _stats(path: Path) -> list[tuple[str, int, int]]:
    """The name, size and time of the file, or of each file in a folder."""
    every = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [(each, each.stat()) for each in every if each.is_file()]
    return [(str(each), stat.st_size, stat.st_mtime_ns) for each, stat in found]


def _folder_of(path: Path, place: str) -> Path:
    """The folder that holds the weights at a place in a checkpoint."""
    for key in place.split("."):
        path = path / key if (path / key).is_dir() else path
    return path


class _Weights(NamedTuple):
    """The weights of a checkpoint.

    keys: those that a file like it has above the weights.
    tensors: by name.
    step: beside them.
    place: the path of weights of their form.
    not_means: the names of weights that are no averages.
    """

    keys: tuple[str, ...]
    tensors: dict[str, Any]
    step: int | None
    place: str
    not_means: frozenset[str] = frozenset()


def _weights(
    path: Path, searched: reading.Searched, of: Of | None, key: str | None, names: Names
) -> _Weights:
    """The weights in the content of a checkpoint.

    The averages are read as `checkpoint.read` does, and the trained weights are those beside them.
    """
    found = searched.found
    if key is not None:
        found = [each for each in found if reading.is_below(each.path, key)]
        # Without `of`, a key above an average is that of a state with the average in it.
        is_average = of == "averages" or (found if of else any(key == each.path for each in found))
        found = [reading.average_at(searched, key)] if is_average else []
    elif found and of is None:
        raise ValueError(
            "expected a model, found averages beside it or alone; choose with "
            "of='averages' or of='trained', on the command line --of"
        )
    if found:
        found = search.main(found)
        if len(found) > 1 and of == "averages":
            raise NotOneError(reading.not_one(searched))
        beside = reading.others(searched.held, [*searched.found, *found])
        averaged = [partners.named(each, beside, names, alone=key is not None) for each in found]
        if of != "trained":
            (one,) = averaged
            place = one.path if _is_saved_model(path, one.path) else one.raw_path
            return _Weights((), one.weights, one.step, place, not_means(one))
        trained = {frozenset(map(id, each.raw.values())): each for each in averaged if each.raw}
        if not trained:
            raise ValueError("expected trained weights beside the averages, found none")
        widest = max(trained, key=len)  # one average may be of a module of the other's model
        if not all(each <= widest for each in trained):
            raise NotOneError(reading.not_one(searched))
        one = trained[widest]
        return _Weights((), dict(one.raw), one.step, one.raw_path)
    held = searched.held
    if key is not None:
        keys = tuple(key.split(".")) if key else ()
        held = [search.Part(keys, reading.tensors_at(searched, key), (searched.tree,))]
    try:
        part, tensors = search.one_model(held)
    except ValueError as error:
        last = ", or take the last checkpoints in a folder with --last" if path.is_dir() else ""
        raise ValueError(f"{error}; choose with key, on the command line --key{last}") from None
    return _Weights(part.path, tensors, search.told(part)[0], part.name)


def _is_saved_model(path: Path, place: str) -> bool:
    return (_folder_of(path, place) / "config.json").is_file()


class Sum:
    """The sum over sources, leaf by leaf."""

    def __init__(self, held: Sequence[Source], c: Sequence[float], integers: str) -> None:
        self.first, self._held, self._c, self._integers = held[0], held, c, integers
        self._own = threading.local()
        each = [_ties(source) for source in held]
        # A difference of means is a mean of what lies between, that of other tensors is none.
        self._kept = held[-1].not_means if min(c) < 0 else frozenset[str]()
        self._last = Sum(held[-1:], [1.0], "last") if self._kept else self
        # The names that are tied to the same other name in all sources.
        self.tied = {n: to for n, to in each[0].items() if all(t.get(n) == to for t in each)}

    def forms(self) -> dict[str, files.Form]:
        return {name: files.Form(tuple(v.shape), v.dtype) for name, v in self.first.tensors.items()}

    def pieces(self, name: str, dtype: torch.dtype) -> Iterator[Piece]:
        r"""$\sum_j c_j \theta_j$ in `dtype`, or the integers, flat and in pieces.

        Summed in float64, large pieces in other threads while this one computes checksums. Beside
        averages, with a negative coefficient, tensors that are no means come from the last source.
        """
        if not (dtype.is_floating_point or dtype.is_complex):
            yield self._agreed(name)
            return
        if name in self._kept:
            yield from self._last.pieces(name, dtype)
            return
        mapped = [flat for source in self._held if (flat := source.mapped(name)) is not None]
        if len(mapped) < len(self._held):
            for total in torch.split(self._loaded(name), PIECE):
                yield self._rounded(name, dtype, total)  # at once: a call would hold the leaf
            return
        for values in zip(*(torch.split(flat, PIECE) for flat in mapped), strict=True):
            for source, value in zip(self._held, values, strict=True):
                source.note(value)
            piece = partial(self._piece, name, dtype, values)
            yield piece if len(values[0]) > _PART else piece()  # which is not worth a thread

    def _piece(self, name: str, dtype: torch.dtype, values: Sequence[Tensor]) -> Tensor:
        held, work = (each[: len(values[0])] for each in self._work(wide(values[0])))
        _add(held, values, self._c, work)
        return self._rounded(name, dtype, held)

    def _work(self, dtype: torch.dtype) -> Tensor:
        """Memory of this thread for two pieces: fresh memory costs as much as a sum."""
        held = getattr(self._own, "work", None)
        if held is None or held.dtype != dtype:
            held = self._own.work = torch.empty(2, PIECE, dtype=dtype)
        return held

    def _loaded(self, name: str) -> Tensor:
        """The flat sum of a leaf, with one source's leaf in memory beside it."""
        total = torch.zeros(self.first.tensors[name].numel(), dtype=wide(self.first.tensors[name]))
        work = torch.empty(min(PIECE, len(total)), dtype=total.dtype)
        for i, (source, x) in enumerate(zip(self._held, self._c, strict=True)):
            value = source.leaf(name).contiguous().view(-1)
            source.note(value)
            pieces = zip(torch.split(total, PIECE), torch.split(value, PIECE), strict=True)
            for into, piece in pieces:
                _add(into, [piece], [x], work[: len(into)], is_first=i == 0)
            del value
        return total

    def _rounded(self, name: str, dtype: torch.dtype, total: Tensor) -> Tensor:
        """A flat sum in `dtype`.

        Raises ValueError, with the source and the tensor, for a number that is not finite.
        """
        narrow = torch.empty(len(total), dtype=dtype)
        parts, into = torch.split(total, _PART), torch.split(narrow, _PART)
        _torch.foreach_copy_(into, parts)
        for rounded, part in zip(into, parts, strict=True):
            if dtype.itemsize == 1 or not _is_finite(rounded):  # 8 bits may saturate
                self._check_finite(name, part)
                rounded.copy_(files.cast(repr(name), part, dtype))
        return narrow

    def _check_finite(self, name: str, total: Tensor) -> None:
        if torch.isfinite(total).all():
            return
        for source in self._held:
            if not torch.isfinite(source.leaf(name)).all():
                raise ValueError(f"{source.path}: {name!r}: expected finite numbers")
        raise ValueError(f"{name!r}: expected a sum within float64, found a larger one")

    def _agreed(self, name: str) -> Tensor:
        """The integers of the last source; ValueError where they must agree and do not."""
        result = self._held[-1].leaf(name).contiguous()
        for source in self._held:
            value = source.leaf(name).contiguous()
            source.note(value)
            if self._integers == "equal" and not torch.equal(value, result):
                raise ValueError(
                    f"{source.path}: {name!r}: expected the integers of {self._held[-1].path}, "
                    "found others"
                )
        return result.view(-1)


def wide(value: Tensor) -> torch.dtype:
    """The dtype of sums: float64 or complex128."""
    return _tree.copy_dtype(value, torch.float64)


def _add(
    total: Tensor,
    values: Sequence[Tensor],
    c: Sequence[float],
    work: Tensor,
    *,
    is_first: bool = True,
) -> None:
    """Add the sum of c times values to `total`, or put it there if it is the first."""
    totals, works = torch.split(total, _PART), torch.split(work, _PART)
    for value, x in zip(values, c, strict=True):
        parts = torch.split(value, _PART)
        if is_first:
            _torch.foreach_copy_(totals, parts)
            _torch.foreach_mul_(totals, x)
        else:
            _torch.foreach_copy_(works, parts)
            _torch.foreach_add_(totals, works, alpha=x)
        is_first = False


def _is_finite(values: Tensor) -> bool:
    """Whether all are; in one pass, which large numbers may deceive into False."""
    if values.is_complex():
        values = torch.view_as_real(values)
    return math.isfinite(values.sum(dtype=torch.promote_types(values.dtype, torch.float32)).item())


def _ties(source: Source) -> dict[str, str]:
    return _alias.ties({name: v for name, v in source.tensors.items() if not v.is_meta})


def check_alike(held: Sequence[Source]) -> None:
    """Raise ValueError, with the first five differences, where a source is not like the first."""
    first = held[0]
    for source in held[1:]:
        told = [f"no {name}" for name in first.tensors if name not in source.tensors]
        told += [f"{name} beside" for name in source.tensors if name not in first.tensors]
        for name, value in first.tensors.items():
            other = source.tensors.get(name)
            if other is not None and kind_of(other) != kind_of(value):
                kinds = [f"{kind} of shape {shape}" for kind, shape in map(kind_of, (other, value))]
                told.append(f"{name}, {kinds[0]} for {kinds[1]}")
        if told:
            found = _paths.some(told)
            raise ValueError(f"{source.path}: expected the tensors of {first.path}, found {found}")


def kind_of(value: Any) -> tuple[str, tuple[int, ...]]:
    """The kind of number, and the shape."""
    dtype = value.dtype
    kind = "complex" if dtype.is_complex else "floating" if dtype.is_floating_point else str(dtype)
    return kind, tuple(value.shape)
