"""A shadow and its step in a file: written atomically, read whole or not at all.

The file is one of safetensors, for whatever reads those: a dict of named parameters is in it under
its own names. A shadow of DTensors goes into a folder of `torch.distributed.checkpoint`.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from emajit import _host, _memory, _names, _shards, _tree
from emajit.checkpoint import files, formats
from emajit.checkpoint.formats import Averaged
from emajit.checkpoint.saved import KEY, Record, Saved, count, opened

__all__ = ["Averaged", "load", "load_sharded", "read", "save", "save_sharded", "write"]

Tree = TypeVar("Tree")
_SHADOW = "shadow."
_TIED = "emajit.tied"
_OF_TORCH = ".ckpt", ".pt", ".pth", ".bin"


def save(
    path: str | os.PathLike[str],
    shadow: Any,
    step: int | Tensor,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `shadow` and the number of updates it has taken.

    Whatever happens meanwhile, a kill or a full disk included, `path` is afterwards the old file or
    the new one. A killed process may leave a `.part` beside it.

    Args:
        path: the file, `.safetensors` by custom, in a folder that exists.
        shadow: a pytree of tensors or None, as in `emajit.update`, or a list of several. In the
            file a leaf has its path in the tree as its name, joined by dots: `{"encoder": [w]}`
            holds `encoder.0`. Leaves that are tied are written once.
        step: how many updates the shadow has taken, which is the step of the next one.
        dtype: of the floating-point leaves in the file; default their own.
        metadata: strings for the header of the file; the keys "format" and "emajit" are taken.

    Raises:
        ValueError: two leaves have the same name, a node of the tree has none for its children, a
            tensor is not dense (sparse, on meta), or is a DTensor, for which there is
            `save_sharded`; safetensors lacks a dtype (complex32, complex128), `dtype` is not
            floating-point, the step is negative, or a key of `metadata` is taken.
        TypeError: a leaf is neither a tensor nor None, the step is no integer, or `metadata` is no
            dict of strings.
        OSError: the file cannot be written.
    """
    taken = count(step)
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
    tied = _memory.ties(named)
    tensors = {name: leaf for name, leaf in named.items() if name not in tied}
    record = Record(taken, tied, own)
    casts = _casts(tensors, dtype)
    files.write_tensors(Path(path), tensors, record.header, record.seed(), casts=casts)


def _casts(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """The names of floating-point tensors, with the dtype to cast them to, if there is one."""
    if dtype is None:
        return {}
    return {name: dtype for name, tensor in tensors.items() if tensor.is_floating_point()}


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
    with opened(path) as saved:
        _check_names(path, {*saved.names()}, wanted)
        for name, leaf in wanted.items():
            files.check_dense(f"like: {name!r}", leaf)
            _check_form(path, name, saved.form(name), leaf)
        tied = saved.record.tied
        loaded: dict[str, Tensor] = {}
        first: dict[Hashable, str] = {}
        for name, leaf in wanted.items():
            same = first.setdefault(_memory.identity(leaf), name)
            if same == name:
                # Not the file's own memory, which changes with the file.
                own = torch.empty_like(leaf, requires_grad=False).copy_(saved.read(name))
                loaded[name] = _host.like(leaf, own)
            elif tied.get(same, same) == tied.get(name, name):
                loaded[name] = loaded[same]
            else:
                raise ValueError(f"{path}: expected {name!r} tied to {same!r} as in like")
    return _rebuilt(like, loaded.values()), saved.record.step


def _rebuilt(like: Tree, leaves: Iterable[Tensor]) -> Tree:
    following = iter(leaves)
    return pytree.tree_map(  # type: ignore[no-any-return]
        lambda leaf: None if leaf is None else next(following), like
    )


def save_sharded(path: str | os.PathLike[str], shadow: Any, step: int | Tensor) -> None:
    """Write a shadow of DTensors and its step, every process its shards; to be called by all.

    The folder is one of `torch.distributed.checkpoint`, and appears when it is complete. In it a
    leaf has the name that `save` gives it, behind "shadow.", and the step is "step". Whole tensors,
    the same in every process, may be among the leaves; in one process without a process group all
    may be whole.

    Args:
        path: the folder, which must not exist, in one that does and that all processes share.
        shadow: a pytree as in `save`.
        step: as in `save`.

    Raises, in all processes, FileExistsError where `path` exists, and OSError if it cannot be
    written; ValueError and TypeError as `save`.
    """
    from emajit.checkpoint import sharded  # noqa: PLC0415, half a second that others need not take

    taken = count(step)
    named = {_SHADOW + name: leaf.detach() for name, leaf in _named("shadow", shadow).items()}
    for name, here in zip(named, _shards.local(named.values()), strict=True):
        files.check_dense(repr(name), here)
    sharded.write(Path(path), {**named, "step": torch.tensor(taken)})


def load_sharded(path: str | os.PathLike[str], like: Tree) -> tuple[Tree, int]:
    """The shadow that `save_sharded` has written, and its step; to be called by all processes.

    How many there are, and how the leaves are placed, may differ from when it was saved: each
    process reads the shards that `like` has in it. The shadow is a new tree: a folder that is
    refused changes nothing. There are no checksums.

    Args:
        path: the folder.
        like: as in `load`, of DTensors, whole tensors or both.

    Raises:
        ValueError: the folder is incomplete or broken; a leaf is missing, unknown, of another shape
            or dtype, or tied in `like` and different in the folder.
        TypeError: a leaf of `like` is neither a tensor nor None.
    """
    from emajit.checkpoint import sharded  # noqa: PLC0415, half a second that others need not take

    path = Path(path)
    wanted = _named("like", like)
    folder = sharded.Folder(path)
    _check_names(path, {*_names.below(_SHADOW, folder.forms)}, wanted)
    for name, leaf in wanted.items():
        _check_form(path, name, folder.forms[_SHADOW + name], leaf)
    if folder.forms.get("step") != ((), torch.int64):
        raise ValueError(f"{path}: expected a step, found none")
    step = torch.zeros((), dtype=torch.int64)
    loaded = {
        _SHADOW + name: torch.empty_like(leaf, requires_grad=False) for name, leaf in wanted.items()
    }
    folder.read_into({**loaded, "step": step})
    leaves: list[Tensor] = []
    first: dict[Hashable, Tensor] = {}
    for (name, leaf), own in zip(wanted.items(), loaded.values(), strict=True):
        leaves.append(first.setdefault(_memory.identity(leaf), _host.like(leaf, own)))
        if not torch.equal(*map(_bits, _shards.local([leaves[-1], own]))):
            raise ValueError(f"{path}: expected {name!r} tied as in like, found another value")
    return _rebuilt(like, leaves), int(step)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def read(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    names: Iterable[str] | torch.nn.Module | None = None,
) -> Averaged:
    """The averaged weights in anybody's checkpoint, under the model's own names.

    Known are: `LitEma`, on its own or in a checkpoint of latent-diffusion, SGM or CogVideo; torch's
    `AveragedModel`; timm; ema-pytorch; diffusers' `EMAModel`; torch_ema; Lightning's weight
    averaging; NeMo; d2go; mmengine; Composer; torchtitan; and what `save` writes.

    Args:
        source: a file of safetensors or `torch.save`, a folder of `torch.distributed.checkpoint`,
            or what one holds. Nothing but tensors and plain containers is unpickled.
        names: the names of the averaged parameters in order, or the model, for the layouts that
            have none of their own: diffusers, torch_ema, NeMo, a `LitEma` on its own.

    The tensors may lie in the file, which is mapped: clone what is to outlive it.

    Raises:
        ValueError: no average is there, or more than one; two parameters have the same flattened
            name; `names` are missing or of another number; an average has another shape than its
            parameter; the file is broken, or holds pickled objects.
        TypeError: `source` or `names` is of another type.
        OSError: the file cannot be read.
    """
    if isinstance(source, Mapping):
        return _recognised(source, names)
    if not isinstance(source, str | os.PathLike):
        found = type(source).__qualname__
        raise TypeError(f"source: expected a path, or a mapping as a file holds one, found {found}")
    path = Path(source)
    tree = _held(path)
    try:
        return _recognised(tree, names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _recognised(tree: Any, names: Iterable[str] | torch.nn.Module | None) -> Averaged:
    found = formats.recognise(tree, _listed(names), _buffers(names))
    if isinstance(names, torch.nn.Module):
        for name, p in names.named_parameters():
            average = found.weights.get(name)
            if average is not None and average.shape != p.shape:
                expected, shape = tuple(p.shape), tuple(average.shape)
                raise ValueError(
                    f"{name!r}: expected an average of shape {expected}, found {shape}"
                )
    return found


def _buffers(names: Iterable[str] | torch.nn.Module | None) -> list[str]:
    if isinstance(names, torch.nn.Module):
        return [name for name, _ in names.named_buffers()]
    return []


def _listed(names: Iterable[str] | torch.nn.Module | None) -> list[str] | None:
    if names is None:
        return None
    if isinstance(names, torch.nn.Module):
        return [name for name, _ in names.named_parameters()]
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"names: expected a list of names, or the model, found {names!r}")
    listed = [*names]
    for name in listed:
        if not isinstance(name, str):
            found = type(name).__qualname__
            raise TypeError(f"names: expected strings, or the model itself, found {found}")
    return listed


def write(
    path: str | os.PathLike[str],
    averaged: Averaged,
    *,
    layout: str = "state_dict",
    names: Iterable[str] | torch.nn.Module | None = None,
    decay: float | None = None,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    tell: Callable[[int], object] = lambda _: None,
) -> None:
    """Write what `read` has found in a layout that others read; whole or not at all.

    Args:
        path: the file. The first two layouts are written as safetensors, but into a `.ckpt`, `.pt`,
            `.pth` or `.bin` with `torch.save`, as the others always are, not into a `.safetensors`.
        averaged: from `read`.
        layout: "state_dict" is the averaged weights as a model loads them; "litema" a checkpoint of
            latent-diffusion, trained weights and averages below `model_ema.`; "averaged-model" the
            state of torch's `AveragedModel`, "ema-pytorch" that of its `EMA`; "timm" what its
            training script saves; "diffusers-ema" and "torch-ema" the states of diffusers'
            `EMAModel` and of torch_ema, by position. What a layout has beyond that, such as the
            `power` of diffusers' warm-up, gets its default. ema-pytorch's `EMA` starts from the
            model again up to its `update_after_step`.
        names: for the last two, the names of the model's parameters in order, or the model, whose
            buffers are then left out. A parameter that is not averaged is as it was trained.
        decay: to go on with, for the layouts that hold one; default that of `averaged`.
        step: how many updates the averages have taken, likewise.
        dtype: of floating-point tensors; default their own.
        tell: is told how many bytes were written, piece by piece.

    Raises:
        ValueError: another layout, or a dtype that is not floating-point or has no number for one
            that is finite; a decay outside [0, 1] or a negative step; "litema" without the trained
            weights, "averaged-model", "ema-pytorch" and "diffusers-ema" without a known step, a
            layout that holds a decay without a known one, a layout by position without the names of
            all averages; a `.safetensors` for a layout that is of `torch.save`.
        TypeError: `averaged` is not from `read`.
        OSError: the file cannot be written.
    """
    if not isinstance(averaged, Averaged):
        raise TypeError(
            f"averaged: expected what read has found, found {type(averaged).__qualname__}"
        )
    _tree.check_dtype(dtype)
    path = Path(path)
    if decay is not None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: expected a number in [0, 1], found {decay}")
        averaged = averaged._replace(decay=float(decay))
    if step is not None:
        averaged = averaged._replace(step=count(step))
    if isinstance(names, torch.nn.Module) and layout in formats.BY_POSITION:
        averaged = _parameters(averaged, names)
    as_safetensors = layout in formats.OF_SAFETENSORS and path.suffix not in _OF_TORCH
    if path.suffix == ".safetensors" and not as_safetensors and layout in formats.LAYOUTS:
        raise ValueError(f"{path}: expected a name with {' or '.join(_OF_TORCH)} for {layout}")
    if not as_safetensors:
        weights, raw = (_cast(part, dtype) for part in (averaged.weights, averaged.raw))
        averaged = averaged._replace(weights=weights, raw=raw)
    state = formats.written(averaged, layout, _listed(names))
    if as_safetensors:
        weights = {name: v for name, v in state.items() if name not in formats.CONTROLS}
        casts, header = _casts(weights, dtype), {"format": "pt"}
        if tied := _memory.ties(state):  # of which safetensors itself keeps copies
            header[_TIED] = json.dumps(tied)
        files.write_tensors(path, state, lambda *_: header, casts=casts, tell=tell)
    else:
        files.write_torch(path, {"state_dict": state} if layout == "litema" else state, tell)


def _parameters(averaged: Averaged, model: torch.nn.Module) -> Averaged:
    """Without the buffers of `model`; its frozen parameters count as averages of themselves."""
    params, buffers = (dict(model.named_parameters()), dict(model.named_buffers()))
    return averaged._replace(
        weights={name: v for name, v in averaged.weights.items() if name not in buffers},
        raw_only=tuple(name for name in averaged.raw_only if name not in params),
    )


def _tie(path: Path, held: dict[str, Tensor], ties: str) -> None:
    """Make one tensor of those that were tied, where they still have the same numbers."""
    try:
        for name, other in json.loads(ties).items():
            if torch.equal(held[name], held[other]):
                held[name] = held[other]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise ValueError(f"{path}: expected names that are tied, found {ties:.200}") from None


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """What is tied stays tied."""
    cast: dict[Hashable, Tensor] = {}
    for name, narrow in _casts(tensors, dtype).items():
        if (identity := _memory.identity(tensors[name])) not in cast:
            cast[identity] = files.cast(repr(name), tensors[name], narrow)
    return {name: cast.get(_memory.identity(v), v) for name, v in tensors.items()}


def _held(path: Path) -> Any:
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
            _tie(path, held, header.get(_TIED, "{}"))
            return held
        saved = Saved(path, file)
        shadow = {name: _apart(saved.read(name)) for name in saved.names()}
        return {"shadow": shadow, "step": saved.record.step}


def _apart(tensor: Tensor) -> Tensor:
    """An empty tensor of a file has the address of the next one, which `torch.save` refuses."""
    return tensor if tensor.numel() else torch.empty_like(tensor)


def _of_folder(path: Path) -> dict[str, Any]:
    from emajit.checkpoint import sharded  # noqa: PLC0415, half a second that others need not take

    folder = sharded.Folder(path)
    held: dict[str, Any] = {
        key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in folder.forms.items()
    }
    folder.read_into(held, alone=True)
    if (path / "meta.pt").is_file():  # Lightning's, which keeps there what is not sharded
        return {
            **files.load_torch(path / "meta.pt"),
            "state_dict": _names.below("state_dict.", held),
        }
    shadow = _names.below(_SHADOW, held)
    return {"shadow": shadow, "step": held["step"]} if shadow and "step" in held else held


def _check_names(path: Path, held: set[str], wanted: dict[str, Tensor]) -> None:
    missing, unknown = sorted(wanted.keys() - held), sorted(held - wanted.keys())
    if missing or unknown:
        told = [f"without {_tree.some(missing)}"] * bool(missing)
        told += [f"with {_tree.some(unknown)} too"] * bool(unknown)
        raise ValueError(f"{path}: expected the leaves of like, found it {' and '.join(told)}")


def _check_form(path: Path, name: str, form: tuple[Any, Any], leaf: Tensor) -> None:
    forms = (tuple(leaf.shape), leaf.dtype), form
    if forms[0] != forms[1]:
        expected, found = ("shape {} in {}".format(*each) for each in forms)
        raise ValueError(f"{path}: {name!r}: expected {expected} as in like, found {found}")


def _named(which: str, tree: Any) -> dict[str, Tensor]:
    """The leaves of a tree that are not None, by their names in a file."""
    named: dict[str, tuple[str, Tensor]] = {}
    for path, name, leaf in _tree.named_leaves(which, tree):
        other, _ = named.setdefault(name, (path, leaf))
        if other != path or name == "__metadata__":
            reason = "which safetensors reserves" if other == path else f"as {other} has"
            raise ValueError(f"{path}: expected a name of its own, found {name!r}, {reason}")
    return {name: leaf for name, (_, leaf) in named.items()}
