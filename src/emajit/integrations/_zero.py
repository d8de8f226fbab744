"""Parameters of DeepSpeed's ZeRO 3 as DTensors; all processes call these functions together.

Between its uses such a parameter is an empty tensor. `ds_tensor` is this process's part: of the
flat parameter, padded to one size for all processes. Without the padding it is the shard of a
DTensor with one dimension. A mirror of the model has these DTensors, in the memory of the parts, in
place of the parameters: averages, scopes and files treat it as any model of DTensors.

All names of DeepSpeed that are no public interface are here (0.19.8).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from emajit import _names, _shards
from emajit._context import contextmanager

_OF_PARAMETERS = "ds_tensor", "ds_shape", "ds_numel", "ds_process_group"
# DeepSpeed calls them around its checkpoints. Between them no parameter is whole; after the second
# one small parameters (`stage3_param_persistence_threshold`) are gathered from the parts again.
_OF_OPTIMIZER = _BEGIN, _END = "checkpoint_event_prologue", "checkpoint_event_epilogue"

# The mirrors of models, and of the modules in them.
_mirrors: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


def is_one(param: Any) -> bool:
    """Whether ZeRO 3 has divided a parameter."""
    return hasattr(param, "ds_id")


def prepare(model: nn.Module) -> bool:
    """Let `mirror` know the model, if ZeRO 3 has divided it; returns whether it has.

    Raises ValueError for parts that are not in the memory of the device, and for another DeepSpeed.
    """
    divided = {name: p for name, p in model.named_parameters() if is_one(p)}
    for name, p in divided.items():
        _check(name, p)
    _mirrors.pop(model, None)  # of an earlier training
    if divided:
        _mirrors[model] = nn.Module()
    return bool(divided)


def check_pull(optimizer: Any, pull: object) -> None:
    """Raise ValueError for averages back into training with DeepSpeed, of any stage.

    Its optimizer writes the parameters from float32 weights of its own.
    """
    state = getattr(optimizer, "accelerator_state", None)
    if pull is not None and getattr(state, "deepspeed_plugin", None) is not None:
        raise ValueError(
            f"pull: expected None with DeepSpeed, found {pull}; its next step would undo the pull"
        )


def _check(name: str, param: Any) -> None:
    optimizer = getattr(param, "_z3_optimizer", None)
    missing = [own for own in _OF_PARAMETERS if not hasattr(param, own)]
    missing += [own for own in _OF_OPTIMIZER if not hasattr(optimizer, own)]
    if missing or not _is_even(param):
        raise ValueError(
            f"{name}: expected a parameter of ZeRO 3 as in DeepSpeed 0.19, found one without "
            f"{', '.join(missing) or 'parts of one size'}; use ZeRO 2, or FSDP with version=2 in "
            "fsdp_config"
        )
    part = param.ds_tensor
    if getattr(part, "final_location", None) == "nvme" or part.device.type != param.device.type:
        raise ValueError(
            f"{name}: expected parameters on the device, found some elsewhere; leave out "
            "offload_param in the configuration of DeepSpeed (offload_optimizer may stay)"
        )


def _is_even(param: Any) -> bool:
    """Whether all parts have the size of the first shard of a DTensor."""
    parts = torch.distributed.get_world_size(param.ds_process_group)
    return bool(param.ds_tensor.numel() == -(-param.ds_numel // parts))


def is_prepared(model: nn.Module) -> bool:
    return model in _mirrors


def mirror(model: nn.Module) -> nn.Module:
    """A module like the model, of parts and the model's buffers; the model unless prepared.

    Its parameters have the names of the model's, and `requires_grad` alike.
    """
    return _reflected(model, {}, {}) if is_prepared(model) else model


def _reflected(
    module: nn.Module, parts: dict[int, Any], seen: dict[nn.Module, nn.Module]
) -> nn.Module:
    if module not in seen:
        seen[module] = found = _mirrors.get(module) or _mirrors.setdefault(module, nn.Module())
        params: dict[str, Any] = {}
        for name, p in module._parameters.items():
            if is_one(p) and id(p) not in parts:
                parts[id(p)] = _part(p, found._parameters.get(name))
            params[name] = parts.get(id(p), p)
        children = [(name, child) for name, child in module._modules.items() if child is not None]
        vars(found).update(
            _parameters=params,
            _buffers=module._buffers,
            _non_persistent_buffers_set=module._non_persistent_buffers_set,
            _modules={name: _reflected(child, parts, seen) for name, child in children},
        )
    return seen[module]


def _part(param: Any, old: Any) -> nn.Parameter:
    """The part of this process as a DTensor, which is `old` if that has the memory of the part."""
    part = param.ds_tensor
    form = part.data_ptr(), part.numel(), part.dtype, param.requires_grad, param.ds_shape
    if getattr(old, "form", None) != form:
        placed = _placed(part.detach(), param.ds_numel, param.ds_process_group)
        old = nn.Parameter(placed, param.requires_grad)
        old.form = form
    return old  # type: ignore[no-any-return]


def _placed(part: Tensor, numel: int, group: Any) -> Tensor:
    """A part, with the padding, as a shard of a DTensor of so many numbers."""
    from torch.distributed import device_mesh, tensor  # noqa: PLC0415, as in `_shards`

    first = torch.distributed.get_rank(group) * part.numel()
    here = part[: max(0, min(part.numel(), numel - first))]
    mesh = device_mesh.DeviceMesh.from_group(group, part.device.type)
    options: Any = {"run_check": False, "shape": (numel,), "stride": (1,)}
    return tensor.DTensor.from_local(here, mesh, [tensor.Shard(0)], **options)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shape of each parameter that `mirror` has flat, by its names, also without wrappers."""
    if not is_prepared(model):
        return {}
    params = dict(mirror(model).named_parameters(remove_duplicate=False))
    bare = _names.canonical_of(params)
    flat = {name: p.form[-1] for name, p in params.items() if hasattr(p, "form")}
    return {bare[name]: shape for name, shape in flat.items()} | flat


def whole(name: str, tensor: Tensor, shapes: Mapping[str, torch.Size]) -> Tensor:
    """As `_shards.whole`, in the shape of the parameter of this name."""
    return _shards.whole(tensor).reshape(shapes.get(name, tensor.shape))


def scope(
    model: nn.Module, entered: AbstractContextManager[object]
) -> AbstractContextManager[object]:
    """A scope that writes the mirror of a model, where the model computes with what is written."""
    return _written(model, entered) if is_prepared(model) else entered


@contextmanager
def _written(model: nn.Module, entered: AbstractContextManager[object]) -> Iterator[None]:
    stack = ExitStack()
    try:
        with _between(model):
            stack.enter_context(entered)
        yield
    finally:
        with _between(model):
            stack.close()


@contextmanager
def _between(model: nn.Module) -> Iterator[None]:
    optimizer = _optimizer(model)
    getattr(type(optimizer), _BEGIN)(optimizer)
    try:
        yield
    finally:
        getattr(optimizer, _END)()


def _optimizer(model: nn.Module) -> Any:
    return next(p._z3_optimizer for p in model.parameters() if hasattr(p, "_z3_optimizer"))


@contextmanager
def before_checkpoints(model: nn.Module, call: Callable[[], None]) -> Iterator[None]:
    """Inside, a function is called before DeepSpeed saves or loads, or gathers all weights."""
    optimizer = _optimizer(model)

    def begin() -> None:
        call()
        getattr(type(optimizer), _BEGIN)(optimizer)

    vars(optimizer)[_BEGIN] = begin
    try:
        yield
    finally:
        del vars(optimizer)[_BEGIN]
