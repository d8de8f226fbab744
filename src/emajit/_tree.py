"""Pytrees to flat lists of leaves and back; every mismatch is an error that names the path."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

PyTree = Any


class Pairs(NamedTuple):
    """The leaves of a shadow and of its params, tied leaves once.

    `slots` has, for each leaf of the shadow's tree, its index in the two lists; None for None.
    """

    shadow: PyTree
    shadows: list[Tensor]
    params: list[Tensor]
    slots: Sequence[int | None]

    def rebuild(self, leaves: Sequence[Tensor]) -> PyTree:
        """The shadow's tree with `leaves` in place of `shadows`."""
        spec = pytree.tree_structure(self.shadow)
        return pytree.tree_unflatten(
            [None if slot is None else leaves[slot] for slot in self.slots], spec
        )


def copy(params: PyTree, dtype: torch.dtype | None) -> PyTree:
    """A detached copy of each leaf, floating-point ones in `dtype`; tied leaves stay tied."""
    for i, leaf in enumerate(pytree.tree_leaves(params)):
        if not (leaf is None or isinstance(leaf, Tensor)):
            raise TypeError(_not_a_leaf("params", params, i, leaf))
    pairs = align(params, params)
    return pairs.rebuild([p.detach().to(_copy_dtype(p, dtype), copy=True) for p in pairs.params])


