"""Find how the leaves of an update are computed: one cache, one function that fills it.

`find` is the only way into an update: it checks the trees, and `_choose` chooses a kernel for each
leaf. The plan of an update in place is cached if the trees are flat dicts or lists; the next update
of the same memory is a cache hit.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emajit import _choose, _kernels, _paths, _rounding, _shards, _torch, _tree, _warn
from emajit._choose import Group
from emajit._kernels import Alpha, Update
from emajit._paths import PyTree
from emajit._rounding import Keys
from emajit._torch import pytree
from emajit._tree import Leaves, Pairs

MOST_PLANS = 64  # in the cache

# Recognised by identity; the range is not read.
_BY_ALPHA: list[Group] = [(range(0), _kernels.multi_tensor_by_alpha_)]


@dataclass(slots=True)
class Plan:
    """How the leaves of one update are computed. It keeps no tensor of the trees alive."""

    groups: list[Group]
    slots: Sequence[int | None]
    skip: bool
    # For stochastic rounding, the hash keys of the paths, without the step.
    keys: Keys | None
    # The dtypes of averages rounded to nearest in less than float32, with the indices of alphas.
    low_precision: set[tuple[torch.dtype, int]]
    # How many averages each parameter has.
    several: int
    # In the cache: the check of the forms of all leaves, from `_torch.forms`, and the first leaf of
    # each pair if leaves are tied.
    fits: Any = None
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
    each = len(shadows) // several
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
    with derivatives (`through`), check everything but the memory of the leaves; a trace of
    `torch.compile` does not check the backend either.

    Raises ValueError and TypeError as `emajit.update_` says, before anything is written.
    """
    given = rounding, nonfinite, backend
    is_traced = through or torch.compiler.is_compiling() or _torch.in_transform()
    flat = None if is_traced else _tree.flatten(shadows, params)
    kept = flat if in_place and same_device else None  # the leaves whose plan is cached
    if kept is not None:
        kinds = type(alphas[0]) if len(alphas) == 1 else tuple(map(type, alphas))
        names = None
        if rounding == "stochastic":  # the noise is a hash of the names
            names = tuple([tuple(s) if type(s) is dict else None for s in shadows])
        options = given, kinds, names
        key, found = _look_up(kept, options)
        if found is not None:
            return found
    pairs = None if flat is None else _tree.pair_plain(flat, len(shadows))
    if kept is not None and pairs is None and (shards := _shards.opened(*kept)) is not None:
        placed, kept = shards
        key, found = _look_up(kept, (*options, placed))
        if found is not None:
            return found
    found = _made(
        shadows,
        params,
        pairs,
        alphas,
        given,
        in_place=in_place,
        same_device=same_device,
        is_traced=is_traced,
        through=through,
    )
    if kept is not None and key is not None and not _torch.dispatch_modes():  # whose keys are fake
        plan = found[0]
        plan.fits = _torch.forms(kept[0] + kept[1])
        plan.firsts = None if isinstance(plan.slots, range) else _tree.firsts(plan.slots)
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
    return found


def _look_up(flat: Leaves, options: Hashable) -> tuple[Hashable, Found | None]:
    """The cache key of these leaves, and the plan for them if their forms are unchanged."""
    shadows, params = flat
    leaves = shadows + params
    try:
        key = tuple(map(Tensor.data_ptr, leaves)), options
    except (TypeError, RuntimeError):  # None, or a leaf without memory of its own
        return None, None
    plan = _plans.get(key)
    if plan is None or not plan.fits(*leaves):
        return key, None
    if plan.several > 1:
        params = params * plan.several
    if plan.firsts is not None:
        shadows, params = [shadows[i] for i in plan.firsts], [params[i] for i in plan.firsts]
    return key, (plan, shadows, params)


def _made(
    shadows: Sequence[PyTree],
    params: PyTree,
    pairs: Pairs | None,
    alphas: Sequence[Alpha],
    given: tuple[str, str, str],
    *,
    in_place: bool,
    same_device: bool,
    is_traced: bool,
    through: bool,
) -> Found:
    """A new plan; everything is checked first, as `find` says."""
    rounding, nonfinite, backend = given
    if torch.compiler.is_compiling():
        backend = "auto"  # Dynamo cannot trace the list of backends
    _choose.check_options(rounding=rounding, nonfinite=nonfinite, backend=backend)
    if through:
        _choose.check_differentiable(rounding, shadows)
    if pairs is None:
        pairs = _tree.pair(shadows, params, same_device=same_device)
    if in_place:
        _tree.check_writable(pairs, shadows)
    several, skip = len(shadows), nonfinite == "skip"
    keys = _keys(shadows, pairs) if rounding == "stochastic" else None
    update = Update(pairs.shadows, pairs.params, alphas, skip, keys)
    if several > 1:
        update = _interleaved(several, *update)
    if is_traced:
        kernel = _choose.kernel_of_a_trace(in_place=in_place, through=through)
        groups: list[Group] = [(range(len(pairs.shadows)), kernel)]
    else:
        groups = _choose.groups(update, backend, in_place=in_place)
    if several > 1 and _choose.is_by_alpha(groups, update, several):
        groups = _BY_ALPHA
    low_precision: set[tuple[torch.dtype, int]] = set()
    is_rounded = keys is None and not is_traced
    if is_rounded and not _warn.NARROW.isdisjoint([s.dtype for s in pairs.shadows]):
        each = len(pairs.shadows) // several
        low_precision = {
            (s.dtype, i // each)
            for i, s in enumerate(pairs.shadows)
            if s.dtype in _warn.NARROW and pairs.params[i].is_floating_point()
        }
    plan = Plan(groups, pairs.slots, skip, keys, low_precision, several)
    return plan, pairs.shadows, pairs.params


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
