"""The only call of `torch.compile`; chooses for each leaf how its average is computed."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emajit import _kernels, _tree
from emajit._kernels import Weight
from emajit._rounding import Keys, Noise
from emajit._tree import Dtypes

Kernel = Any  # of (shadows, params, weights, skip, keys): a plain function, or one compiled

# "auto" compiles only what `foreach` cannot do in one pass: mixed or low precision,
# nonfinite="skip", a weight that lives on a CUDA device.
# Milliseconds of update_ on the 161 tensors of ResNet-50, eager / compiled, interleaved medians, on
# 2 cores of an AMD EPYC, torch 2.13, 2026-11-22:
#   float32 5.1 / 6.3, float32 of bfloat16 7.5 / 6.7, bfloat16 21 / 4.0, "skip" 34 / 6.2
# Below this many elements a step takes some ms at the most, and does not earn back in 10,000 steps
# the seconds to minutes of a compilation, which grow with the number of leaves.
_WORTH_COMPILING = 2**20


def is_traced() -> bool:
    """Whether the call is part of somebody's `torch.compile` or of a `torch.func` transform.

    Addresses mean nothing there, and `foreach` operators have no batching rule.
    """
    return torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None


def in_dispatch_mode() -> bool:
    """Whether a `TorchDispatchMode` is on, such as one that counts or records operators.

    Dynamo runs no graph inside of one; it raises after it has run the function as it is.
    """
    return torch._C._len_torch_dispatch_stack() > 0


class Work(NamedTuple):
    """What is to be averaged: lists of one length, and how; `dtypes` as in `_tree.Pairs`."""

    shadows: list[Tensor]
    params: list[Tensor]
    weights: list[Weight]
    skip: bool
    noise: Noise | Keys | None
    dtypes: Dtypes | None = None

    def part(self, leaves: Sequence[int]) -> Work:
        if len(leaves) == len(self.shadows):
            return self
        return Work(
            [self.shadows[i] for i in leaves],
            [self.params[i] for i in leaves],
            [self.weights[i] for i in leaves],
            self.skip,
            self.noise and self.noise.part(leaves),
        )

    @property
    def device(self) -> torch.device:
        return self.shadows[0].device if self.shadows else torch.device("cpu")

    def keys(self) -> Keys | None:
        return self.noise.keys(self.device) if self.noise and self.shadows else None


def average(work: Work, backend: str) -> list[Tensor]:
    """`_kernels.average`, each leaf in the way that suits it."""
    if is_traced():
        return _kernels.average(*work[:4], work.keys())
    new: dict[int, Tensor] = {}
    kernels = _kernels.average, _kernels.average, _kernels.foreach_average
    for leaves, results in _run(kernels, work, backend):
        new |= zip(leaves, results, strict=True)
    return [_laid_out_as(s, new[i]) for i, s in enumerate(work.shadows)]


def average_(work: Work, backend: str) -> None:
    """`_kernels.average_`, each leaf in the way that suits it."""
    if is_traced():
        _kernels.average_(*work[:4], work.keys())
    else:
        kernels = _kernels.average_, _kernels.eager_average_, _kernels.foreach_average_
        _run(kernels, work, backend)


def _laid_out_as(shadow: Tensor, average: Tensor) -> Tensor:
    """The average in the strides that `empty_like` gives it: the shadow's, if that is dense.

    Inductor takes the parameter's where the two differ.
    """
    if average.stride() == shadow.stride():
        return average
    laid_out = torch.empty_like(shadow)
    return average if average.stride() == laid_out.stride() else laid_out.copy_(average)


def _run(
    kernels: tuple[Kernel, Kernel, Kernel], work: Work, backend: str
) -> list[tuple[Iterable[int], Any]]:
    """Call a kernel for each group of leaves; their indices and what it returned."""
    kernel, eager, foreach = kernels
    if in_dispatch_mode():
        backend = "eager"
    done: list[tuple[Iterable[int], Any]] = []
    for way, leaves in _ways(work, backend).items():
        part = work.part(leaves)
        if way == "foreach":
            result = foreach(*part[:3])
        elif way == "eager" or (backend == "auto" and not _pays(part.shadows)):
            result = eager(*part[:4], part.keys())
        else:
            result = _run_compiled(kernel, part, backend, eager)
        done.append((leaves, result))
    return done


def _run_compiled(kernel: Kernel, work: Work, backend: str, eager: Kernel) -> Any:
    # Detached, a leaf is the same to dynamo's guards whether it is a frozen parameter or a tensor;
    # a parameter of several averages stays one tensor, which is read once.
    detached = {id(leaf): leaf.detach() for leaf in (*work.shadows, *work.params)}
    s, p = ([detached[id(leaf)] for leaf in leaves] for leaves in (work.shadows, work.params))
    key = kernel, layout(work), work.device, work.skip
    run = _compiled(kernel, key, backend, eager)
    return run(s, p, scalars(work), work.skip, work.keys())


def layout(work: Work) -> Hashable:
    """What a graph depends on, beside the options."""
    places = {i: place for place, i in enumerate(dict.fromkeys(map(id, work.weights)))}
    leaves = zip(work.shadows, work.params, work.weights, strict=True)
    regions = work.noise and tuple(work.noise.regions)
    return regions, tuple(
        [(s.shape, s.stride(), s.dtype, p.stride(), p.dtype, places[id(w)]) for s, p, w in leaves]
    )


def scalars(work: Work) -> list[Tensor]:
    """The weights as 0-d tensors, whose values a graph does not depend on.

    What is one object stays one: two decays may have the same value at one step, not at the next.
    """
    tensors = {i: _scalar(w, work.device) for i, w in {id(w): w for w in work.weights}.items()}
    return [tensors[id(w)] for w in work.weights]


def _scalar(weight: Weight, device: torch.device) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    # `full` hands the number to a kernel; `tensor` would copy it from the host.
    return torch.full((), weight, dtype=torch.float64, device=device)


def _ways(work: Work, backend: str) -> dict[Hashable, Sequence[int]]:
    """The leaves for `foreach`, the ones for an eager kernel, and for each device the rest."""
    shadows, params, weights, skip, _, dtypes = work
    foreach = backend in ("auto", "eager")
    if dtypes is None:
        dtypes = _tree.dtypes(shadows, params)
    if foreach and _kernels.lerps(dtypes, weights, skip):
        return {"foreach": range(len(shadows))}
    ways: dict[Hashable, list[int]] = {}
    for i, (s, p, w) in enumerate(zip(shadows, params, weights, strict=True)):
        way: Hashable
        if foreach and _kernels.lerps({(s.dtype, p.dtype)}, [w], skip):
            way = "foreach"
        elif backend == "eager" or not (_is_plain(s) and _is_plain(p)):
            way = "eager"
        else:
            way = s.device
        ways.setdefault(way, []).append(i)
    # What is compiled comes first: it may fail before it writes, the others do not.
    return dict(sorted(ways.items(), key=lambda item: item[0] in ("foreach", "eager")))


def _is_plain(leaf: Tensor) -> bool:
    # Inductor has no code for complex numbers and overlooks a negation bit; integers are copied.
    return leaf.is_floating_point() and not leaf.is_neg()


def _pays(shadows: list[Tensor]) -> bool:
    elements = sum(s.numel() for s in shadows)
    return elements >= _WORTH_COMPILING and can_compile(shadows[0].device.type)


@lru_cache(maxsize=256)
def _compiled(kernel: Kernel, _key: Hashable, backend: str, eager: Kernel) -> Kernel:
    """`kernel`, compiled for the leaves and options that `_key` tells."""
    return _IfItCompiles(kernel, eager) if backend == "auto" else compiled(kernel, backend)


class _IfItCompiles:
    """A compiled kernel; an eager one from when that fails to compile, before it writes."""

    def __init__(self, kernel: Kernel, eager: Kernel) -> None:
        self.kernel, self.eager = kernel, eager
        self.run: Kernel = None

    def __call__(self, *arguments: Any) -> Any:
        try:
            self.run = self.run or compiled(self.kernel, "inductor")
            return self.run(*arguments)
        except (torch._dynamo.exc.TorchDynamoException, OSError) as error:  # OSError: of its cache
            if self.run is self.eager:
                raise
            message = f"emajit runs an update without a compiler: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            self.run = self.eager
            return self.run(*arguments)


def compiled(function: Any, backend: str, **options: bool) -> Any:
    """`function`, compiled with a cache of its own, and with further options of Inductor.

    Dynamo keeps its cache with the code object and gives up after 8 entries, which several models
    would exhaust together.
    """
    fresh = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    # The size asserts repeat what the guards have checked, 0.5 us a tensor.
    all_options: Any = {"size_asserts": False, **options} if backend == "inductor" else None
    return torch.compile(fresh, fullgraph=True, dynamic=False, backend=backend, options=all_options)


@lru_cache(maxsize=8)
def can_compile(device: str) -> bool:
    """Whether Inductor works here for a device; the reason why not is told in one warning."""
    one = [torch.zeros(1, device=device)]
    try:
        work = Work(one, one, [1.0], False, None)
        _run_compiled(_kernels.average, work, "inductor", _kernels.average)
    except Exception as error:  # noqa: BLE001, what fails without a compiler differs by platform
        message = f"emajit runs without a compiler on {device}, since torch.compile failed: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return False
    return True
