"""Folders of `torch.distributed.checkpoint`, written and read by any number of processes."""

from __future__ import annotations

import errno
import inspect
import io
import math
import operator
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save

_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(n for n, v in vars(torch).items() if isinstance(v, torch.dtype))},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
}


_LONGEST_NUMBER = 2**14  # bytes; `torch.save` writes 1.3 KiB for an int


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _KNOWN.get(module.removesuffix("._local"), ()):
            raise pickle.UnpicklingError(f"{module}.{name} is nothing that a .metadata holds")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """A reader that reads the index once, unpickles only the classes of an index, and checks it."""

    def __init__(self, path: Path) -> None:
        """Raise ValueError, with the path, where the index is broken."""
        super().__init__(path)
        file = path / ".metadata"
        try:
            with file.open("rb") as opened:
                self.index: Metadata = _Unpickler(opened).load()
            self.tensors = {
                key: entry
                for key, entry in self.index.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            for key, entry in self.tensors.items():
                _check_chunks(key, entry)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001, of a broken pickle it may be any
            raise ValueError(f"{file}: expected the index of a checkpoint, found {error}") from None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.index


def _check_chunks(key: str, entry: TensorStorageMetadata) -> None:
    """Raise ValueError unless the chunks of a tensor cover it exactly, without overlap."""
    size, dtype = [operator.index(n) for n in entry.size], entry.properties.dtype
    if not isinstance(key, str) or not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key!r} of {dtype}")  # noqa: TRY004, it is a broken file
    boxes = [[*zip(chunk.offsets, chunk.sizes, strict=True)] for chunk in entry.chunks]
    held = 0
    active: list[list[tuple[int, int]]] = []
    for box in sorted(box for box in boxes if all(n for _, n in box)):
        fits = len(box) == len(size) and all(
            0 <= begin < begin + n <= whole for (begin, n), whole in zip(box, size, strict=True)
        )
        active = [other for other in active if not box or sum(other[0]) > box[0][0]]
        if not fits or any(_overlap(box, other) for other in active):
            raise ValueError(f"a chunk of {key!r} at {box} in {size}, beside {active}")
        held += math.prod(n for _, n in box)
        active.append(box)
    if held != math.prod(size):
        raise ValueError(f"{held} numbers of {key!r}, whose size is {size}")


def _overlap(box: list[tuple[int, int]], other: list[tuple[int, int]]) -> bool:
    return all(a < b + m and b < a + n for (a, n), (b, m) in zip(box, other, strict=True))


class Folder:
    """A folder and the forms of its tensors; at first only the index is read."""

    def __init__(self, path: Path) -> None:
        """Raise ValueError, with the path, where there is no such folder or its index is broken."""
        if not (path / ".metadata").is_file():  # which is written last
            raise ValueError(
                f"{path}: expected a complete folder of torch.distributed.checkpoint, found none"
            )
        self.path, self._reader = path, _Reader(path)
        self.forms = {
            key: (tuple(entry.size), entry.properties.dtype)
            for key, entry in self._reader.tensors.items()
        }
        # For each tensor the keys that led to it when it was saved.
        self.places: dict[str, tuple[Any, ...]] = self._reader.index.planner_data or {}

    def numbers(self) -> dict[str, Any]:
        """The single numbers and strings among the pickled objects, such as the step.

        What is large, broken or of a class is left out.
        """
        kinds, found = self._reader.index.state_dict_metadata, {}
        for place, stored in (self._reader.index.storage_data or {}).items():
            if isinstance(kinds.get(place.fqn), BytesStorageMetadata):
                value = self._unpickled(stored)
                if isinstance(value, int | float | str):
                    found[place.fqn] = value
        return found

    def _unpickled(self, stored: Any) -> Any:
        """A small object without classes of its own; else None."""
        file = self.path / stored.relative_path
        inside = file.resolve().is_relative_to(self.path.resolve())
        if not inside or not file.is_file() or stored.length > _LONGEST_NUMBER:
            return None
        with file.open("rb") as opened:
            opened.seek(stored.offset)
            data = io.BytesIO(opened.read(stored.length))
        try:
            return torch.load(data, map_location="cpu", weights_only=True)
        except Exception:  # noqa: BLE001, of a broken pickle it may be any
            return None

    def read_into(self, tensors: dict[str, Any], *, alone: bool = False) -> None:
        """Fill the tensors with the data at their keys; each process fills its shards of DTensors.

        All processes must call this together, unless one process reads `alone`.

        Raises ValueError where a file is missing or broken; some tensors may then be filled.
        """
        try:
            with _on_one_process_too():
                _load(tensors, self._reader, alone=alone)
        except (CheckpointException, RuntimeError, OSError) as error:
            raise ValueError(
                f"{self.path}: expected the data that its index lists, found {_reason(error)}"
            ) from None


def _reason(error: BaseException) -> BaseException:
    """The first error of a process if the error has several, else the error itself."""
    failures = getattr(error, "failures", {})  # by rank, each with its traceback
    return next(iter(failures.values()), [error])[0]


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a folder, which appears when it is complete; every process writes its shards.

    Raises FileExistsError where something is there already, and OSError if it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")

    def clear() -> None:
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
        if path.exists():
            raise FileExistsError(errno.EEXIST, "expected no folder there yet", str(path))
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()

    _by_the_first(clear)
    try:
        with _on_one_process_too():
            save(tensors, storage_writer=FileSystemWriter(part))
    except CheckpointException as error:
        reason = _reason(error)
        raise OSError(getattr(reason, "errno", None) or errno.EIO, str(reason), str(path)) from None
    _by_the_first(lambda: part.rename(path))


def _by_the_first(act: Callable[[], object]) -> None:
    """Let the first process act; if it raises, all processes raise its error."""
    raised: list[Any] = [None]
    together = dist.is_available() and dist.is_initialized()
    if not together or dist.get_rank() == 0:
        try:
            act()
        except OSError as error:
            raised = [error]
    if together:
        dist.broadcast_object_list(raised)
    if raised[0] is not None:
        raise raised[0]


@contextmanager
def _on_one_process_too() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _load(tensors: dict[str, Any], reader: _Reader, *, alone: bool) -> None:
    if not alone:
        state_dict_loader.load(tensors, storage_reader=reader)
    elif "no_dist" in inspect.signature(state_dict_loader.load).parameters:
        state_dict_loader.load(tensors, storage_reader=reader, no_dist=True)
    else:  # in torch 2.6 only the deprecated function has `no_dist`
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            state_dict_loader.load_state_dict(tensors, reader, no_dist=True)
