"""Write files whole or not at all, and read and write safetensors tensor by tensor."""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file as load_file  # noqa: PLC0414, for merging
except ModuleNotFoundError as error:
    message = "emajit.checkpoint needs safetensors; pip install safetensors"
    raise ModuleNotFoundError(message, name=error.name) from None

try:  # the same checksums in a fifth of the time (36 GB/s in place of 7)
    from zlib_ng.zlib_ng import crc32 as crc32  # noqa: PLC0414, for streaming
except ModuleNotFoundError:
    from zlib import crc32 as crc32  # noqa: PLC0414

_CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}
_LONGEST_HEADER = 99_999_000  # of the 100 MB that safetensors reads, less the padding
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all: `fill` a temporary file, sync it, and rename it to `path`.

    Each temporary file has a random name, so that two writers do not mix. A link stays a link, and
    a file keeps its permissions.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected a file to write, found a folder", str(path))
    if path.exists() and not path.is_file():  # a rename would replace a device
        raise OSError(errno.EINVAL, "expected a regular file to write", str(path))
    if not path.parent.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            if path.exists():
                part.chmod(stat.S_IMODE(path.stat().st_mode))
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Flush a rename in `folder` to the disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Callable[[Mapping[str, str], Mapping[str, Form]], Mapping[str, str]],
    seed: int = 0,
    *,
    casts: Mapping[str, torch.dtype] = MappingProxyType({}),
    tell: Callable[[int], object] = lambda _: None,
) -> None:
    """Write a safetensors file, one tensor at a time in host memory.

    `metadata` gets the `checksum` and the form of each tensor. Tensors in `casts` are cast as they
    are written, and `tell` is called with the bytes of each tensor. safetensors' own writer makes
    the file unreadable to other users, does not sync it, and needs all tensors at once.

    Raises ValueError for a name that is no text, a tensor that is not dense or of a dtype
    that the format does not have, a finite number that overflows in its cast, and a header
    beyond 100 MB, which no reader accepts.
    """
    for name, tensor in tensors.items():
        check_dense(repr(name), tensor)
    forms = {
        name: Form(tuple(tensor.shape), casts.get(name, tensor.dtype))
        for name, tensor in tensors.items()
    }

    names = in_order(forms)

    def fill(file: BinaryIO) -> None:
        checksums = dict.fromkeys(forms, "00000000")
        file.write(header(forms, names, metadata(checksums, forms)))
        for name in names:
            host = cast(repr(name), tensors[name].detach().to("cpu"), forms[name].dtype)
            host = host.resolve_conj().resolve_neg().contiguous()
            checksums[name] = checksum(host, seed)
            file.write(memory(host))
            tell(host.nbytes)
        file.seek(0)
        file.write(header(forms, names, metadata(checksums, forms)))

    write(path, fill)


def in_order(forms: Mapping[str, Form]) -> list[str]:
    """The names in the order of a safetensors file: wide dtypes first, so each number is aligned.

    Raises ValueError for a dtype that the format does not have.
    """
    for name, form in forms.items():
        if form.dtype not in _CODES:
            raise ValueError(f"{name!r}: expected a dtype that safetensors has, found {form.dtype}")
    return sorted(forms, key=lambda name: (-forms[name].dtype.itemsize, name))


def float_casts(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Map the name of each floating-point tensor to `dtype`; empty if it is None."""
    if dtype is None:
        return {}
    return {name: dtype for name, tensor in tensors.items() if tensor.is_floating_point()}


def cast(where: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`; ValueError, with `where`, if one of its numbers overflows."""
    if tensor.is_floating_point() or tensor.is_complex():
        largest = torch.finfo(dtype).max
        if largest < torch.finfo(tensor.dtype).max and _overflows(tensor, dtype):
            raise ValueError(f"{where}: expected numbers up to {largest:g}, found a larger one")
    return tensor.to(dtype)


def _overflows(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a number is rounded beyond `dtype`, where torch may write its largest number."""
    wide = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    wide = wide if wide.dtype.itemsize > 1 else wide.to(torch.float32)
    if not wide.numel():
        return False
    of = torch.finfo(dtype)
    limit = of.max + of.eps / 2 * 2 ** math.floor(math.log2(of.max))  # and half of its ulp
    low, high = map(float, wide.aminmax())  # no temporary
    if -limit < low <= high < limit:
        return False
    over = wide.abs() >= limit
    has_infinity = dtype.itemsize > 1 or dtype is torch.float8_e5m2
    return bool((over & wide.isfinite() if has_infinity else over).any())


def write_torch(path: Path, state: Any, tell: Callable[[int], object]) -> None:
    """`torch.save`, whole or not at all; `tell` is called with the bytes of each piece."""

    def fill(file: BinaryIO) -> None:
        telling: Any = _Telling(file, tell)
        try:
            torch.save(state, telling)
        except RuntimeError as error:
            raise telling.raised or error from None

    write(path, fill)


class _Telling:
    """A file for `torch.save` that keeps the first error, which torch replaces by another."""

    def __init__(self, file: BinaryIO, tell: Callable[[int], object]) -> None:
        self._file, self._tell = file, tell
        self.raised: BaseException | None = None

    def write(self, piece: bytes) -> int:
        try:
            written = self._file.write(piece)
            self._tell(written)
        except BaseException as error:
            self.raised = self.raised or error
            raise
        return written

    def flush(self) -> None:
        self._file.flush()


def check_dense(where: str, tensor: Tensor) -> None:
    """Raise ValueError, with `where`, for a tensor that is not dense."""
    if not _is_dense(tensor):
        kind = "nested " if tensor.is_nested else "quantised " if tensor.is_quantized else ""
        found = f"{kind}{type(tensor).__name__} in {tensor.layout} on {tensor.device}"
        raise ValueError(f"{where}: expected a dense tensor, found {found}")


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has its numbers in memory: not meta, sparse, quantised or a DTensor."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return False
    try:
        return bool(tensor.data_ptr()) or not tensor.numel()
    except RuntimeError:  # inside a `torch.func` transform
        return False


class Form(NamedTuple):
    """The shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def header(forms: Mapping[str, Form], names: list[str], metadata: Mapping[str, str]) -> bytes:
    """The length in 8 bytes, then JSON, padded with spaces to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        shape, dtype = forms[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
    try:
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"expected names and metadata in Unicode, found {error}") from None
    if len(text) > _LONGEST_HEADER:
        found = f"{len(text):,} bytes of names and metadata"
        raise ValueError(f"expected a header of at most {_LONGEST_HEADER:,} bytes, found {found}")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def checksum(host: Tensor, seed: int) -> str:
    """The CRC-32 of a contiguous tensor in host memory, in 8 hexadecimal digits."""
    return f"{crc32(memory(host), seed):08x}"


def memory(host: Tensor) -> Any:
    """The memory of a contiguous tensor as a buffer; the caller must keep the tensor alive."""
    return (ctypes.c_ubyte * host.nbytes).from_address(host.data_ptr()) if host.nbytes else b""


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The safetensors file at `path`, as `safetensors.safe_open` gives it.

    Raises ValueError, with the path, for a file that is not safetensors, or broken.
    """
    try:
        file = _opened(path)
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        found = f"{error}"
        if not is_safetensors(path) and start_of_torch(path):
            found = "a file of torch.save, which emajit.checkpoint.read reads"
        raise ValueError(f"{path}: expected a whole safetensors file, found {found}") from None
    with file:
        yield file


def _opened(path: Path) -> Any:
    # safetensors opens the path twice, for the header and for the numbers; meanwhile the file may
    # be replaced.
    while True:
        with opened_to_read(path) as held:  # Python's OSError names the path
            file = safe_open(path, framework="pt")
            _check_names(path, held)
            if os.path.samestat(os.fstat(held.fileno()), path.stat()):
                return file


def _check_names(path: Path, held: BinaryIO) -> None:
    """Raise ValueError for two tensors of one name; safetensors would take the last."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        held = dict(pairs)
        if len(held) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{path}: expected each name once, found two of {twice!r}")
        return held

    length = int.from_bytes(held.read(8), "little")
    json.loads(held.read(length), object_pairs_hook=once)


def opened_to_read(path: Path) -> BinaryIO:
    """The open file; OSError if it is not regular: opening a pipe would wait for a writer."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "expected a regular file to read", str(path))
    return path.open("rb")


def start_of_torch(path: Path) -> bytes:
    """The first bytes of a file of `torch.save`, a zip or (before 1.6) a pickle; else none."""
    with opened_to_read(path) as file:
        start = file.read(2)
    return start if start == b"PK" or start[:1] == b"\x80" else b""


def is_safetensors(path: Path) -> bool:
    with opened_to_read(path) as file:
        return file.read(9)[8:] == b"{"


class Unordered(dict[str, Any]):
    """The tensors of a file that does not keep the order of a model's parameters."""


def tie_equal(held: dict[str, Tensor]) -> None:
    """Tie matrices that have the same numbers: a safetensors file has no ties.

    Constant matrices, such as an initialisation, are not tied.
    """
    firsts: dict[Any, str] = {}
    for name, value in held.items():
        if value.dim() < 2 or not value.numel():
            continue
        items = _items(value)
        begin = items[:16].flatten().tolist()  # reads a page of the file
        first = firsts.setdefault((value.shape, value.dtype, *begin), name)
        is_twin = first != name and torch.equal(_items(held[first]), items)
        if is_twin and bool((items != items[0]).any()):
            held[name] = held[first]


def _items(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, one row for each number."""
    return tensor.flatten().view(torch.uint8).view(-1, tensor.element_size())


def form(file: Any, name: str) -> Form:
    """The form of a tensor in the file; a dtype that torch lacks keeps the format's name."""
    part = file.get_slice(name)
    code = part.get_dtype()
    return Form(tuple(part.get_shape()), _DTYPES.get(code, code))


def tensor(path: Path, file: Any, name: str) -> Tensor:
    """A tensor in the file; ValueError, with the path, for a dtype that torch lacks."""
    try:
        return file.get_tensor(name)  # type: ignore[no-any-return]
    except SafetensorError as error:
        raise ValueError(f"{path}: {name!r}: expected a dtype of torch, found {error}") from None
