"""Find how the leaves of an update are computed: one cache, one function that fills it.

`find` is the only way into an update: it checks the trees, and `_choose` chooses a kernel for each
leaf. The plan of an update in place is cached if the trees are flat dicts or lists; the next update
of the same memory is a cache hit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from emajit import _choose, _kernels, _paths, _rounding, _shards, _torch, _tree, _warn
from emajit._choose import Group
from emajit._kernels import Alpha, Kernel, Update
from emajit._paths import PyTree
from emajit._rounding import Keys
from emajit._torch import pytree
from emajit._tree import Leaves, Pairs

MOST_PLANS = 64  # in the cache

_BY_ALPHA: list[Group] = [(range(0), _kernels.multi_tensor_by_alpha_)]

Options = tuple[Any, ...]  # of `find`


@dataclass(slots=True)
class Plan:
    """How the leaves of one update are computed. It keeps no tensor of the trees alive."""

    groups: list[Group]
    slots: Sequence[int | None]
    skip: bool
    # For stochastic rounding, the hash keys of the paths, without the step.
    keys: Keys | None
    # The dtypes of averages rounded to nearest in less than float32, each with the index of its
    # alpha.
    low_precision: list[tuple[torch.dtype, int]]
    # How many averages each parameter has.
    several: int
    # For a cache hit: the indices of the distinct leaves (None if all are distinct), the pairs of
    # indices of one object, the check of shapes, strides, dtypes and devices, and the first leaf of
    # each pair if leaves are tied.
    unique: list[int] | None = None
    duplicates: Sequence[tuple[int, int]] = ()
    fits: Callable[..., bool] | None = None
    firsts: list[int] | None = None

    def run(
        self, shadows: list[Tensor], params: list[Tensor], alphas: Sequence[Alpha], step: Any
    ) -> Any:
        """Compute the averages: in place, or as a list in the order of the pairs."""
        if self.groups is _BY_ALPHA:
            return self.groups[0][1](Update(shadows, params, alphas))
        update = self.update(shadows, params, alphas, step)
        if len(self.groups) == 1 and isinstance(self.groups[0][0], range):
            news = self.groups[0][1](update)
        else:
            news = {}
            for leaves, kernel in self.groups:
                averages = kernel(update.part(leaves))
                if averages is not None:
                    news.update(zip(leaves, averages, strict=True))
            news = [news[i] for i in range(len(news))]
        return _tree.deinterleave(news, self.several) if news else news

    def update(
        self, shadows: list[Tensor], params: list[Tensor], alphas: Sequence[Alpha], step: Any
    ) -> Update:
        """The arguments of the kernels; warns of averages that stall."""
        for dtype, i in self.low_precision:
            _warn.warn_of_stall(dtype, alphas[i])
        keys = self.keys.at(step) if self.keys is not None else None
        if self.several > 1:
            return _interleaved(self.several, shadows, params, alphas, self.skip, keys)
        return Update(shadows, params, alphas, self.skip, keys)

    def rebuild(
        self, shadows: Sequence[PyTree], olds: list[Tensor], averages: list[Tensor]
    ) -> list[PyTree]:
        """The trees of the shadows, with averages in the order of the pairs, laid out as `olds`."""
        averages = [*map(_laid_out_as, olds, averages)]
        size = len(self.slots) // max(1, len(shadows))
        each = [self.slots[i * size : (i + 1) * size] for i in range(len(shadows))]
        return [_tree.rebuild(t, averages, own) for t, own in zip(shadows, each, strict=True)]


Found = tuple[Plan, list[Tensor], list[Tensor]]  # the lists are the leaves of this update


def _interleaved(
    several: int, shadows: list[Tensor], params: list[Tensor], alphas: Sequence[Alpha], *rest: Any
) -> Update:
    """An update in which the averages of a parameter follow each other."""
    each = len(shadows) // max(1, several)
    shadows, params = (_tree.interleave(leaves, several) for leaves in (shadows, params))
    return Update(shadows, params, [*alphas] * each, *rest)


def _laid_out_as(shadow: Tensor, average: Tensor) -> Tensor:
    """The average with the strides of `empty_like(shadow)`: the shadow's own, if it is dense.

    Where strides differ, Inductor's result has the parameter's. A trace keeps them.
    """
    if average.stride() == shadow.stride() or torch.compiler.is_compiling():
        return average
    laid_out = torch.empty_like(shadow)
    return average if average.stride() == laid_out.stride() else laid_out.copy_(average)


_plans: dict[Hashable, Plan] = {}


def find(
    shadows: Sequence[PyTree],
    params: PyTree,
    alphas: Sequence[Alpha],
    rounding: str,
    nonfinite: str,
    backend: str,
    *,
    in_place: bool = True,
    same_device: bool = True,
    through: bool = False,
) -> Found:
    """The plan for an update of these shadows, each with its alpha, and the leaves in its order.

    The cache key holds the addresses of all leaves of shadows and params, the options, the types
    of the alphas, with stochastic rounding the names of the leaves, and the placements of
    DTensors. A hit also needs the shape, the strides, the dtype and the device of each leaf to be
    unchanged. A miss and an update that is not in place check everything. A trace, and an update
    with derivatives (`through`), check everything but the memory of the leaves and the backend.

    Raises ValueError and TypeError as `emajit.update_` says, before anything is written.
    """
    given = rounding, nonfinite, backend
    if torch.compiler.is_compiling() or through or _torch.in_transform():
        return _traced(shadows, params, given, in_place, through, same_device)
    flat = _tree.flatten(shadows, params)
    if flat is None or not in_place or not same_device:
        return _made(shadows, params, flat, alphas, given, in_place, same_device)
    kinds = type(alphas[0]) if len(alphas) == 1 else tuple(map(type, alphas))
    names = None
    if rounding == "stochastic":  # the noise is a hash of the names
        names = tuple([tuple(s) if type(s) is dict else None for s in shadows])
    options: tuple[Any, ...] = given, kinds, names
    leaves = flat[0] + flat[1]
    addresses = _addresses(leaves)
    found = _hit((addresses, options), leaves, flat)
    if found is None and (shards := _shards.opened(*flat)) is not None:
        placed, flat = shards
        leaves = flat[0] + flat[1]
        addresses, options = _addresses(leaves), (*options, placed)
        found = _hit((addresses, options), leaves, flat)
    if found is None:
        found = _made(shadows, params, flat, alphas, given, in_place=True)
        if addresses is not None and not _torch.in_dispatch_mode():
            if len(_plans) >= MOST_PLANS:
                _plans.clear()
            _plans[addresses, options] = _remembered(found[0], leaves)
    return found


def _addresses(leaves: list[Any]) -> tuple[int, ...] | None:
    try:
        return tuple(map(Tensor.data_ptr, leaves))
    except (TypeError, RuntimeError):  # None, or a leaf without memory of its own
        return None


def _hit(key: Hashable, leaves: list[Any], flat: Leaves) -> Found | None:
    """The cached plan for the leaves at these addresses, if their forms are unchanged."""
    if (plan := _plans.get(key)) is None or plan.fits is None:
        return None
    shadows, params = flat
    if plan.unique is not None:  # each duplicate must still be its first object
        if any(leaves[i] is not leaves[j] for i, j in plan.duplicates):
            return None
        leaves = [leaves[i] for i in plan.unique]
    if not plan.fits(*leaves):
        return None
    if plan.several > 1:
        params = params * plan.several
    if plan.firsts is not None:
        shadows, params = [shadows[i] for i in plan.firsts], [params[i] for i in plan.firsts]
    return plan, shadows, params


def _remembered(plan: Plan, leaves: list[Any]) -> Plan:
    """The plan, completed by the checks for a later cache hit."""
    places: dict[int, int] = {}
    duplicates = [
        (i, j) for i, leaf in enumerate(leaves) if (j := places.setdefault(id(leaf), i)) < i
    ]
    unique = [*places.values()]
    firsts = None if isinstance(plan.slots, range) else _tree.firsts(plan.slots)
    return replace(
        plan,
        unique=unique if duplicates else None,
        duplicates=duplicates,
        fits=_torch.forms([leaves[i] for i in unique]),
        firsts=firsts,
    )


def _made(
    shadows: Sequence[PyTree],
    params: PyTree,
    flat: Leaves | None,
    alphas: Sequence[Alpha],
    options: Options,
    in_place: bool,
    same_device: bool = True,
) -> Found:
    """A new plan, after everything has been checked."""
    rounding, nonfinite, backend = options
    _choose.check_options(rounding=rounding, nonfinite=nonfinite, backend=backend)
    if _torch.in_dispatch_mode():
        backend = "eager"
    pairs = _tree.pair(shadows, params, flat, same_device=same_device)
    if in_place:
        _tree.check_averages(shadows)
        _tree.check_writable(pairs, shadows)
    several, skip = len(shadows), nonfinite == "skip"
    keys = _keys(shadows, pairs) if rounding == "stochastic" else None
    update = Update(pairs.shadows, pairs.params, alphas, skip, keys)
    if several != 1:
        update = _interleaved(several, *update)
    groups = _choose.groups(update, backend, in_place=in_place)
    if several > 1 and _choose.is_by_alpha(groups, update, several):
        groups = _BY_ALPHA
    low = _low_precision(pairs, several) if keys is None else []
    return Plan(groups, pairs.slots, skip, keys, low, several), *pairs[:2]


def _low_precision(pairs: Pairs, several: int) -> list[tuple[torch.dtype, int]]:
    """The dtypes in which averages may stall, each with the index of its alpha."""
    if _warn.NARROW.isdisjoint([s.dtype for s in pairs.shadows]):
        return []
    each = max(1, len(pairs.shadows) // max(1, several))
    rows = enumerate(zip(pairs.shadows, pairs.params, strict=True))
    found = {(s.dtype, i // each) for i, (s, p) in rows if p.is_floating_point()}
    return [(dtype, i) for dtype, i in found if dtype in _warn.NARROW]


def _traced(
    shadows: Sequence[PyTree],
    params: PyTree,
    options: Options,
    in_place: bool,
    through: bool,
    same_device: bool,
) -> Found:
    """A plan of one group, for the user's own trace or transform; derivatives may go through."""
    rounding, nonfinite, _ = options
    _choose.check_options(rounding=rounding, nonfinite=nonfinite)
    pairs = _tree.pair(shadows, params, None, same_device=same_device)
    if in_place and not _torch.in_transform():
        _tree.check_averages(shadows)
    if through:
        _choose.check_differentiable(rounding, shadows)
    keys = _keys(shadows, pairs) if rounding == "stochastic" else None
    if through or _torch.in_transform():  # the multi-tensor operators have no batching rule
        kernel: Kernel = _kernels.transformed_ if in_place else _kernels.single_tensor
    else:
        kernel = _kernels.traced_ if in_place else _kernels.traced
    everything = range(len(pairs.shadows))
    plan = Plan([(everything, kernel)], pairs.slots, nonfinite == "skip", keys, [], len(shadows))
    olds = pairs.shadows if in_place or through else [s.detach() for s in pairs.shadows]
    return plan, olds, pairs.params if through else [p.detach() for p in pairs.params]


def _keys(shadows: Sequence[PyTree], pairs: Pairs) -> Keys:
    """The hash keys of the pairs, in the order of the kernels."""
    firsts = _tree.firsts(pairs.slots)
    places = _tree.interleave(firsts, len(shadows))
    paths: list[str] = []
    regions: list[Any] = []
    for i, shadow in enumerate(shadows):
        prefix = "" if len(shadows) == 1 else f"[{i}]"
        paths += [prefix + path for path in _paths.paths(shadow)]
        regions += [_shards.region(leaf) for leaf in pytree.tree_leaves(shadow)]
    for leaf, s in zip(firsts, pairs.shadows, strict=True):
        if s.dtype.itemsize < 2 and s.is_floating_point():
            raise ValueError(
                f"shadow{paths[leaf]}: expected bfloat16, float16 or wider for "
                f"rounding='stochastic', found {s.dtype}"
            )
    device = pairs.shadows[0].device if pairs.shadows else torch.device("cpu")
    return _rounding.of_paths([paths[i] for i in places], [regions[i] for i in places], device)
