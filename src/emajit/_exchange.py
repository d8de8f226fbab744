"""Exchange a module's tensors for their averages, and undo it, as lists of calls."""

from __future__ import annotations

import itertools
import operator
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from emajit import _alias, _names, _paths, _shards, _torch

# A function, and its arguments.
Call = tuple[Any, ...]

_set_data: Any = Tensor.data.__set__  # type: ignore[attr-defined]
_version_of: Any = operator.attrgetter("_version")
_entered = itertools.count()


def calls(
    modules: list[nn.Module],
    averages: list[tuple[Tensor, Tensor]],
    *,
    copy: bool,
    raised: BaseException | None,
) -> tuple[list[Call], list[Call], Call]:
    """The calls that put averages in place of tensors, the calls that undo them, and a last check.

    The check raises if an average was written. `raised` is the exception in flight on entering.
    """
    tensors = [tensor for tensor, _ in averages]
    moved: list[tuple[Tensor, Tensor]] = []
    copied: list[tuple[Tensor, Tensor]] = []
    renormed = _renormed(modules)
    for tensor, average in averages:
        stays = copy or id(tensor) in renormed or _is_shared(tensor)
        (copied if stays else moved).append((tensor, average.detach()))
    tracked = tuple([tensor for tensor in tensors if not tensor.is_inference()])
    versions = tuple(map(_version_of, tracked))
    inside = _versions_inside(versions)
    enter = _torch.setting_versions(tracked, inside)
    undo = _torch.setting_versions(tracked, versions)
    entered = inside if enter else versions
    enter += [(_set_data, t, average.to(t.device, t.dtype)) for t, average in moved]
    undo += [(_set_data, t, t.data) for t, _ in moved]
    if copied:
        shards = [shard.detach() for shard in _shards.local(tensor for tensor, _ in copied)]
        values = _shards.local(average for _, average in copied)
        enter.append((_torch.foreach_copy_, shards, values))
        # Subclasses that wrap tensors copy in Python, where a signal may come between two tensors.
        written = [inner for shard in shards for inner in within(shard)]
        kept = [inner.clone() for inner in written]
        undo[:0] = [(_shards.reshard, modules[0]), (_torch.foreach_copy_, written, kept)]
        # Code inside may have given a parameter other memory.
        undo += [(_set_data, t, t.data) for t, _ in copied if not _torch.wraps(t)]
    left: list[int] = []
    undo.insert(0, (left.extend, map(_version_of, tracked)))
    check = (_check_read, modules[0], moved, tracked, entered, left, raised)
    return enter, undo + _put_back(modules, averages), check


