"""Evaluate a model with its averaged weights: for a while, or as a module of their own."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from emajit import _names, _paths, _shards, _torch

# The entered scopes, in order, each with the ids of its parameters and buffers, which the scope
# keeps alive. Each operation on a dict is atomic, whatever thread or signal comes.
_inside: dict[object, set[int]] = {}
_entered = itertools.count()

# Called before emajit writes parameters: each makes the writer wait for a stream that reads them.
before_writing: list[Callable[[], object]] = []


def prepare_to_write() -> None:
    """Wait for the streams that still read parameters, and clear the casts that autocast keeps.

    `torch.autocast` casts each parameter once, and computes with this copy to its end, whatever is
    written into the parameter meanwhile, or to which memory it refers.
    """
    for wait in before_writing:
        wait()
    torch.clear_autocast_cache()


def check_outside(tensors: Iterable[Tensor], *, before: object = None) -> None:
    """Raise RuntimeError if one of `tensors` holds averaged weights in an `ema_scope` now.

    Given `before`, an entered scope, only scopes that were entered earlier count.
    """
    if not _inside:
        return
    ours = set(map(id, tensors))
    for scope, theirs in list(_inside.items()):
        if scope is before:
            return
        if not ours.isdisjoint(theirs):
            raise RuntimeError("expected a model outside of ema_scope, found it inside of one")


@contextmanager
def ema_scope(model: nn.Module, shadow: Mapping[str, Tensor | None]) -> Iterator[None]:
    """A context in which `model` computes with the tensors of `shadow` themselves.

    Nothing is copied: each parameter refers to the memory of its average inside, and to its own
    again afterwards, whatever was raised. The `nn.Parameter` objects stay the same, so optimizers,
    hooks, tied weights and compiled models keep working. Only an average with another dtype than
    its parameter is cast. Code that writes parameters inside writes the averages: call
    `model.eval()` if averages of buffers are among them. Do not backpropagate across the boundary:
    autograd raises, except for graphs from before the scope that are used after it.

    Into DTensors, and into other tensors that wrap tensors (quantised weights), the averages are
    copied, and the training weights kept meanwhile: FSDP gathers parameters from memory of its own.
    No process waits for another.

    It is for evaluation. What outlives it, such as an export, a trace or a kept `state_dict()`,
    refers to the training weights again afterwards: for those, use `averaged_module`.

    Args:
        model: any module; one inside `torch.compile`, DDP or activation checkpointing is fine.
        shadow: averages by the names of `named_parameters()`, with or without the prefixes that
            such wrappers add. Averages of buffers may be among them. A parameter that does not
            require grad may be left out, and so may all but one of the names of a tied one.

    Raises:
        ValueError: a name is missing in `shadow` or unknown to `model`, a shape or device differs,
            or tied parameters have different averages. The model is then untouched.
        TypeError: `model` is not a module, or `shadow` is not a mapping.
        RuntimeError: the model is inside such a scope already, in this thread or another.

    >>> model, shadow = nn.Linear(1, 1, bias=False), {"weight": torch.tensor([[2.0]])}
    >>> with torch.no_grad(), ema_scope(model, shadow):
    ...     model(torch.ones(1))
    tensor([2.])
    """
    if isinstance(model, nn.Module):
        _shards.reshard(model)
    with exchanged(model, _averages(model, shadow)):
        yield


@contextmanager
def exchanged(model: nn.Module, averages: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """A context in which these tensors of `model` refer to the memory of their averages."""
    for tensor, average in averages:
        _shards.check_present("model", tensor)
        if tensor.is_meta and not average.is_meta:
            raise ValueError(
                f"model: expected parameters with memory, found one of shape {tuple(tensor.shape)} "
                "on the meta device; give the model memory, or remove the hooks that take it away"
            )
    averages = [(t, average.detach().to(t.device, t.dtype)) for t, average in averages]
    tensors = [tensor for tensor, _ in averages]
    copied = [pair for pair in averages if _torch.wraps(pair[0])]
    swapped = {*map(id, tensors), *map(id, _shards.local(tensors))}
    # Only callbacks undo: each of them runs, whatever one before it raises.
    with ExitStack() as undo:
        undo.callback(torch.clear_autocast_cache)
        undo.callback(_inside.pop, undo, None)
        _inside[undo] = swapped
        check_outside(tensors, before=undo)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if id(buffer) in swapped:  # a forward may put another object there
                    undo.callback(module._buffers.__setitem__, name, buffer)
        _move_to_another_version(tensors, undo)
        torch.clear_autocast_cache()
        for tensor, average in averages:
            if not _torch.wraps(tensor):
                undo.callback(setattr, tensor, "data", tensor.data)
                tensor.data = average
        if copied:
            _copy(copied, undo)
            undo.callback(_shards.reshard, model)
        yield


def averaged_module(model: nn.Module, shadow: Mapping[str, Tensor | None]) -> nn.Module:
    """A module like `model` whose parameters are the tensors of `shadow`.

    No average is copied: the module follows every `emajit.update_` of the shadow and every call of
    a `LitEma` (`averaged_module(model, ema.named_averages())`) for as long as it lives, though not
    the new tensors that `emajit.update` returns. It can be compiled once, exported, traced, saved,
    deep-copied, and run as a teacher or in another thread. Its parameters do not require grad.

    Parameters without an average, which do not require grad in `model`, are shared with it. Buffers
    are the shadow's where it has them, else copies made now. Everything else is deep-copied:
    submodules, hooks, attributes. It is in the mode of `model`; call `eval()` where BatchNorm
    should not write its statistics and dropout should be off. The wrappers of `torch.compile`,
    `DataParallel` and `DistributedDataParallel` around the whole model are dropped.

    The module computes in the dtype of the shadow: averages in float32 of a bfloat16 model want
    float32 inputs, or `torch.autocast`. A floating-point buffer is copied to the dtype of the
    averages whose parameters have the dtype of the buffer, if these averages share one.

    Args:
        model: the trained module, outside of an `ema_scope`. It is not changed.
        shadow: as in `ema_scope`.

    Raises:
        ValueError: as `ema_scope`; also for a model that `fully_shard` has wrapped, which cannot be
            copied.
        TypeError, RuntimeError: as `ema_scope`.

    >>> model, shadow = nn.Linear(1, 1, bias=False), {"weight": torch.tensor([[2.0]])}
    >>> teacher = averaged_module(model, shadow)
    >>> shadow["weight"].fill_(3.0)
    tensor([[3.]])
    >>> teacher(torch.ones(1))
    tensor([3.])
    """
    if isinstance(model, nn.Module):
        model = _unwrapped(model)
    averages = _averages(model, shadow)
    check_outside([*model.parameters(), *model.buffers()])
    if _shards.has_fsdp(model):
        raise ValueError(
            "model: expected one that can be copied, found fully_shard; use ema_scope, or build "
            "another model from the full averages"
        )
    # The replacement that `deepcopy` puts in place of each tensor, by the id of the tensor.
    copies: dict[int, Any] = {id(p): p for p in model.parameters()}
    dtypes: dict[torch.dtype, set[torch.dtype]] = {}
    for tensor, average in averages:
        if isinstance(tensor, nn.Parameter):
            dtypes.setdefault(tensor.dtype, set()).add(average.dtype)
            copies[id(tensor)] = nn.Parameter(average.detach(), requires_grad=False)
        else:
            copies[id(tensor)] = average.detach()
    for buffer in model.buffers():
        if id(buffer) not in copies:
            beside = dtypes.get(buffer.dtype, ())
            dtype = next(iter(beside)) if len(beside) == 1 else buffer.dtype
            copies[id(buffer)] = buffer.detach().to(dtype, copy=True)
    for module in model.modules():  # such as the weight that an old `weight_norm` has computed
        for value in vars(module).values():
            if isinstance(value, Tensor):
                copies.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(model, copies)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module in the wrappers around it."""
    wrappers = nn.DataParallel, nn.parallel.DistributedDataParallel
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _copy(averages: list[tuple[Tensor, Tensor]], undo: ExitStack) -> None:
    prepare_to_write()
    shards = [shard.detach() for shard in _shards.local(tensor for tensor, _ in averages)]
    undo.callback(_torch.foreach_copy_, shards, [shard.clone() for shard in shards])
    _torch.foreach_copy_(shards, _shards.local(average for _, average in averages))


