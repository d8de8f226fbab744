"""The arithmetic of the average, on flat lists of tensors.

Nothing here knows a tree, a schedule or a compiler. Shadows and params are lists of one length;
where several averages of a parameter follow each other, it is read once. Weights are one for all of
them, or one for each: `w = 1 - beta`, a Python float, or a 0-d float64 tensor that is never read
back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from functools import cache
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from emajit import _rounding
from emajit._rounding import Keys
from emajit._shards import Region

Weight = float | Tensor
Key = tuple[Tensor, Region | None]


def blend(
    shadow: Tensor, param: Tensor, weight: Weight, skip: bool, key: Key | None = None
) -> Tensor:
    """One leaf: `s + w (p - s)` in float32 or wider, rounded once to the shadow's dtype.

    `torch.lerp` evaluates the equation from the nearer end, as `p - (1 - w) (p - s)` where
    `w >= 1/2`: of finite numbers `w = 0` gives exactly `s` and `w = 1` exactly `p`. With `skip`, an
    element whose parameter is NaN or infinite keeps its old average. With a `key` rounding to 16
    bits is stochastic. An integer or bool parameter is copied.
    """
    if not (param.is_floating_point() or param.is_complex()):
        return param.to(shadow.dtype, copy=True)
    precision = _precision(shadow, param)
    s, p = shadow.to(precision), param.to(precision)
    average = torch.lerp(s, p, _at(weight, s.device, s.dtype))
    if skip:
        average = torch.where(torch.isfinite(p), average, s)
    if key is not None and shadow.dtype in _rounding.SUPPORTED:
        words, region = key
        return _rounding.stochastic(average, shadow.dtype, words.to(s.device), region)
    return average.to(shadow.dtype)


def _at(weight: Weight, device: torch.device, dtype: torch.dtype) -> Weight:
    return weight.to(device, dtype) if isinstance(weight, Tensor) else weight


def _precision(shadow: Tensor, param: Tensor) -> torch.dtype:
    return torch.promote_types(_at_least_32_bits(shadow), _at_least_32_bits(param))


def _at_least_32_bits(tensor: Tensor) -> torch.dtype:
    if tensor.is_complex():
        return torch.promote_types(tensor.dtype, torch.complex64)
    return tensor.dtype if tensor.dtype.itemsize >= 4 else torch.float32


def _keys_of(keys: Keys | None, shadows: Sequence[Tensor]) -> Sequence[Key | None]:
    if keys is None:
        return [None] * len(shadows)
    return [*zip(keys.words.unbind(), keys.regions, strict=True)]


def each(weights: Sequence[Weight], shadows: Sequence[Tensor]) -> Sequence[Weight]:
    """The weight of each leaf."""
    return weights if len(weights) == len(shadows) else [*weights] * len(shadows)


def _rows(
    shadows: Sequence[Tensor],
    params: Sequence[Tensor],
    weights: Sequence[Weight],
    keys: Keys | None,
) -> Iterable[tuple[Tensor, Tensor, Weight, Key | None]]:
    return zip(shadows, params, each(weights, shadows), _keys_of(keys, shadows), strict=True)


def average(
    shadows: Sequence[Tensor],
    params: Sequence[Tensor],
    weights: Sequence[Weight],
    skip: bool,
    keys: Keys | None = None,
) -> list[Tensor]:
    """Blend every leaf; the form to compile and to trace."""
    return [blend(s, p, w, skip, key) for s, p, w, key in _rows(shadows, params, weights, keys)]


def average_(
    shadows: Sequence[Tensor],
    params: Sequence[Tensor],
    weights: Sequence[Weight],
    skip: bool,
    keys: Keys | None = None,
) -> None:
    """Blend every leaf in place; the form to compile and to trace."""
    for s, p, w, key in _rows(shadows, params, weights, keys):
        # torch.compile loses a write to a 0-d float64 input (2.11 to 2.13), not to a view of it.
        target = s.view(1) if s.ndim == 0 else s
        target.copy_(blend(s, p, w, skip, key))


def eager_average_(
    shadows: Sequence[Tensor],
    params: Sequence[Tensor],
    weights: Sequence[Weight],
    skip: bool,
    keys: Keys | None = None,
) -> None:
    """`average_` with half the temporaries for a shadow that needs no rounding."""
    at = cache(_at)
    for s, p, w, key in _rows(shadows, params, weights, keys):
        if p.is_floating_point() and s.dtype == _precision(s, p) and not skip:
            s.lerp_(p.to(s.dtype), at(w, s.device, s.dtype))
        else:
            s.copy_(blend(s, p, w, skip, key))


FULL = {(dtype, dtype) for dtype in (torch.float32, torch.float64)}


def lerps(
    dtypes: AbstractSet[tuple[torch.dtype, torch.dtype]], weights: Iterable[Weight], skip: bool
) -> bool:
    """Whether `_foreach_lerp_` is the whole update of leaves that have these pairs of dtypes.

    It is not for a weight that is a tensor, for which it launches one kernel a leaf.
    """
    return not skip and dtypes <= FULL and set(map(type, weights)) == {float}


def foreach_average(
    shadows: list[Tensor], params: list[Tensor], weights: list[Weight]
) -> list[Tensor]:
    """`average` of leaves that `lerps`, in one call."""
    return list(torch._foreach_lerp(shadows, params, _scalars(weights)))


def foreach_average_(shadows: list[Tensor], params: list[Tensor], weights: list[Weight]) -> None:
    """`average_` of leaves that `lerps`, in one call."""
    torch._foreach_lerp_(shadows, params, _scalars(weights))


def foreach_averages_(shadows: list[Tensor], params: list[Tensor], weights: list[Weight]) -> None:
    """One average after the other, each of the same params; for Ctrl-C it is one call."""
    size = len(params) // len(weights)
    each = [shadows[i : i + size] for i in range(0, len(shadows), size)]
    [*map(torch._foreach_lerp_, each, repeat(params[:size]), weights)]  # type: ignore[arg-type]


def _scalars(weights: list[Weight]) -> Any:
    return weights[0] if len(weights) == 1 else weights
