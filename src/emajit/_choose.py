"""Choose how leaves are computed: multi-tensor, single-tensor or compiled; every threshold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from emajit import _compile, _kernels, _shards, _torch
from emajit._kernels import Kernel, Update
from emajit._torch import pytree

# Measured on 2 cores of an AMD EPYC with 32 MiB of cache, torch 2.13, 2026-11-22 to 2026-11-30.
#
# "auto" compiles updates that no single operator does: mixed or low precision, nonfinite="skip", an
# alpha on a device. Milliseconds of update_ on ResNet-50, eager / compiled: float32 3.1 / 3.3,
# float32 of bfloat16 10 / 3.6, bfloat16 16 / 3.1 (with noise 360 / 11.4), "skip" 36 / 4.1. Below
# this many elements a step takes a few ms at most, and 10,000 steps do not earn back the
# seconds to minutes of a compilation, which grow with the number of leaves.
WORTH_COMPILING = 2**20
WORTH_COMPILING_NOISE = 2**18
# Several averages, each smaller than the cache, are updated one after the other: an operator with a
# scalar for each leaf takes 1.3 times as long. For larger averages each parameter is read once.
READ_ONCE = 2**23
# A model is compiled in groups of leaves that share a graph, like the blocks of a network: about
# 16 groups, each with at least this many leaves and elements. First call in one graph / in groups,
# 8 s of it Inductor's start: ResNet-50 18 / 13 s, ViT-B 16 / 10 s, a U-Net 74 / 31 s. Later calls
# take 1.02 times as long.
#
# With noise a group has at most this many leaves, too. First and later calls of ResNet-50: 45 s and
# 11.4 ms; with 24 to 32 leaves 67 s and 20 ms, because gcc stops inlining.
GROUPS = 16
GROUP_LEAVES = 12
GROUP_ELEMENTS = 2**22

_OPTIONS = {
    "rounding": ("nearest", "stochastic"),
    "nonfinite": ("propagate", "skip"),
    "backend": ("auto", "eager", "inductor"),
}

# Some leaves, a `range` if all of them, and the kernel that averages them.
Group = tuple[Sequence[int], Kernel]
S = TypeVar("S")


def kernel_of_a_trace(*, in_place: bool, through: bool) -> Kernel:
    """The kernel for a trace, for a transform, or for an update with derivatives (`through`)."""
    if through:
        return _kernels.single_tensor
    if _torch.in_transform():  # the multi-tensor operators have no batching rule
        return _kernels.transformed_ if in_place else _kernels.transformed
    return _kernels.traced_ if in_place else _kernels.traced


def groups(update: Update, backend: str, *, in_place: bool) -> list[Group]:
    """The leaves to compile, those for one operator, and the rest, each with its kernel."""
    everything = range(len(update.shadows))
    multi: list[int] = []
    if backend in ("auto", "eager") and not update.skip:
        dtypes = _kernels.MULTI_TENSOR_DTYPES
        is_number = [type(alpha) is float for alpha in update.alphas]
        is_number *= len(everything) // max(1, len(is_number))
        rows = enumerate(zip(update.shadows, update.params, is_number, strict=True))
        multi = [i for i, (s, p, number) in rows if number and (s.dtype, p.dtype) in dtypes]
        if not {*map(type, update.shadows + update.params)} <= _torch.PLAIN:
            # An operator hands the whole list, plain leaves too, to each tensor in a wrapper.
            wrapped = [any(map(_torch.wraps, pair)) for pair in zip(*update[:2], strict=True)]
            multi = [i for i in multi if not wrapped[i]]
        if len(multi) == len(everything) > 0:
            return [(everything, _kernels.multi_tensor_ if in_place else _kernels.multi_tensor)]
    rest = sorted({*everything}.difference(multi))
    chosen: list[Group] = []
    # Compiled groups come first: a compilation may fail, before the other leaves are written.
    if rest and backend != "eager":
        for group in _to_compile(update, rest, backend):
            layout = _compile.layout(update.part(group))
            chosen.append((group, _compile.kernel(layout, backend, in_place=in_place)))
        compiled = {i for group, _ in chosen for i in group}
        rest = [i for i in rest if i not in compiled]
    eager: list[Group] = [
        (multi, _kernels.multi_tensor_ if in_place else _kernels.multi_tensor),
        (rest, _kernels.single_tensor_ if in_place else _kernels.single_tensor),
    ]
    # Of these the last leaf is written last: LitEma counts an interrupted update if it was written.
    chosen += sorted([group for group in eager if group[0]], key=lambda group: group[0][-1])
    if len(chosen) == 1 and chosen[0][0] == [*everything]:
        return [(everything, chosen[0][1])]
    return chosen


def is_by_alpha(groups: list[Group], update: Update, several: int) -> bool:
    """Whether several averages are to be updated one after the other."""
    if [kernel for _, kernel in groups] != [_kernels.multi_tensor_]:
        return False
    return sum(map(Tensor.numel, update.shadows)) // several < READ_ONCE


def _to_compile(update: Update, leaves: list[int], backend: str) -> list[Sequence[int]]:
    """The leaves worth compiling, in groups that are a graph each."""
    least = 0
    if backend == "auto":
        least = WORTH_COMPILING if update.keys is None else WORTH_COMPILING_NOISE
    devices: dict[torch.device, list[int]] = {}
    for i in leaves:
        devices.setdefault(update.shadows[i].device, []).append(i)
    chosen: list[Sequence[int]] = []
    for device, own in devices.items():
        if sum([update.shadows[i].numel() for i in own]) < least:
            continue
        graph = _compile.compilable(update, own)
        elements = sum([update.shadows[i].numel() for i in graph])
        if not graph or elements < least or (backend == "auto" and not _compile.tries(device)):
            continue
        is_divided = update.keys is not None or elements >= 2 * GROUP_ELEMENTS
        if is_divided and device.type == "cpu":
            chosen += _in_graphs(graph, update.part(graph))
        else:
            chosen.append(graph)
    return chosen


def _in_graphs(leaves: Sequence[int], update: Update) -> list[Sequence[int]]:
    """Divide the leaves with noise, or of a large model, into groups, many of them equal.

    Equal groups share a graph: the blocks of a network repeat. With n leaves of a form and
    k groups, each group gets n // k; repeat for the remainder. Small leaves come first, before the
    threads start: behind large leaves they would also keep gcc from inlining.
    """
    noisy = update.keys is not None
    elements = sum(s.numel() for s in update.shadows)
    least = 1 if noisy else max(GROUP_ELEMENTS, elements // GROUPS)
    forms: dict[tuple[Any, ...], list[int]] = {}
    rows = zip(leaves, _compile.layout(update).forms, update.rows(), strict=True)
    for leaf, form, (s, _, alpha, key) in rows:
        forms.setdefault((s.numel(), form, id(alpha), key and key[1]), []).append(leaf)
    columns = [(form[0], forms[form]) for form in sorted(forms, key=itemgetter(0))]
    most = GROUP_LEAVES if noisy else len(leaves)
    groups: list[Sequence[int]] = []
    while columns:
        times = _times(columns, least)
        for j in range(times):
            shares = [c[len(c) // times * j : len(c) // times * (j + 1)] for _, c in columns]
            group = [*chain.from_iterable(shares)]
            groups += [group[i : i + most] for i in range(0, len(group), most)]
        rests = [(size, c[len(c) // times * times :]) for size, c in columns]
        columns = [(size, rest) for size, rest in rests if rest]
    return groups if noisy or len(groups) > 1 else [leaves]


def _times(columns: list[tuple[int, list[int]]], elements: int) -> int:
    """The number of equal groups with at least `GROUP_LEAVES` and `elements` each."""

    def suffices(groups: int) -> bool:
        shares = [(size, len(c) // groups) for size, c in columns]
        enough = sum(n for _, n in shares) >= GROUP_LEAVES
        return enough and sum(size * n for size, n in shares) >= elements

    most = sum(len(c) for _, c in columns) // GROUP_LEAVES
    return next(filter(suffices, range(most, 1, -1)), 1)


def check_options(**found: str) -> None:
    """Raise ValueError for an unknown `rounding`, `nonfinite` or `backend`."""
    for name, value in found.items():
        expected = _OPTIONS[name]
        if value in expected:
            continue
        if name == "backend":
            if value in torch.compiler.list_backends(exclude_tags=()):
                continue
            expected = *expected, "a name of torch.compiler.list_backends()"
        raise ValueError(f"{name}: expected {' or '.join(expected)}, found {value!r}")


def checked_schedule(name: str, schedule: S) -> S:
    """A schedule; raises TypeError for a function that makes one, uncalled, and for a module."""
    if hasattr(schedule, "makes_schedules"):
        made = schedule.__name__  # type: ignore[attr-defined]
        raise TypeError(f"{name}: expected a schedule, found {made} itself; call it: {made}(...)")
    if isinstance(schedule, torch.nn.Module):
        found = type(schedule).__qualname__
        raise TypeError(f"{name}: expected a number or a schedule, found a module, {found}")
    return schedule


def check_differentiable(rounding: str, shadows: Any) -> None:
    """Raise ValueError where derivatives cannot go through an update."""
    if rounding != "nearest":
        raise ValueError(
            f"differentiable: expected rounding='nearest', found {rounding!r}, without a derivative"
        )
    if _shards.are_in(pytree.tree_leaves(shadows)):
        raise ValueError("differentiable: expected whole tensors, found DTensors")
