"""Match the tensors of a module with their averages by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from emajit import _names, _paths, _shards

_VALUES = (Tensor, type(None), Mapping)


def pairs(
    model: nn.Module, shadow: Mapping[str, Any], *, strict: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """Each averaged parameter and buffer of the model once, with its average.

    If `strict`, each parameter that requires grad must have an average.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, found {type(model).__qualname__}")
    shadow = _flat(shadow)
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
                f"shadow[{name!r}]: expected the average of {first!r}, its tied parameter, "
                "found another"
            )
    missing = [name for name, p in params.items() if p.requires_grad and p not in averages]
    if strict and missing:
        raise ValueError(
            "shadow: expected an average of each trainable parameter, or strict=False, missing "
            f"{_paths.few(missing)}"
        )
    return [(tensor, average) for tensor, (_, average) in averages.items()]


def check_present(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Raise ValueError if a tensor of the model has no memory here, and its average has."""
    for tensor, average in pairs:
        _shards.check_present("model", tensor)
        if tensor.is_meta and not average.is_meta:
            raise ValueError(
                f"model: expected parameters with memory, found one of shape {tuple(tensor.shape)} "
                "on the meta device; load the weights, or remove the hooks that unload them"
            )


def _flat(shadow: object) -> dict[str, Tensor | None]:
    """The averages by full names: the keys of nested mappings joined with dots."""
    if not isinstance(shadow, Mapping):
        found = type(shadow).__qualname__
        hint = f"; {_paths.of_averages(shadow)}" if isinstance(shadow, nn.Module) else ""
        raise TypeError(f"shadow: expected a mapping of names to averages, found {found}{hint}")
    flat: dict[str, Tensor | None] = {}
    nested: dict[str, Tensor | None] = {}
    for name, average in shadow.items():
        if not (isinstance(name, str) and isinstance(average, _VALUES)):
            found = f"{name!r}: {type(average).__qualname__}"
            raise TypeError(f"shadow: expected names and averages or None, found {found}")
        if average is None or isinstance(average, Tensor):
            flat[name] = average
        else:
            nested |= {f"{name}.{rest}": below for rest, below in _flat(average).items()}
    if twice := flat.keys() & nested:
        raise ValueError(f"shadow: expected one average of each name, found two of {min(twice)!r}")
    return flat | nested


def _same_values(a: Tensor, b: Tensor) -> bool:
    a, b = _shards.local([a, b])
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
