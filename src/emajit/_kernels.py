r"""The arithmetic of an update, $s \leftarrow s + \alpha (p - s)$, on flat lists of tensors.

Nothing here knows a tree, a schedule or a compiler. There are three ways to compute leaves, each as
a pure function and, with an underscore, in place: `multi_tensor` in one operator, `single_tensor`
leaf by leaf, and `traced`, the form for `torch.compile`. `transformed` is `single_tensor` inside a
transform.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emajit import _rounding, _torch
from emajit._rounding import Keys
from emajit._shards import Region

# The end nearer to the average: whether it is the parameter, and the factor of `p - s` from there,
# `alpha - 1` from the parameter, `alpha` from the shadow.
End = tuple[bool | Tensor, float | Tensor]
Alpha = float | Tensor | End
Key = tuple[Tensor, Region | None]


class Update(NamedTuple):
    """One update, flattened: what a kernel is given.

    Shadows and params are lists of one length. The averages of one parameter follow each other,
    except for `multi_tensor_by_alpha_`: there the averages with one alpha follow each other.
    """

    shadows: list[Tensor]
    params: list[Tensor]
    # 1 - decay, one for all leaves or one for each: a Python float, or a 0-d float64 tensor that is
    # never read back. `traced` takes it as an `End`, too.
    alphas: Sequence[Alpha]
    # Whether an element whose parameter is NaN or infinite keeps its average.
    skip: bool = False
    # For stochastic rounding: the hash keys of the leaves.
    keys: Keys | None = None

    def part(self, leaves: Sequence[int]) -> Update:
        """Some of the leaves, in this order; a `range` is all of them."""
        if isinstance(leaves, range):
            return self
        alphas = self.alphas
        return Update(
            [self.shadows[i] for i in leaves],
            [self.params[i] for i in leaves],
            alphas if len(alphas) == 1 else [alphas[i] for i in leaves],
            self.skip,
            self.keys and self.keys.part(leaves),
        )

    def rows(self) -> Iterable[tuple[Tensor, Tensor, Alpha, Key | None]]:
        """Shadow, parameter, alpha and hash key of each leaf; None where it rounds to nearest."""
        n, keys = len(self.shadows), self.keys
        alphas = self.alphas if len(self.alphas) == n else [*self.alphas] * n
        each: list[Any] = [None] * n
        if keys is not None:
            rows = zip(self.shadows, keys.words.unbind(), keys.regions, strict=True)
            each = [(w, r) if s.dtype in _rounding.SUPPORTED else None for s, w, r in rows]
        return [*zip(self.shadows, self.params, alphas, each, strict=True)]


Kernel = Callable[[Update], Any]

# One operator for all leaves of these dtypes of shadow and parameter, without `skip`. Its alpha is
# a number: a tensor would launch one kernel for each leaf.
MULTI_TENSOR_DTYPES = {(dtype, dtype) for dtype in (torch.float32, torch.float64)}


def multi_tensor(u: Update) -> list[Tensor]:
    """The averages of leaves of `MULTI_TENSOR_DTYPES`."""
    alphas: Any = u.alphas[0] if len(u.alphas) == 1 else u.alphas
    return list(_torch.foreach_lerp(u.shadows, u.params, alphas))


def multi_tensor_(u: Update) -> None:
    alphas: Any = u.alphas[0] if len(u.alphas) == 1 else u.alphas
    _torch.foreach_lerp_(u.shadows, u.params, alphas)


def multi_tensor_by_alpha_(u: Update) -> None:
    """`multi_tensor_` for one alpha after the other, in one C call that Ctrl-C cannot split."""
    size = len(u.shadows) // len(u.alphas)
    shadows = [u.shadows[i : i + size] for i in range(0, len(u.shadows), size)]
    [*map(_torch.foreach_lerp_, shadows, repeat(u.params[:size]), u.alphas)]


# Leaf by leaf.


def blend(shadow: Tensor, param: Tensor, alpha: Alpha, skip: bool, key: Key | None) -> Tensor:
    """One leaf: `s + alpha (p - s)` in float32 or wider, rounded once to the shadow's dtype.

    `torch.lerp` evaluates the equation from the nearer end, as `p - (1 - alpha) (p - s)` where
    `alpha >= 1/2`: for finite numbers `alpha = 0` gives exactly `s` and `alpha = 1` exactly `p`. An
    integer or bool parameter is copied.
    """
    if not _is_averaged(param):
        return param.to(shadow.dtype, copy=True)
    dtype = precision(shadow, param)
    s, p = shadow.to(dtype), param.to(dtype)
    if key is not None:
        return _at_random(*_terms(s, p, alpha, skip), shadow.dtype, key)
    average = torch.lerp(s, p, _at(alpha, s.device, s.dtype))
    if skip:
        average = torch.where(torch.isfinite(p), average, s)
    return average.to(shadow.dtype)


def single_tensor(u: Update) -> list[Tensor]:
    """The average of each leaf."""
    return [blend(s, p, alpha, u.skip, key) for s, p, alpha, key in u.rows()]


def single_tensor_(u: Update) -> None:
    """`single_tensor` in place, with half the temporaries for a shadow that needs no rounding."""
    at = cache(_at)
    for s, p, alpha, key in u.rows():
        if p.is_floating_point() and s.dtype == precision(s, p) and not u.skip:
            s.lerp_(p.to(s.dtype), at(alpha, s.device, s.dtype))
        else:
            s.copy_(blend(s, p, alpha, u.skip, key))


def transformed(u: Update) -> list[Tensor]:
    """`single_tensor` of detached leaves: in a transform `no_grad` lets tangents through."""
    shadows, params = ([t.detach() for t in tensors] for tensors in (u.shadows, u.params))
    return single_tensor(u._replace(shadows=shadows, params=params))


def transformed_(u: Update) -> None:
    """`transformed` in place: `lerp_` has no batching rule."""
    for s, average in zip(u.shadows, transformed(u), strict=True):
        s.copy_(average)


# In multi-tensor operators: Inductor fuses them into one kernel on a device with Triton.


def traced(u: Update) -> list[Tensor]:
    """The averages, in the form to compile and to trace."""
    news: list[Any] = [None] * len(u.shadows)
    for leaves, group in _groups(u):
        olds, bases, steps = _increments(group)
        averages = _torch.foreach_add(bases, steps)
        if any(a is not s for a, s in zip(olds, group.shadows, strict=True)):
            rounded = _rounded(group, averages, bases, steps)
            averages = [torch.empty_like(s) for s in group.shadows]
            _torch.foreach_copy_(averages, rounded)  # in one operator, too
        for i, average in zip(leaves, averages, strict=True):
            news[i] = average
    for i, (s, p) in enumerate(zip(u.shadows, u.params, strict=True)):
        if news[i] is None:
            news[i] = p.to(s.dtype, copy=True)
    return news


def traced_(u: Update) -> None:
    """`traced` in place."""
    for _, group in _groups(u):
        olds, bases, steps = _increments(group)
        if all(a is b is s for a, b, s in zip(olds, bases, group.shadows, strict=True)):
            _torch.foreach_add_([*map(_view, olds)], [*map(_view, steps)])
            continue
        rounded = _rounded(group, _torch.foreach_add(bases, steps), bases, steps)
        _torch.foreach_copy_([*map(_view, group.shadows)], [*map(_view, rounded)])
    for s, p in zip(u.shadows, u.params, strict=True):
        if not _is_averaged(p):
            s.copy_(p)


def _view(tensor: Tensor) -> Tensor:
    """A view of a 0-d tensor: torch.compile loses a write to one in float64 (2.11 to 2.13)."""
    return tensor.view(1) if tensor.ndim == 0 else tensor


def _groups(u: Update) -> Iterable[tuple[list[int], Update]]:
    """The leaves grouped by arithmetic precision, without integer and bool leaves."""
    groups: dict[torch.dtype, list[int]] = {}
    for i, (s, p) in enumerate(zip(u.shadows, u.params, strict=True)):
        if _is_averaged(p):
            groups.setdefault(precision(s, p), []).append(i)
    everything = [*range(len(u.shadows))]
    for leaves in groups.values():
        yield leaves, u if leaves == everything else u.part(leaves)


def _increments(u: Update) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The shadows in the arithmetic precision, and the two terms of each average.

    `s + alpha (p - s)` from the nearer end, as `torch.lerp` does: `p + (alpha - 1) (p - s)` where
    `alpha >= 1/2`.
    """
    dtype = precision(u.shadows[0], u.params[0])
    olds = [s if s.dtype == dtype else s.to(dtype) for s in u.shadows]
    # Operators promote 16-bit dtypes to the shadow's precision, but not 8-bit dtypes.
    params = [p if p.dtype.itemsize > 1 else p.to(dtype) for p in u.params]
    differences = _torch.foreach_sub(params, olds)
    if u.skip:
        both = zip(params, differences, strict=True)
        differences = [torch.where(torch.isfinite(p), d, 0) for p, d in both]
    real = dtype.to_real() if dtype.is_complex else dtype
    ends = [_nearer_end(alpha, olds[0].device, real) for alpha in u.alphas]
    if len(ends) == 1:
        factor: Any = ends[0][1]
        at_params = [ends[0][0]] * len(olds)
    else:
        factor, at_params = _alike([f for _, f in ends], olds[0].device, real), [a for a, _ in ends]
    rows = zip(at_params, olds, params, strict=True)
    bases = [_base(at_param, old, p, u.skip) for at_param, old, p in rows]
    return olds, bases, _torch.foreach_mul(differences, factor)


