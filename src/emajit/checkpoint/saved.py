"""The record beside the tensors in a file of `checkpoint.save`, and how such a file is read."""

from __future__ import annotations

import json
import operator
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emajit.checkpoint import files

# Keys in the header of a safetensors file, written by `save`, by `write` and by `merging.merge`.
KEY, TIED, MERGED = "emajit", "emajit.tied", "emajit.merged"
SHADOW = "shadow."  # before the names of the leaves in a folder of `save_sharded`


class Record(NamedTuple):
    """The step, the written leaf's name for each leaf tied to it, and the user's metadata."""

    step: int
    tied: dict[str, str]
    metadata: dict[str, str]

    def seed(self) -> int:
        """The seed of the tensors' checksums, so that they fit no file with another record."""
        return zlib.crc32(json.dumps(self, sort_keys=True).encode())

    def header(
        self, checksums: Mapping[str, str], forms: Mapping[str, files.Form]
    ) -> dict[str, str]:
        ours = {"step": self.step, "tied": self.tied, "crc32": dict(checksums)}
        return {
            **self.metadata,
            "format": "pt",
            KEY: json.dumps({**ours, "forms": _checksum_of(forms)}),
        }


def _checksum_of(forms: Mapping[str, files.Form]) -> int:
    """A checksum of shapes and dtypes, so that the same bytes are not read as other numbers."""
    told = {name: [*shape, str(dtype)] for name, (shape, dtype) in forms.items()}
    return zlib.crc32(json.dumps(told, sort_keys=True).encode())


def count(step: Any) -> int:
    """The number of updates as an int; TypeError and ValueError name the step."""
    try:
        if isinstance(step, bool) or getattr(step, "dtype", None) is torch.bool:
            raise TypeError  # noqa: TRY301, as for any other type
        number = operator.index(step)
    except (TypeError, RuntimeError):
        raise TypeError(f"step: expected an int or a 0-d integer tensor, found {step!r}") from None
    if number < 0:
        raise ValueError(f"step: expected the number of updates so far, >= 0, found {number}")
    if number >= 2**63:
        raise ValueError(f"step: expected a number of updates below 2**63, found {number}")
    return number


class Saved:
    """A file of `checkpoint.save`, open for reading tensor by tensor."""

    def __init__(self, path: Path, file: Any) -> None:
        """Raise ValueError, with the path, where the record is missing or does not fit."""
        header = file.metadata() or {}
        if KEY not in header:
            raise ValueError(
                f"{path}: expected a file of emajit.checkpoint.save, found one of another program; "
                "try emajit.checkpoint.read"
            )
        ours = header[KEY]
        own = {key: v for key, v in header.items() if key not in ("format", KEY)}
        self.path, self._file = path, file
        try:
            told = json.loads(ours)
            forms = {name: files.form(file, name) for name in file.keys()}  # noqa: SIM118
            # The first files had no checksum of the forms.
            known = told.pop("forms", _checksum_of(forms))
            step, tied, self._crc32 = (told.pop(key) for key in ("step", "tied", "crc32"))
            self.record = Record(step, tied, own)
            fits = (
                not told
                and (type(step), type(tied), type(self._crc32)) == (int, dict, dict)
                and step >= 0
                and set(forms) == set(self._crc32)
                and tied.keys().isdisjoint(forms)
                and known == _checksum_of(forms)
                and all(isinstance(kept, str) and kept in self._crc32 for kept in tied.values())
            )
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            fits = False
        if not fits:
            raise ValueError(
                f"{path}: expected a step and a checksum of each tensor, found {ours:.200}"
            )

    def names(self) -> list[str]:
        """The names of the written leaves, then the names tied to one of them."""
        return [*self._crc32, *self.record.tied]

    def form(self, name: str) -> tuple[tuple[int, ...], torch.dtype | str]:
        """The shape and dtype of a leaf."""
        return files.form(self._file, self.record.tied.get(name, name))

    def read(self, name: str) -> Tensor:
        """A leaf, mapped from the file, after a check of its checksum."""
        kept = self.record.tied.get(name, name)
        host: Tensor = self._file.get_tensor(kept)
        if files.checksum(host, self.record.seed()) != self._crc32[kept]:
            raise ValueError(
                f"{self.path}: {name!r} is corrupt: its checksum differs from the saved one"
            )
        return host


@contextmanager
def opened(path: Path) -> Iterator[Saved]:
    with files.opened(path) as file:
        yield Saved(path, file)
