"""Choose how leaves are computed: multi-tensor, single-tensor or compiled; every threshold."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
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
# seconds to minutes of a compilation, which grow with the number of leaves. Before torch 2.8 "auto"
# compiles nothing on a CPU: Inductor does not vectorise 16-bit dtypes there, 18 ms in place of 16.
WORTH_COMPILING = 2**20
WORTH_COMPILING_NOISE = 2**18
# Several averages, each smaller than the cache, are updated one after the other: an operator with a
# scalar for each leaf takes 1.3 times as long. For larger averages each parameter is read once.
READ_ONCE = 2**23
# A model is compiled in groups of leaves that share a graph, like the blocks of a network: at most
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


def groups(update: Update, backend: str, *, in_place: bool) -> list[Group]:
    """The leaves for one operator, those to compile, and the rest, each with its kernel."""
    multi, single = (
        (_kernels.multi_tensor_, _kernels.single_tensor_)
        if in_place
        else (_kernels.multi_tensor, _kernels.single_tensor)
    )
    eager = backend in ("auto", "eager")
    pairs = [(s.dtype, p.dtype) for s, p in zip(update.shadows, update.params, strict=True)]
    if not pairs:
        return []
    if eager and _kernels.is_one_lerp({*pairs}, update.alphas, update.skip):
        return [(range(len(pairs)), multi)]
    compilable = _compilable(update) if backend != "eager" else set()
    ways: dict[Hashable, list[int]] = {}
    for i, (s, p, alpha, _) in enumerate(update.rows()):
        if eager and _kernels.is_one_lerp({pairs[i]}, [alpha], update.skip):
            way: Hashable = "multi"
        else:
            way = s.device if {id(s), id(p)} <= compilable else "single"
        ways.setdefault(way, []).append(i)
    chosen: list[Group] = []
    for way, leaves in ways.items():
        part = update.part(leaves)
        if way == "multi":
            chosen.append((leaves, multi))
        elif way == "single" or (backend == "auto" and not _worth_compiling(part)):
            chosen.append((leaves, single))
        else:
            # Compiled groups come first: they may fail before they write, the others do not.
            chosen[:0] = [
                (group, _compile.kernel(update.part(group), backend, in_place=in_place))
                for group in _in_graphs(leaves, part)
            ]
    if len(chosen) == 1 and chosen[0][0] == [*range(len(pairs))]:
        return [(range(len(pairs)), chosen[0][1])]
    return chosen


def is_by_alpha(groups: list[Group], update: Update, several: int) -> bool:
    """Whether several averages are to be updated one after the other."""
    elements = sum(map(Tensor.numel, update.shadows)) // several
    kernels = [kernel for _, kernel in groups]
    return kernels == [_kernels.multi_tensor_] and elements < READ_ONCE


def _compilable(update: Update) -> set[int]:
    """The ids of the leaves that a graph may have."""
    raw = [leaf for leaf in (*update.shadows, *update.params) if _is_raw(leaf)]
    return {id(leaf) for leaf in raw} - _compile.aliased_inputs(raw)


def _is_raw(leaf: Tensor) -> bool:
    # Inductor has no code for complex numbers and overlooks a negation bit; integers are copied.
    # A subclass may hold more than its numbers, which a graph would freeze and our key lacks.
    is_tensor = type(leaf) in (Tensor, torch.nn.Parameter)
    return is_tensor and leaf.is_floating_point() and not leaf.is_neg()


def _worth_compiling(update: Update) -> bool:
    elements = sum(s.numel() for s in update.shadows)
    least = WORTH_COMPILING if update.keys is None else WORTH_COMPILING_NOISE
    device = update.shadows[0].device.type
    if elements < least or not _compile.can_compile(device):
        return False
    return device != "cpu" or _torch.drops_guards()


def _in_graphs(leaves: Sequence[int], update: Update) -> list[Sequence[int]]:
    """Put all leaves in one graph; with noise or in a large model, in groups, many of them equal.

    Equal groups share a graph: the blocks of a network repeat. With n leaves of a form and
    k groups, each group gets n // k; repeat for the remainder. Small leaves come first, before the
    threads start: behind large leaves they would also keep gcc from inlining.
    """
    if update.shadows[0].device.type != "cpu":
        return [leaves]
    noisy = update.keys is not None
    elements = sum(s.numel() for s in update.shadows)
    least = 1 if noisy else max(GROUP_ELEMENTS, elements // GROUPS)
    forms: dict[tuple[Any, ...], list[int]] = {}
    for leaf, (s, p, alpha, key) in zip(leaves, update.rows(), strict=True):
        form = s.numel(), _compile.form(s, p), id(alpha), key and key[1]
        forms.setdefault(form, []).append(leaf)
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


def called(name: str, schedule: S) -> S:
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
