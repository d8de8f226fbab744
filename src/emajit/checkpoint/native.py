"""A shadow and its step in emajit's own file or folder.

The file is in safetensors; a shadow of DTensors goes into a folder of
`torch.distributed.checkpoint`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from emajit import _alias, _names, _paths, _shards, _tree, offload
from emajit._torch import pytree
from emajit.checkpoint import files
from emajit.checkpoint.saved import KEY, SHADOW, Record, count, opened
from emajit.checkpoint.sources import OF_TORCH

Tree = TypeVar("Tree")


def save(
    path: str | os.PathLike[str],
    shadow: Any,
    step: int | Tensor,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `shadow` and the number of updates it has taken.

    Even after a kill or on a full disk, `path` is either the old file or the new file. A killed
    process may leave a `.part` file beside it.

    Args:
        path: the file, usually `.safetensors`, in a folder that exists; its name must not end as
            those of `torch.save`: `.pt`, `.pth`, `.ckpt`, `.bin`.
        shadow: a pytree of tensors or None, as in `emajit.update`, or a list of several. The name
            of a leaf in the file is its path in the tree, joined by dots: `{"encoder": [w]}` gives
            `encoder.0`. Tied leaves are written once.
        step: how many updates the shadow has taken, which is the step of the next update.
        dtype: the dtype of floating-point leaves in the file; default, their own.
        metadata: strings for the header of the file; the keys "format" and "emajit" are reserved.

    Raises:
        ValueError: two leaves have the same name; a node of the tree has no names for its children;
            a tensor is not dense (sparse, on meta) or is a DTensor (see `save_sharded`);
            safetensors lacks a dtype (complex32, complex128); `dtype` is not floating-point; the
            step is negative; a key of `metadata` is taken; `path` has a name for `torch.save`.
        TypeError: a leaf is neither a tensor nor None, the step is no integer, or `metadata` is no
            dict of strings.
        OSError: the file cannot be written.
    """
    taken = count(step)
    check_name(Path(path))
    _tree.check_dtype(dtype)
    if not isinstance(metadata, Mapping | None):
        raise TypeError(f"metadata: expected a dict, found {type(metadata).__qualname__}")
    own = dict(metadata or {})
    for key, value in own.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata: expected strings, found {key!r}: {value!r}")
        if key in ("format", KEY):
            raise ValueError(f"metadata: expected keys of your own, found {key!r}")
    named = _named("shadow", shadow)
    for name, leaf in named.items():
        if _shards.is_one(leaf):
            found = _shards.described(leaf)
            raise ValueError(
                f"{name!r}: expected a whole tensor, found {found}; save_sharded writes those"
            )
    tied = _alias.ties(named)
    tensors = {name: leaf for name, leaf in named.items() if name not in tied}
    record = Record(taken, tied, own)
    casts = files.float_casts(tensors, dtype)
    files.write_tensors(Path(path), tensors, record.header, record.seed(), casts=casts)


