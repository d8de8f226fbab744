"""Write tensors that are made piece by piece, while the next piece is made."""

from __future__ import annotations

import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from emajit.checkpoint import archives, files

# A flat piece of a tensor, or the call that makes it in any thread.
Piece = Tensor | Callable[[], Tensor]
Pieces = Callable[[str], Iterable[Piece]]
_CORES = 4  # the disk and the checksums are slower than the sums of more threads
_WAITING = 2  # calls that a thread may be behind: their pieces are held in memory
_SYNCED = 2**26  # bytes that are brought to the disk while the next are computed


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
def _behind() -> Iterator[Behind]:
    with ThreadPoolExecutor(1) as pool:  # not one for all: a fork would have it without a thread
        yield Behind(pool)


@contextmanager
def _ahead(names: Iterable[str], pieces: Pieces) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """The names with their pieces, in order, which as many threads make as there are cores.

    The calls are asked for in the thread of the caller, in order, and few ahead.
    """
    workers = min(_CORES, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        asked = ((name, piece) for name in names for piece in pieces(name))
        yield _in_order(pool, asked, workers)


def _in_order(
    pool: ThreadPoolExecutor, asked: Iterable[tuple[str, Piece]], workers: int
) -> Iterator[tuple[str, Tensor]]:
    waiting: deque[tuple[str, Tensor | Future[Tensor]]] = deque()
    for name, piece in asked:
        if len(waiting) > workers:
            yield _first(waiting)
        waiting.append((name, piece if isinstance(piece, Tensor) else pool.submit(piece)))
    while waiting:
        yield _first(waiting)


def _first(waiting: deque[tuple[str, Tensor | Future[Tensor]]]) -> tuple[str, Tensor]:
    name, piece = waiting.popleft()
    return name, piece if isinstance(piece, Tensor) else piece.result()


class _Writing:
    """Writes to a file in another thread, and in a third what is written to the disk."""

    def __init__(self, file: BinaryIO, tell: Callable[[int], object], *both: Behind) -> None:
        self._file, self._tell, (self.write, self._sync) = file, tell, both
        self._unsynced = 0

    def __call__(self, call: Callable[..., object], piece: Tensor, *args: object) -> None:
        """Let `call` write a piece."""
        self.write(call, self._file, piece, *args)
        self._tell(piece.nbytes)
        self._unsynced += piece.nbytes
        if self._unsynced >= _SYNCED:
            self._sync(os.fsync, self._file.fileno())
            self._unsynced = 0


@contextmanager
def _writing(file: BinaryIO, tell: Callable[[int], object]) -> Iterator[_Writing]:
    with _behind() as write, _behind() as sync:
        yield _Writing(file, tell, write, sync)
        write.finish()
        sync.finish()


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
        with _writing(file, tell) as write, _ahead(names, pieces) as made:
            for _, piece in made:
                write(_write, piece)
        file.seek(0)
        file.write(files.header(forms, names, metadata()))

    files.write(path, fill)


def _write(file: BinaryIO, piece: Tensor) -> None:
    file.write(files.memory(piece))


def _write_checked(file: BinaryIO, piece: Tensor, record: zipfile.ZipInfo) -> None:
    _write(file, piece)
    record.CRC = files.crc32(files.memory(piece), record.CRC)


def _end(file: BinaryIO, record: zipfile.ZipInfo) -> None:
    """Write the checksum of a record into the descriptor behind it."""
    file.seek(4, os.SEEK_CUR)  # behind the signature
    file.write(record.CRC.to_bytes(4, "little"))


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
        with zipfile.ZipFile(part, "a") as archive:
            root = archive.infolist()[0].filename.partition("/")[0]
            records = {name: archive.getinfo(f"{root}/data/{i}") for i, name in enumerate(kept)}
            for name, record in records.items():
                if record.file_size != state[name].nbytes:
                    raise RuntimeError(f"expected {name!r} in {record.filename}, found another")
            with _writing(file, tell) as write, _ahead(kept, pieces) as made:
                for name, held in groupby(made, lambda each: each[0]):
                    records[name].CRC = 0
                    write.write(file.seek, archives.begin(part, records[name]))
                    for _, piece in held:
                        write(_write_checked, piece, records[name])
                    write.write(_end, file, records[name])
            file.flush()
            for key, text in metadata().items():  # this writes the directory with the checksums too
                archive.writestr(f"{root}/{key}", text)

    files.write(path, fill)
