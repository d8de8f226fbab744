"""Averages and parameters combined: averages back into training, and BEMA."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from emajit import _kernels, _paths, _plan, _tree, functional, schedules, scope
from emajit._torch import pytree
from emajit.functional import Step

Tree = TypeVar("Tree")


def pull_(params: Tree, shadow: Any, c: float = 1.0) -> Tree:
    r"""Pull the parameters to their averages in place: $\theta \leftarrow \theta + c (s - \theta)$.

    For every k-th step of training, after the optimizer's and the shadow's update. Switch EMA
    (arXiv 2402.09240) takes $c = 1$ at the end of each epoch; Lookahead (1907.08610) goes a part of
    the way. The state of the optimizer, such as its momentum, stays as it is. Autograd notices the
    write: it refuses a backward through a forward from before.

    Precision and rounding are those of `emajit.update`, with the roles exchanged: an integer
    parameter is copied from the shadow, and a 16-bit parameter keeps its value where the pull is
    under half of its ulp. With $c = 1$ finite parameters are their averages, rounded once. One
    operator writes all float32 and float64 parameters with averages of the same dtype.

    Args:
        params: the parameters of training, a pytree such as `dict(model.named_parameters())`.
        shadow: their averages, of the same structure, shapes and devices. For some parameters only,
            choose them by `emajit.select(params)`.
        c: the share of the way to the average, in [0, 1].

    Returns `params`.

    Raises, before anything is written:
        ValueError: `c` is not in [0, 1]; structure, shape or device differ; a parameter overlaps
            the memory of another leaf; a floating-point parameter has an integer for its average.
        TypeError: a leaf is neither a tensor nor None, or `c` is no number.
        RuntimeError: a parameter is inside an `ema_scope`, where it holds an average.

    >>> params = {"w": torch.tensor([1.0], requires_grad=True)}
    >>> pull_(params, {"w": torch.tensor([0.0])}, 0.25) is params
    True
    >>> params
    {'w': tensor([0.7500], requires_grad=True)}
    """
    if not isinstance(c, (int, float)) or isinstance(c, bool):
        raise TypeError(f"c: expected a number in [0, 1], found {c!r}")
    if not 0 <= c <= 1:
        raise ValueError(f"c: expected a number in [0, 1], found {c!r}")
    leaves, spec = pytree.tree_flatten(params)
    scope.check_outside(leaf for leaf in leaves if isinstance(leaf, Tensor))
    # `detach` shares the version, by which autograd notices; `data` does not.
    bare = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    written, alphas = pytree.tree_unflatten(bare, spec), [float(c)]
    try:
        # Compilation never pays for itself: pulls are rare.
        plan, p, s = _plan.find([written], shadow, alphas, "nearest", "propagate", "eager")
    except (TypeError, ValueError) as error:
        raise _renamed(error, shadow="params", params="shadow") from None
    for i, (leaf, average) in enumerate(zip(leaves, spec.flatten_up_to(shadow), strict=True)):
        if leaf is not None and _is_averaged(leaf) and not _is_averaged(average):  # else copied
            where = _paths.path("shadow", shadow, i)
            raise ValueError(f"{where}: expected an average of {leaf.dtype}, found {average.dtype}")
    scope.prepare_to_write()
    with torch.set_grad_enabled(False):
        replace(plan, low_precision=set()).run(p, s, alphas, 0)  # no average that could stall
    return params


def bema(
    shadow: Tree,
    params: Any,
    initial: Any,
    step: Step,
    *,
    power: float = 0.2,
    lag: float = 10.0,
    multiplier: float = 1.0,
) -> Tree:
    r"""The average corrected for its lag behind training: $s + \alpha_t (\theta_t - \theta_0)$.

    BEMA (arXiv 2508.00180), $\alpha_t = (\rho + \gamma t)^{-\eta}$, with the defaults of TRL's
    `BEMACallback`. Its shadow has `decay=schedules.inverse_power()`, and both count $t$ in training
    steps: the callback updates at steps 400, 800 and so on. The result is for evaluation:
    `ema_scope(model, bema(...))`.

    BEMA is made for fine-tuning. It is ahead early and overshoots late: where training settles at
    $\theta^*$, the correction goes on to $\theta^* + \alpha_t (\theta^* - \theta_0)$, a quarter of
    the way too far at step 1000, a sixth at step 10,000. Measured on noisy quadratics (64
    curvatures from 0.01 to 1, SGD at rate 0.1, gradient noise 1, an update at each step, 400
    seeds), the losses of the trained weights, the average and BEMA are

        step 10, from 3.0: 26.3, 33.5, 20.2
        step 100, from 3.0: 3.69, 3.75, 10.3
        step 1000, from 3.0: 1.63, 1.15, 5.65
        step 10, from 0.3: 0.72, 0.59, 0.94

    where all weights start at 3, or at 0.3, at the size of the noise.

    Args:
        shadow: the average at `step`.
        params: $\theta_t$, a pytree of the same structure, shapes and devices.
        initial: $\theta_0$, the parameters before training, likewise; from `emajit.init`.
        step: $t$, the number of training steps; an int or a 0-d integer tensor.
        power: $\eta$, TRL's `bias_power`; 0 adds the whole way.
        lag: $\rho$, at least 1.
        multiplier: $\gamma$.

    Returns new tensors in the shadow's structure and dtypes. The arithmetic is in float64 if one of
    the three leaves is, else in float32. Integers are those of the shadow.

    Raises:
        ValueError: structure, shape or device differ; an argument is out of its range.
        TypeError: a leaf is neither a tensor nor None, or the step is no integer.
        RuntimeError: a parameter is inside an `ema_scope`, where it holds an average.

    >>> shadow, params, initial = ({"w": torch.tensor([x])} for x in (1.0, 2.0, 0.0))
    >>> bema(shadow, params, initial, 1014, power=0.5)
    {'w': tensor([1.0625])}
    """
    alpha: Any = schedules.inverse_power(power, lag, multiplier)
    weight = alpha.alpha(functional.checked_step(step))
    now = _tree.pair([shadow], params)
    try:
        start = _tree.pair([shadow], initial)
    except (TypeError, ValueError) as error:
        raise _renamed(error, params="initial") from None
    scope.check_outside(now.params)
    with torch.no_grad():
        rows = zip(now.shadows, now.params, start.params, strict=True)
        corrected = [_corrected(s, p, p0, weight) for s, p, p0 in rows]
        new: Tree = _tree.rebuild(shadow, corrected, now.slots)
    return new


def _corrected(s: Tensor, p: Tensor, p0: Tensor, weight: float | Tensor) -> Tensor:
    if not _is_averaged(p):
        return s.detach().clone()
    dtype = torch.promote_types(_kernels.precision(s, p), _kernels.precision(s, p0))
    if isinstance(weight, Tensor):
        weight = weight.to(s.device, dtype.to_real())
    return (s.to(dtype) + weight * (p.to(dtype) - p0.to(dtype))).to(s.dtype)


def _is_averaged(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def _renamed(error: Exception, **roles: str) -> Exception:
    """The error of an update whose arguments have other roles here; quoted names stay."""
    text = re.sub(r"'[^']*'|\w+", lambda found: roles.get(found[0], found[0]), str(error))
    return type(error)(text)