def _base(at_param: bool | Tensor, old: Tensor, param: Tensor, skip: bool) -> Tensor:
    """The nearer end; the shadow where the parameter is skipped."""
    if at_param is False:
        return old
    if skip:
        finite = torch.isfinite(param)
        return torch.where(finite if at_param is True else finite & at_param, param, old)
    return param if at_param is True else torch.where(at_param, param, old)


def _alike(factors: list[Any], device: torch.device, dtype: torch.dtype) -> list[Any]:
    """The factors as they are if all are numbers, else all as tensors."""
    if not any(isinstance(factor, Tensor) for factor in factors):
        return factors
    return [
        f if isinstance(f, Tensor) else torch.full((), f, dtype=dtype, device=device)
        for f in factors
    ]


def _nearer_end(alpha: Any, device: torch.device, dtype: torch.dtype) -> End:
    """The end, with its factor on the leaves' device and in the dtype of their arithmetic."""
    if isinstance(alpha, tuple):
        at_param, factor = alpha
        return at_param, factor.to(device, dtype)
    if isinstance(alpha, Tensor):
        alpha = alpha.to(device)
        at_param = alpha >= 0.5
        return at_param, torch.where(at_param, alpha - 1.0, alpha).to(dtype)
    return (True, alpha - 1.0) if alpha >= 0.5 else (False, alpha)


