"""Evaluate a model with its averaged weights: in a context, or as a separate module."""

from __future__ import annotations

import copy as copying
import operator
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import starmap
from types import CellType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from emajit import _exchange, _pairs, _shards, _torch, _warn
from emajit._context import contextmanager

_HOOKS = "_forward_pre_hooks", "_forward_hooks"

# The entered scopes, in order, each with the ids of its parameters and buffers, which the scope
# keeps alive. Each operation on a dict is atomic for threads and signals.
_inside: dict[object, set[int]] = {}

# Called before emajit writes parameters: each makes the writer wait for a stream that reads them.
before_writing: list[Callable[[], object]] = []


def prepare_to_write() -> None:
    """Wait for the streams that still read parameters, and clear the caches computed from them.

    `torch.autocast` casts each parameter once and uses this copy until it ends, even if the
    parameter is written or refers to other memory meanwhile. `parametrize.cached` keeps the
    weights that parametrizations compute.
    """
    for wait in before_writing:
        wait()
    for forget, *args in _forgetting():
        forget(*args)


def _forgetting() -> list[_exchange.Call]:
    """The calls that clear the caches computed from parameters."""
    return [(torch.clear_autocast_cache,), (_torch.parametrized().clear,)]


def check_outside(tensors: Iterable[Tensor], *, before: object = None) -> None:
    """Raise RuntimeError if one of `tensors` is inside an `ema_scope` now.

    With `before`, an entered scope, only scopes entered earlier count.
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
def ema_scope(
    model: nn.Module, shadow: Mapping[str, Any], *, copy: bool = False, strict: bool = True
) -> Iterator[None]:
    """A context in which `model` computes with the tensors of `shadow` themselves.

    Nothing is copied: inside, each parameter refers to the memory of its average; afterwards it
    refers to its own memory again, also after an exception or Ctrl-C. The `nn.Parameter` objects
    stay the same, so optimizers, hooks, tied weights and compiled models keep working. An average
    is cast only if its dtype is not its parameter's. Code that writes a parameter inside (an
    optimizer's step, `load_state_dict`) writes the average, and the end of the scope raises an
    error. Writes through `.data`, in `torch.inference_mode`, or to averages of buffers go
    unnoticed: call `model.eval()` if buffers are averaged. The other buffers keep the values of
    training: a write into them inside, as by `update_bn`, is undone at the end.

    If a parameter visibly shares its memory, the average is copied into it, and a copy of the
    training weight is kept meanwhile: after `share_memory()`, in a flat buffer with others, and for
    DTensors and other subclasses that wrap tensors (quantised weights). The same holds for weights
    with a `max_norm`, which an embedding's forward writes. No process waits for another. Use `copy`
    where sharing is invisible: for captured CUDA graphs, and views of a whole parameter.

    Values computed from the training weights before the scope do not change, such as an adapter
    that `eval()` has merged into a frozen weight: unmerge it before the scope, or merge it in a
    copy or in the module that `averaged_module` returns. The `weight` that the hooks of the old
    `weight_norm` and `spectral_norm` compute is of the last forward, inside and afterwards.

    Use it for evaluation only. Do not backpropagate across the boundary: autograd raises, except
    for graphs from before the scope that are used after it, and where activation checkpointing
    recomputes a forward from inside after the scope, with the training weights. After the scope an
    export or a trace made inside may refer to the training weights or the averages, and a kept
    `state_dict()` refers to the averages, which go on changing: use `averaged_module` for these.
    Code that saves a model inside (accelerate's `save_state`) saves the averages.

    Args:
        model: any module; one inside `torch.compile`, DDP or activation checkpointing is fine.
        shadow: averages by the names of `named_parameters()`, with or without the prefixes of such
            wrappers, flat or nested by the parts of a name. It may hold averages of buffers, and
            may leave out parameters that do not require grad and all but one of the names of a
            tied parameter.
        copy: copy every average into the memory of its parameter, as described above.
        strict: whether each parameter that requires grad must have an average. If not, a parameter
            without an average keeps its training weight inside; see `emajit.select`.

    Raises:
        ValueError: a name is missing in `shadow` or unknown to `model`, a shape or device differs,
            or tied parameters have different averages. The model is then untouched.
        TypeError: `model` is not a module, or `shadow` is not a mapping.
        RuntimeError: the model is inside such a scope already, in this thread or another; or, at
            the end, a parameter was written, or the model has other parameters than before, as
            after `remove_parametrizations`.

    >>> model, shadow = nn.Linear(1, 1, bias=False), {"weight": torch.tensor([[2.0]])}
    >>> with torch.no_grad(), ema_scope(model, shadow):
    ...     model(torch.ones(1))
    tensor([2.])
    """
    if isinstance(model, nn.Module):
        _shards.reshard(model)
    with exchanged(model, _pairs.pairs(model, shadow, strict=strict), copy=copy):
        yield


@contextmanager
def exchanged(
    model: nn.Module, averages: list[tuple[Tensor, Tensor]], *, copy: bool = False
) -> Iterator[None]:
    """A context in which tensors of `model` are their averages; its end restores other buffers too.

    A signal is handled before an exchange or after it, never between two tensors.
    """
    _pairs.check_present(averages)
    scope, modules, raised = object(), _exchange.modules_of(model), sys.exception()
    tensors = [tensor for tensor, _ in averages]
    undo: list[_exchange.Call] = [
        (_inside.pop, scope, None),
        *_forgetting(),
        (_exchange.check_parameters, model, _exchange.parameters_of(modules), raised),
    ]
    leave = starmap(operator.call, undo)
    try:
        try:
            _inside[scope] = {*map(id, tensors), *map(id, _shards.local(tensors))}
            check_outside(tensors, before=scope)
            prepare_to_write()
            enter, undo[:0], check = _exchange.calls(modules, averages, copy=copy, raised=raised)
            undo.append(check)
            deque(starmap(operator.call, enter), maxlen=0)
            yield
        finally:
            deque(leave, maxlen=0)  # the first call here, and in C: see `_context`
    finally:
        _exchange.finish(leave)


def averaged_module(
    model: nn.Module, shadow: Mapping[str, Any], *, strict: bool = True
) -> nn.Module:
    """A module like `model` whose parameters are the tensors of `shadow`.

    No average is copied: the module follows every `emajit.update_` of the shadow and every call of
    a `LitEma` (`averaged_module(model, ema.named_averages())`) for as long as it lives (one within
    `parametrize.cached` after its end), though not the new tensors that `emajit.update` returns. It
    can be compiled once, exported, traced, saved, deep-copied, and run as a teacher or in another
    thread. Its parameters do not require grad.

    Parameters without an average share their memory with `model`: of averages of an adapter of PEFT
    the base weights. Buffers are the shadow's where it has them, else copies made now. Everything
    else is deep-copied: submodules, hooks, attributes. Functions are shared: a closure over a layer
    goes on with the training weights, which warns. The module is in the training mode of `model`;
    call `eval()` to switch dropout off and to keep BatchNorm from writing its statistics. The
    wrappers of `torch.compile`, `DataParallel` and `DistributedDataParallel` are dropped.

    The module computes in the dtype of the shadow: float32 averages of a bfloat16 model need
    float32 inputs, or `torch.autocast`. Copied floating-point buffers change dtype like the
    parameters of their dtype: to the dtype of these parameters' averages, if all share one.

    Args:
        model: the trained module, outside of an `ema_scope`. It is not changed.
        shadow: as in `ema_scope`.
        strict: as in `ema_scope`.

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
    averages = _pairs.pairs(model, shadow, strict=strict)
    check_outside([*model.parameters(), *model.buffers()])
    if _shards.has_fsdp(model):
        raise ValueError(
            "model: expected one that can be copied, found fully_shard; use ema_scope, or build "
            "another model from the full averages"
        )
    copies = _copies(model, averages)
    with torch.no_grad():  # TorchScript clones its parameters
        copied: nn.Module = copying.deepcopy(model, copies)
    _exchange.refer_to(copies, model, copied)
    _separate_parametrizations(copied)
    _warn_of_closures(model, copies)
    return copied


def _copies(model: nn.Module, averages: list[tuple[Tensor, Tensor]]) -> dict[int, Any]:
    """The replacement that `deepcopy` puts in place of each tensor, by the id of the tensor."""
    copies: dict[int, Any] = {}
    dtypes: dict[torch.dtype, set[torch.dtype]] = {}
    for tensor, average in averages:
        if isinstance(tensor, nn.Parameter):
            dtypes.setdefault(tensor.dtype, set()).add(average.dtype)
            copies[id(tensor)] = nn.Parameter(average.detach(), requires_grad=False)
        else:
            copies[id(tensor)] = average.detach()
    for p in model.parameters():
        if id(p) not in copies:
            copies[id(p)] = nn.Parameter(p.detach(), requires_grad=False) if p.requires_grad else p
    for buffer in model.buffers():
        if id(buffer) not in copies:
            beside = dtypes.get(buffer.dtype, ())
            dtype = next(iter(beside)) if len(beside) == 1 else buffer.dtype
            copies[id(buffer)] = buffer.detach().to(dtype, copy=True)
    for module in model.modules():  # tensor attributes, such as the weight of an old `weight_norm`
        for value in vars(module).values():
            if isinstance(value, Tensor):
                copies.setdefault(id(value), value.detach().clone())
    return copies


def _separate_parametrizations(copied: nn.Module) -> None:
    """Inject the properties of parametrizations again: in a copy they refer to the original.

    Within `parametrize.cached` the copy would compute with the weights of the original.
    """
    for module in copied.modules():
        if parametrize.is_parametrized(module) and _torch.inject_property is not None:
            module.__class__ = type(module).__bases__[0]
            _torch.inject_class(module)
            for name in module.parametrizations:  # type: ignore[union-attr]
                _torch.inject_property(module, name)


def _warn_of_closures(model: nn.Module, copies: dict[int, Any]) -> None:
    """Warn of functions in attributes or forward hooks that hold layers: they are not copied."""
    own = {*map(id, model.modules()), *copies}
    for path, module in model.named_modules():
        attributes = vars(module)
        hooks = (f for name in _HOOKS for f in attributes.get(name, {}).values())
        for function in (*attributes.values(), *hooks):
            cells = getattr(function, "__closure__", None) or ()
            if not own.isdisjoint(map(id, map(_content, cells))):
                _warn.warn(
                    f"{path or 'model'}: expected functions that hold no layer, found the closure "
                    f"{function.__qualname__}, which goes on with the training weights; use a "
                    "method, or ema_scope"
                )


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside its wrappers."""
    wrappers = nn.DataParallel, nn.parallel.DistributedDataParallel
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model
