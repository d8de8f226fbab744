"""The zip archives that `torch.save` writes: checks before torch maps one."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

_ITEM_SIZES = {  # of the storages of one dtype, as torch.save names them
    f"{name}Storage": size
    for size, names in (
        (2, ("Short", "Half", "BFloat16")),
        (4, ("Int", "Float", "QInt32")),
        (8, ("Long", "Double", "ComplexFloat")),
        (16, ("ComplexDouble",)),
    )
    for name in names
}


def is_stored(path: Path) -> bool:
    """Whether no record is compressed, so that torch can map the file."""
    with zipfile.ZipFile(path) as archive:
        return all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())


def check_lengths(path: Path) -> None:
    """Raise ValueError for a record that is shorter than its tensors: torch reads past its end."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: record for record in archive.infolist()}
        pickled = next(name for name in records if name.endswith("data.pkl"))
        text = _held(path, records[pickled]) or archive.read(pickled)
    folder = pickled.removesuffix("data.pkl")
    found = _Lengths(io.BytesIO(text))
    found.load()
    for key, length in found.lengths.items():
        held = records[f"{folder}data/{key}"].file_size
        if held < length:
            raise ValueError(f"record {key}: expected {length:,} bytes, found {held:,}")


def _held(path: Path, record: zipfile.ZipInfo) -> bytes:
    """The bytes of an uncompressed record, without a check of its checksum, like torch."""
    if record.compress_type != zipfile.ZIP_STORED:
        return b""
    with path.open("rb") as file:
        file.seek(begin(path, record))
        return file.read(record.file_size)


def begin(path: Path, record: zipfile.ZipInfo) -> int:
    """Where the bytes of a record begin in the file, behind its local header."""
    with path.open("rb") as file:
        file.seek(record.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))  # the lengths of both
        return file.tell() + int(name) + int(extra)


class _Lengths(pickle.Unpickler):
    """Finds the number of bytes of each storage in a file of `torch.save`; makes no object."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.lengths: dict[str, int] = {}

    def find_class(self, _: str, name: str) -> Any:
        return type(name, (_Nothing,), {})

    def persistent_load(self, pid: Any) -> None:
        _, kind, key, _, count = pid
        length = count * _ITEM_SIZES.get(kind.__name__, 1)  # `UntypedStorage` counts bytes
        self.lengths[key] = max(length, self.lengths.get(key, 0))


class _Nothing:
    """Replaces any pickled object and any function that makes one."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def _ignore(self, *_: object) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore
