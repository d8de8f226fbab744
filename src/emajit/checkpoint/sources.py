"""The content of a checkpoint, a file or a folder, as nested mappings of tensors."""

from __future__ import annotations

import errno
import gc
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emajit import _names
from emajit.checkpoint import files, pickled, zero
from emajit.checkpoint.files import Unordered
from emajit.checkpoint.saved import KEY, MERGED, SHADOW, TIED, Saved

OF_TORCH = ".ckpt", ".pt", ".pth", ".bin"  # the names that `torch.save` writes
SUFFIXES = ".safetensors", ".pkl", *OF_TORCH
_INDEX = ".index.json"
# Files beside a model that hold no weights, by their first word.
NOT_MODELS = re.compile(r"(optimizer|scheduler|scaler|sampler|rng|random|training_args)")


@contextmanager
def _no_collections() -> Iterator[None]:
    """Pause the garbage collector, which looks at all new objects again and again.

    A file with 100,000 tensors is read in 5.6 s of CPU time instead of 6.9 (torch 2.13).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_no_collections()
def content(path: Path, *, on_disk: bool = False) -> Any:
    """The content of a file; or of a folder, with each file and folder in it under its name.

    A folder of shards is read, not mapped. With `on_disk` its tensors are on meta, and `loaded`
    reads one.

    Raises ValueError, with the path, for a broken file, and OSError if it cannot be read.
    """
    if (path / ".metadata").is_file():
        return _of_shards(path, on_disk=on_disk)
    if path.is_dir():
        held = _of_folder(path, on_disk=on_disk)
        if not held:
            expected = (
                "expected a file, or a folder of torch.distributed.checkpoint or of files of "
                "weights, found another"
            )
            raise IsADirectoryError(errno.EISDIR, expected, str(path))
        return held
    if not files.is_safetensors(path):
        return pickled.load_torch(path)
    with files.opened(path) as file:
        header = file.metadata() or {}
        if any('"crc32"' in told for k, told in header.items() if k not in (KEY, MERGED)):
            raise ValueError(f"{path}: expected the record of its step at {KEY!r}, found another")
        if KEY not in header:
            names = file.keys()
            held = Unordered({name: _apart(files.tensor(path, file, name)) for name in names})
            if TIED in header:
                _tie(path, held, header[TIED])
            else:
                files.tie_equal(held)
            return held
        saved = Saved(path, file)
        shadow = {name: _apart(saved.read(name)) for name in saved.names()}
        return {"shadow": shadow, "step": saved.record.step}


def loaded(tensor: Tensor) -> Tensor:
    """A tensor, read from the disk if `content` has left it there."""
    if not hasattr(tensor, "emajit_place"):
        return tensor
    folder, key = tensor.emajit_place
    value = torch.empty_like(tensor, device="cpu")
    folder.read_into({key: value}, alone=True)
    return value


def _of_folder(path: Path, depth: int = 2, *, on_disk: bool) -> dict[str, Any]:
    """The weight files in a folder under their names, the numbers in config.json, and folders."""
    if zero.is_one(path):
        return zero.content(path)
    names = sorted(each.name for each in path.iterdir() if each.is_file())
    held: dict[str, Any] = {}
    for index in [name for name in names if name.endswith(_INDEX)]:
        shards = _shards_of(path / index)
        names = [name for name in names if name not in shards]
        stem = index.removesuffix(_INDEX).rpartition(".")[0]
        sharded = {k: v for shard in shards for k, v in content(path / shard).items()}
        held[stem] = Unordered(sharded)
    if "model.safetensors" in names:  # the same weights, as transformers may write them too
        names = [name for name in names if name != "pytorch_model.bin"]
    for name in names:
        if name.endswith(SUFFIXES) and not NOT_MODELS.match(name):
            held[name.rpartition(".")[0]] = content(path / name)
    for folder in sorted(each for each in path.iterdir() if each.is_dir()) if depth else ():
        is_sharded = (folder / ".metadata").is_file()
        inner = _of_shards(folder, on_disk=on_disk) if is_sharded else None
        if inner := inner or _of_folder(folder, depth - 1, on_disk=on_disk):
            held[folder.name] = inner
    if held and "config.json" in names:  # where diffusers keeps the state of an `EMAModel`
        told = told_in(path / "config.json")
        held |= {k: v for k, v in told.items() if isinstance(v, int | float) and k not in held}
    return held


def told_in(path: Path) -> Mapping[str, Any]:
    """The mapping in a file of JSON; an empty one without the file, or for other JSON."""
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a file of JSON, found {error}") from None
    return told if isinstance(told, Mapping) else {}


def _shards_of(index: Path) -> list[str]:
    """The files that an index names; ValueError if one of them is missing or elsewhere."""
    places = told_in(index).get("weight_map")
    if not isinstance(places, Mapping) or not all(isinstance(v, str) for v in places.values()):
        raise ValueError(f"{index}: expected a file for each weight, found none")
    shards = sorted(set(places.values()))
    for shard in shards:
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise ValueError(f"{index}: expected its files beside it, found none at {shard}")
    return shards


def _tie(path: Path, held: dict[str, Tensor], ties: str) -> None:
    """Tie the tensors that the header lists as tied, if they still have the same numbers."""
    try:
        for name, other in json.loads(ties).items():
            if torch.equal(held[name], held[other]):
                held[name] = held[other]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise ValueError(f"{path}: expected names that are tied, found {ties:.200}") from None


def _apart(tensor: Tensor) -> Tensor:
    """`tensor`, or a new one if it is empty.

    An empty tensor in a file has the address of the next tensor, which `torch.save` refuses.
    """
    return tensor if tensor.numel() else torch.empty_like(tensor)


def _with_lists(held: Any) -> Any:
    """`held` with a list in place of each mapping with keys 0, 1, 2, ..."""
    if not isinstance(held, Unordered):
        return held
    if held.keys() == {*range(len(held))}:
        return [_with_lists(value) for _, value in sorted(held.items())]
    return Unordered({str(key): _with_lists(value) for key, value in held.items()})


def _of_shards(path: Path, *, on_disk: bool = False) -> dict[str, Any]:
    """The tensors and numbers in a folder of torch.distributed.checkpoint, in its containers."""
    from emajit.checkpoint import sharded  # noqa: PLC0415, half a second for this alone

    folder = sharded.Folder(path)
    device = "meta" if on_disk else "cpu"
    flat: dict[str, Any] = {
        key: torch.empty(shape, dtype=dtype, device=device)
        for key, (shape, dtype) in folder.forms.items()
    }
    if on_disk:
        for key, value in flat.items():
            value.emajit_place = folder, key
    else:
        folder.read_into(flat, alone=True)
    held: Any = Unordered()
    for key, value in {**folder.numbers(), **flat}.items():
        *containers, name = folder.places.get(key, (key,))
        inner = held
        for container in containers:
            inner = inner.setdefault(container, Unordered())
        inner[name] = value
    held = _with_lists(held)
    if (path / "meta.pt").is_file():  # Lightning keeps there what is not sharded
        held = {**pickled.load_torch(path / "meta.pt"), **held}
        held.setdefault("state_dict", _names.below("state_dict.", flat))
    shadow = _names.below(SHADOW, flat)
    return {"shadow": shadow, "step": flat["step"]} if shadow and "step" in flat else held
