"""A shadow and its step in a file: written atomically, read whole or not at all.

The file is one of safetensors, for whatever reads those: a dict of named parameters is in it under
its own names.
"""

from __future__ import annotations

import json
import operator
import os
import zlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from emajit import _memory, _tree
from emajit.checkpoint import files

__all__ = ["load", "save"]

Tree = TypeVar("Tree")
_KEY = "emajit"


def save(path: str | os.PathLike[str], shadow: Any, step: int | Tensor) -> None:
    """Write `shadow` and the number of updates it has taken.

    Whatever happens meanwhile, a kill or a full disk included, `path` is afterwards the old file or
    the new one. A killed process may leave a `.part` beside it.

    Args:
        path: the file, `.safetensors` by custom, in a folder that exists.
        shadow: a pytree of tensors or None, as in `emajit.update`, or a list of several. In the
            file a leaf has its path in the tree as its name, joined by dots: `{"encoder": [w]}`
            holds `encoder.0`. Leaves that are tied are written once.
        step: how many updates the shadow has taken, which is the step of the next one.

    Raises:
        ValueError: two leaves have the same name, safetensors lacks a dtype (complex32,
            complex128), or the step is negative.
        TypeError: a leaf is neither a tensor nor None, or the step is no integer.
        OSError: the file cannot be written.
    """
    count = operator.index(step)
    if count < 0:
        raise ValueError(f"step: expected the number of updates so far, >= 0, found {count}")
    kept: dict[Hashable, str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, leaf in _named("shadow", shadow).items():
        first = kept.setdefault(_memory.identity(leaf), name)
        if first == name:
            tensors[name] = leaf
        else:
            tied[name] = first

    def metadata(crc32: Mapping[str, str]) -> dict[str, str]:
        return _Record(count, tied, dict(crc32)).metadata()

    files.write_tensors(Path(path), tensors, metadata, _seed(count))


def load(path: str | os.PathLike[str], like: Tree) -> tuple[Tree, int]:
    """The shadow that `save` has written, and its step.

    The shadow is a new tree: a file that is refused changes nothing. All numbers are checked
    against the checksums that were saved with them.

    Args:
        path: the file.
        like: a tree of the structure, shapes, dtypes and devices that are expected, such as
            `emajit.init(params)`. Its values are not read. What is tied there is tied in the
            result.

    Raises:
        ValueError: the file is truncated, corrupt or not from `save`; a leaf is missing, unknown,
            of another shape or dtype, or tied in `like` and not in the file. The message names the
            file and the leaf.
        TypeError: a leaf of `like` is neither a tensor nor None.
        OSError: the file cannot be read.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "ema.safetensors")
    >>> save(path, {"w": torch.tensor([1.0, 2.0])}, step=3)
    >>> load(path, like={"w": torch.zeros(2)})
    ({'w': tensor([1., 2.])}, 3)
    """
    path = Path(path)
    wanted = _named("like", like)
    with files.opened(path) as file:
        record = _record(path, file)
        _check_forms(path, file, record, wanted)
        loaded: dict[str, Tensor] = {}
        first: dict[Hashable, str] = {}
        for name, leaf in wanted.items():
            same = first.setdefault(_memory.identity(leaf), name)
            if same == name:
                loaded[name] = _read(path, file, record, record.tied.get(name, name), leaf)
            elif record.tied.get(same, same) == record.tied.get(name, name):
                loaded[name] = loaded[same]
            else:
                raise ValueError(f"{path}: expected {name!r} tied to {same!r} as in like")
    leaves = iter(loaded.values())
    return pytree.tree_map(lambda leaf: None if leaf is None else next(leaves), like), record.step


class _Record(NamedTuple):
    """What is saved beside the tensors."""

    step: int
    tied: dict[str, str]
    crc32: dict[str, str]

    def metadata(self) -> dict[str, str]:
        return {"format": "pt", _KEY: json.dumps(self._asdict())}


def _seed(step: int) -> int:
    """Where the checksums start, so that another step fits none of them."""
    return zlib.crc32(str(step).encode())


def _record(path: Path, file: Any) -> _Record:
    text = (file.metadata() or {}).get(_KEY)
    if text is None:
        raise ValueError(f"{path}: expected a file of emajit.checkpoint.save, found another's")
    try:
        record = _Record(**json.loads(text))
    except (TypeError, ValueError):
        record = _Record(-1, {}, {})
    step, tied, crc32 = record
    if not (
        (type(step), type(tied), type(crc32)) == (int, dict, dict)
        and step >= 0
        and set(file.keys()) == set(crc32) >= set(map(str, tied.values()))
    ):
        found = f"{text:.200}"
        raise ValueError(f"{path}: expected a step and a checksum of each tensor, found {found}")
    return record


def _check_forms(path: Path, file: Any, record: _Record, wanted: dict[str, Tensor]) -> None:
    held = record.crc32.keys() | record.tied.keys()
    missing, unknown = sorted(wanted.keys() - held), sorted(held - wanted.keys())
    if missing or unknown:
        told = [f"without {_tree.some(missing)}"] * bool(missing)
        told += [f"with {_tree.some(unknown)} too"] * bool(unknown)
        raise ValueError(f"{path}: expected the leaves of like, found it {' and '.join(told)}")
    for name, leaf in wanted.items():
        expected = tuple(leaf.shape), leaf.dtype
        found = files.form(file, record.tied.get(name, name))
        if found != expected:
            expected_form, found_form = ("shape {} in {}".format(*f) for f in (expected, found))
            raise ValueError(
                f"{path}: {name!r}: expected {expected_form} as in like, found {found_form}"
            )


def _read(path: Path, file: Any, record: _Record, name: str, leaf: Tensor) -> Tensor:
    host = file.get_tensor(name)
    if files.checksum(host, _seed(record.step)) != record.crc32[name]:
        raise ValueError(f"{path}: {name!r} is corrupt: its checksum is another than was saved")
    # Not the file's own memory, which changes with the file.
    return torch.empty_like(leaf, requires_grad=False).copy_(host)


def _named(which: str, tree: Any) -> dict[str, Tensor]:
    """The leaves of a tree that are not None, by their names in a file."""
    named: dict[str, tuple[str, Tensor]] = {}
    for path, name, leaf in _tree.named_leaves(which, tree):
        other, _ = named.setdefault(name, (path, leaf))
        if other != path or name == "__metadata__":
            reason = "which safetensors reserves" if other == path else f"as {other} has"
            raise ValueError(f"{path}: expected a name of its own, found {name!r}, {reason}")
    return {name: leaf for name, (_, leaf) in named.items()}
