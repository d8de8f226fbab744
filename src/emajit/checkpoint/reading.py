"""The averages in a checkpoint of any library, read from a file or from its content."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emajit import _names, _paths
from emajit._torch import pytree
from emajit.checkpoint import files
from emajit.checkpoint.averaged import Averaged, Names, listed
from emajit.checkpoint.files import Opaque
from emajit.checkpoint.layouts import LAYOUTS
from emajit.checkpoint.saved import KEY, SHADOW, TIED, Saved


def read(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    names: Iterable[str] | torch.nn.Module | None = None,
) -> Averaged:
    """The averaged weights in a checkpoint of any known library, under the model's own names.

    The layout is recognised. The modules in `emajit.checkpoint.layouts` describe the known ones,
    from `LitEma` and torch's `AveragedModel` to those of diffusers, Lightning and NeMo, and what
    `save` writes.

    Args:
        source: a file of safetensors or `torch.save`, a folder of `torch.distributed.checkpoint`,
            or the content of one. Nothing but tensors and plain containers is unpickled.
        names: the names of the averaged parameters in order, or the model, for the layouts that
            hold no names: those by position (diffusers, torch_ema, NeMo), a `LitEma` on its own.

    The tensors may lie in the file, which is mapped into memory: clone those that are to outlive
    it.

    Raises:
        ValueError: there is no average, or more than one; two parameters have the same flattened
            name; `names` are missing, or too few or too many; an average has another shape than its
            parameter; the file is broken, or holds pickled objects.
        TypeError: `source` or `names` is of another type.
        OSError: the file cannot be read.
    """
    if isinstance(source, Mapping):
        return _read_tree(source, names)
    if not isinstance(source, str | os.PathLike):
        found = type(source).__qualname__
        raise TypeError(f"source: expected a path, or a mapping as a file holds one, found {found}")
    path = Path(source)
    tree = _held(path)
    try:
        return _read_tree(tree, names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_tree(tree: Any, names: Iterable[str] | torch.nn.Module | None) -> Averaged:
    """The averages in the content of a file, of the shapes of the model if `names` is one."""
    found = _recognise(tree, listed(names))
    if isinstance(names, torch.nn.Module):
        for name, p in names.named_parameters():
            average = found.weights.get(name)
            if average is not None and average.shape != p.shape:
                expected, shape = tuple(p.shape), tuple(average.shape)
                raise ValueError(
                    f"{name!r}: expected an average of shape {expected}, found {shape}"
                )
    return found


def _recognise(tree: Any, names: Names) -> Averaged:
    """The one average that is in `tree`; ValueError for none, for two, and for a broken one."""
    try:
        leaves = pytree.tree_leaves(tree)
    except RecursionError:
        raise ValueError(
            "expected averages in a layout that is known, found one in itself"
        ) from None
    if not isinstance(tree, Mapping):
        found_type = type(tree).__qualname__
        raise ValueError(  # noqa: TRY004, it is a broken file, not a wrong argument
            f"expected a mapping of names, found {found_type}{_pickled(leaves)}"
        )
    try:
        candidates = [layout.read(tree, names) for layout in LAYOUTS if layout.read is not None]
        found = [averaged for averaged in candidates if averaged is not None]
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"expected averages in a layout that is known, found {error!r}") from None
    if not found:
        keys = _paths.some([str(key) for key in tree])
        raise ValueError(
            "expected averages in a layout that is known, found none among "
            f"{keys}{_pickled(leaves)}"
        )
    if len(found) > 1:
        layouts = " and ".join([averaged.layout for averaged in found])
        raise ValueError(f"expected one average, found two: {layouts}")
    _check_values(found[0])
    used = {id(value) for part in (found[0].weights, found[0].raw) for value in part.values()}
    held = {id(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
    _check_beside(tree, used)
    return found[0]._replace(others=len(held - used))


def _pickled(leaves: Sequence[Any]) -> str:
    """The end of an error message: the classes of pickled objects, or nothing if there is none."""
    kinds = {type(leaf) for leaf in leaves if isinstance(leaf, Opaque)}
    names = sorted(f"{kind.__module__}.{kind.__name__}" for kind in kinds)
    return f", beside what is not unpickled: {_paths.some(names)}" if names else ""


def _check_values(found: Averaged) -> None:
    broken = [name for name, value in found.weights.items() if not isinstance(value, Tensor)]
    if broken:
        raise ValueError(f"{found.layout}: expected tensors, found others at {broken[:5]}")
    for what, kind, value in (("step", int, found.step), ("decay", int | float, found.decay)):
        if not isinstance(value, kind | None):
            told = type(value).__qualname__
            raise ValueError(  # noqa: TRY004, it is a broken file, not a wrong argument
                f"{found.layout}: {what}: expected a number, found {told}"
            )
    for name in found.weights.keys() & found.raw.keys():
        expected, shape = (tuple(part[name].shape) for part in (found.raw, found.weights))
        if shape != expected:
            raise ValueError(f"{name!r}: expected an average of shape {expected}, found {shape}")


def _check_beside(tree: Any, used: set[int]) -> None:
    """Raise ValueError for a pickled object in a mapping that holds a used tensor."""
    if not isinstance(tree, Mapping):
        return
    opaque = [
        key
        for key, value in tree.items()
        if isinstance(value, Opaque) and not str(key).endswith("_extra_state")
    ]
    if opaque and any(id(value) in used for value in tree.values()):
        found = type(tree[opaque[0]]).__name__
        raise ValueError(f"{opaque[0]!r}: expected a tensor, found a pickled {found}")
    for value in tree.values():
        _check_beside(value, used)


def _held(path: Path) -> Any:
    """The content of a file or a folder, as nested mappings."""
    if (path / ".metadata").is_file():
        return _of_folder(path)
    if path.is_dir():
        expected = "expected a file, or a folder of torch.distributed.checkpoint, found another"
        raise IsADirectoryError(errno.EISDIR, expected, str(path))
    if not files.is_safetensors(path):
        return files.load_torch(path)
    with files.opened(path) as file:
        header = file.metadata() or {}
        if KEY not in header:
            names = file.keys()
            held = {name: _apart(files.tensor(path, file, name)) for name in names}
            if TIED in header:
                _tie(path, held, header[TIED])
            else:
                files.tie_equal(held)
            return held
        saved = Saved(path, file)
        shadow = {name: _apart(saved.read(name)) for name in saved.names()}
        return {"shadow": shadow, "step": saved.record.step}


def _tie(path: Path, held: dict[str, Tensor], ties: str) -> None:
    """Tie the tensors that a header tells were tied, if they still have the same numbers."""
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


def _of_folder(path: Path) -> dict[str, Any]:
    from emajit.checkpoint import sharded  # noqa: PLC0415, half a second for this alone

    folder = sharded.Folder(path)
    held: dict[str, Any] = {
        key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in folder.forms.items()
    }
    folder.read_into(held, alone=True)
    if (path / "meta.pt").is_file():  # Lightning keeps there what is not sharded
        return {
            **files.load_torch(path / "meta.pt"),
            "state_dict": _names.below("state_dict.", held),
        }
    shadow = _names.below(SHADOW, held)
    return {"shadow": shadow, "step": held["step"]} if shadow and "step" in held else held