def _copy_dtype(leaf: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return leaf.dtype
    if leaf.is_complex():
        return dtype.to_complex()
    return dtype if leaf.is_floating_point() else leaf.dtype


def align(shadow: PyTree, params: PyTree) -> Pairs:
    """Pair each leaf of `shadow` with the leaf of `params` at the same path.

    Dicts are matched by key, whatever their order. Leaves of `shadow` that are one tensor, or the
    same view of the same memory, are tied: they make one pair.

    Raises:
        ValueError: the structure, a shape, a device or the kind of number differs, or leaves are
            tied in `shadow` and not in `params`.
        TypeError: a leaf is neither a tensor nor None.
    """
    if type(shadow) is dict and type(params) is dict and list(shadow) == list(params):
        leaves, others = list(shadow.values()), list(params.values())
        if _fit(leaves, others):
            return Pairs(shadow, leaves, others, range(len(leaves)))
    leaves, spec = pytree.tree_flatten(shadow)
    try:
        others = spec.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(_structure_differs(shadow, params, error)) from None
    shadows: list[Tensor] = []
    partners: list[Tensor] = []
    slots: list[int | None] = []
    first: dict[Hashable, int] = {}
    for i, (s, p) in enumerate(zip(leaves, others, strict=True)):
        if s is None and p is None:
            slots.append(None)
            continue
        if not (isinstance(s, Tensor) and isinstance(p, Tensor)):
            raise _not_a_pair(shadow, i, s, p)
        if (
            s.shape != p.shape
            or s.device != p.device
            or (s.dtype is not p.dtype and not torch.can_cast(p.dtype, s.dtype))
        ):
            raise ValueError(_leaf_differs(shadow, i, s, p))
        slot = first.setdefault(_address(s), len(shadows))
        if slot == len(shadows) or not _same_view(s, shadows[slot]):
            slot = len(shadows)
            shadows.append(s)
            partners.append(p)
        elif not _same_view(p, partners[slot]):
            tied = _path("shadow", shadow, slots.index(slot))
            raise ValueError(
                f"{_path('shadow', shadow, i)} and {tied} are tied: "
                "expected the same of params, found two different parameters"
            )
        slots.append(slot)
    return Pairs(shadow, shadows, partners, slots)


def _fit(shadows: list[Any], params: list[Any]) -> bool:
    """Whether all leaves are tensors that fit each other and none is tied, checked in bulk."""
    if torch.compiler.is_compiling():
        return False
    try:
        addresses = {s.data_ptr() for s in shadows}
        return (
            len(addresses) == len(shadows)
            and [s.shape for s in shadows] == [p.shape for p in params]
            and [s.device for s in shadows] == [p.device for p in params]
            and all(map(torch.can_cast, [p.dtype for p in params], [s.dtype for s in shadows]))
        )
    except (AttributeError, RuntimeError):  # not a tensor, or one without memory of its own
        return False


def _address(tensor: Tensor) -> Hashable:
    """Where a tensor starts. One without memory of its own stands for itself.

    Inside a trace `data_ptr()` would become a guard on that very tensor.
    """
    if torch.compiler.is_compiling():
        return tensor
    try:
        return tensor.data_ptr() or tensor
    except RuntimeError:  # a fake tensor, or one wrapped by a torch.func transform
        return tensor


def _same_view(a: Tensor, b: Tensor) -> bool:
    return a is b or (
        _address(a) == _address(b)
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype is b.dtype
    )


def check_writable(pairs: Pairs) -> None:
    """Raise ValueError if writing one of the shadows would change another leaf, or itself twice."""
    leaves = pairs.shadows + pairs.params
    starts = [leaf.data_ptr() for leaf in leaves]
    if all(map(Tensor.is_contiguous, leaves)):
        stops = [start + leaf.nbytes for start, leaf in zip(starts, leaves, strict=True)]
    else:
        stops = [start + _extent(leaf) for start, leaf in zip(starts, leaves, strict=True)]
        for slot, s in enumerate(pairs.shadows):
            if s.numel() and _repeats_itself(s.shape, s.stride()):
                raise ValueError(
                    f"{_path('shadow', pairs.shadow, pairs.slots.index(slot))}: expected memory "
                    f"of its own for each element, found shape {tuple(s.shape)} with strides "
                    f"{s.stride()}"
                )
    for i, j in _touching(tuple(starts), tuple(stops), len(pairs.shadows)):
        if _share_memory(leaves[i], leaves[j]):
            raise ValueError(_overlap(pairs, i, j))


def _extent(tensor: Tensor) -> int:
    """How many bytes lie from the first byte of a tensor to its last."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


# A pure function of addresses, so a training loop pays for the sort once.
@lru_cache(maxsize=64)
def _touching(
    starts: tuple[int, ...], stops: tuple[int, ...], shadows: int
) -> list[tuple[int, int]]:
    """The pairs of leaves whose addresses intersect, at least one among the first `shadows`."""
    touching = []
    reached: list[int] = []
    for i in sorted(range(len(starts)), key=starts.__getitem__):
        if starts[i] == stops[i]:
            continue
        reached = [j for j in reached if stops[j] > starts[i]]
        touching += [(min(i, j), max(i, j)) for j in reached if min(i, j) < shadows]
        reached.append(i)
    return touching


@lru_cache(maxsize=1024)
def _repeats_itself(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two indices may mean one element: a step does not clear all smaller ones together."""
    reach = 0
    for step, n in sorted((step, n) for step, n in zip(strides, shape, strict=True) if n != 1):
        if step <= reach:
            return True
        reach += step * (n - 1)
    return False


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have a byte in common: exact, at the cost of a mask over both."""
    if a.device != b.device:
        return False
    start = min(a.data_ptr(), b.data_ptr())
    stop = max(a.data_ptr() + _extent(a), b.data_ptr() + _extent(b))
    touched = torch.zeros(stop - start, dtype=torch.bool)

    def seen(t: Tensor) -> Tensor:
        strides = [step * t.itemsize for step in t.stride()]
        return touched.as_strided((*t.shape, t.itemsize), (*strides, 1), t.data_ptr() - start)

    seen(a).fill_(True)
    return bool(seen(b).any())


def _path(name: str, tree: PyTree, index: int) -> str:
    """Where leaf number `index` of a tree stands, as one would write it in Python."""
    paths = pytree.tree_flatten_with_path(tree)[0]
    return f"{name}{pytree.keystr(paths[index][0])}"


def _not_a_leaf(name: str, tree: PyTree, index: int, leaf: object) -> str:
    return (
        f"{_path(name, tree, index)}: expected a tensor or None, found {type(leaf).__qualname__}"
        "; a class of your own is seen into once it is registered as a pytree"
    )


def _not_a_pair(shadow: PyTree, index: int, s: object, p: object) -> Exception:
    for name, leaf in (("shadow", s), ("params", p)):
        if not (leaf is None or isinstance(leaf, Tensor)):
            message = _not_a_leaf("shadow", shadow, index, leaf)
            return TypeError(message.replace("shadow", name, 1))
    expected, found = ("None", "a tensor") if s is None else ("a tensor", "None")
    path = _path("params", shadow, index)
    return ValueError(f"{path}: expected {expected} as in shadow, found {found}")


def _leaf_differs(shadow: PyTree, index: int, s: Tensor, p: Tensor) -> str:
    path = _path("params", shadow, index)
    if s.shape != p.shape:
        expected, found = f"shape {tuple(s.shape)}", str(tuple(p.shape))
    elif s.device != p.device:
        expected, found = f"device {s.device}", str(p.device)
    else:
        expected, found = f"a dtype that {s.dtype} can hold", str(p.dtype)
    return f"{path}: expected {expected} as in shadow, found {found}"


def _structure_differs(shadow: PyTree, params: PyTree, error: ValueError) -> str:
    ours, theirs = (
        {pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]}
        for tree in (shadow, params)
    )
    missing, extra = sorted(ours - theirs), sorted(theirs - ours)
    if not missing and not extra:
        return f"params: expected the structure of shadow, found another: {error}"
    told = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(extra)} too"] * bool(extra)
    return f"params: expected the structure of shadow, found that it {' and '.join(told)}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _overlap(pairs: Pairs, i: int, j: int) -> str:
    def path(k: int) -> str:
        name = "shadow" if k < len(pairs.shadows) else "params"
        return _path(name, pairs.shadow, pairs.slots.index(k % len(pairs.shadows)))

    return f"{path(i)}: expected memory of its own, found that it overlaps {path(j)}"
