"""Read and write the parameters and buffers of a module for a `LitEma`."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import starmap
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emajit import _alias, _names, _shards, _torch, scope

Policy = Literal["ignore", "copy", "average"]


def check_policy(policy: str) -> None:
    """Raise ValueError for an unknown policy."""
    if policy not in ("ignore", "copy", "average"):
        raise ValueError(f"buffers: expected ignore or copy or average, found {policy!r}")


def averaged(
    model: nn.Module, policy: Policy, chosen: _names.Filter
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The trainable parameters and the buffers to be averaged.

    Raises ValueError for a parameter whose values are elsewhere (ZeRO 3, accelerate's offloading).
    """
    _shards.reshard(model)
    params: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    is_offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    for name, p in params.items():
        _shards.check_present(name, p)
        if p.is_meta and is_offloaded:
            raise ValueError(
                f"{name}: expected a parameter with memory, found one that accelerate has "
                "offloaded; build the LitEma before cpu_offload or enable_sequential_cpu_offload"
            )
    bare = _bare_names(model)
    params, buffers = (
        {name: tensor for name, tensor in tensors.items() if chosen.keeps(bare[name])}
        for tensors in (params, held_buffers(model, policy))
    )
    return params, buffers


def _bare_names(model: nn.Module) -> dict[str, str]:
    every = [name for of in (model.named_parameters(), model.named_buffers()) for name, _ in of]
    return _names.canonical_of(every)


def check_filter(model: nn.Module, chosen: _names.Filter) -> None:
    """Raise ValueError where a pattern matches no name, or no trainable parameter is left.

    A model without trainable parameters passes: it may get some later.
    """
    bare = _bare_names(model)
    trainable = [bare[name] for name, p in model.named_parameters() if p.requires_grad]
    chosen.check(bare.values() if trainable else ())
    if trainable and not any(map(chosen.keeps, trainable)):
        raise ValueError(
            "include, exclude: expected parameters that require grad, found none left in "
            f"{type(model).__name__}"
        )


def held_buffers(model: nn.Module, policy: Policy) -> dict[str, Tensor]:
    """The persistent buffers of `model` by name; none with "ignore".

    Raises ValueError for an unknown policy.
    """
    check_policy(policy)
    if policy == "ignore":
        return {}
    lasting = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in _torch.lasting_buffers(module)
    }
    return {name: buffer for name, buffer in model.named_buffers() if name in lasting}


def copied(buffers: Mapping[str, Tensor], policy: Policy, names: Collection[str]) -> list[str]:
    """The names of the buffers that are copied, not averaged: all, with "copy".

    With "average", the buffers whose mean has no meaning: u and v of a `spectral_norm` are unit
    vectors whose signs may flip between two updates, so that their means give the weight any
    norm (measured: 4 to 119, with copies 1.000 to 1.003); the mask of a pruned weight is 0 or 1;
    the scale of a quantised tensor belongs to its zero point, an integer; and inf - inf, of a mask
    or of an observer without data, is NaN. `names` tell the first three.
    """
    if policy == "copy":
        return [*buffers]
    return [
        name
        for name, buffer in buffers.items()
        if any(
            name.endswith(end) and all(name.removesuffix(end) + other in names for other in others)
            for end, others in _COPIED.items()
        )
        or not _is_finite(buffer)
    ]


# The ends of names of copied buffers, and the ends of names that must exist beside them.
_COPIED = {
    "_u": ("_v",),
    "_v": ("_u",),
    "_mask": ("_orig",),
    "scale": ("zero_point",),
}


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.is_meta or tensor.dtype.itemsize < 2:
        return True
    return bool(torch.isfinite(tensor).all())


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """`dict(model.named_parameters())`, in about half the time unless it is overridden.

    torch's own uses a generator for each level and checks each parameter for a tie; here ties are
    looked for once.
    """
    params: dict[str, Tensor] = {}
    is_plain = getattr(model.named_parameters, "__func__", None) is nn.Module.named_parameters
    is_gathered = is_plain and _gather(model, "", params, set())
    if is_gathered and len(set(map(id, params.values()))) == len(params):
        return params
    return dict(model.named_parameters())


def _gather(
    module: nn.Module, prefix: str, params: dict[str, Tensor], seen: set[nn.Module]
) -> bool:
    """Collect the parameters below a module; False if one overrides `named_modules`."""
    if module in seen:
        return True
    seen.add(module)
    if type(module).named_modules is not nn.Module.named_modules:
        return False
    for name, p in module._parameters.items():
        if p is not None:
            params[prefix + name] = p
    for name, child in module._modules.items():
        if child is not None and not _gather(child, f"{prefix}{name}.", params, seen):
            return False
    return True


