"""The zip archives that `torch.save` writes: checks before torch maps one."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

DTYPES = {  # of the storages that `torch.save` names; bytes for any other, as in `UntypedStorage`
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_QUANTISED = {"QInt32Storage": torch.qint32}  # those of more than a byte

# A compressed pickle of names and shapes is about a tenth; one that is far smaller repeats itself.
_MOST_PACKED, _LARGE = 100, 2**20


def item_size(kind: str) -> int:
    """The bytes of each number in a storage of this class."""
    return (DTYPES | _QUANTISED).get(kind, torch.uint8).itemsize


class Scan(NamedTuple):
    """What a zip archive of `torch.save` says of itself.

    is_stored: whether no record is compressed, so that torch can map the file.
    names: the classes and functions that its pickle names.
    pickled, text: the name of the pickle's record, and its bytes.
    """

    is_stored: bool
    names: set[str]
    pickled: str = ""
    text: bytes = b""


def scan(path: Path) -> Scan:
    """Read the directory and the pickle of an archive, in one pass; nothing in it runs.

    Raises ValueError for a compressed pickle that repeats itself; for two pickles or two records of
    one name, of which torch may read the other; and for a record that is shorter than its tensors:
    torch reads past its end.
    """
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: record for record in archive.infolist()}
        pickles = [name for name in records if name.endswith("data.pkl")]
        if len(pickles) != 1 or len(records) < len(archive.infolist()):
            # Of two records of one name, torch takes the first and Python the last.
            raise ValueError(f"expected one pickle and each record once, found {pickles}")
        pickled = pickles[0]
        size, packed = records[pickled].file_size, records[pickled].compress_size
        if size > max(_LARGE, _MOST_PACKED * packed):
            raise ValueError(
                f"expected a pickle of names and shapes, found {size:,} bytes in {packed:,}"
            )
        text = _held(path, records[pickled]) or archive.read(pickled)
    folder = pickled.removesuffix("data.pkl")
    found = _Pickled(io.BytesIO(text))
    found.load()
    for key, length in found.lengths.items():
        held = records[f"{folder}data/{key}"].file_size
        if held < length:
            raise ValueError(f"record {key}: expected {length:,} bytes, found {held:,}")
    stored = all(record.compress_type == zipfile.ZIP_STORED for record in records.values())
    return Scan(stored, found.names, pickled, text)


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


class _Pickled(pickle.Unpickler):
    """Finds the bytes of each storage in a file of `torch.save`, and names; makes no object."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.lengths: dict[str, int] = {}
        self.names: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.names.add(f"{module}.{name}")
        return type(name, (Nothing,), {})

    def persistent_load(self, pid: Any) -> None:
        _, kind, key, _, count = pid
        length = count * item_size(kind.__name__)
        self.lengths[key] = max(length, self.lengths.get(key, 0))


class Nothing:
    """Replaces any pickled object and any function that makes one."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def _ignore(self, *_: object) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore
