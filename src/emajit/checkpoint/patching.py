"""Copy an archive of `torch.save` with new tensors, without unpickling what else it holds.

The records of the archive are copied, except the numbers of the changed tensors. The pickle keeps
its bytes too, so that it may hold objects of any class: items of the outermost dict are set by
instructions behind the old ones.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from emajit import _alias
from emajit.checkpoint import archives, files

_KINDS = {dtype: kind for kind, dtype in archives.DTYPES.items()}
_CHUNK, _ALIGNED = 2**24, 64  # bytes; torch aligns records like this
_START = b"\x80\x02}q\x00"  # protocol 2, an empty dict, remembered as the first object


class Storage(NamedTuple):
    """The numbers in a record of an archive; `kind` is the name of their class in torch."""

    key: str
    kind: str
    size: int


class Held(NamedTuple):
    """A tensor in an archive, which is not read.

    `is_lazy` tells whether torch conjugates or negates its numbers as it reads them.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    is_lazy: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Raises ValueError for a dtype that emajit does not write."""
        if self.storage.kind not in archives.DTYPES:
            raise ValueError(f"expected {' or '.join(archives.DTYPES)}, found {self.storage.kind}")
        return archives.DTYPES[self.storage.kind]

    def range(self) -> tuple[int, int]:
        """The bytes of its storage where it starts and stops."""
        size = archives.item_size(self.storage.kind)
        start = self.offset * size
        return start, _alias.end((start, self.shape, self.stride, size))


class Changes(NamedTuple):
    """What a copy of an archive has in place of the original.

    items: of the outermost dict: plain containers with new tensors, and with those that are `Held`.
    numbers: tensors in the archive, and the tensor of the same shape that each becomes.
    """

    items: Mapping[str, Any]
    numbers: Sequence[tuple[Held, Tensor]] = ()


class Archive:
    """A checkpoint of `torch.save`: its containers, with `Held` tensors, and other objects empty.

    Raises ValueError, with the path, where the file is another, or broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with files.opened_to_read(path):
            pass
        try:
            scan = archives.scan(path)
            self._pickled, self._text = scan.pickled, scan.text
            file = io.BytesIO(self._text)
            self.tree = _Skeleton(file).load()
            # A later protocol has frames, which must not grow.
            is_known = self._text[:2] in (_START[:2], b"\x80\x03") and not file.read()
        except Exception as error:  # noqa: BLE001, whatever a broken file makes of a parser
            raise ValueError(
                f"{path}: expected a whole checkpoint of torch.save, with a dict, found: "
                f"{str(error) or type(error).__name__:.300}"
            ) from None
        if not isinstance(self.tree, dict) or not is_known:
            found = f"{type(self.tree).__name__} in protocol {self._text[1]}"
            raise ValueError(f"{path}: expected a dict pickled by protocol 2 or 3, found {found}")

    def write(self, path: Path, changes: Changes, tell: Callable[[int], object]) -> None:
        """Write a copy with these changes, whole or not at all.

        `tell` is called with the bytes of each written piece. Raises ValueError for a number that
        overflows, or has no place in the dtype; for tensors that share memory with others; and for
        an object that would have to be pickled anew.
        """
        with zipfile.ZipFile(self.path) as archive:
            records = archive.infolist()
            folder = self._pickled.removesuffix("data.pkl")
            order = f"{folder}byteorder"
            if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
                raise ValueError(f"{self.path}: expected numbers of this machine's byte order")
            taken = {record.filename.removeprefix(f"{folder}data/") for record in records}
            text, added = _appended(self._text, changes.items, taken)
            changed: dict[str, list[tuple[Held, Tensor]]] = {}
            for held, tensor in changes.numbers:
                _check_fits(held, tensor)
                changed.setdefault(f"{folder}data/{held.storage.key}", []).append((held, tensor))
            _check_apart(self.tree, changes.numbers)

            def fill(file: BinaryIO) -> None:
                with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as out:
                    for record in records:
                        name, size = record.filename, record.file_size
                        pieces: Iterator[Any] = self._pieces(archive, record)
                        if name == self._pickled:
                            size, pieces = len(text), iter([text])
                        elif name == f"{folder}.format_version":
                            # From 1 on, torch may compute where its own writer puts each record.
                            size, pieces = 1, iter([b"0"])
                        elif name in changed:
                            pieces = iter([_with(bytearray(b"".join(pieces)), changed[name])])
                        _add(out, file, name, size, pieces, tell)
                    for key, tensor in added.items():
                        name = f"{folder}data/{key}"
                        _add(out, file, name, tensor.nbytes, iter([files.memory(tensor)]), tell)

            files.write(path, fill)

    def _pieces(self, archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> Iterator[bytes]:
        """The bytes of a record; like torch, without a check of the checksum."""
        is_stored = record.compress_type == zipfile.ZIP_STORED
        rest = record.file_size
        with self.path.open("rb") if is_stored else archive.open(record) as file:
            if is_stored:
                file.seek(archives.begin(self.path, record))
            while rest:
                piece = file.read(min(rest, _CHUNK))
                if not piece:
                    raise ValueError(f"{self.path}: {record.filename}: expected {rest} bytes more")
                rest -= len(piece)
                yield piece


def _add(
    out: zipfile.ZipFile,
    file: BinaryIO,
    name: str,
    size: int,
    pieces: Iterator[Any],
    tell: Callable[[int], object],
) -> None:
    """Add a record, whose bytes begin at a multiple of 64 for torch's mapping."""
    is_long = size > 2**30
    begin = file.tell() + 30 + len(name.encode()) + (20 if is_long else 0) + 4
    padding = -begin % _ALIGNED
    record = zipfile.ZipInfo(name)
    record.file_size, record.extra = size, b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with out.open(record, "w", force_zip64=is_long) as written:
        for piece in pieces:
            written.write(piece)
            tell(memoryview(piece).nbytes)


def _check_fits(held: Any, tensor: Tensor) -> None:
    if not isinstance(held, Held):
        raise ValueError(  # noqa: TRY004, it is a broken file, not a wrong argument
            f"expected a tensor where the average goes, found {type(held).__name__}"
        )
    if held.shape != tuple(tensor.shape):
        raise ValueError(f"expected an average of shape {held.shape}, found {tuple(tensor.shape)}")
    if held.is_lazy or (0 not in held.shape and _alias.repeats_itself(held.shape, held.stride)):
        found = "a conjugated or negated view" if held.is_lazy else f"strides {held.stride}"
        raise ValueError(f"expected a place with each number once as it is, found {found}")
    if not torch.can_cast(tensor.dtype, held.dtype):
        raise ValueError(f"expected an average that fits {held.dtype}, found {tensor.dtype}")
    cast = files.cast("an average", tensor, held.dtype)
    is_whole = not (tensor.is_floating_point() or tensor.is_complex())
    if is_whole and not torch.equal(cast.to(tensor.dtype), tensor):
        raise ValueError(f"expected numbers that fit {held.dtype}, found others in {tensor.dtype}")


def _check_apart(tree: Any, numbers: Sequence[tuple[Held, Tensor]]) -> None:
    """Raise ValueError where a change would reach another tensor in the archive too."""
    if not numbers:
        return
    first: dict[Held, Tensor] = {}
    for held, tensor in numbers:
        if not same(first.setdefault(held, tensor), tensor):
            raise ValueError(f"expected one average of shape {held.shape}, found two in one place")
    found, changed = Counter(_tensors(tree)), Counter(held for held, _ in numbers)
    each = [*first, *(held for held in found if held not in first)]
    base: dict[str, int] = {}  # no two storages in one range of addresses; 0 is none
    ranges = []
    for held in each:
        at = base.setdefault(held.storage.key, (1 + len(base)) << 64)
        ranges.append([at + end for end in held.range()])
    starts, stops = zip(*ranges, strict=True)
    shared = [each[i] for i, _ in _alias.touching(starts, stops, len(first))]
    shared += [held for held in first if 0 not in held.shape and found[held] > changed[held]]
    if shared:
        raise ValueError(
            "expected averages apart from all other tensors, found one of shape "
            f"{shared[0].shape} that shares its memory"
        )


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits, NaN included."""
    if _alias.tied(a, b) or (a.shape, a.dtype) != (b.shape, b.dtype):
        return _alias.tied(a, b)
    return torch.equal(*(_host(each).flatten().view(torch.uint8) for each in (a, b)))


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _tensors(tree: Any) -> Iterator[Held]:
    """The tensors in a tree, each as often as it has a path, or twice for many paths."""
    stack, visits = [tree], Counter[int]()
    while stack:
        value = stack.pop()
        if isinstance(value, Held):
            yield value
        elif isinstance(value, Storage):
            yield Held(value, 0, (value.size,), (1,))
        elif isinstance(value, dict | list | tuple | _Object) and visits[id(value)] < 2:
            visits[id(value)] += 1
            stack += [*value.keys(), *value.values()] if isinstance(value, dict) else []
            stack += value if isinstance(value, list | tuple) else []
            stack += getattr(value, "__dict__", {}).values()


def _with(held: bytearray, changed: Sequence[tuple[Held, Tensor]]) -> bytearray:
    """The bytes of a storage, in which tensors get new numbers."""
    for (storage, offset, shape, stride, _), tensor in changed:
        if math.prod(shape):
            whole = torch.frombuffer(held, dtype=archives.DTYPES[storage.kind])
            whole.as_strided(shape, stride, offset).copy_(tensor)
    return held


def _appended(
    text: bytes, items: Mapping[str, Any], taken: set[str]
) -> tuple[bytes, dict[str, Tensor]]:
    """A pickle whose outermost dict has these items too, and the tensors of its new records."""
    file = io.BytesIO()
    pickler = _Items(file, taken)
    pickler.dump(dict(items))
    own = file.getvalue()
    if not own.startswith(_START):
        raise RuntimeError(f"expected a pickle of protocol 2, found {own[:9]!r}")
    # The old instructions leave the outermost dict on the stack, the new ones fill it. They
    # number their objects from 1 on, and need no object of the old ones.
    return text[:-1] + own[len(_START) :], pickler.added


class _Items(pickle.Pickler):
    """Pickles items with tensors, those of the archive by their records there."""

    def __init__(self, file: BinaryIO, taken: set[str]) -> None:
        super().__init__(file, protocol=2)
        self.added: dict[str, Tensor] = {}
        self._next = 1 + max((int(key) for key in taken if key.isdecimal()), default=-1)
        tensor: Any = torch.empty(0)
        self._rebuild = tensor.__reduce_ex__(2)[0]  # torch's function, as `torch.save` names it

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            key, host = str(self._next + len(self.added)), _host(value)
            if host.dtype not in _KINDS:
                raise ValueError(f"expected averages in {[*_KINDS]}, found {host.dtype}")
            self.added[key] = host
            storage = Storage(key, _KINDS[host.dtype], host.numel())
            value = Held(storage, 0, tuple(host.shape), tuple(host.stride()))
        if isinstance(value, Held):
            if value.is_lazy:
                raise ValueError("expected tensors as they are, found a conjugated or negated view")
            return self._rebuild, (*value[:4], False, OrderedDict())
        if isinstance(value, archives.Nothing):
            name = type(value).__name__
            raise ValueError(f"expected tensors beside the averages, found a pickled {name}")  # noqa: TRY004
        return NotImplemented

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Storage):
            return None
        return "storage", getattr(torch, value.kind), value.key, "cpu", value.size


class _Skeleton(pickle.Unpickler):
    """Makes the containers and `Held` tensors; runs and imports nothing that a pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module.partition(".")[0] == "torch":
            if name == "_rebuild_tensor_v2":
                return _held
            if name == "_rebuild_parameter":
                return lambda tensor, *_: tensor
        return type(name, (_Object,), {})

    def persistent_load(self, pid: Any) -> Storage:
        _, kind, key, _, count = pid
        return Storage(key, kind.__name__, count)


def _held(storage: Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> Held:
    """As the function of torch, whose seventh argument tells conjugated and negated views."""
    return Held(storage, offset, tuple(shape), tuple(stride), any(map(bool, rest[2:])))


class _Object(archives.Nothing):
    """Replaces any pickled object, and keeps what it holds: there may be tensors."""

    inside: list[Any]

    def __new__(cls, *args: object, **_: object) -> Any:
        made = super().__new__(cls)
        made.inside = [*args]
        return made

    def _keep(self, *args: object) -> None:
        self.inside += args

    __setstate__ = __setitem__ = append = extend = add = _keep