def _is_averaged(param: Tensor) -> bool:
    return param.is_floating_point() or param.is_complex()


def _terms(s: Tensor, p: Tensor, alpha: Alpha, skip: bool) -> tuple[Tensor, Tensor]:
    """The base and the step of one average, as in `_increments`."""
    at_param, factor = _nearer_end(alpha, s.device, s.dtype.to_real())
    difference = p - s
    if skip:
        difference = torch.where(torch.isfinite(p), difference, 0)
    return _base(at_param, s, p, skip), difference * factor


def _rounded(
    u: Update, averages: list[Tensor], bases: list[Tensor], steps: list[Tensor]
) -> list[Tensor]:
    """The averages rounded to their shadows' dtypes, to nearest or at random."""
    rows = zip(averages, bases, steps, u.rows(), strict=True)
    return [
        average.to(s.dtype) if key is None else _at_random(base, step, s.dtype, key)
        for average, base, step, (s, _, _, key) in rows
    ]


def _at_random(base: Tensor, step: Tensor, dtype: torch.dtype, key: Key) -> Tensor:
    words, region = key
    return _rounding.stochastic(base.to(step.dtype), step, dtype, words.to(step.device), region)


def _at(alpha: Alpha, device: torch.device, dtype: torch.dtype) -> Any:
    return alpha.to(device, dtype) if isinstance(alpha, Tensor) else alpha


def precision(shadow: Tensor, param: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float32 or complex64, or float64 or complex128 if a leaf is."""
    wide = [
        dtype if dtype.itemsize >= 4 else torch.float32 for dtype in (shadow.dtype, param.dtype)
    ]
    dtype = torch.promote_types(*wide)
    return torch.promote_types(dtype, torch.complex64) if dtype.is_complex else dtype