def _move_to_another_version(tensors: Iterable[Tensor], undo: ExitStack) -> None:
    """Give tensors a version inside that they never have outside, and theirs again afterwards.

    Autograd compares versions, not memory: a graph from inside would otherwise be differentiated
    with the weights from outside, without an error.
    """
    tracked = tuple(tensor for tensor in tensors if not tensor.is_inference())
    versions = tuple(tensor._version for tensor in tracked)
    undo.callback(_torch.set_versions, tracked, versions)
    entered = 2**30 + next(_entered) % 2**14 * 2**16
    _torch.set_versions(tracked, tuple(version + entered for version in versions))


def _averages(model: nn.Module, shadow: Mapping[str, Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    """Each parameter and buffer of the model that has an average, once, with that average."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, found {type(model).__qualname__}")
    _check_named(shadow)
    params = _names.named(model, "parameters", twice=True)
    tensors: dict[str, Tensor] = {**params, **_names.named(model, "buffers", twice=True)}
    partners = _names.match(tensors, shadow)
    unknown = [name for name in shadow if name not in partners]
    if unknown:
        found = _paths.few(unknown)
        raise ValueError(f"shadow: expected names of parameters of the model, found {found}")
    averages: dict[Tensor, tuple[str, Tensor]] = {}
    for name, partner in partners.items():
        tensor, average = tensors[partner], shadow[name]
        if average is None:
            continue
        if average.shape != tensor.shape or average.device != tensor.device:
            expected, found = (f"{tuple(t.shape)} on {t.device}" for t in (tensor, average))
            raise ValueError(f"shadow[{name!r}]: expected shape {expected}, found {found}")
        if misplaced := _shards.misplaced(average, tensor):
            raise ValueError(f"shadow[{name!r}]: {misplaced}")
        first, known = averages.setdefault(tensor, (name, average))
        if known is not average and not _same_values(known, average):
            raise ValueError(
                f"shadow[{name!r}]: expected the average of {first!r}, to which the model ties it, "
                "found another"
            )
    missing = [name for name, p in params.items() if p.requires_grad and p not in averages]
    if missing:
        raise ValueError(
            "shadow: expected an average of each trainable parameter, missing "
            f"{_paths.few(missing)}"
        )
    return [(tensor, average) for tensor, (_, average) in averages.items()]


def _check_named(shadow: object) -> None:
    if not isinstance(shadow, Mapping):
        found = type(shadow).__qualname__
        hint = "; a LitEma has a scope of its own" if isinstance(shadow, nn.Module) else ""
        raise TypeError(f"shadow: expected a mapping of names to averages, found {found}{hint}")
    for name, average in shadow.items():
        if not (isinstance(name, str) and isinstance(average, Tensor | None)):
            found = f"{name!r}: {type(average).__qualname__}"
            raise TypeError(f"shadow: expected names and averages or None, found {found}")


def _same_values(a: Tensor, b: Tensor) -> bool:
    a, b = _shards.local([a, b])
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