def listed(
    use: str, parameters: Iterable[Tensor], seen: Callable[[], nn.Module | None] | None
) -> list[Tensor]:
    """The parameters as a list, after the model `seen` last was resharded."""
    model = seen() if seen is not None else None
    if model is not None:
        _shards.reshard(model)
    found: list[Any] = [parameters] if isinstance(parameters, nn.Module) else [*parameters]
    for each in found:
        if not isinstance(each, Tensor):
            kind = type(each).__qualname__
            raise TypeError(f"{use}: expected tensors, as model.parameters() gives, found {kind}")
    own = set(map(id, model.parameters())) if model is not None else set()
    if model is not None and any(not _shards.is_one(p) and id(p) not in own for p in found):
        raise ValueError(
            f"{use}: expected the parameters as shards, found whole ones; list them after "
            "model.reshard()"
        )
    return found


def at_once(*calls: tuple[Any, ...]) -> None:
    """Call C functions, each with its arguments; no signal is handled between two calls."""
    deque(starmap(operator.call, calls), maxlen=0)


def copying(params: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Any, ...]:
    """A C function that copies values into parameters, and its arguments, for `at_once`.

    Raises ValueError before anything is written.
    """
    for i, (p, value) in enumerate(zip(params, values, strict=True)):
        if misplaced := _shards.misplaced(p, value):
            raise ValueError(f"parameter {i}: {misplaced}")
    params, values = _shards.local(params), _shards.local(values)
    for i, (p, value) in enumerate(zip(params, values, strict=True)):
        if not _alias.can_be_written(p):
            found = "one that repeats an element" if p.layout is torch.strided else str(p.layout)
            raise ValueError(f"parameter {i}: expected a dense tensor to write, found {found}")
        if p.is_meta != value.is_meta:
            expected, found = str(value.device), str(p.device)
            raise ValueError(f"parameter {i}: expected one on {expected}, found {found}")
    scope.prepare_to_write()
    alike = [v.to(p.device, p.dtype) for p, v in zip(params, values, strict=True)]
    if not alike:  # the operator refuses an empty list
        return (tuple,)
    return (_torch.foreach_copy_, [p.data for p in params], alike)


def places(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[nn.Module, str]]:
    """For each tensor, the module that has it and its name in that module."""
    found: dict[int, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            found.setdefault(id(tensor), (module, name))
    return {name: found[id(tensor)] for name, tensor in tensors.items() if id(tensor) in found}


def check_shapes(averages: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    for name, average in averages.items():
        expected, found = tuple(average.shape), tuple(params[name].shape)
        if expected != found:
            raise ValueError(
                f"{name}: expected shape {expected} as averaged, found {found}; "
                "after a change of shape, call track(model)"
            )
        if misplaced := _shards.misplaced(params[name], average):
            raise ValueError(f"{name}: {misplaced}")


def copy_common(average: Tensor, old: Tensor) -> None:
    """Copy the common block of `old`, from index 0 in each dimension, into a resized average.

    Copies nothing if neither shape contains the other, or for shards.
    """
    common = tuple(map(min, average.shape, old.shape))
    one_contains = average.dim() == old.dim() and common in (average.shape, old.shape)
    if one_contains and not _shards.are_in((average, old)):
        block = tuple(map(slice, common))
        average[block].copy_(old[block])


def check_stored(stored: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """Raise ValueError unless the parameters have the number and shapes of the stored ones."""
    if len(stored) != len(parameters):
        raise ValueError(f"restore: expected {len(stored)} parameters, found {len(parameters)}")
    for i, (old, p) in enumerate(zip(stored, parameters, strict=True)):
        if old.shape != p.shape:
            expected, found = tuple(old.shape), tuple(p.shape)
            raise ValueError(f"restore: expected shape {expected} for parameter {i}, found {found}")


def copied_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers of a model."""
    return {n: b.clone() for n, b in model.named_buffers() if _alias.can_be_written(b)}


def overwritten_beside(
    overwritten: Iterable[tuple[nn.Module, dict[str, Tensor]]], parameters: Iterable[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The buffers of overwritten models with these parameters, and the buffers' old values."""
    passed = {*map(_alias.identity, _shards.local(parameters))}
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for model, values in overwritten:
        theirs = map(_alias.identity, _shards.local(model.parameters()))
        if not passed.isdisjoint(theirs):
            for name, buffer in model.named_buffers():
                if name in values and values[name].shape == buffer.shape:
                    found.setdefault(id(buffer), (buffer, values[name]))
    return [buffer for buffer, _ in found.values()], [value for _, value in found.values()]
