"""Write tensors that are made piece by piece, while the next piece is made."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from emajit.checkpoint import archives, files

Pieces = Callable[[str], Iterable[Tensor]]
T = TypeVar("T")
_CORES = 4  # the disk and the checksums are slower than the sums of more threads
_WAITING = 2  # pieces that a thread may be behind: they are held in memory


class Behind:
    """Calls in another thread, in order."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool, self._waiting = pool, deque[Future[Any]]()

    def __call__(self, call: Callable[..., object], *args: object) -> None:
        """Add a call; first wait while two others are waiting. Raises what an earlier one did."""
        while len(self._waiting) >= _WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(call, *args))

    def finish(self) -> None:
        """Wait for all calls. Raises what one of them did."""
        while self._waiting:
            self._waiting.popleft().result()


@contextmanager
def behind() -> Iterator[Behind]:
    with ThreadPoolExecutor(1) as pool:  # not one for all: a fork would have it without a thread
        yield Behind(pool)


@contextmanager
def ahead(calls: Iterable[Callable[[], T]]) -> Iterator[Iterator[T]]:
    """The results of calls, in order, which as many threads compute as there are cores."""
    workers = min(_CORES, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        yield _in_order(pool, calls, workers)


def _in_order(
    pool: ThreadPoolExecutor, calls: Iterable[Callable[[], T]], workers: int
) -> Iterator[T]:
    waiting: deque[Future[T]] = deque()
    for call in calls:
        if len(waiting) > workers:
            yield waiting.popleft().result()
        waiting.append(pool.submit(call))
    while waiting:
        yield waiting.popleft().result()


def write_safetensors(
    path: Path,
    forms: Mapping[str, files.Form],
    pieces: Pieces,
    metadata: Callable[[], Mapping[str, str]],
    tell: Callable[[int], object],
) -> None:
    """Write a safetensors file whose tensors come in flat pieces, whole or not at all.

    `metadata` is asked before and after, for texts of the same length. `tell` is called with the
    bytes of each piece, in the thread of the caller.
    """
    names = files.in_order(forms)

    def fill(file: BinaryIO) -> None:
        file.write(files.header(forms, names, metadata()))
        with behind() as write:
            for name in names:
                for piece in pieces(name):
                    write(_write, file, piece)
                    tell(piece.nbytes)
            write.finish()
        file.seek(0)
        file.write(files.header(forms, names, metadata()))

    files.write(path, fill)


def _write(file: BinaryIO, piece: Tensor) -> None:
    file.write(files.memory(piece))


def write_torch(
    path: Path,
    forms: Mapping[str, files.Form],
    tied: Mapping[str, str],
    nested: Callable[[dict[str, Tensor]], Any],
    pieces: Pieces,
    metadata: Callable[[], Mapping[str, str]],
    tell: Callable[[int], object],
) -> None:
    """Write a file of `torch.save`, as `write_safetensors`.

    torch writes the records of the storages without their bytes, from memory that is never touched;
    then they are filled, and their checksums with them. Each text of `metadata`, which is asked at
    the end, becomes a record that torch ignores. `tied` maps a name to the one whose storage it
    shares, and `nested` makes the saved object.
    """
    # In the order in which torch meets and numbers the storages.
    kept = [*dict.fromkeys(tied.get(name, name) for name in forms)]
    state = {name: torch.empty(forms[name].shape, dtype=forms[name].dtype) for name in kept}

    def fill(file: BinaryIO) -> None:
        part = Path(file.name)
        with torch.serialization.skip_data():
            torch.save(nested({name: state[tied.get(name, name)] for name in forms}), part)
        with behind() as write, zipfile.ZipFile(part, "a") as archive:
            root = archive.infolist()[0].filename.partition("/")[0]
            for i, name in enumerate(kept):
                record = archive.getinfo(f"{root}/data/{i}")
                if record.file_size != state[name].nbytes:
                    raise RuntimeError(f"expected {name!r} in {record.filename}, found another")
                file.seek(archives.begin(part, record))
                record.CRC = 0
                for piece in pieces(name):
                    write(_write, file, piece)
                    record.CRC = zlib.crc32(files.memory(piece), record.CRC)
                    tell(piece.nbytes)
                write.finish()
                file.seek(4, os.SEEK_CUR)  # behind the signature of the record's descriptor
                file.write(record.CRC.to_bytes(4, "little"))
            file.flush()
            for key, text in metadata().items():  # this writes the directory with the checksums too
                archive.writestr(f"{root}/{key}", text)

    files.write(path, fill)
