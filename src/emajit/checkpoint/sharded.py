"""Folders of `torch.distributed.checkpoint`, which any number of processes write and read."""

from __future__ import annotations

import errno
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
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _KNOWN.get(module.removesuffix("._local"), ()):
            raise pickle.UnpicklingError(f"{module}.{name} is nothing that a .metadata holds")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """One that builds nothing but what a `.metadata` is made of: it is a pickle."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001, of a broken pickle it may be any
            raise ValueError(f"{path}: expected the index of a checkpoint, found {error}") from None
        if not isinstance(metadata, Metadata):
            found = type(metadata).__qualname__
            raise ValueError(  # noqa: TRY004, it is a broken file, not a wrong argument
                f"{path}: expected the index of a checkpoint, found {found}"
            )
        return metadata


class Folder:
    """What is held there; nothing is read but the index."""

    def __init__(self, path: Path) -> None:
        """Raise ValueError, with the path, where there is no such folder or its index is broken."""
        if not (path / ".metadata").is_file():  # which is written last
            raise ValueError(
                f"{path}: expected a complete folder of torch.distributed.checkpoint, found none"
            )
        self.path = path
        index = _Reader(path).read_metadata().state_dict_metadata
        self.forms = {
            key: (tuple(entry.size), entry.properties.dtype)
            for key, entry in index.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read_into(self, tensors: dict[str, Any], *, alone: bool = False) -> None:
        """Fill tensors, under their keys here; of a DTensor each process its shard.

        All processes do it together, but where one does it `alone`.

        Raises ValueError where a file is missing or broken; some may then be filled.
        """
        try:
            with _on_one_process_too():
                load(tensors, storage_reader=_Reader(self.path), no_dist=alone)
        except (CheckpointException, RuntimeError, OSError) as error:
            raise ValueError(f"{self.path}: expected what its index tells, found {error}") from None


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a folder, which appears when it is complete; every process its shards.

    Raises FileExistsError where something is there already.
    """
    part = path.with_name(f".{path.name}.part")

    def clear() -> None:
        if path.exists():
            raise FileExistsError(errno.EEXIST, "expected no folder there yet", str(path))
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()

    _by_the_first(clear)
    with _on_one_process_too():
        save(tensors, storage_writer=FileSystemWriter(part))
    _by_the_first(lambda: part.rename(path))


def _by_the_first(act: Callable[[], object]) -> None:
    """Let the first process act; what it raises, all of them raise."""
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