def load(path: str | os.PathLike[str], like: Tree) -> tuple[Tree, int]:
    """Read the shadow that `save` has written, and its step.

    The shadow is a new tree: a file that is refused changes nothing. All numbers are checked
    against the checksums saved with them.

    Args:
        path: the file.
        like: a tree of the expected structure, shapes, dtypes and devices, such as
            `emajit.init(params)`. Its values are not read. Leaves that are tied in `like` are tied
            in the result. Of a DTensor each process gets its shard.

    Raises:
        ValueError: the file is truncated, corrupt or not from `save`; a leaf is missing, unknown,
            of another shape or dtype, or tied in `like` but not in the file. The message names the
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
    if path.is_dir():
        told = "expected a file, found a folder, which load_sharded or emajit.checkpoint.read reads"
        raise IsADirectoryError(errno.EISDIR, told, str(path))
    wanted = _named("like", like)
    with opened(path) as saved:
        _check_names(path, {*saved.names()}, wanted)
        for (name, leaf), here in zip(wanted.items(), _shards.local(wanted.values()), strict=True):
            files.check_dense(f"like: {name!r}", here)
            _check_form(path, name, saved.form(name), leaf)
        tied = saved.record.tied
        loaded: dict[str, Tensor] = {}
        first: dict[Hashable, str] = {}
        for name, leaf in wanted.items():
            same = first.setdefault(_alias.identity(leaf), name)
            if same == name:
                # A copy: the file's own memory changes with the file.
                own = torch.empty_like(leaf, requires_grad=False)
                own.copy_(_shards.split_as(leaf, saved.read(name)))
                loaded[name] = offload.like(leaf, own)
            elif tied.get(same, same) == tied.get(name, name):
                loaded[name] = loaded[same]
            else:
                raise ValueError(f"{path}: expected {name!r} tied to {same!r} as in like")
    return _rebuilt(like, loaded.values()), saved.record.step


def check_name(path: Path) -> None:
    """Raise ValueError where the name of a file in safetensors says that `torch.save` wrote it."""
    if path.suffix in OF_TORCH:
        proper = path.with_suffix(".safetensors").name
        raise ValueError(
            f"{path}: expected a name for safetensors, such as {proper}, found {path.suffix}, a "
            "name for torch.save"
        )


def save_sharded(path: str | os.PathLike[str], shadow: Any, step: int | Tensor) -> None:
    """Write a shadow of DTensors and its step; every process calls this and writes its shards.

    The folder has the format of `torch.distributed.checkpoint`, and appears when it is complete.
    The name of a leaf in it is "shadow." and the name that `save` gives; the step is "step". Leaves
    may be whole tensors too, the same in every process; one process without a process group may
    save only whole tensors.

    Args:
        path: the folder, which must not exist yet; its parent exists and all processes share it.
        shadow: a pytree as in `save`.
        step: as in `save`.

    Raises, in all processes, FileExistsError where `path` exists, and OSError if it cannot be
    written; ValueError and TypeError as `save`.
    """
    from emajit.checkpoint import sharded  # noqa: PLC0415, half a second for this alone

    taken = count(step)
    named = {SHADOW + name: leaf.detach() for name, leaf in _named("shadow", shadow).items()}
    for name, here in zip(named, _shards.local(named.values()), strict=True):
        files.check_dense(repr(name), here)
    sharded.write(Path(path), {**named, "step": torch.tensor(taken)})


def load_sharded(path: str | os.PathLike[str], like: Tree) -> tuple[Tree, int]:
    """Read the shadow that `save_sharded` has written, and its step; every process calls this.

    The number of processes and the placements may have changed since saving: each process reads
    the shards that its `like` has. The shadow is a new tree: a folder that is refused changes
    nothing. There are no checksums.

    Args:
        path: the folder.
        like: as in `load`, of DTensors, whole tensors or both.

    Raises:
        ValueError: the folder is incomplete or broken; a leaf is missing, unknown, of another shape
            or dtype, or tied in `like` and different in the folder.
        TypeError: a leaf of `like` is neither a tensor nor None.
    """
    from emajit.checkpoint import sharded  # noqa: PLC0415, half a second for this alone

    path = Path(path)
    wanted = _named("like", like)
    folder = sharded.Folder(path)
    _check_names(path, {*_names.below(SHADOW, folder.forms)}, wanted)
    for name, leaf in wanted.items():
        _check_form(path, name, folder.forms[SHADOW + name], leaf)
    if folder.forms.get("step") != ((), torch.int64):
        raise ValueError(f"{path}: expected a step, found none")
    step = torch.zeros((), dtype=torch.int64)
    loaded = {
        SHADOW + name: torch.empty_like(leaf, requires_grad=False) for name, leaf in wanted.items()
    }
    folder.read_into({**loaded, "step": step})
    leaves: list[Tensor] = []
    first: dict[Hashable, Tensor] = {}
    for (name, leaf), own in zip(wanted.items(), loaded.values(), strict=True):
        leaves.append(first.setdefault(_alias.identity(leaf), offload.like(leaf, own)))
        if not torch.equal(*map(_bits, _shards.local([leaves[-1], own]))):
            raise ValueError(f"{path}: expected {name!r} tied as in like, found another value")
    return _rebuilt(like, leaves), int(step)


def _rebuilt(like: Tree, leaves: Iterable[Tensor]) -> Tree:
    """A tree of the structure of `like`, with `leaves` in place of its own."""
    following = iter(leaves)
    return pytree.tree_map(  # type: ignore[no-any-return]
        lambda leaf: None if leaf is None else next(following), like
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _check_names(path: Path, held: set[str], wanted: dict[str, Tensor]) -> None:
    missing, unknown = sorted(wanted.keys() - held), sorted(held - wanted.keys())
    if missing or unknown:
        told = [f"without {_paths.some(missing)}"] * bool(missing)
        told += [f"with {_paths.some(unknown)} too"] * bool(unknown)
        raise ValueError(f"{path}: expected the leaves of like, found it {' and '.join(told)}")


def _check_form(path: Path, name: str, form: tuple[Any, Any], leaf: Tensor) -> None:
    forms = (tuple(leaf.shape), leaf.dtype), form
    if forms[0] != forms[1]:
        expected, found = ("shape {} in {}".format(*each) for each in forms)
        raise ValueError(f"{path}: {name!r}: expected {expected} as in like, found {found}")


def _named(which: str, tree: Any) -> dict[str, Tensor]:
    """The leaves of a tree, without None, by their names in a file."""
    named: dict[str, tuple[str, Tensor]] = {}
    for path, name, leaf in _paths.named_leaves(which, tree):
        other, _ = named.setdefault(name, (path, leaf))
        if other != path or name == "__metadata__":
            reason = "which safetensors reserves" if other == path else f"as {other} has"
            raise ValueError(f"{path}: expected a name of its own, found {name!r}, {reason}")
    return {name: leaf for name, (_, leaf) in named.items()}
