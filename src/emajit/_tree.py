"""Pytrees to flat lists of leaves and back; every mismatch is an error that names the path."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from emajit import _host, _memory, _shards

PyTree = Any
Dtypes = frozenset[tuple[torch.dtype, torch.dtype]]
T = TypeVar("T")

_HINT = "pass dict(model.named_parameters())"


class Pairs(NamedTuple):
    """The leaves of a shadow and of its params, tied leaves once; of DTensors, their shards here.

    `slots` has, for each leaf of the shadow's tree, its index in the two lists; None for None.
    `memo` is what an earlier call has found of the same memory, where there was one.
    """

    shadow: PyTree
    shadows: list[Tensor]
    params: list[Tensor]
    slots: Sequence[int | None]
    memo: Memo | None = None

    def rebuild(self, leaves: Sequence[Tensor]) -> PyTree:
        """The shadow's tree with `leaves` in place of `shadows`."""
        olds, spec = pytree.tree_flatten(self.shadow)
        whole = leaves
        if _shards.are_in(olds):
            whole = [*map(_shards.like, self._of_each(olds), leaves)]
        return pytree.tree_unflatten(
            [None if slot is None else whole[slot] for slot in self.slots], spec
        )

    def paths(self) -> list[str]:
        """Where each of `shadows` stands in the shadow's tree, as one would write it in Python."""
        return self._of_each(_paths(self.shadow))

    def regions(self) -> list[_shards.Region | None]:
        """Which part of a leaf each of `shadows` is, if not all of it."""
        leaves = _leaves(self.shadow)
        if not _shards.are_in(leaves):
            return [None] * len(self.shadows)
        return [_shards.region(leaf) for leaf in self._of_each(leaves)]

    def _of_each(self, leaves: list[T]) -> list[T]:
        """Of each of `shadows` what `leaves` has at its first place in the tree."""
        firsts = {slot: i for i, slot in reversed([*enumerate(self.slots)])}
        return [leaves[firsts[slot]] for slot in range(len(self.shadows))]


_SCALES = torch.float8_e8m0fnu, torch.float4_e2m1fn_x2  # without a sign, and two to an element


def check_dtype(dtype: Any) -> None:
    """Raise ValueError for what is neither None nor a real floating-point dtype."""
    is_float = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if not (dtype is None or is_float) or dtype in _SCALES:
        raise ValueError(f"dtype: expected a floating-point dtype, found {dtype}")


def copy(params: PyTree, dtype: torch.dtype | None) -> PyTree:
    """A detached copy of each leaf, floating-point ones in `dtype`; tied leaves stay tied."""
    check_leaves("params", params)
    pairs = align(params, params)
    return pairs.rebuild([p.detach().to(_copy_dtype(p, dtype), copy=True) for p in pairs.params])


def copy_to_host(params: PyTree, dtype: torch.dtype | None, *, pinned: bool) -> PyTree:
    """As `copy`, but in host memory; page-locked, if wanted and if there is a CUDA device."""
    check_leaves("params", params)
    pairs = align(params, params)
    if _shards.are_in(pytree.tree_leaves(params)):
        raise ValueError("device: expected that of the parameters, which are DTensors, found cpu")
    pinned = pinned and torch.cuda.is_available()
    copies = []
    for path, p in zip(pairs.paths(), pairs.params, strict=True):
        if p.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"device: expected that of params{path} or, of CUDA parameters, cpu, found cpu for "
                f"{p.device}"
            )
        held = torch.empty_like(
            p.detach(), dtype=_copy_dtype(p, dtype), device="cpu", pin_memory=pinned
        ).copy_(p)
        copies.append(held if p.is_cpu else _host.offloaded(held, p.device))
    return pairs.rebuild(copies)


def check_leaves(which: str, tree: PyTree) -> None:
    """Raise TypeError if a leaf is neither a tensor nor None."""
    for i, leaf in enumerate(pytree.tree_leaves(tree)):
        if not (leaf is None or isinstance(leaf, Tensor)):
            raise TypeError(_not_a_leaf(which, tree, i, leaf))