def _renormed(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of embedding weights that each forward renormalises in place (`max_norm`)."""
    return {
        id(module._parameters.get("weight"))
        for module in modules
        if module.__dict__.get("max_norm") is not None
    }


def _is_shared(tensor: Tensor) -> bool:
    """Whether another process or another tensor may share a tensor's memory.

    True also for tensor subclasses that wrap tensors, whose inner memory cannot be exchanged.
    """
    if _torch.wraps(tensor):
        return True
    if tensor.layout is not torch.strided:
        return False
    storage = tensor.untyped_storage()
    if storage.nbytes() > tensor.nbytes:
        return True
    return tensor.is_cpu and storage.is_shared()  # True for every storage on a GPU


def within(tensor: Any) -> list[Tensor]:
    """The innermost tensors of a subclass that wraps tensors, or the tensor itself."""
    if not (_torch.wraps(tensor) and hasattr(tensor, "__tensor_flatten__")):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [inner for name in names for inner in within(getattr(tensor, name))]


def _versions_inside(versions: tuple[int, ...]) -> tuple[int, ...]:
    """Versions for the tensors inside the scope that they never have outside.

    Autograd compares versions, not memory: otherwise it would differentiate a graph from inside
    with the training weights, without an error.
    """
    entered = 2**30 + next(_entered) % 2**14 * 2**16
    return tuple([version + entered for version in versions])


def _put_back(modules: list[nn.Module], averages: list[tuple[Tensor, Tensor]]) -> list[Call]:
    """The calls that restore the modules' buffers: the tensors of now, with the values of now.

    A forward in training mode, or `update_bn`, replaces or writes them.
    """
    exchanged = {id(tensor) for pair in averages for tensor in pair}
    undo: list[Call] = []
    buffers: dict[int, Tensor] = {}
    for module in modules:
        if module._buffers and isinstance(module._buffers, dict):  # TorchScript has no dict
            undo.append((module._buffers.update, dict(module._buffers)))
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in exchanged and _alias.can_be_written(buffer):
                buffers[id(buffer)] = buffer.data
    values = [buffer.clone() for buffer in buffers.values()]
    return [*undo, (_torch.foreach_copy_, [*buffers.values()], values)] if buffers else undo


def finish(calls: Iterator[object]) -> None:
    """Make all remaining calls, even if some raise; then raise the first error."""
    failed: BaseException | None = None
    while True:
        try:
            deque(calls, maxlen=0)
            break
        except BaseException as error:  # noqa: BLE001, go on with the next call
            failed = failed or error
    if failed is not None:
        raise failed


def _has_raised(raised: BaseException | None) -> bool:
    """Whether the scope ends by an exception; `raised` was in flight when it was entered."""
    error = sys.exception()
    while isinstance(error, GeneratorExit):  # closing the generator raises it, see `_context`
        error = error.__context__
    return error is not raised


def _check_read(
    model: nn.Module,
    moved: Iterable[tuple[Tensor, Tensor]],
    tracked: tuple[Tensor, ...],
    entered: tuple[int, ...],
    left: list[int],
    raised: BaseException | None,
) -> None:
    """Raise RuntimeError if a parameter was written inside, unless an exception ends the scope.

    `entered` and `left` are the versions of the tracked tensors after entering and before leaving.
    """
    if left == list(entered) or _has_raised(raised):
        return
    # A lower version means that the tensor was swapped for another.
    changed = {id(t) for t, a, b in zip(tracked, entered, left, strict=True) if a < b}
    averages = {id(tensor) for tensor, _ in moved}
    written = [n for n, p in model.named_parameters() if id(p) in changed & averages]
    if written:
        raise RuntimeError(
            "ema_scope: expected parameters that are only read inside, found some that were "
            f"written: {_paths.few(written)}; the model has its training weights back, and the "
            "averages hold the written values. With copy=True the end of the scope undoes the write"
        )


def check_parameters(model: nn.Module, before: set[Tensor], raised: BaseException | None) -> None:
    """Raise RuntimeError if the model has other parameters, unless an exception ends the scope."""
    if _has_raised(raised):
        return
    found = parameters_of(modules_of(model))
    if found != before:
        raise RuntimeError(
            f"ema_scope: expected the same parameters at its end, found "
            f"{len(found - before)} new and {len(before - found)} missing; the old ones have "
            "their training weights back, new ones may hold averages. Change the module that "
            "averaged_module returns instead"
        )


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The modules of `model.modules()`, faster: without a generator for each level."""
    found, seen = [model], {model}
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def parameters_of(modules: list[nn.Module]) -> set[Tensor]:
    return {p for module in modules for p in module._parameters.values() if p is not None}


def refer_to(copies: dict[int, Any], model: nn.Module, copied: nn.Module) -> None:
    """Make parameters and buffers refer to the memory of `copies` where they are other tensors.

    Classes with a `__deepcopy__` of their own (TorchScript, tensordict) copy the training weights.
    """
    for kind in ("parameters", "buffers"):
        news = _names.named(copied, kind, twice=True)
        for name, tensor in _names.named(model, kind, twice=True).items():
            expected, new = copies[id(tensor)], news.get(name)
            if new is expected:
                continue
            if new is None or new.shape != expected.shape or _torch.wraps(new):
                found = "none" if new is None else "a copy of the training weight"
                raise ValueError(
                    f"model: expected {name} in a deep copy, found {found}; use ema_scope"
                )
            new.data = expected.detach()
            new.requires_grad_(expected.requires_grad)
