r"""The average as a pure function of (shadow, params, step), and its in-place twin.

$s \leftarrow s + \alpha (p - s)$ with $\alpha = 1 - \beta(t)$, for each leaf $s$ of the shadow and
$p$ of the parameters.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from emajit import _choose, _devices, _plan, _torch, _tree, scope
from emajit._kernels import Alpha

Step = int | Tensor
Decay = float | Tensor
Schedule = Callable[[Step], Decay]
Tree = TypeVar("Tree")
Rounding = Literal["nearest", "stochastic"]
Nonfinite = Literal["propagate", "skip"]


@overload
def init(
    params: dict[str, nn.Parameter], *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]: ...
@overload
def init(params: Tree, *, dtype: torch.dtype | None = None) -> Tree: ...
def init(params: Any, *, dtype: torch.dtype | None = None) -> Any:
    """The first shadow of `params`: a detached copy of each leaf, in the same structure.

    Args:
        params: a pytree whose leaves are tensors or None: a dict of named parameters, a
            `state_dict()`, nested tuples, a registered dataclass.
        dtype: the dtype of the floating-point leaves (complex leaves take its complex partner).
            Default: that of each parameter. Use float32 for 16-bit parameters: increments near
            decay 1 are too small for them.

    Leaves that are tied in `params` are tied in the shadow. Strides of dense leaves are kept.

    Raises:
        TypeError: a leaf is neither a tensor nor None.
        ValueError: `dtype` is not a real floating-point dtype.
    """
    _tree.check_dtype(dtype)
    with torch.no_grad():
        return _tree.copy(params, dtype)


def update(
    shadow: Tree,
    params: Any,
    step: Step,
    *,
    decay: Decay | Schedule,
    rounding: Rounding = "nearest",
    nonfinite: Nonfinite = "propagate",
    backend: str = "auto",
    differentiable: bool = False,
) -> Tree:
    r"""The shadow after one more step, in new tensors: $s + \alpha (p - s)$.

    Alpha is $1 - \beta(t)$, computed in float64. The result is finite where $p - s$ is. The
    arithmetic is in float64 if the shadow's or the parameter's leaf is, else in float32; the result
    is rounded once, to the shadow's dtype. An integer or bool parameter is copied, None stays None,
    and tied leaves of the shadow are averaged once and stay tied. The result requires no grad and
    has no tangent unless the update is `differentiable`.

    Args:
        shadow: the averages so far, from `init` or an earlier update.
        params: the parameters, a pytree of the same structure, shapes and devices, such as
            `dict(model.named_parameters())`. The dtypes may differ: a float32 shadow of bfloat16
            parameters is the normal case.
        step: how many updates the shadow has already taken, 0 on the first call. An int, or a 0-d
            integer tensor; a tensor on a GPU is never read back to the host. Within your own
            `torch.compile` give a tensor: an int recompiles as it grows.
        decay: $\beta$, the decay rate: the share of the old shadow that is kept, in [0, 1]. A
            float, a 0-d tensor, or a schedule, `step -> decay` (see `emajit.schedules`).
        rounding: how bfloat16 and float16 shadows round. To "nearest" they stall: near decay 1
            almost every increment is under half an ulp and rounds away; one warning says so at the
            first decay above 0.9, unless alpha is a tensor on a device or the call is traced.
            "stochastic" goes to either neighbour at random, so that the mean is right, also where
            a float32 shadow stalls; a single element has noise of a few ulps.
            The noise is a hash of the step, the path of the leaf in `shadow` and the index of the
            element: the same call gives the same bits. Number the steps, and use no number twice.
            Within `torch.func.vmap` (torch 2.13) the examples share their noise.
        nonfinite: "propagate" does the arithmetic as written: a NaN or an infinity, such as in a
            mask among the buffers of a `state_dict()`, stays or becomes NaN. With "skip" an element
            whose parameter is NaN or infinite keeps its old average.
        backend: "eager" is multi-tensor, one `torch._foreach` operator, for the leaves that need
            no temporary, and single-tensor for the others; "inductor" (or the name of another
            `torch.compile` backend) compiles all leaves that a graph can have; "auto" takes the
            faster way for each leaf, and compiles nothing for decays of 1/2 and below, where a
            warm-up begins. After a compilation has failed it warns, and tries no other on devices
            of this type. Inside your own `torch.compile` the call is traced, whatever the backend.
        differentiable: as in `torch.optim`. False cuts gradients and tangents. With True both go
            through the formula to the shadow and the params but not the decay, single-tensor for
            any `backend`; "stochastic" rounding and DTensors are refused.

    Raises:
        ValueError: structure, shape or device differ, or the shadow's dtype cannot hold the
            parameter's kind of number (the message has the path); decay or step is out of range
            (values of tensors on a device, and of a tensor step anywhere, are not checked) or a
            tensor of another shape or kind of number; an unknown option.
        TypeError: a leaf is neither a tensor nor None, the step is neither an integer nor a tensor,
            or the decay is no number, tensor or schedule.
        RuntimeError: a parameter is inside an `ema_scope`, where it holds an average.

    >>> shadow = {"w": torch.tensor([0.0])}
    >>> update(shadow, {"w": torch.tensor([1.0])}, 0, decay=0.75)
    {'w': tensor([0.2500])}
    """
    alphas = [_alpha(decay, step)]
    given = rounding, nonfinite, backend
    new: Tree = _pure([shadow], params, alphas, step, given, differentiable)[0]
    return new


def update_(
    shadow: Tree,
    params: Any,
    step: Step,
    *,
    decay: Decay | Schedule,
    rounding: Rounding = "nearest",
    nonfinite: Nonfinite = "propagate",
    backend: str = "auto",
) -> Tree:
    """`update` written into the shadow's own memory; returns `shadow`.

    The results are those of `update`. Everything is checked before the first leaf is written. One
    operator then writes all float32 and float64 leaves with parameters of the same dtype, and one
    compiled graph writes a compiled group (on the CPU several graphs with stochastic rounding or
    from 2**23 elements on). An interrupt between two operators or graphs, or between two leaves of
    any other dtype in eager mode, can leave some leaves updated; without "auto" so can a graph
    that fails to compile after others have run.

    Raises:
        ValueError: as `update`; also where a leaf of the shadow requires grad (perhaps the params
            were given first), or overlaps the memory of another leaf, of a parameter, or its own. A
            trace does not see memory: inside it overlap is not checked, and leaves are tied only if
            they are one object.
        TypeError, RuntimeError: as `update`.

    >>> shadow = {"w": torch.tensor([0.0])}
    >>> update_(shadow, {"w": torch.tensor([1.0])}, 0, decay=0.75) is shadow
    True
    >>> shadow
    {'w': tensor([0.2500])}
    """
    alphas = [_alpha(decay, step)]
    plan, s, p = _plan.find([shadow], params, alphas, rounding, nonfinite, backend)
    scope.check_outside(p)
    with torch.set_grad_enabled(False):  # half a microsecond less than `no_grad`
        plan.run(s, p, alphas, step)
    return shadow


def update_many(
    shadows: Sequence[Tree],
    params: Any,
    step: Step,
    *,
    decays: Sequence[Decay | Schedule],
    rounding: Rounding = "nearest",
    nonfinite: Nonfinite = "propagate",
    backend: str = "auto",
    differentiable: bool = False,
) -> list[Tree]:
    """`update` of several shadows of the same params, each with its own decay, in one pass.

    Args:
        shadows: as many as `decays`, of one structure; no two share a tensor.
        decays: a decay or a schedule for each shadow.
        params: as in `update`.
        step: as in `update`.
        rounding: as in `update`. The path of a leaf, which is hashed for the noise, begins with the
            index of its shadow.
        nonfinite: as in `update`.
        backend: as in `update`.
        differentiable: as in `update`.

    Raises:
        ValueError: as `update`; also where the numbers of shadows and decays differ, two shadows
            share a tensor, or are not tied alike.
        TypeError, RuntimeError: as `update`.

    >>> shadows = [{"w": torch.tensor([0.0])}, {"w": torch.tensor([0.0])}]
    >>> update_many(shadows, {"w": torch.tensor([1.0])}, 0, decays=[0.5, 0.75])
    [{'w': tensor([0.5000])}, {'w': tensor([0.2500])}]
    """
    alphas = alphas_of(shadows, decays, step)
    return _pure(shadows, params, alphas, step, (rounding, nonfinite, backend), differentiable)


def update_many_(
    shadows: Sequence[Tree],
    params: Any,
    step: Step,
    *,
    decays: Sequence[Decay | Schedule],
    rounding: Rounding = "nearest",
    nonfinite: Nonfinite = "propagate",
    backend: str = "auto",
) -> Sequence[Tree]:
    """`update_many` written into the shadows' own memory; returns `shadows`. Raises as `update_`.

    >>> shadows = [{"w": torch.tensor([0.0])}, {"w": torch.tensor([0.0])}]
    >>> update_many_(shadows, {"w": torch.tensor([1.0])}, 0, decays=[0.5, 0.75]) is shadows
    True
    >>> shadows
    [{'w': tensor([0.5000])}, {'w': tensor([0.2500])}]
    """
    alphas = alphas_of(shadows, decays, step)
    plan, s, p = _plan.find(shadows, params, alphas, rounding, nonfinite, backend)
    scope.check_outside(p)
    with torch.set_grad_enabled(False):
        plan.run(s, p, alphas, step)
    return shadows


def _pure(
    shadows: Sequence[Any],
    params: Any,
    alphas: Sequence[Alpha],
    step: Step,
    given: tuple[str, str, str],
    differentiable: bool,
) -> list[Any]:
    """The new trees."""
    plan, s, p = _plan.find(shadows, params, alphas, *given, in_place=False, through=differentiable)
    scope.check_outside(p)
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        return plan.rebuild(shadows, s, plan.run(s, p, alphas, step))


def alphas_of(
    shadows: Sequence[Any], decays: Sequence[Decay | Schedule], step: Step
) -> list[Alpha]:
    """The alpha of each of several shadows."""
    for name, found in (("shadows", shadows), ("decays", decays)):
        if not isinstance(found, (list, tuple)):
            raise TypeError(f"{name}: expected a list, found {type(found).__qualname__}")
    if len(shadows) != len(decays):
        raise ValueError(f"shadows: expected {len(decays)}, as decays, found {len(shadows)}")
    return [_alpha(decay, step) for decay in decays]


_NUMBERS = Real, torch.SymFloat, torch.SymInt


def _alpha(decay: Decay | Schedule, step: Step) -> float | Tensor:
    """`1 - decay(step)` in float64: in float32, 1 - 0.9999 is off by 1.7e-4 of itself."""
    if type(step) is not int or step < 0:
        step = checked_step(step)
        if isinstance(step, Tensor) and hasattr(decay, "alpha") and _devices.is_narrow(step.device):
            return decay.alpha(step)  # type: ignore[no-any-return]
        step = _devices.argument(decay, step)
    beta = _choose.checked_schedule("decay", decay)(step) if callable(decay) else decay
    if type(beta) is float and 0.0 <= beta <= 1.0:
        return 1.0 - beta
    if isinstance(beta, Tensor):
        if beta.ndim != 0 or not beta.is_floating_point():
            found = f"shape {tuple(beta.shape)} and {beta.dtype}"
            raise ValueError(f"decay: expected a 0-d floating-point tensor, found {found}")
        if beta.device.type != "cpu" or torch.compiler.is_compiling() or _torch.in_transform():
            return 1.0 - beta.detach().to(_devices.widest(beta.device))
        beta = float(beta.detach())  # in host memory, so nothing waits for it
    if not isinstance(beta, _NUMBERS) or isinstance(beta, bool):
        found = getattr(beta, "__qualname__", type(beta).__qualname__)
        raise TypeError(f"decay: expected a number, a 0-d tensor or a schedule, found {found}")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"decay: expected a number in [0, 1], found {beta} at step {step}")
    return 1.0 - float(beta)


def checked_step(step: Step) -> Step:
    """The step; a NumPy integer, whose products may overflow, becomes an int."""
    if isinstance(step, Tensor):
        integer = not (step.is_floating_point() or step.is_complex() or step.dtype == torch.bool)
        if step.ndim != 0 or not integer:
            found = f"shape {tuple(step.shape)} and {step.dtype}"
            raise ValueError(f"step: expected an int or a 0-d integer tensor, found {found}")
        return step
    if not isinstance(step, (int, torch.SymInt)) or isinstance(step, bool):
        if not hasattr(step, "__index__") or isinstance(step, bool):
            raise TypeError(f"step: expected an int or a 0-d integer tensor, found {step!r}")
        step = operator.index(step)
    if step < 0:
        raise ValueError(f"step: expected the number of updates so far, >= 0, found {step}")
    return step


def check_decay(decay: Any) -> None:
    """Raise ValueError or TypeError for an invalid decay, or a schedule invalid at step 0."""
    _alpha(decay, 0)
