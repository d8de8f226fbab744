"""Pair the leaves of two trees, and rebuild a tree; every mismatch is an error that names the path.

Several shadows of the same params are a list of trees here; one shadow is a list of one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from emajit import _alias, _paths, _shards, _torch
from emajit._paths import PyTree
from emajit._torch import pytree

T = TypeVar("T")


# The leaves of shadows, one tree after the other, and of their params, once for all trees. A plain
# tuple: a NamedTuple adds 3% to `update_` of a small model.
Leaves = tuple[list[Any], list[Any]]


def flatten(shadows: Sequence[PyTree], params: PyTree) -> Leaves | None:
    """The leaves, if all trees are lists, or dicts with the same keys in the same order; else None.

    Nothing else is compared here.
    """
    leaves: list[Any] = []
    if type(params) is dict:
        names = list(params)
        for shadow in shadows:
            if type(shadow) is not dict or list(shadow) != names:
                return None
            leaves += shadow.values()
        return leaves, [*params.values()]
    if type(params) is list:
        for shadow in shadows:
            if type(shadow) is not list or len(shadow) != len(params):
                return None
            leaves += shadow
        return leaves, params
    return None


class Pairs(NamedTuple):
    """Shadows and their params; tied leaves are one pair, and a DTensor is its local shard.

    `slots` maps each leaf of each tree to the index of its pair, a None leaf to None.
    """

    shadows: list[Tensor]
    params: list[Tensor]
    slots: Sequence[int | None]


def pair_plain(flat: Leaves, several: int) -> Pairs | None:
    """As `pair`, in a quarter of the time, if all leaves are plain tensors, match and are not tied.

    Else None: the reason is not known here.
    """
    shadows, params = flat[0], flat[1] * several
    if not {*map(type, shadows + params)} <= _torch.PLAIN:
        return None
    try:
        addresses = {s.data_ptr() for s in shadows}
        fit = (
            len(addresses - {0}) == len(shadows)
            and {p.layout for p in params} <= {torch.strided}
            and [s.shape for s in shadows] == [p.shape for p in params]
            and [s.device for s in shadows] == [p.device for p in params]
            and all(map(torch.can_cast, [p.dtype for p in params], [s.dtype for s in shadows]))
        )
    except RuntimeError:  # without memory of its own
        return None
    return Pairs(shadows, params, range(len(shadows))) if fit else None


def firsts(slots: Sequence[int | None]) -> list[int]:
    """The first leaf of each pair."""
    first = {slot: i for i, slot in reversed([*enumerate(slots)]) if slot is not None}
    return [first[slot] for slot in sorted(first)]


def pair(shadows: Sequence[PyTree], params: PyTree, *, same_device: bool = True) -> Pairs:
    """Pair each leaf of the shadows with the leaf of `params` at the same path.

    Dicts are matched by key, in any order. Leaves of a shadow that are one tensor, or the
    same view of the same memory, are tied: they make one pair.

    Raises:
        ValueError: the structure, a shape, a device (with `same_device`), the kind of number
            or the placement of a DTensor differs; leaves are tied in a shadow and not in `params`;
            or two shadows share a tensor or are not tied alike.
        TypeError: a leaf is neither a tensor nor None.
    """
    pairs: list[Pairs] = []
    for i, shadow in enumerate(shadows):
        try:
            pairs.append(_pair_leaf_by_leaf(shadow, params, same_device=same_device))
        except (TypeError, ValueError) as error:
            if len(shadows) == 1:
                raise
            raise type(error)(f"of shadows[{i}]: {error}") from None
    return pairs[0] if len(pairs) == 1 else _joined(shadows, pairs)


def _joined(shadows: Sequence[PyTree], pairs: list[Pairs]) -> Pairs:
    """The pairs of several shadows, which must be tied alike and share no tensor."""
    owners: dict[Hashable, tuple[int, int]] = {}
    for i, (tree, own) in enumerate(zip(shadows, pairs, strict=True)):
        for slot, s in enumerate(own.shadows):
            owner = owners.setdefault(_alias.identity(s), (i, slot))
            if owner != (i, slot) or own.slots != pairs[0].slots:
                ties = enumerate(zip(own.slots, pairs[0].slots, strict=True))
                leaf = next((j for j, (a, b) in ties if a != b), firsts(own.slots)[slot])
                raise ValueError(
                    f"{_paths.path(f'shadows[{i}]', tree, leaf)}: expected a tensor of its own, "
                    "tied as in shadows[0], found another tie"
                )
    size = len(pairs[0].shadows) if pairs else 0
    slots = [
        None if slot is None else i * size + slot
        for i, own in enumerate(pairs)
        for slot in own.slots
    ]
    return Pairs(
        [*chain.from_iterable(own.shadows for own in pairs)],
        [*chain.from_iterable(own.params for own in pairs)],
        slots,
    )


def _pair_leaf_by_leaf(shadow: PyTree, params: PyTree, *, same_device: bool) -> Pairs:
    leaves, spec = pytree.tree_flatten(shadow)
    try:
        others = spec.flatten_up_to(params)
    except ValueError as error:
        raise _paths.structure_differs(shadow, params, error) from None
    held: list[Tensor] = []
    partners: list[Tensor] = []
    slots: list[int | None] = []
    first: dict[Hashable, int] = {}
    for i, (s, p) in enumerate(zip(leaves, others, strict=True)):
        if s is None and p is None:
            slots.append(None)
            continue
        if not (isinstance(s, Tensor) and isinstance(p, Tensor)):
            raise _paths.not_a_pair(shadow, i, s, p)
        if _shards.misplaced(p, s):
            raise _paths.placed_differently(shadow, i, s, p)
        s, p = _shards.local([s, p])  # noqa: PLW2901
        if (
            s.shape != p.shape
            or (same_device and s.device != p.device)
            or not (s.layout is p.layout is torch.strided)
            or _kind(p) > _kind(s)
        ):
            raise _paths.leaf_differs(shadow, i, s, p)
        slot = first.setdefault(_alias.identity(s), len(held))
        if slot == len(held):
            held.append(s)
            partners.append(p)
        elif not _alias.tied(p, partners[slot]):
            tied = _paths.path("shadow", shadow, slots.index(slot))
            raise ValueError(
                f"{_paths.path('shadow', shadow, i)} and {tied} are tied: "
                "expected the same of params, found two different parameters"
            )
        slots.append(slot)
    return Pairs(held, partners, slots)


def _kind(tensor: Tensor) -> int:
    """The rank of a kind of number: each holds the lower ones. `can_cast` cannot be traced."""
    if tensor.is_complex():
        return 3
    return 2 if tensor.is_floating_point() else int(tensor.dtype is not torch.bool)


def check_writable(pairs: Pairs, shadows: Sequence[PyTree]) -> None:
    """Raise ValueError if a shadow requires grad, cannot be written, or shares memory.

    A leaf that requires grad is a parameter: the params were probably given first. A trace and a
    transform do not see memory, and check only this.
    """
    for i, leaf in enumerate(chain.from_iterable(map(pytree.tree_leaves, shadows))):
        if leaf is not None and leaf.requires_grad:
            raise ValueError(
                f"{_path(shadows, i)}: expected an average, found a tensor that requires grad; "
                "the shadow comes first, the params second"
            )
    if torch.compiler.is_compiling() or _torch.in_transform():
        return

    def where(k: int) -> str:
        size = len(pairs.shadows)
        return _path(shadows, firsts(pairs.slots)[k % size], "" if k < size else "params")

    for k, s in enumerate(pairs.shadows):
        if not s.is_contiguous() and s.numel() and _alias.repeats_itself(s.shape, s.stride()):
            raise ValueError(
                f"{where(k)}: expected memory of its own for each element, found shape "
                f"{tuple(s.shape)} with strides {s.stride()}"
            )
        if s.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{where(k)}: expected a tensor that can be written here, found one that was made "
                "in torch.inference_mode()"
            )
        if s.is_neg():  # foreach would refuse it after it has written other leaves
            raise ValueError(
                f"{where(k)}: expected a tensor that can be written, found a negated view; pass "
                "its resolve_neg()"
            )
    params = pairs.params[: len(pairs.params) // len(shadows)] if shadows else []
    overlap = next(_alias.overlaps(pairs.shadows + params, len(pairs.shadows)), None)
    if overlap is not None:
        here, there = map(where, overlap)
        raise ValueError(f"{here}: expected memory of its own, found that it overlaps {there}")


def _path(shadows: Sequence[PyTree], leaf: int, which: str = "") -> str:
    """The path of a leaf of several trees, or of its partner in the tree named `which`."""
    tree, index = divmod(leaf, len(pytree.tree_leaves(shadows[0])))
    shadow = "shadow" if len(shadows) == 1 else f"shadows[{tree}]"
    return _paths.path(which or shadow, shadows[tree], index)


def rebuild(tree: PyTree, tensors: Sequence[Tensor], slots: Sequence[int | None]) -> PyTree:
    """The tree with the tensor of each slot as leaf; a shard becomes a DTensor placed as before.

    Tied leaves, which have one slot, become one object.
    """
    olds, spec = pytree.tree_flatten(tree)
    leaves = [None if slot is None else tensors[slot] for slot in slots]
    if _shards.are_in(olds):
        placed: dict[int, Any] = {}
        for old, slot in zip(olds, slots, strict=True):
            if slot is not None and slot not in placed:
                placed[slot] = _shards.like(old, tensors[slot])
        leaves = [None if slot is None else placed[slot] for slot in slots]
    return pytree.tree_unflatten(leaves, spec)


def check_dtype(dtype: Any) -> None:
    """Raise ValueError unless `dtype` is None or a real floating-point dtype."""
    is_float = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if not (dtype is None or is_float) or dtype in _torch.FLOATS_WITHOUT_ARITHMETIC:
        expected = "a floating-point dtype such as torch.float32"
        raise ValueError(f"dtype: expected {expected}, found {dtype!r}")


def copy(params: PyTree, dtype: torch.dtype | None) -> PyTree:
    """A detached copy of each leaf, floating-point ones in `dtype`; tied leaves stay tied."""
    _paths.check_leaves("params", params)
    pairs = pair([params], params)
    copies = [p.detach().to(copy_dtype(p, dtype), copy=True) for p in pairs.params]
    return rebuild(params, copies, pairs.slots)


def copy_dtype(leaf: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a leaf's average: its own; for a floating-point or complex leaf `dtype`."""
    if dtype is None:
        return leaf.dtype
    if leaf.is_complex():
        return dtype.to_complex()
    return dtype if leaf.is_floating_point() else leaf.dtype


def interleave(tensors: list[T], parts: int) -> list[T]:
    """Reorder tensors from shadow by shadow to parameter by parameter.

    >>> interleave(["a0", "b0", "a1", "b1"], 2)
    ['a0', 'a1', 'b0', 'b1']
    """
    if parts < 2:
        return tensors
    size = len(tensors) // parts
    columns = [tensors[k * size : (k + 1) * size] for k in range(parts)]
    return [*chain.from_iterable(zip(*columns, strict=True))]


def deinterleave(tensors: list[T], parts: int) -> list[T]:
    """The inverse of `interleave`.

    >>> deinterleave(["a0", "a1", "b0", "b1"], 2)
    ['a0', 'b0', 'a1', 'b1']
    """
    if parts == 1:
        return tensors
    return [tensor for k in range(parts) for tensor in tensors[k::parts]]
