r"""Schedules: the decay as a function of the step.

An average with a high decay is smooth, but remembers the first steps for long. A schedule makes the
decay lower at first, or lets the average lengthen with the run:

>>> import torch
>>> import emajit
>>> from emajit import schedules
>>> params = {"w": torch.ones(1)}
>>> shadow = emajit.init(params)
>>> for step in range(3):
...     _ = emajit.update_(shadow, params, step, decay=schedules.warmup(0.999))

Here and in `emajit.LitEma` a schedule stands in place of the number.

| schedule | for |
| --- | --- |
| `constant` | the same decay at every step |
| `warmup` | a short average at first; the warm-up of latent-diffusion and TensorFlow |
| `debiased` | an average without the bias of its first value, as in Adam |
| `inverse_gamma` | the warm-up of k-diffusion, diffusers, timm and ema-pytorch |
| `exponential_ramp` | the warm-up of YOLOv5, ultralytics and mmdetection |
| `momentum_annealing` | the warm-up of mmengine's `MomentumAnnealingEMA` |
| `power_function` | a length that is a share of the run, for `emajit.posthoc` |
| `half_life_fraction` | a half-life that is a share of the run, as in torchtitan |
| `half_life` | a half-life in images, as in StyleGAN2 and EDM |
| `inverse_power` | an alpha that falls as a power of the step, as in BEMA |
| `uniform` | the equal mean of all steps (SWA) |
| `cosine`, `linear` | from one decay to another: BYOL, DINO, data2vec |
| `delay` | a copy of the parameters at first, then another schedule |
| `every` | an update at every n-th step only |
| `scaled` | the same average at a larger batch |

`multi_avg_fn` makes a schedule the `multi_avg_fn` of torch's own `AveragedModel`.

## Your own

Any function `step -> decay` may be a schedule. The step counts the updates that the shadow has
already taken, 0 on the first call. The decay $\beta$ is the share of the old shadow that is kept.

A Python int gives a float. A 0-d integer tensor gives a 0-d float64 tensor on its device (a float
where the decay is the same at every step), without being read back, so that a schedule can be
traced by `torch.compile` and captured in a CUDA graph. Your function gets a tensor step as a 0-d
float64 tensor, since quotients of integer tensors are float32; `step.long()` is an index.

On a device without float64 (MPS) the decay for a tensor step is float32, and 1 - decay would lose
its last digits. There an update calls `schedule.alpha(step)`, which every schedule of this module
computes without cancellation.

Every schedule here raises ValueError for an argument outside its range and TypeError for one of
another type, and is printed, compared and pickled as the call that made it:

>>> every(warmup(0.999), 4)
every(warmup(0.999), 4)
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, overload

import torch
from torch import Tensor

from emajit import _choose, _devices, functional

__all__ = [  # noqa: RUF022, in the order of use
    "constant",
    "warmup",
    "debiased",
    "inverse_gamma",
    "exponential_ramp",
    "momentum_annealing",
    "power_function",
    "half_life_fraction",
    "half_life",
    "inverse_power",
    "uniform",
    "cosine",
    "linear",
    "delay",
    "every",
    "scaled",
    "multi_avg_fn",
    "sigma_rel_to_gamma",
    "gamma_to_sigma_rel",
]

Step = int | Tensor
Decay = float | Tensor
Schedule = Callable[[Step], Decay]
P = ParamSpec("P")


class _Schedule:
    """A schedule, 1 minus its decay without cancellation, and the call that made it."""

    def __init__(self, schedule: Schedule, alpha: Schedule, *made: Any) -> None:
        self._schedule, self.alpha, self._made = schedule, alpha, made

    def __call__(self, step: Step) -> Decay:
        return self._schedule(step)

    def _call(self) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        """The call in one normal form; computed on demand, since the factory may be traced."""
        name, args, kwargs = self._made
        bound = inspect.signature(globals()[name]).bind(*args, **kwargs)
        return name, bound.args, bound.kwargs

    def __repr__(self) -> str:
        return _written(*self._call())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Schedule) and self._call() == other._call()

    def __hash__(self) -> int:
        return hash(_Schedule)  # torch 2.11 hashes instances before `__init__` in a trace

    def __reduce__(self) -> Any:
        return _make, self._made


def _written(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    told = [*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())]
    return f"{name}({', '.join(told)})"


def _make(name: str, args: Any, kwargs: Any) -> Schedule:
    made: Schedule = globals()[name](*args, **kwargs)
    return made


def _factory(function: Callable[P, Schedule]) -> Callable[P, Schedule]:
    @functools.wraps(function)
    def made(*args: P.args, **kwargs: P.kwargs) -> Schedule:
        try:
            if any(isinstance(value, bool) for value in (*args, *kwargs.values())):
                raise TypeError  # noqa: TRY301, a bool is no number here
            schedule: Any = function(*args, **kwargs)
        except TypeError:
            given = inspect.signature(function).bind(*args, **kwargs)  # raises for missing ones
            for name, value in given.arguments.items():
                _choose.checked_schedule(name, value)
            found = _written(function.__name__, args, kwargs)
            raise TypeError(f"expected numbers for a schedule, found {found}") from None
        return _Schedule(schedule, schedule.alpha, function.__name__, args, kwargs)

    made.makes_schedules = True  # type: ignore[attr-defined]
    return made


def _alpha(schedule: Schedule, step: Step) -> Decay:
    alpha = getattr(schedule, "alpha", None)  # a user's schedule may not have it
    return 1 - schedule(step) if alpha is None else alpha(step)


def multi_avg_fn(
    decay: float | Schedule,
    *,
    rounding: functional.Rounding = "nearest",
    nonfinite: functional.Nonfinite = "propagate",
    backend: str = "auto",
) -> Callable[[Any, Any, Step], None]:
    """The update of `emajit.update_` for torch's `AveragedModel(model, multi_avg_fn=...)`.

    Lightning's `WeightAveraging` takes it, too. Its step is `AveragedModel`'s `n_averaged`, which
    is 0 for the copy in the first `update_parameters`: that copy counts as the first update. It is
    not read back. An integer buffer (`use_buffers=True`) is copied. The result can be pickled.

    Args:
        decay: a number in [0, 1] or a schedule.
        rounding: as in `emajit.update`. `AveragedModel` averages in the dtype of each parameter:
            "stochastic" keeps 16-bit averages from stalling.
        nonfinite: as in `emajit.update`.
        backend: as in `emajit.update`.

    Raises ValueError and TypeError for a decay that `emajit.update` would refuse.

    >>> from torch.optim.swa_utils import AveragedModel
    >>> model = torch.nn.Linear(1, 1)
    >>> averaged = AveragedModel(model, multi_avg_fn=multi_avg_fn(warmup(0.999)))
    >>> averaged.update_parameters(model)  # after each optimizer step
    """
    functional.check_decay(decay)
    _choose.check_options(rounding=rounding, nonfinite=nonfinite, backend=backend)
    return functools.partial(
        _average, decay=decay, rounding=rounding, nonfinite=nonfinite, backend=backend
    )


def _average(averages: Any, params: Any, num_averaged: Step, **options: Any) -> None:
    functional.update_([*averages], [*params], num_averaged, **options)


@_factory
def constant(decay: float) -> Schedule:
    r"""The same decay at every step: $\beta_t = \beta$.

    >>> schedule = constant(0.999)
    >>> [schedule(step) for step in range(3)]
    [0.999, 0.999, 0.999]
    """
    _check_share("decay", decay)
    return _Schedule(lambda step: decay, lambda step: 1 - decay)  # noqa: ARG005


@_factory
def warmup(decay: Decay) -> Schedule:
    r"""A short average at first: $\beta_t = \min(\beta, (1 + n) / (10 + n))$, $n = t + 1$.

    The warm-up of latent-diffusion's `LitEma` and of TensorFlow's `ExponentialMovingAverage`. It
    reaches 0.999 at step 8989 and 0.9999 at step 89989. `decay` may be a 0-d float64 tensor.

    >>> schedule = warmup(0.9999)
    >>> [round(schedule(step), 4) for step in (0, 1, 2, 89_988, 89_989)]
    [0.1818, 0.25, 0.3077, 0.9999, 0.9999]
    >>> warmup(torch.tensor(0.9, dtype=torch.float64))(0)
    tensor(0.1818, dtype=torch.float64)
    """
    if not isinstance(decay, Tensor):
        _check_share("decay", decay)

    def schedule(step: Step) -> Decay:
        n = _real(step) + 1
        return _minimum((1 + n) / (10 + n), decay)

    return _Schedule(schedule, lambda step: _maximum(9 / (11 + _real(step)), 1 - decay))


@_factory
def inverse_gamma(
    gamma: float = 1.0, power: float = 2 / 3, min_decay: float = 0.0, max_decay: float = 0.9999
) -> Schedule:
    r"""An average that lengthens as a power of the step: $\beta_t = 1 - (1 + t/\gamma)^{-p}$.

    Clamped to [`min_decay`, `max_decay`]. From Katherine Crowson's k-diffusion; also in diffusers,
    timm and ema-pytorch. `power` 2/3 suits runs of a million steps and more, 3/4 shorter ones.

    >>> schedule = inverse_gamma()
    >>> [round(schedule(step), 4) for step in range(4)]
    [0.0, 0.37, 0.5193, 0.6031]
    """
    _check(gamma > 0, "gamma", "a number > 0", gamma)
    _check(power > 0, "power", "a number > 0", power)
    _check(
        0 <= min_decay <= max_decay <= 1,
        "min_decay and max_decay",
        "0 <= min_decay <= max_decay <= 1",
        (min_decay, max_decay),
    )

    def schedule(step: Step) -> Decay:
        decay = 1 - (1 + _real(step) / gamma) ** -power
        return _maximum(_minimum(decay, max_decay), min_decay)

    def alpha(step: Step) -> Decay:
        return _minimum(_maximum((1 + _real(step) / gamma) ** -power, 1 - max_decay), 1 - min_decay)

    return _Schedule(schedule, alpha)


@_factory
def power_function(sigma_rel: float | None = None, gamma: float | None = None) -> Schedule:
    r"""An average whose length is a share of the run: $\beta_t = (1 - 1/n)^{\gamma+1}$, $n = t+1$.

    Section 3.1 of Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
    Models" (arXiv 2312.02696). The weight of the parameters of time $\tau$ in the average of time
    $t$ is proportional to $\tau^\gamma$. Give either $\gamma \ge 0$ or `sigma_rel`, the standard
    deviation of that profile relative to its length, at most $1/\sqrt{12} = 0.28867$ (which is
    $\gamma = 0$, the equal average):

    $\sigma_{rel} = (\gamma + 1)^{1/2} (\gamma + 2)^{-1} (\gamma + 3)^{-1/2}$

    An average updated only at each k-th training step has the same profile, since the step
    counts its updates: `every(power_function(...), k)` is the same schedule.

    >>> schedule = power_function(sigma_rel=0.10)
    >>> [round(schedule(step), 4) for step in (0, 1, 2, 999)]
    [0.0, 0.0041, 0.04, 0.9921]
    """
    if sigma_rel is not None and gamma is None:
        exponent = sigma_rel_to_gamma(sigma_rel) + 1
    elif gamma is not None and sigma_rel is None:
        _check(0 <= gamma < math.inf, "gamma", "a number >= 0", gamma)
        exponent = gamma + 1
    else:
        raise ValueError(f"expected one of sigma_rel and gamma, found {sigma_rel} and {gamma}")

    def schedule(step: Step) -> Decay:
        n = _real(step) + 1
        return (1 - 1 / n) ** exponent

    return _Schedule(schedule, lambda step: -_expm1(exponent * _log1p(-1 / (_real(step) + 1))))


@overload
def sigma_rel_to_gamma(sigma_rel: float) -> float: ...
@overload
def sigma_rel_to_gamma(sigma_rel: Sequence[float] | Tensor) -> Tensor: ...
def sigma_rel_to_gamma(sigma_rel: float | Sequence[float] | Tensor) -> float | Tensor:
    r"""The exponent $\gamma$ of the power-function average of a relative length.

    The largest root of $\gamma^3 + 7\gamma^2 + (16 - \sigma^{-2})\gamma + (12 - \sigma^{-2})$, from
    arXiv 2312.02696, section 3.1. A float for a number, else a float64 tensor of the same shape.

    Raises ValueError where `sigma_rel` is not in $(0, 1/\sqrt{12}]$.

    >>> round(sigma_rel_to_gamma(0.05), 2)
    16.97
    >>> sigma_rel_to_gamma([0.05, 0.10])
    tensor([16.9722,  6.9372], dtype=torch.float64)
    """
    return _each(_gamma, sigma_rel)


@overload
def gamma_to_sigma_rel(gamma: float) -> float: ...
@overload
def gamma_to_sigma_rel(gamma: Sequence[float] | Tensor) -> Tensor: ...
def gamma_to_sigma_rel(gamma: float | Sequence[float] | Tensor) -> float | Tensor:
    r"""The relative length: $(\gamma + 1)^{1/2} (\gamma + 2)^{-1} (\gamma + 3)^{-1/2}$.

    The inverse of `sigma_rel_to_gamma`. Raises ValueError where `gamma` is negative.

    >>> round(gamma_to_sigma_rel(6.94), 4)
    0.1
    """
    return _each(_sigma_rel, gamma)


def _each(function: Callable[[float], float], values: Any) -> float | Tensor:
    if isinstance(values, float | int):
        return function(values)
    numbers = torch.as_tensor(values, dtype=torch.float64)
    mapped = [function(number) for number in numbers.flatten().tolist()]
    return torch.tensor(mapped, dtype=torch.float64).reshape(numbers.shape)


def _sigma_rel(gamma: float) -> float:
    _check(0 <= gamma < math.inf, "gamma", "a number >= 0", gamma)
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def _gamma(sigma_rel: float) -> float:
    uniform_width = 12**-0.5
    in_range = 1e-150 < sigma_rel < uniform_width or math.isclose(sigma_rel, uniform_width)
    _check(in_range, "sigma_rel", "0 < sigma_rel <= 12 ** -0.5 = 0.28867", sigma_rel)
    t = sigma_rel**-2
    gamma = 1 / sigma_rel  # above the root, from where Newton's method falls monotonically
    while True:
        value = ((gamma + 7) * gamma + 16 - t) * gamma + 12 - t
        following = gamma - value / ((3 * gamma + 14) * gamma + 16 - t)
        if not following < gamma:
            return max(gamma, 0.0)
        gamma = following


@_factory
def half_life(images: float, batch_size: int, rampup_ratio: float | None = 0.05) -> Schedule:
    r"""A half-life in training images, $\beta_t = 2^{-B/h}$ with $h = \min(H, r B t)$.

    From StyleGAN2 and EDM (arXiv 2206.00364): `images` is $H$ in images, `batch_size` is $B$, and
    `rampup_ratio` $r$ keeps the half-life below that share of the images seen so far; None means no
    such limit. With a limit the first update copies the parameters.

    >>> schedule = half_life(500_000, batch_size=512)
    >>> [round(schedule(step), 4) for step in (0, 1, 100, 100_000)]
    [0.0, 0.0, 0.8706, 0.9993]
    """
    _check(images > 0, "images", "a number > 0", images)
    _check(batch_size > 0, "batch_size", "a number > 0", batch_size)
    finite = rampup_ratio is None or 0 < rampup_ratio < math.inf
    _check(finite, "rampup_ratio", "a number > 0 or None", rampup_ratio)

    if rampup_ratio is None:
        return constant(0.5 ** (batch_size / images))

    def halvings(step: Step) -> Decay:
        life = _minimum(rampup_ratio * batch_size * _real(step), images)
        return batch_size / _maximum(life, 1e-8)

    def schedule(step: Step) -> Decay:
        n = halvings(step)
        return torch.exp2(-n) if isinstance(n, Tensor) else 2.0**-n

    return _Schedule(schedule, lambda step: -_expm1(-math.log(2) * halvings(step)))


@_factory
def half_life_fraction(fraction: float = 0.05) -> Schedule:
    r"""A half-life of a share of the updates so far: $\beta_t = 2^{-1/(f n)}$, $n = t + 1$.

    torchtitan's default, with `fraction` $f = 0.05$. For $n \gg 1/f$ the average is that of
    `power_function` with the exponent $\gamma = \ln 2 / f - 1$. So its relative length is 0.063 for
    $f = 0.05$:

    >>> round(gamma_to_sigma_rel(math.log(2) / 0.05 - 1), 3)
    0.063
    >>> schedule = half_life_fraction()
    >>> [round(schedule(step), 4) for step in (0, 19, 39, 9999)]
    [0.0, 0.5, 0.7071, 0.9986]
    """
    _check(0 < fraction < math.inf, "fraction", "a number > 0", fraction)

    def halvings(step: Step) -> Decay:
        return 1 / (fraction * (_real(step) + 1))

    def schedule(step: Step) -> Decay:
        n = halvings(step)
        return torch.exp2(-n) if isinstance(n, Tensor) else 2.0**-n

    return _Schedule(schedule, lambda step: -_expm1(-math.log(2) * halvings(step)))


@_factory
def exponential_ramp(decay: float = 0.9999, tau: float = 2000.0) -> Schedule:
    r"""A decay that grows with a time constant: $\beta_t = \beta (1 - e^{-n/\tau})$, $n = t + 1$.

    The average of YOLOv5 and ultralytics (`ModelEMA`), and mmdetection's `ExpMomentumEMA`, whose
    `momentum` is $1 - \beta$ and whose `gamma` is $\tau$.

    >>> schedule = exponential_ramp()
    >>> [round(schedule(step), 4) for step in (0, 1999, 9999)]
    [0.0005, 0.6321, 0.9932]
    """
    _check_share("decay", decay)
    _check(tau > 0, "tau", "a number > 0", tau)

    def schedule(step: Step) -> Decay:
        return -decay * _expm1(-(_real(step) + 1) / tau)

    return _Schedule(schedule, lambda step: 1 - decay + decay * _exp(-(_real(step) + 1) / tau))


@_factory
def momentum_annealing(momentum: float = 0.0002, gamma: float = 100.0) -> Schedule:
    r"""A share of the parameters that falls to `momentum`: $\beta_t = 1 - \max(m, g / (g + t))$.

    mmengine's `MomentumAnnealingEMA`, whose `momentum` $m$ is 1 minus the decay. $g$ is `gamma`.
    With $g = 1$ it is the equal average, until its share has fallen to $m$.

    >>> schedule = momentum_annealing()
    >>> [round(schedule(step), 4) for step in (0, 1, 100, 499_900)]
    [0.0, 0.0099, 0.5, 0.9998]
    """
    _check_share("momentum", momentum)
    _check(gamma > 0, "gamma", "a number > 0", gamma)

    def schedule(step: Step) -> Decay:
        t = _real(step)
        return _minimum(t / (gamma + t), 1 - momentum)

    return _Schedule(schedule, lambda step: _maximum(gamma / (gamma + _real(step)), momentum))


@_factory
def inverse_power(
    power: float = 0.5, lag: float = 10.0, multiplier: float = 1.0, min_alpha: float = 0.0
) -> Schedule:
    r"""A share of the parameters that falls as a power of the step: $(\rho + \gamma t)^{-\kappa}$.

    $\beta_t = 1 - \max(a, (\rho + \gamma t)^{-\kappa})$ with `power` $\kappa$, `lag` $\rho$,
    `multiplier` $\gamma$ and `min_alpha` $a$: the average of BEMA (arXiv 2508.00180) under the
    defaults of TRL's `BEMACallback`, which counts $t$ in training steps. See `emajit.bema`.

    >>> schedule = inverse_power()
    >>> [round(schedule(step), 4) for step in (0, 390, 9990)]
    [0.6838, 0.95, 0.99]
    """
    _check(0 <= power < math.inf, "power", "a number >= 0", power)
    _check(1 <= lag < math.inf, "lag", "a number >= 1", lag)
    _check(0 <= multiplier < math.inf, "multiplier", "a number >= 0", multiplier)
    _check_share("min_alpha", min_alpha)

    def alpha(step: Step) -> Decay:
        return _maximum((lag + multiplier * _real(step)) ** -power, min_alpha)

    return _Schedule(lambda step: 1 - alpha(step), alpha)


@_factory
def debiased(decay: float) -> Schedule:
    r"""Without the bias of the start: $\beta_t = \beta (1 - \beta^t) / (1 - \beta^{t+1})$.

    The shadow equals the average that starts from zero and is divided by $1 - \beta^{t+1}$, as in
    Adam (arXiv 1412.6980, section 3) and optax: its first value is not special.

    >>> schedule = debiased(0.9)
    >>> [round(schedule(step), 4) for step in range(4)]
    [0.0, 0.4737, 0.631, 0.7092]
    """
    _check_share("decay", decay)
    if decay == 0:
        return constant(0.0)
    if decay == 1:
        return uniform()
    log = math.log(decay)

    def schedule(step: Step) -> Decay:
        t = _real(step)
        return decay * _expm1(t * log) / _expm1((t + 1) * log)

    return _Schedule(schedule, lambda step: (decay - 1) / _expm1((_real(step) + 1) * log))


@_factory
def uniform() -> Schedule:
    r"""The equal average of all parameters seen (SWA, Polyak): $\beta_t = t / (t + 1)$.

    >>> schedule = uniform()
    >>> [round(schedule(step), 4) for step in range(4)]
    [0.0, 0.5, 0.6667, 0.75]
    """

    def schedule(step: Step) -> Decay:
        t = _real(step)
        return t / (t + 1)

    return _Schedule(schedule, lambda step: 1 / (_real(step) + 1))


@_factory
def cosine(start: float, end: float, steps: int) -> Schedule:
    r"""Half a cosine from `start` to `end`: $\beta_t = e - (e - s)(\cos(\pi t/T) + 1)/2$, then $e$.

    Here $s$ is `start`, $e$ is `end` and $T$ is `steps`. The target network of BYOL (arXiv
    2006.07733) and the teacher of DINO (arXiv 2104.14294).

    >>> schedule = cosine(0.996, 1.0, steps=100)
    >>> [round(schedule(step), 4) for step in (0, 50, 100, 200)]
    [0.996, 0.998, 1.0, 1.0]
    """
    _check_ramp(start, end, steps)

    def schedule(step: Step) -> Decay:
        t = _minimum(_real(step), float(steps))
        return end - (end - start) * (_cos(math.pi / steps * t) + 1) / 2

    def alpha(step: Step) -> Decay:
        left = steps - _minimum(_real(step), float(steps))
        return 1 - end + (end - start) * _sin(math.pi / 2 / steps * left) ** 2

    return _Schedule(schedule, alpha)


@_factory
def linear(start: float, end: float, steps: int) -> Schedule:
    r"""A straight line from `start` to `end`: $\beta_t = s + (e - s) t / T$, then $e$.

    Here $s$ is `start`, $e$ is `end`, $T$ is `steps`. The teacher of data2vec (arXiv 2202.03555).

    >>> schedule = linear(0.999, 0.9999, steps=100)
    >>> [round(schedule(step), 5) for step in (0, 50, 100, 200)]
    [0.999, 0.99945, 0.9999, 0.9999]
    """
    _check_ramp(start, end, steps)

    def schedule(step: Step) -> Decay:
        return end - (end - start) * (1 - _minimum(_real(step), float(steps)) / steps)

    def alpha(step: Step) -> Decay:
        left = steps - _minimum(_real(step), float(steps))
        return 1 - end + (end - start) * left / steps

    return _Schedule(schedule, alpha)


@_factory
def delay(schedule: Schedule, start: int) -> Schedule:
    r"""The shadow is the parameters ($\beta_t = 0$) before `start`, then `schedule(step - start)`.

    >>> delayed = delay(constant(0.99), start=2)
    >>> [delayed(step) for step in range(4)]
    [0.0, 0.0, 0.99, 0.99]
    """
    schedule = _checked(schedule)
    start = _integer("start", start, 0)

    def from_start(of: Schedule, before: float, step: Step) -> Decay:
        if not isinstance(step, Tensor):
            return before if step < start else of(step - start)
        t: Tensor = _unbounded(step)
        wide = _devices.widest(t.device)
        later = of((t - start).clamp(min=0))
        if not isinstance(later, Tensor):
            # `as_tensor` would copy it from the host.
            later = torch.full((), later, dtype=wide, device=t.device)
        return torch.where(t < start, before, later.to(wide))

    def alpha(step: Step) -> Decay:
        return from_start(functools.partial(_alpha, schedule), 1.0, step)

    return _Schedule(lambda step: from_start(schedule, 0.0, step), alpha)


@_factory
def every(schedule: Schedule, interval: int) -> Schedule:
    r"""For a shadow updated at each `interval`-th step only: the product of that many decays.

    $\beta'_t = \prod_{i<k} \beta_{kt + i}$ with $k$ the `interval`. Here $t$ counts the updates of
    the shadow, and $\beta$ is written for an update at each training step. Within an interval the
    parameters count as if they were held at their value at its end.

    >>> sparse = every(constant(0.99), interval=10)
    >>> [round(sparse(step), 4) for step in range(3)]
    [0.9044, 0.9044, 0.9044]
    """
    schedule = _checked(schedule)
    interval = _integer("interval", interval, 1)

    def within(of: Callable[[Step], Decay], step: Step) -> list[Decay]:
        first = _unbounded(step) * interval
        return [of(first + i) for i in range(interval)]

    def product(step: Step) -> Decay:
        return functools.reduce(operator.mul, within(schedule, step), 1.0)

    def alpha(step: Step) -> Decay:
        alphas = within(functools.partial(_alpha, schedule), step)
        return -_expm1(functools.reduce(operator.add, [_log1p(-a) for a in alphas]))

    return _Schedule(product, alpha)


@_factory
def scaled(schedule: Schedule, kappa: float) -> Schedule:
    r"""For a batch $\kappa$ times larger: $\beta'_t = \beta(\kappa t)^\kappa$.

    The scaling rule of arXiv 2307.13813, to be used with the scaling rule of the optimizer (SGD:
    a learning rate $\kappa$ times larger). The average is as long in samples as before. Here $t$
    counts the updates at the larger batch, and $\beta$ is written for updates at the smaller one:
    a `cosine` keeps its `steps`. $\kappa$ is any number > 0, and $\beta$ is taken at real numbers.

    >>> large = scaled(constant(0.9995), kappa=16)
    >>> [round(large(step), 4) for step in range(3)]
    [0.992, 0.992, 0.992]
    """
    schedule = _checked(schedule)
    _check(0 < kappa < math.inf, "kappa", "a number > 0", kappa)

    def before(step: Step) -> Step:
        at: Any = kappa * (_real(step) if isinstance(step, Tensor) else _unbounded(step))
        return at  # type: ignore[no-any-return]

    def alpha(step: Step) -> Decay:
        return -_expm1(kappa * _log1p(-_alpha(schedule, before(step))))

    return _Schedule(lambda step: schedule(before(step)) ** kappa, alpha)


def _unbounded(step: Any) -> Any:
    """The step in a type that holds its products; the real step of `scaled` as it is."""
    if isinstance(step, Tensor):
        return step if step.is_floating_point() else step.to(torch.int64)
    return operator.index(step) if hasattr(step, "dtype") else step  # an integer of NumPy


def _real(step: Step) -> Decay:
    return step.to(_devices.widest(step.device)) if isinstance(step, Tensor) else float(step)


def _minimum(a: Decay, b: Decay) -> Decay:
    if isinstance(a, Tensor):
        return torch.clamp(a, max=b)
    if isinstance(b, Tensor):
        return torch.clamp(b, max=a)
    return min(a, b)


def _maximum(a: Decay, b: Decay) -> Decay:
    return torch.clamp(a, min=b) if isinstance(a, Tensor) else max(a, b)


def _expm1(x: Decay) -> Decay:
    return torch.expm1(x) if isinstance(x, Tensor) else math.expm1(x)


def _exp(x: Decay) -> Decay:
    return torch.exp(x) if isinstance(x, Tensor) else math.exp(x)


def _log1p(x: Decay) -> Decay:
    if isinstance(x, Tensor):
        return torch.log1p(x)
    return math.log1p(x) if x > -1 else -math.inf


def _sin(x: Decay) -> Decay:
    return torch.sin(x) if isinstance(x, Tensor) else math.sin(x)


def _cos(x: Decay) -> Decay:
    return torch.cos(x) if isinstance(x, Tensor) else math.cos(x)


def _check(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, found {found}")


def _integer(name: str, number: int, least: int) -> int:
    integer = hasattr(number, "__index__") and not isinstance(number, Tensor)
    _check(integer and number >= least, name, f"an integer >= {least}", repr(number))
    return operator.index(number)


def _checked(schedule: Schedule) -> Schedule:
    """The schedule; one of the user's gets a tensor in float64, as `emajit.update` gives it."""
    _check(callable(schedule), "schedule", "a schedule, step -> decay", schedule)
    _choose.checked_schedule("schedule", schedule)
    if hasattr(schedule, "alpha"):
        return schedule
    return lambda step: schedule(_devices.argument(schedule, step))


def _check_share(name: str, share: float) -> None:
    _check(0 <= share <= 1, name, "a number in [0, 1]", share)


def _check_ramp(start: float, end: float, steps: int) -> None:
    _check_share("start", start)
    _check_share("end", end)
    _integer("steps", steps, 1)