def _copy_dtype(leaf: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return leaf.dtype
    if leaf.is_complex():
        return dtype.to_complex()
    return dtype if leaf.is_floating_point() else leaf.dtype


def align(shadow: PyTree, params: PyTree, *, writable: bool = False, repeats: int = 1) -> Pairs:
    """Pair each leaf of `shadow` with the leaf of `params` at the same path.

    Dicts are matched by key, whatever their order. Leaves of `shadow` that are one tensor, or the
    same view of the same memory, are tied: they make one pair. `params` may be told to consist of
    so many times the same.

    Raises:
        ValueError: the structure, a shape, a device, the kind of number or how a DTensor is placed
            differs, or leaves are tied in `shadow` and not in `params`; if `writable`, also where
            writing a leaf of the shadow would change another leaf.
        TypeError: a leaf is neither a tensor nor None.
    """
    flat = _flat(shadow, params)
    if flat is not None and _host.are_in(flat[0]):
        flat = None
    if flat is not None and _shards.are_in(chain(*flat)):
        flat = _local(*flat)
    if flat is None or not writable:
        return _paired(shadow, params, flat, writable=writable)
    leaves = _once(flat, repeats)
    pairs = _known(shadow, flat, leaves)
    return pairs or _remembered(_paired(shadow, params, flat, writable=True), leaves)


def known(shadow: PyTree, params: PyTree) -> Pairs | None:
    """`align` of plain leaves that it has found writable, if all is as it was then; else None."""
    flat = None if _host.is_used() else _flat(shadow, params)
    return flat and _known(shadow, flat, flat[0] + flat[1])


def known_several(shadows: Any, params: PyTree, several: int) -> Pairs | None:
    """`align_several` of so many shadows, as `known`; those with ties are left to that."""
    flat = None if _host.is_used() else _flat(shadows, [params] * several)
    pairs = flat and _known(shadows, flat, _once(flat, several))
    return pairs if pairs and isinstance(pairs.slots, range) else None


def _once(flat: tuple[list[Any], list[Any]], repeats: int) -> list[Any]:
    """The leaves of both, of params that are so many times the same those of one."""
    return flat[0] + flat[1][: len(flat[1]) // max(1, repeats)]


def _paired(
    shadow: PyTree, params: PyTree, flat: tuple[list[Any], list[Any]] | None, *, writable: bool
) -> Pairs:
    """`align` without a memo: in bulk if all leaves fit, else leaf by leaf."""
    if flat is not None and _fit(*flat):
        pairs = Pairs(shadow, *flat, range(len(flat[0])))
    else:
        pairs = _align_leaf_by_leaf(shadow, params)
    if writable:
        _check_writable(pairs)
    return pairs


def align_several(shadows: list[PyTree], params: PyTree, *, writable: bool = False) -> Pairs:
    """`align` of several shadows of the same params, one after the other.

    Raises, beside that, ValueError if two of them share a tensor or are not tied alike.
    """
    several = len(shadows)
    try:
        pairs = align(shadows, [params] * several, writable=writable, repeats=several)
    except (TypeError, ValueError):
        for i, shadow in enumerate(shadows):
            try:
                align(shadow, params)
            except (TypeError, ValueError) as error:
                raise type(error)(f"of shadow[{i}]: {error}") from None
        raise
    if not shadows or isinstance(pairs.slots, range):
        return pairs
    leaves = len(pairs.slots) // len(shadows)
    size = len({*pairs.slots[:leaves]} - {None})
    for i, slot in enumerate(pairs.slots):
        first = pairs.slots[i % leaves]
        if first is not None and slot != first + i // leaves * size:
            here, there = (_path("shadow", shadows, j) for j in (i, i % leaves))
            raise ValueError(
                f"{here}: expected a tensor of its own, tied as {there} is, found another tie"
            )
    return pairs


def interleave(tensors: list[T], parts: int) -> list[T]:
    """From one shadow after the other to one parameter after the other.

    >>> interleave(["a0", "b0", "a1", "b1"], 2)
    ['a0', 'a1', 'b0', 'b1']
    """
    if parts == 1:
        return tensors
    size = len(tensors) // max(1, parts)
    columns = [tensors[k * size : (k + 1) * size] for k in range(parts)]
    return [*chain.from_iterable(zip(*columns, strict=True))]


def deinterleave(tensors: list[Tensor], parts: int) -> list[Tensor]:
    """The inverse of `interleave`.

    >>> deinterleave(["a0", "a1", "b0", "b1"], 2)
    ['a0', 'b0', 'a1', 'b1']
    """
    if parts == 1:
        return tensors
    return [tensor for k in range(parts) for tensor in tensors[k::parts]]


class Memo(NamedTuple):
    """What `update_` has found once need not be found again for the same memory.

    The guards know addresses' shapes, strides and dtypes, and no tensor: nothing is kept alive.
    `elements` is how many the shadows have; `plans` is for what others derive of it.
    """

    guards: Any
    singles: list[int]
    twins: list[tuple[int, int]]
    slots: Sequence[int | None]
    first: list[int]
    dtypes: Dtypes
    elements: int
    plans: dict[Hashable, Any]

    def fits(self, leaves: list[Tensor]) -> bool:
        """Whether the leaves at these addresses are still of the same form, and as often there."""
        if self.twins:
            if any(leaves[i] is not leaves[j] for i, j in self.twins):
                return False
            leaves = [leaves[i] for i in self.singles]
        return bool(self.guards.check(*leaves))


_memos: dict[tuple[int, tuple[int, ...] | None], Memo] = {}


def _known(shadow: PyTree, flat: tuple[list[Any], list[Any]], leaves: list[Any]) -> Pairs | None:
    """The pairs as an earlier call has found them of the same memory."""
    memo = _memos.get((len(flat[0]), _addresses(leaves)))
    if memo is None or not memo.fits(leaves):
        return None
    if len(memo.first) == len(flat[0]):
        return Pairs(shadow, flat[0], flat[1], memo.slots, memo)
    shadows, params = ([tree[i] for i in memo.first] for tree in flat)
    return Pairs(shadow, shadows, params, memo.slots, memo)


def _remembered(pairs: Pairs, leaves: list[Any]) -> Pairs:
    addresses = _addresses(leaves)
    if addresses is None:
        return pairs
    if len(_memos) >= 64:
        _memos.clear()
    memo = _memos[len(pairs.slots), addresses] = _memo(leaves, pairs)
    return pairs._replace(memo=memo)


def _addresses(leaves: list[Any]) -> tuple[int, ...] | None:
    try:
        return tuple(map(Tensor.data_ptr, leaves))
    except (TypeError, RuntimeError):  # None, or a leaf without memory of its own
        return None


def _memo(leaves: list[Tensor], pairs: Pairs) -> Memo:
    first: list[int] = []
    for i, slot in enumerate(pairs.slots):
        if slot == len(first):
            first.append(i)
    places: dict[int, int] = {}
    twins = [(i, j) for i, leaf in enumerate(leaves) if (j := places.setdefault(id(leaf), i)) < i]
    singles = [*places.values()]
    # Dynamo's, in C++: 35 ns a tensor, where `Tensor.shape` alone takes 200 to 400. They take no
    # tensor twice.
    guards = torch._C._dynamo.guards.TensorGuards(
        *[leaves[i] for i in singles], dynamic_dims_sizes=None, dynamic_dims_strides=None
    )
    elements = sum(map(Tensor.numel, pairs.shadows))
    return Memo(guards, singles, twins, pairs.slots, first, dtypes(*pairs[1:3]), elements, {})


def dtypes(shadows: list[Tensor], params: list[Tensor]) -> Dtypes:
    return frozenset([(s.dtype, p.dtype) for s, p in zip(shadows, params, strict=True)])


def _align_leaf_by_leaf(shadow: PyTree, params: PyTree) -> Pairs:
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
        if _shards.misplaced(p, s):
            raise ValueError(_placed_differently(shadow, i, s, p))
        s, home = _host.split(s)  # noqa: PLW2901
        s, p = _shards.local([s, p])  # noqa: PLW2901
        if (
            s.shape != p.shape
            or home != p.device
            or not (s.layout is p.layout is torch.strided)
            or _kind(p) > _kind(s)
        ):
            raise ValueError(_leaf_differs(shadow, i, s, p, home))
        slot = first.setdefault(_memory.identity(s), len(shadows))
        if slot == len(shadows):
            shadows.append(s)
            partners.append(p)
        elif not _memory.tied(p, partners[slot]):
            tied = _path("shadow", shadow, slots.index(slot))
            raise ValueError(
                f"{_path('shadow', shadow, i)} and {tied} are tied: "
                "expected the same of params, found two different parameters"
            )
        slots.append(slot)
    return Pairs(shadow, shadows, partners, slots)


def _flat(shadow: PyTree, params: PyTree) -> tuple[list[Any], list[Any]] | None:
    """The leaves of two lists, of two dicts with the same keys in order, or of lists of dicts."""
    if type(shadow) is list and type(params) is list and len(shadow) == len(params):
        if not shadow or type(shadow[0]) is not dict:
            return shadow, params
        parts = [part for part in map(_flat, shadow, params) if part]
        if len(parts) < len(shadow):
            return None
        shadows, others = zip(*parts, strict=True)
        return [*chain(*shadows)], [*chain(*others)]
    if type(shadow) is dict and type(params) is dict and list(shadow) == list(params):
        return list(shadow.values()), list(params.values())
    return None


def _is_flat(tree: PyTree) -> bool:
    return type(tree) is dict and all(v is None or isinstance(v, Tensor) for v in tree.values())


def _leaves(tree: PyTree) -> list[Any]:
    return [*tree.values()] if _is_flat(tree) else pytree.tree_leaves(tree)


def _local(shadows: list[Any], params: list[Any]) -> tuple[list[Any], list[Any]] | None:
    """The shards that are here, of leaves that are placed alike."""
    if _shards.placed(shadows) != _shards.placed(params):
        return None
    return _shards.local(shadows), _shards.local(params)


def _kind(tensor: Tensor) -> int:
    """Each kind of number can hold the ones below it; `torch.can_cast`, which cannot be traced."""
    if tensor.is_complex():
        return 3
    return 2 if tensor.is_floating_point() else int(tensor.dtype is not torch.bool)


def _fit(shadows: list[Any], params: list[Any]) -> bool:
    """Whether all leaves are tensors that fit each other and none is tied, checked in bulk."""
    if torch.compiler.is_compiling():
        return False
    try:
        addresses = {s.data_ptr() for s in shadows}
        return (
            len(addresses - {0}) == len(shadows)
            and {p.layout for p in params} <= {torch.strided}
            and [s.shape for s in shadows] == [p.shape for p in params]
            and [s.device for s in shadows] == [p.device for p in params]
            and all(map(torch.can_cast, [p.dtype for p in params], [s.dtype for s in shadows]))
        )
    except (AttributeError, RuntimeError):  # not a tensor, or one without memory of its own
        return False


def _check_writable(pairs: Pairs) -> None:
    """Raise ValueError if writing one of the shadows would change another leaf, or itself twice."""
    leaves = pairs.shadows + pairs.params
    if not all(map(Tensor.is_contiguous, leaves)):
        for slot, s in enumerate(pairs.shadows):
            if s.numel() and _memory.repeats_itself(s.shape, s.stride()):
                raise ValueError(
                    f"shadow{pairs.paths()[slot]}: expected memory of its own for each element, "
                    f"found shape {tuple(s.shape)} with strides {s.stride()}"
                )
    if not torch.is_inference_mode_enabled():
        for slot, s in enumerate(pairs.shadows):
            if s.is_inference():
                raise ValueError(
                    f"shadow{pairs.paths()[slot]}: expected a tensor that can be written here, "
                    "found one that was made in torch.inference_mode()"
                )
    for slot, s in enumerate(pairs.shadows):
        if s.is_neg():  # which foreach refuses after others were written
            raise ValueError(
                f"shadow{pairs.paths()[slot]}: expected a tensor that can be written, found a "
                "negated view; pass its resolve_neg()"
            )
    overlap = next(_memory.overlaps(leaves, len(pairs.shadows)), None)
    if overlap is not None:
        raise ValueError(_overlap(pairs, *overlap))


def _paths(tree: PyTree) -> list[str]:
    """Where each leaf stands, as one would write it in Python."""
    if _is_flat(tree):  # in a tenth of the time
        return [f"[{name!r}]" for name in tree]
    try:
        return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    except ValueError:  # a node whose class was registered without names for its children
        return [f"<leaf {i}>" for i in range(len(pytree.tree_leaves(tree)))]


def named_leaves(which: str, tree: PyTree) -> list[tuple[str, str, Tensor]]:
    """Of each leaf that is not None, where it stands, that in plain words, and the leaf.

    Raises TypeError for a leaf that is no tensor, and ValueError for a node whose class was
    registered without names for its children; `which` is what the tree is called in errors.

    >>> [row[:2] for row in named_leaves("shadow", {"a": [torch.ones(1)], "b": None})]
    [("shadow['a'][0]", 'a.0')]
    """
    check_leaves(which, tree)
    paths = [which + path for path in _paths(tree)]
    try:
        keys = [key for key, _ in pytree.tree_flatten_with_path(tree)[0]]
    except ValueError as error:
        raise ValueError(f"{which}: expected names for all children, found {error}") from None
    names = [".".join(map(_word, key)) for key in keys]
    leaves = pytree.tree_leaves(tree)
    return [row for row in zip(paths, names, leaves, strict=True) if row[2] is not None]


def _word(entry: Any) -> str:
    """One step of a path, of pytree's three classes for them."""
    return str(next(getattr(entry, a) for a in ("key", "idx", "name") if hasattr(entry, a)))


def _path(name: str, tree: PyTree, index: int) -> str:
    return name + _paths(tree)[index]


def _not_a_leaf(name: str, tree: PyTree, index: int, leaf: object) -> str:
    found = (
        f"{_path(name, tree, index)}: expected a tensor or None, found {type(leaf).__qualname__}"
    )
    if isinstance(leaf, torch.nn.Module | Iterator):
        tensors = "named_averages" if hasattr(leaf, "named_averages") else "state_dict"
        hint = _HINT if name == "params" else f"pass a dict of tensors, such as its {tensors}()"
        return f"{found}; {hint}"
    return found


def _not_a_pair(shadow: PyTree, index: int, s: object, p: object) -> Exception:
    for name, leaf in (("shadow", s), ("params", p)):
        if not (leaf is None or isinstance(leaf, Tensor) or not pytree.tree_is_leaf(leaf)):
            return TypeError(_not_a_leaf(name, shadow, index, leaf))
    expected, found = (
        "None" if x is None else "a tensor" if isinstance(x, Tensor) else type(x).__qualname__
        for x in (s, p)
    )
    path = _path("params", shadow, index)
    return ValueError(f"{path}: expected {expected} as in shadow, found {found}")


def _leaf_differs(shadow: PyTree, index: int, s: Tensor, p: Tensor, home: torch.device) -> str:
    path = _path("params", shadow, index)
    if s.shape != p.shape:
        expected, found = f"shape {tuple(s.shape)} as in shadow", str(tuple(p.shape))
    elif home != p.device:
        expected, found = f"device {home} as in shadow", str(p.device)
    elif s.layout is not torch.strided or p.layout is not torch.strided:
        expected, found = "dense tensors", f"{s.layout} in shadow and {p.layout} in params"
    else:
        expected, found = f"a number that {s.dtype} as in shadow can hold", str(p.dtype)
    return f"{path}: expected {expected}, found {found}"


def _placed_differently(shadow: PyTree, index: int, s: Tensor, p: Tensor) -> str:
    hints = {
        (True, False): "; the reshard() of a module of FSDP makes its parameters shards again",
        (False, True): "; make the shadow of the sharded parameters",
    }
    hint = hints.get((_shards.is_one(s), _shards.is_one(p)), "")
    return f"{_path('params', shadow, index)}: {_shards.misplaced(p, s)}{hint}"


def _structure_differs(shadow: PyTree, params: PyTree, error: ValueError) -> str:
    if not (isinstance(params, Tensor) or params is None) and pytree.tree_is_leaf(params):
        kind = type(shadow).__qualname__
        return f"params: expected {kind} as shadow, found {type(params).__qualname__}; {_HINT}"
    ours, theirs = set(_paths(shadow)), set(_paths(params))
    missing, extra = sorted(ours - theirs), sorted(theirs - ours)
    if not missing and not extra:
        return f"params: expected the structure of shadow, found another: {error}"
    told = [f"lacks {some(missing)}"] * bool(missing) + [f"has {some(extra)} too"] * bool(extra)
    return f"params: expected the structure of shadow, found that it {' and '.join(told)}"


def some(names: list[str]) -> str:
    """The first five of `names`, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _overlap(pairs: Pairs, i: int, j: int) -> str:
    def path(k: int) -> str:
        name = "shadow" if k < len(pairs.shadows) else "params"
        return name + pairs.paths()[k % len(pairs.shadows)]

    return f"{path(i)}: expected memory of its own, found that it overlaps {path(j)}"
