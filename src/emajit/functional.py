r"""The average as a pure function of (shadow, params, step), and its in-place twin.

$s \leftarrow s + w (p - s)$ with $w = 1 - \beta(t)$, for each leaf $s$ of the shadow and $p$ of the
parameters.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from numbers import Real
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from emajit import _compile, _host, _kernels, _memory, _offload, _tree, scope
from emajit._kernels import Weight
from emajit._rounding import Noise

Step = int | Tensor
Decay = float | Tensor
Schedule = Callable[[Step], Decay]
Tree = TypeVar("Tree")


@overload
def init(
    params: dict[str, nn.Parameter],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    pin_memory: bool = False,
) -> dict[str, Tensor]: ...
@overload
def init(
    params: Tree,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    pin_memory: bool = False,
) -> Tree: ...
def init(
    params: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    pin_memory: bool = False,
) -> Any:
    """The first shadow of `params`: a detached copy of each leaf, in the same structure.

    Args:
        params: a pytree whose leaves are tensors or None: a dict of named parameters, a
            `state_dict()`, nested tuples, a registered dataclass.
        dtype: the dtype of the floating-point leaves (complex leaves take its complex partner).
            Default: that of each parameter. Parameters in bfloat16 or float16 want float32 here,
            since at a decay near 1 a step of the average is below the resolution of 16 bits.
        device: "cpu" keeps the shadow of CUDA parameters in host memory. `update_` then averages on
            the device, in pieces, which take 16 to 160 MiB there (a leaf that is not contiguous is
            one piece). Whatever reads such a leaf or a view of it waits for the device; what reads
            its memory behind torch's back, as an array of `numpy()` does later, has to call
            `torch.cuda.synchronize()`. Default: that of each parameter.
        pin_memory: with `device="cpu"`, lock the pages, so that neither the host nor the training
            waits for `update_`: it goes on in a side stream, for which the next `step` of an
            optimizer of `torch.optim` waits on the device. For leaves that require no grad, such as
            buffers, the training waits at once. Before anything else writes the parameters, such as
            operators of your own or an optimizer in a CUDA graph, call `torch.cuda.synchronize()`.
            PyTorch locks a power of two of bytes for each leaf, up to twice its size, unless told
            otherwise (`PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:...`, where it knows that).
            Without a CUDA device this has no effect.

    Leaves that are tied in `params` are tied in the shadow. Strides of dense leaves are kept.

    Raises:
        TypeError: a leaf is neither a tensor nor None.
        ValueError: `dtype` is not a real floating-point dtype; `device` is neither "cpu" nor None,
            or the parameters are DTensors or on a device without CUDA; `pin_memory` without
            `device="cpu"`.
    """
    _tree.check_dtype(dtype)
    if device is not None and str(device).partition(":")[0] != "cpu":
        raise ValueError(
            f"device: expected cpu, or none for that of the parameters, found {device}"
        )
    if pin_memory and device is None:
        raise ValueError("pin_memory: expected device='cpu' with it, found none")
    with torch.no_grad():
        if device is None:
            return _tree.copy(params, dtype)
        return _tree.copy_to_host(params, dtype, pinned=pin_memory)


def update(
    shadow: Tree,
    params: Any,
    step: Step,
    *,
    decay: Decay | Schedule | list[Any],
    rounding: Literal["nearest", "stochastic"] = "nearest",
    nonfinite: Literal["propagate", "skip"] = "propagate",
    backend: str = "auto",
) -> Tree:
    r"""The shadow after one more step, in new tensors: $s + w (p - s)$, $w = 1 - \beta(t)$.

    It is finite where $p - s$ is. The weight is computed in float64. The leaves are averaged in
    float64 if one of the two is, else in float32, and rounded once to the shadow's dtype. An
    integer or bool parameter is copied, None stays None, and leaves of the shadow that are one
    tensor are averaged once and stay one.
    The result never requires grad.

    Args:
        shadow: the averages so far, from `init` or an earlier update.
        params: the parameters, a pytree of the same structure, shapes and devices, such as
            `dict(model.named_parameters())`. The dtypes may differ: a float32 shadow of bfloat16
            parameters is the normal case.
        step: how many updates the shadow has already taken, 0 on the first call. An int, or a 0-d
            integer tensor; one on a GPU is never read back to the host. Within your own
            `torch.compile` give a tensor: an int recompiles as it grows.
        decay: $\beta$, the share of the old shadow that is kept, in [0, 1]: a float, a 0-d tensor,
            or a schedule, `step -> decay` (see `emajit.schedules`). Or a list of those: `shadow` is
            then a list of as many shadows, which are updated in one pass over the parameters.
        rounding: how bfloat16 and float16 shadows round. To "nearest" they stall: where a step of
            the average is below half the distance to the next number, which for bfloat16 and a
            decay of 0.9999 is nearly always, it is lost; one warning says so, unless the weight is
            a tensor on a device or the call is traced. "stochastic" goes to either neighbour at
            random, so that the mean is right; a single element has noise of some of those
            distances. The noise is a hash of the step, the path of the leaf in `shadow` and the
            index of the element: the same call gives the same bits. Number the steps, and do not
            use one twice. Within `torch.func.vmap` (torch 2.13) the examples share their noise.
        nonfinite: "propagate" does the arithmetic as written: what is NaN or infinite, such as a
            mask among the buffers of a `state_dict()`, stays NaN or infinite or becomes NaN. With
            "skip" an element whose parameter is NaN or infinite keeps its old average.
        backend: "eager" uses a `torch._foreach` operator for the leaves that need no temporary, and
            takes the others one by one; "inductor" (or the name of another `torch.compile` backend)
            compiles all; "auto" takes for each leaf the faster. Inside your own `torch.compile` the
            call is traced and `backend` has no effect.

    Raises:
        ValueError: structure, shape or device differ, or the shadow's dtype cannot hold the
            parameter's kind of number, named by path; decay or step is out of range (a tensor on
            a device, or a step that is one, is used unread, so a wrong one goes unnoticed) or a
            tensor of another shape or kind of number; an unknown option.
        TypeError: a leaf is neither a tensor nor None, the step is neither an integer nor a tensor,
            or the decay is none of the three.
        RuntimeError: a parameter is inside of an `ema_scope`, and holds an average.

    >>> shadow = {"w": torch.tensor([0.0])}
    >>> update(shadow, {"w": torch.tensor([1.0])}, 0, decay=0.75)
    {'w': tensor([0.2500])}
    """
    pairs, work = prepare(shadow, params, step, decay, rounding, nonfinite, writable=False)
    check_backend(backend)
    with torch.no_grad():
        new = _compile.average(work, backend)
    several = len(decay) if isinstance(decay, list) else 1
    return pairs.rebuild(_tree.deinterleave(new, several))  # type: ignore[no-any-return]


def update_(
    shadow: Tree,
    params: Any,
    step: Step,
    *,
    decay: Decay | Schedule | list[Any],
    rounding: Literal["nearest", "stochastic"] = "nearest",
    nonfinite: Literal["propagate", "skip"] = "propagate",
    backend: str = "auto",
) -> Tree:
    """`update` written into the shadow's own memory; returns `shadow`.

    The shadow comes first: the other way round, the weights are written. The results are those of
    `update`. Everything is checked before the first leaf is written. One operator then writes all
    leaves of one kind: float32 and float64 with parameters of the same dtype, or what is compiled
    (on the CPU in groups of leaves, with stochastic rounding or of more than 2**26 elements).
    Between two operators, and in eager mode between two leaves of any other dtype, Ctrl-C or a lack
    of memory can leave some averaged and some not.

    Raises:
        ValueError: as `update`; also where a leaf of the shadow overlaps the memory of another
            leaf, of a parameter, or its own. Inside a trace memory cannot be seen: there overlap
            is not checked, and only leaves that are one object are known to be tied.
        TypeError, RuntimeError: as `update`.

    >>> shadow = {"w": torch.tensor([0.0])}
    >>> update_(shadow, {"w": torch.tensor([1.0])}, 0, decay=0.75) is shadow
    True
    >>> shadow
    {'w': tensor([0.2500])}
    """
    weights = _weights(decay, step)
    writable = not _memory.is_traced()
    plain = rounding == "nearest" and nonfinite == "propagate" and backend in ("auto", "eager")
    pairs = None
    if writable and isinstance(decay, list):
        pairs = _tree.known_several(shadow, params, len(decay))
    elif writable:
        pairs = _tree.known(shadow, params)
    if pairs and plain and _repeat_(pairs, weights):
        return shadow
    pairs = pairs or _pairs(shadow, params, decay, writable=writable)
    work = _work(pairs, weights, step, rounding, nonfinite, on_host=writable)
    check_backend(backend)
    with torch.set_grad_enabled(False):  # half a microsecond less than `no_grad`
        if _host.is_used():
            work = _offload.average_(work)
        _compile.average_(work, backend)
    return shadow


# Of so many parameters, which are more than a cache holds, each is read once for all averages. Of
# fewer it takes a quarter less time to average one after the other: a scalar for each leaf is a
# slower operator. (2 cores of an AMD EPYC with 32 MiB of cache, 2026-11-23.)
_READ_ONCE = 2**23


def _repeat_(pairs: _tree.Pairs, weights: list[Weight]) -> bool:
    """`update_` of full precision, of leaves that an earlier call has checked; else nothing.

    That is nearly every call of a training. Of six leaves it takes a tenth less time than the way
    for all options, most of which is code that was last run a step ago.
    """
    memo = pairs.memo
    if not (memo and pairs.shadows and memo.dtypes <= _kernels.FULL and type(weights[0]) is float):
        return False
    scope.check_outside(pairs.params)
    with torch.set_grad_enabled(False):
        if len(weights) == 1:
            torch._foreach_lerp_(pairs.shadows, pairs.params, weights[0])
        elif set(map(type, weights)) != {float}:
            return False
        elif memo.elements // len(weights) >= _READ_ONCE:
            _kernels.foreach_average_(*_interleaved(pairs, weights))
        else:
            _kernels.foreach_averages_(pairs.shadows, pairs.params, weights)
    return True


def prepare(
    shadow: Any,
    params: Any,
    step: Step,
    decay: Decay | Schedule | list[Any],
    rounding: str,
    nonfinite: str,
    *,
    writable: bool,
) -> tuple[_tree.Pairs, _compile.Work]:
    """Check everything; the pairs of leaves, and what is to be computed of them."""
    weights = _weights(decay, step)
    pairs = _pairs(shadow, params, decay, writable=writable)
    return pairs, _work(pairs, weights, step, rounding, nonfinite)


def _work(
    pairs: _tree.Pairs,
    weights: list[Weight],
    step: Step,
    rounding: str,
    nonfinite: str,
    *,
    on_host: bool = False,
) -> _compile.Work:
    """What is to be computed of leaves that fit, of which some may be in host memory."""
    _check_option("rounding", rounding, ("nearest", "stochastic"))
    _check_option("nonfinite", nonfinite, ("propagate", "skip"))
    if _host.is_used() and not on_host:
        _host.refuse(pairs.shadows, pairs.params)
    noise = None
    if rounding == "stochastic":
        paths, regions = (_tree.interleave(t, len(weights)) for t in _places(pairs))
        noise = Noise(paths, regions, step, {})
    skip = nonfinite == "skip"
    work = _compile.Work(*_interleaved(pairs, weights), skip, noise, pairs.memo)
    if not work.is_traced:
        if noise is None and not work.dtypes <= _NEVER_STALL:
            _warn_of_stalls(work)
        scope.check_outside(work.params)
    return work


def _interleaved(
    pairs: _tree.Pairs, weights: list[Weight]
) -> tuple[list[Tensor], list[Tensor], list[Weight]]:
    """Shadows, params and weights, so that the averages of a parameter follow each other."""
    several = len(weights)
    if several == 1:
        return pairs.shadows, pairs.params, weights
    shadows, params = (_tree.interleave(leaves, several) for leaves in pairs[1:3])
    return shadows, params, weights * (len(shadows) // max(1, several))


_NEVER_STALL = {
    (shadow, param)
    for shadow in (torch.float32, torch.float64)
    for param in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}


_RESOLUTION = {
    dtype: torch.finfo(dtype).eps / 2
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
}


def _warn_of_stalls(work: _compile.Work) -> None:
    for s, p, w in {(s.dtype, p.dtype, w) for s, p, w in work.rows() if isinstance(w, float)}:
        if p.is_floating_point:
            warn_of_stalls([s], w)


def warn_of_stalls(dtypes: Iterable[torch.dtype], weight: float) -> None:
    """One warning for each dtype in which an average loses nearly every step of this weight."""
    for dtype in dtypes:
        if 0 < weight < _RESOLUTION.get(dtype, 0):
            _warn_of_stall(dtype)


@lru_cache
def _warn_of_stall(dtype: torch.dtype) -> None:
    message = (
        f"an average in {dtype} stalls: where 1 - decay is below {_RESOLUTION[dtype]:.2g}, "
        "rounding to nearest loses nearly every step; an average in float32 does not"
    )
    if dtype.itemsize > 1:
        message += ", nor does rounding='stochastic' of emajit.update_"
    warnings.warn(message, UserWarning, stacklevel=6)


def _pairs(shadow: Any, params: Any, decay: Any, *, writable: bool) -> _tree.Pairs:
    """The leaves of one shadow, or of as many as there are decays."""
    if not isinstance(decay, list):
        return _tree.align(shadow, params, writable=writable)
    if not isinstance(shadow, list) or len(shadow) != len(decay):
        found = (
            f"a list of {len(shadow)}" if isinstance(shadow, list) else type(shadow).__qualname__
        )
        raise ValueError(f"shadow: expected a list of {len(decay)}, as decay, found {found}")
    return _tree.align_several(shadow, params, writable=writable)


def _places(pairs: _tree.Pairs) -> tuple[list[str], list[Any]]:
    """Paths and regions of the shadows, each of a dtype that can be rounded at random."""
    paths = pairs.paths()
    for path, s in zip(paths, pairs.shadows, strict=True):
        if s.dtype.itemsize < 2 and s.is_floating_point():
            raise ValueError(
                f"shadow{path}: expected bfloat16, float16 or wider for rounding='stochastic', "
                f"found {s.dtype}"
            )
    return paths, pairs.regions()


# `float` first: to ask `Real` takes longer, and so does to make a union in each call.
_INTEGERS = int, torch.SymInt
_NUMBERS = float, Real, torch.SymFloat, torch.SymInt


def _weights(decay: Decay | Schedule | list[Any], step: Step) -> list[Weight]:
    """The weight of each average."""
    if type(decay) is float and 0.0 <= decay <= 1.0 and type(step) is int and step >= 0:
        return [1.0 - decay]
    step = _checked_step(step)
    if isinstance(decay, list):
        return [_weight(one, step) for one in decay]
    return [_weight(decay, step)]


def _weight(decay: Decay | Schedule, step: Step) -> Weight:
    """`w = 1 - beta(step)` in float64: in float32, 1 - 0.9999 is off by 1.7e-4 of itself."""
    beta = decay(step) if callable(decay) else decay
    if isinstance(beta, Tensor):
        if beta.ndim != 0 or not beta.is_floating_point():
            found = f"shape {tuple(beta.shape)} and {beta.dtype}"
            raise ValueError(f"decay: expected a 0-d floating-point tensor, found {found}")
        if beta.device.type != "cpu" or _memory.is_traced():
            return 1.0 - beta.detach().to(torch.float64)
        beta = float(beta.detach())  # in host memory, so nothing waits for it
    if not isinstance(beta, _NUMBERS):
        found = getattr(beta, "__qualname__", type(beta).__qualname__)
        raise TypeError(f"decay: expected a number, a 0-d tensor or a schedule, found {found}")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"decay: expected a number in [0, 1], found {beta} at step {step}")
    return 1.0 - float(beta)


def _checked_step(step: Step) -> Step:
    """The step; one of NumPy's, in which a product may overflow, as an int."""
    if isinstance(step, Tensor):
        integer = not (step.is_floating_point() or step.is_complex() or step.dtype == torch.bool)
        if step.ndim != 0 or not integer:
            found = f"shape {tuple(step.shape)} and {step.dtype}"
            raise ValueError(f"step: expected an int or a 0-d integer tensor, found {found}")
        return step
    if not isinstance(step, _INTEGERS):
        if not hasattr(step, "__index__"):
            raise TypeError(f"step: expected an int or a 0-d integer tensor, found {step!r}")
        step = operator.index(step)
    if step < 0:
        raise ValueError(f"step: expected the number of updates so far, >= 0, found {step}")
    return step


def check_decay(decay: Any) -> None:
    """Raise ValueError or TypeError for what is no decay, nor a schedule that begins with one."""
    _weight(decay, 0)


def check_backend(backend: str) -> None:
    """Raise ValueError for a backend that nobody knows."""
    ours = ("auto", "eager", "inductor")
    if backend not in ours and backend not in torch.compiler.list_backends(exclude_tags=()):
        _check_option("backend", backend, (*ours, "a name of torch.compiler.list_backends()"))


def _check_option(name: str, found: str, expected: tuple[str, ...]) -> None:
    if found not in expected:
        raise ValueError(f"{name}: expected {' or '.join(expected)}, found {found!r}")
