"""The only call of `torch.compile`; chooses for each leaf how its average is computed."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from emajit import _kernels
from emajit._kernels import Keys, Weight
from emajit._rounding import Noise

Kernel = Any  # of (shadows, params, weights, skip, keys): a plain function, or one compiled

# "auto" compiles only what `foreach` cannot do in one pass: mixed or low precision,
# nonfinite="skip", a weight that lives on a CUDA device.
# Milliseconds of update_ on the 161 tensors of ResNet-50, eager / compiled, interleaved medians, on
# 2 cores of an AMD EPYC, torch 2.13, 2026-11-21:
#   float32 3.6 / 4.7, float32 of bfloat16 10 / 6.4, bfloat16 13 / 3.7, float32 with "skip" 30 / 5.0
# Below this many elements a step takes some ms at the most, and does not earn back in 10,000 steps
# the seconds to minutes of a compilation, which grow with the number of leaves.
_WORTH_COMPILING = 2**20


def is_traced() -> bool:
    """Whether the call is part of somebody's `torch.compile` or of a `torch.func` transform.

    Addresses mean nothing there, and `foreach` operators have no batching rule.
    """
    return torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None


def average(
    shadows: list[Tensor],
    params: list[Tensor],
    weights: list[Weight],
    skip: bool,
    noise: Noise | None,
    backend: str,
) -> list[Tensor]:
    """`_kernels.average`, each leaf in the way that suits it."""
    if is_traced():
        keys = _keys(noise, range(len(shadows)), shadows)
        return _kernels.average(shadows, params, weights, skip, keys)
    new: dict[int, Tensor] = {}
    kernels = _kernels.average, _kernels.foreach_average
    for leaves, results in _run(kernels, shadows, params, weights, skip, noise, backend):
        new |= zip(leaves, results, strict=True)
    return [_laid_out_as(s, new[i]) for i, s in enumerate(shadows)]


def average_(
    shadows: list[Tensor],
    params: list[Tensor],
    weights: list[Weight],
    skip: bool,
    noise: Noise | None,
    backend: str,
) -> None:
    """`_kernels.average_`, each leaf in the way that suits it."""
    if is_traced():
        keys = _keys(noise, range(len(shadows)), shadows)
        _kernels.average_(shadows, params, weights, skip, keys)
    else:
        kernels = _kernels.average_, _kernels.foreach_average_
        _run(kernels, shadows, params, weights, skip, noise, backend)


def _laid_out_as(shadow: Tensor, average: Tensor) -> Tensor:
    """The average in the strides that `empty_like` gives it: the shadow's, if that is dense.

    Inductor takes the parameter's where the two differ.
    """
    if average.stride() == shadow.stride():
        return average
    laid_out = torch.empty_like(shadow)
    return average if average.stride() == laid_out.stride() else laid_out.copy_(average)


def _run(
    kernels: tuple[Kernel, Kernel],
    shadows: list[Tensor],
    params: list[Tensor],
    weights: list[Weight],
    skip: bool,
    noise: Noise | None,
    backend: str,
) -> list[tuple[Iterable[int], Any]]:
    """Call a kernel for each group of leaves; their indices and what it returned."""
    kernel, foreach = kernels
    done: list[tuple[Iterable[int], Any]] = []
    ways = _ways(shadows, params, weights, skip, backend)
    for way, leaves in ways.items():
        s, p, w = shadows, params, weights
        if len(ways) > 1:
            s, p, w = [s[i] for i in leaves], [p[i] for i in leaves], [w[i] for i in leaves]
        if way == "foreach":
            result = foreach(s, p, w)
        else:
            keys = _keys(noise, leaves, s)
            if way == "eager" or (backend == "auto" and not _pays(s)):
                result = kernel(s, p, w, skip, keys)
            else:
                result = _run_compiled(kernel, s, p, w, skip, keys, backend)
        done.append((leaves, result))
    return done


def _keys(noise: Noise | None, leaves: Iterable[int], shadows: list[Tensor]) -> Keys:
    return noise.keys(leaves, shadows[0].device) if noise is not None and shadows else None


def _run_compiled(
    kernel: Kernel,
    shadows: list[Tensor],
    params: list[Tensor],
    weights: list[Weight],
    skip: bool,
    keys: Keys,
    backend: str,
) -> Any:
    # Detached, a leaf is the same to dynamo's guards whether it is a frozen parameter or a tensor;
    # a parameter of several averages stays one tensor, which is read once.
    detached = {id(leaf): leaf.detach() for leaf in (*shadows, *params)}
    s, p = ([detached[id(leaf)] for leaf in leaves] for leaves in (shadows, params))
    device = s[0].device
    # By identity: two decays may have the same value at one step and not at the next.
    scalars = {i: _scalar(w, device) for i, w in {id(w): w for w in weights}.items()}
    layout = tuple(
        [(a.shape, a.stride(), a.dtype, b.stride(), b.dtype) for a, b in zip(s, p, strict=True)]
    )
    places = {i: place for place, i in enumerate(scalars)}
    key = layout, device, skip, keys is None, tuple([places[id(w)] for w in weights])
    compiler = "inductor" if backend == "auto" else backend
    return _compiled(kernel, key, compiler)(s, p, [scalars[id(w)] for w in weights], skip, keys)


def _scalar(weight: Weight, device: torch.device) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    # `full` hands the number to a kernel; `tensor` would copy it from the host.
    return torch.full((), weight, dtype=torch.float64, device=device)


def _ways(
    shadows: list[Tensor],
    params: list[Tensor],
    weights: list[Weight],
    skip: bool,
    backend: str,
) -> dict[Hashable, Sequence[int]]:
    """The leaves for `foreach`, the ones for an eager kernel, and for each device the rest."""
    foreach = backend in ("auto", "eager")
    if foreach and _kernels.lerps(shadows, params, weights, skip):
        return {"foreach": range(len(shadows))}
    ways: dict[Hashable, list[int]] = {}
    for i, (s, p, w) in enumerate(zip(shadows, params, weights, strict=True)):
        way: Hashable
        if foreach and _kernels.lerps([s], [p], [w], skip):
            way = "foreach"
        elif backend == "eager" or not (_is_plain(s) and _is_plain(p)):
            way = "eager"
        else:
            way = s.device
        ways.setdefault(way, []).append(i)
    return dict(ways)


def _is_plain(leaf: Tensor) -> bool:
    # Inductor has no code for complex numbers and overlooks a negation bit; integers are copied.
    return leaf.is_floating_point() and not leaf.is_neg()


def _pays(shadows: list[Tensor]) -> bool:
    elements = sum(s.numel() for s in shadows)
    return elements >= _WORTH_COMPILING and _can_compile(shadows[0].device.type)


@lru_cache(maxsize=256)
def _compiled(kernel: Kernel, _key: Hashable, backend: str) -> Kernel:
    """`kernel`, compiled for the leaves and options that `_key` tells.

    Dynamo keeps its cache with the code object and gives up after 8 entries, which several models
    would exhaust together: each key has a code object of its own.
    """
    fresh = FunctionType(kernel.__code__.replace(), kernel.__globals__, kernel.__name__)
    # The size asserts repeat what the guards have checked, 0.5 us a tensor.
    options: Any = {"size_asserts": False} if backend == "inductor" else None
    return torch.compile(fresh, fullgraph=True, dynamic=False, backend=backend, options=options)


@lru_cache(maxsize=8)
def _can_compile(device: str) -> bool:
    """Whether Inductor works here for a device; the reason why not is told in one warning."""
    one = [torch.zeros(1, device=device)]
    try:
        _run_compiled(_kernels.average, one, one, [1.0], skip=False, keys=None, backend="inductor")
    except Exception as error:  # noqa: BLE001, what fails without a compiler differs by platform
        message = f"emajit runs without a compiler on {device}, since torch.compile failed: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return False
    return True
