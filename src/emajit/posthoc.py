r"""Choose the averaging length after training: any average, from snapshots of two.

Update two power-function averages of different lengths in one pass, and save snapshots of them.
Afterwards an average of any length between them is put together from the files. The length is the
standard deviation of an average's profile over time, as a share of the run.

>>> import tempfile
>>> import torch
>>> from torch import nn
>>> import emajit
>>> from emajit import posthoc, schedules
>>> model, folder = nn.Linear(8, 1), tempfile.mkdtemp()  # a folder for each run
>>> params = dict(model.named_parameters())
>>> lengths = [0.05, 0.10]  # of the run
>>> decays = [schedules.power_function(sigma_rel) for sigma_rel in lengths]
>>> shadows = [emajit.init(params) for _ in decays]
>>> for step in range(640):  # train, then
...     _ = emajit.update_many_(shadows, params, step, decays=decays)
...     if (step + 1) % 40 == 0:
...         _ = posthoc.save(folder, shadows, step + 1, sigma_rel=lengths)
>>> weights = posthoc.reconstruct(posthoc.snapshots(folder), 0.07)
>>> with torch.no_grad(), emajit.ema_scope(model, weights):
...     prediction = model(torch.ones(8))

To resume in a loop of your own, save the list of both averages beside model and optimizer. A run
that resumes loads it, goes on bit for bit, and first removes the snapshots of later steps, which
the interrupted run left:

>>> path = f"{folder}/resume.safetensors"
>>> emajit.checkpoint.save(path, shadows, step + 1)
>>> shadows, start = emajit.checkpoint.load(path, like=shadows)
>>> for snapshot in posthoc.snapshots(folder):
...     if snapshot.step > start:
...         snapshot.path.unlink()

On the command line, three lengths, and a picture of their profiles:

```sh
emajit reconstruct snapshots --sigma-rel 0.06 0.07 0.08 -o averages --plot
```

`emajit demo` draws the loss of its model against the length (`lengths.png`), from snapshots alone.

## Choices

- **In Lightning and transformers**: `EMACallback(posthoc=PostHoc(folder, every=100))` saves the
  snapshots, see `emajit.integrations`.
- **Lengths**: 0.05 and 0.10, as in EDM2. Lengths outside of the saved span are possible, with a
  warning that tells the expected error.
- **Snapshots**: 64 in a run are enough, see below.
- **Size of the files**: `save(..., dtype=torch.float16)` halves it.
- **Memory**: it holds the results and one leaf at a time. For several lengths make one call of
  `reconstruct`, which then reads the files once.
- **The mean of a stretch**: with `schedules.uniform()` in place of the two lengths, `window` gives
  the exact mean of the weights of any stretch between two snapshots.

## How it works

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv
2312.02696), section 3 and appendix C. The power-function average of the weights $\theta$ at time
$T$ is $\int_0^T p(t) \theta(t) dt$ with the profile $p(t) = (\gamma + 1) t^\gamma / T^{\gamma + 1}$
on $[0, T]$. Its relative length $\sigma_{rel}$ is the standard deviation of $p$ divided by $T$. A
weighted sum of averages is the average of the same weighted sum of profiles: so the wanted profile
is fitted by the profiles of the snapshots.

The coefficients sum to 1 here, while the paper leaves the sum free. With few snapshots, or between
two, the error is then several times smaller.

## Limits

- From snapshots at 64 steps of a random walk, lengths from 0.05 to 0.10 have a relative error of at
  most 5e-6 (1e-6 with a drift, 3e-4 from float16 files). The error of the profile, which the
  command shows and warnings tell, is a bound for noise: 2e-4 here.
- Reconstruct at saved steps only. Between them the error of the profile reaches 0.8, more among the
  first ten, and a warning says so.
- The step has to count all updates from the start of the run, since the profile does.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby, pairwise
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, overload

import torch
from torch import Tensor, nn

from emajit import _controls, _devices, _paths, _tree, _warn, checkpoint
from emajit.checkpoint import files
from emajit.checkpoint.averaged import Averaged, not_means
from emajit.checkpoint.saved import Saved, count, opened
from emajit.checkpoint.summing import kind_of
from emajit.schedules import gamma_to_sigma_rel, sigma_rel_to_gamma

__all__ = [  # noqa: RUF022, in the order of use
    "save",
    "snapshots",
    "reconstruct",
    "PostHoc",
    "window",
    "Snapshot",
    "sigma_rel_to_gamma",
    "gamma_to_sigma_rel",
    "profile",
    "solve_coefficients",
    "Solution",
]

_GAMMA = "posthoc.gamma"


class Snapshot(NamedTuple):
    """A file with the average of length `gamma` after `step` updates."""

    step: int
    gamma: float
    path: Path


@dataclass(frozen=True)
class PostHoc:
    """The snapshots that a trainer's callback writes in training, for `reconstruct`.

    folder: the folder, one for each run. A training that is resumed goes on in its folder, and
        first removes the snapshots of later steps, which it writes again. A training that begins
        refuses a folder with snapshots.
    every: save after each `every`-th update, and after the last update of the training.
    sigma_rel: the relative lengths of the averages, which the callback keeps beside its own.
    keep: how many steps have their snapshots kept, the newest; None for all.
    dtype: as in `save`.
    overwrite: whether a training that begins removes the snapshots of these lengths in the folder:
        for a job that is started again by itself, perhaps before its first checkpoint.

    Raises ValueError and TypeError for an unusable option.
    """

    folder: str | os.PathLike[str]
    every: int
    sigma_rel: Sequence[float] = (0.05, 0.10)
    keep: int | None = None
    dtype: torch.dtype | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str | os.PathLike):
            raise TypeError(f"folder: expected a path, found {type(self.folder).__qualname__}")
        keep = 1 if self.keep is None else self.keep
        _controls.check_steps("every", self.every)
        _controls.check_steps("keep", keep)
        lengths, several = _listed(self.sigma_rel)
        if not several or len({f"{length:.6g}" for length in lengths}) < max(len(lengths), 1):
            raise ValueError(f"sigma_rel: expected different lengths, found {self.sigma_rel!r}")
        for length in lengths:
            sigma_rel_to_gamma(length)
        _tree.check_dtype(self.dtype)


class Solution(NamedTuple):
    r"""How an average is put together.

    `coefficients` has one number for each profile, float64. `error` is the relative
    distance of the fitted profile to the wanted profile, $\|\sum_i x_i p_i - p\| / \|p\|$: the
    reconstruction differs by this share of the noise in the wanted average.
    """

    coefficients: Tensor
    error: float


def save(
    folder: str | os.PathLike[str],
    shadow: Any,
    step: int | Tensor,
    *,
    sigma_rel: float | Sequence[float],
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """Write a snapshot of one average, or of a list of averages, into `folder`.

    Each is a file `STEP-SIGMA_REL.safetensors` of `emajit.checkpoint.save`, with its gamma in the
    header. A resumed run that comes to the same step writes the same file again.

    Args:
        folder: the folder, which is created if missing.
        shadow: a pytree averaged with `schedules.power_function(sigma_rel)`, or a list of such.
        step: how many updates the shadow has taken, at least 1.
        sigma_rel: the relative length of the average, or a list of one per average.
        dtype: the dtype of floating-point leaves in the file; default, their own. float16 halves
            the file; its relative rounding error is at most 4.9e-4 (below 6e-5 an absolute 3e-8),
            about half as much in a reconstruction within the span of the lengths.

    Raises:
        ValueError: `shadow` and `sigma_rel` differ in length, `sigma_rel` is out of range,
            the step is 0, `dtype` is not floating-point, or a finite number overflows in it.
        TypeError, OSError: as `emajit.checkpoint.save`.

    Returns the files.
    """
    lengths, several = _listed(sigma_rel)
    shadows = shadow if several else [shadow]
    if not several and isinstance(shadow, list):
        raise ValueError(f"sigma_rel: expected a list of {len(shadow)}, as shadow, found one")
    if not isinstance(shadows, list) or len(shadows) != len(lengths):
        found = f"a list of {len(shadows)}" if isinstance(shadows, list) else type(shadows).__name__
        raise ValueError(f"shadow: expected a list of {len(lengths)}, as sigma_rel, found {found}")
    _tree.check_dtype(dtype)
    taken = count(step)
    if taken < 1:
        raise ValueError(f"step: expected the number of updates so far, >= 1, found {taken}")
    paths = [Path(folder, f"{taken:010d}-{length:.6g}.safetensors") for length in lengths]
    if len(set(paths)) < len(paths):
        raise ValueError(f"sigma_rel: expected different lengths, found {lengths}")
    gammas = [sigma_rel_to_gamma(length) for length in lengths]
    for i, average in enumerate(shadows):
        _check_range(f"shadow[{i}]" if several else "shadow", average, dtype)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path, average, gamma in zip(paths, shadows, gammas, strict=True):
        checkpoint.save(path, average, taken, dtype=dtype, metadata={_GAMMA: repr(gamma)})
    return paths


def _listed(sigma_rel: float | Sequence[float]) -> tuple[list[float], bool]:
    """The lengths as a list, and whether a list was given."""
    if _is_number(sigma_rel):
        return [float(sigma_rel)], False
    if isinstance(sigma_rel, Iterable) and not isinstance(sigma_rel, str):
        listed = [*sigma_rel]
        if all(map(_is_number, listed)):
            return [float(one) for one in listed], True
    raise TypeError(f"sigma_rel: expected a number, or a list of numbers, found {sigma_rel!r}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) or (isinstance(value, Tensor) and not value.ndim)


def _check_range(which: str, shadow: Any, dtype: torch.dtype | None) -> None:
    """Raise ValueError where a finite number would be infinite in `dtype`."""
    for path, _, leaf in _paths.named_leaves(which, shadow):
        if dtype is not None and leaf.is_floating_point():
            files.cast(path, leaf.detach(), dtype)


def snapshots(folder: str | os.PathLike[str]) -> list[Snapshot]:
    """List the snapshots that `save` has put into `folder`, sorted by step, then by gamma.

    Other files of `emajit.checkpoint.save`, and files still being written, are left out.

    Raises:
        ValueError: a `.safetensors` file there is broken, or not from emajit.
        OSError: `folder` cannot be read.
    """
    found = []
    for path in sorted(Path(folder).iterdir()):
        if path.suffix != ".safetensors":
            continue
        with opened(path) as saved:
            gamma = saved.record.metadata.get(_GAMMA)
            if gamma is None:
                continue
            try:
                found.append(Snapshot(saved.record.step, float(gamma), path))
            except ValueError:
                raise ValueError(f"{path}: expected a gamma, found {gamma!r}") from None
    return sorted(found)


def window(
    averages: Iterable[Snapshot | str | os.PathLike[str]], start: int, stop: int
) -> dict[str, Tensor]:
    r"""The mean of the weights after the steps `start + 1` to `stop`, from means since the start.

    Of means $A_1$ over $t_1$ steps and $A_2$ over $t_2 > t_1$, $(t_2 A_2 - t_1 A_1) / (t_2 - t_1)$
    is exactly the mean of the steps in between. It multiplies the rounding errors of the files by
    $(t_1 + t_2) / (t_2 - t_1)$ at most: save float64 if the window is a small part of the run.

    Buffers that the files do not average come from `stop`, as do those of batch normalisation in
    torch's `AveragedModel`, whose file does not tell: re-estimate them for the mean.

    Args:
        averages: snapshots of an average with `schedules.uniform()`, saved with `sigma_rel` $=
            1 / \sqrt{12}$; or files that `checkpoint.read` knows and that hold their step, such as
            icefall's, with `model_avg` and `batch_idx_train`. A file that does not tell the decay
            has to hold a mean since the start; no test can tell.
        start: $t_1$, the step of one average, or 0.
        stop: $t_2$, the step of another average.

    Returns the mean in float64, by name; leaves that are not floating-point come from `stop`.

    Raises ValueError where no average has one of the steps, or two have; a file tells another
    profile or a decay that is not of a mean; names, shapes or kinds of number differ; or `start` is
    not before `stop`.
    """
    *first, end = (held for *_, held in _ends(averages, start, stop))
    kept = not_means(end)
    means = {}
    for name, average in end.weights.items():
        if not (average.is_floating_point() or average.is_complex()):
            means[name] = average.clone()
            continue
        mean = average.to(_tree.copy_dtype(average, torch.float64), copy=True)
        for begin in first if name not in kept else ():
            mean = (stop * mean - start * begin.weights[name].to(mean.dtype)) / (stop - start)
        means[name] = mean
    return means


def _check_same(begin: Averaged, end: Averaged, start: int, stop: int) -> None:
    """Raise ValueError where the averages differ in names, shapes or kinds of number."""
    (begins, first), (ends, last) = ((each.weights, not_means(each)) for each in (begin, end))
    differ = {*(begins.keys() ^ ends.keys()), *(first ^ last)}
    differ |= {n for n in begins.keys() & ends.keys() if kind_of(begins[n]) != kind_of(ends[n])}
    if differ:
        raise ValueError(
            f"averages: expected the same names, shapes and kinds at {start} and {stop}, found "
            f"others at {_paths.some(sorted(differ))}"
        )


def window_of(
    averages: Iterable[Snapshot | str | os.PathLike[str]], start: int, stop: int
) -> dict[Path, float]:
    """The files whose sum, with these coefficients, is the `window` from `start` to `stop`."""
    shares = {start: -start / (stop - start), stop: stop / (stop - start)} if start < stop else {}
    return {path: shares[step] for step, path, _ in _ends(averages, start, stop)}


def _ends(
    averages: Iterable[Snapshot | str | os.PathLike[str]], start: int, stop: int
) -> list[tuple[int, Path, Averaged]]:
    """The step, file and content of the averages at `start`, if it is not 0, and at `stop`.

    Raises ValueError as `window`.
    """
    if not 0 <= start < stop:
        raise ValueError(f"start: expected 0 <= start < stop, found {start} and {stop}")
    wanted = (start, stop) if start else (stop,)
    found: dict[int, tuple[int, Path, Averaged]] = {}
    for each in averages:
        if isinstance(each, Snapshot) and each.step not in wanted:
            continue
        path = each.path if isinstance(each, Snapshot) else Path(each)
        held = checkpoint.read(path)
        if held.step is not None and held.step in wanted:
            gamma = each.gamma if isinstance(each, Snapshot) else _gamma_in(path)
            if gamma is not None and abs(gamma) > 1e-6:  # nan: of another file of `save`
                length = gamma_to_sigma_rel(gamma)
                raise ValueError(
                    f"{path}: expected a mean since the start, found sigma_rel {length:g}"
                )
            _check_decay(path, held.step, held.decay)
            _, other, _ = found.setdefault(held.step, (held.step, path, held))
            if other.resolve() != path.resolve():
                raise ValueError(f"{path}: expected one average at {held.step}, found {other} too")
    if missing := [step for step in wanted if step not in found]:
        raise ValueError(f"averages: expected one at each of {wanted}, found none at {missing}")
    ends = [found[step] for step in wanted]
    for *_, begin in ends[:-1]:
        _check_same(begin, ends[-1][2], start, stop)
    return ends


def _check_decay(path: Path, step: int, decay: float | None) -> None:
    """Raise ValueError for another decay than that of `schedules.uniform` in the last update."""
    uniform = 1 - 1 / step
    if decay is not None and abs(decay - uniform) > 1e-7:  # float32, as a `LitEma` has it
        raise ValueError(
            f"{path}: expected a mean since the start, whose decay at {step} is {uniform:.6g}, "
            f"found decay {decay:g}"
        )


def _gamma_in(path: Path) -> float | None:
    """The gamma of a snapshot; None for another file."""
    try:
        with opened(path) as saved:
            return float(saved.record.metadata.get(_GAMMA, "nan"))
    except (OSError, ValueError):
        return None


def profile(t: Tensor, step: float, gamma: float) -> Tensor:
    r"""The profile $p(t)$ of an average: $(\gamma + 1) t^\gamma / T^{\gamma + 1}$ up to $T$.

    Args:
        t: times in steps, of any shape.
        step: $T$, the time of the average.
        gamma: its exponent.

    Returns float64 (float32 on a device without it) of the shape of `t`, zero after $T$. The
    profile's integral is 1.
    """
    x = t.to(_devices.widest(t.device)) / step
    return torch.where((x >= 0) & (x <= 1), (gamma + 1) / step * x**gamma, 0.0)


def solve_coefficients(
    steps: Sequence[float], gammas: Sequence[float], step: float, gamma: float
) -> Solution:
    r"""The weighted sum of profiles that is nearest to the profile of `gamma` at `step`.

    Minimises $\int (\sum_i x_i p_i(t) - p(t))^2 dt$ over coefficients with $\sum_i x_i = 1$. With
    $A_{ij} = \langle p_i, p_j \rangle$ and $b_i = \langle p_i, p \rangle$ that is
    $A x + \lambda = b$, in float64. arXiv 2312.02696, section 3.2 and appendix C, leaves the sum
    free; then constant weights shrink with the sum, by up to a tenth at a step between two
    snapshots. Nearly equal profiles get the solution of least norm.

    Args:
        steps: the time of each profile.
        gammas: the exponent of each profile.
        step: the time of the wanted profile.
        gamma: its exponent.

    Raises ValueError where there are no profiles, `steps` and `gammas` differ in length, a
    step is not positive, or an exponent is negative.

    >>> x, error = solve_coefficients([50, 100, 50, 100], [6.94, 6.94, 16.97, 16.97], 100, 10.0)
    >>> [round(number, 2) for number in x.tolist()], round(error, 3)
    ([-0.02, 0.67, 0.01, 0.34], 0.047)
    """
    if not steps or len(steps) != len(gammas):
        found = f"{len(steps)} and {len(gammas)}"
        raise ValueError(f"steps and gammas: expected as many of each, at least one, found {found}")
    numbers = [*steps, step, *gammas, gamma]
    if not all(map(math.isfinite, numbers)) or min(*steps, step) <= 0 or min(*gammas, gamma) < 0:
        raise ValueError("steps and gammas: expected steps > 0 and gammas >= 0, found others")
    t, g = (torch.as_tensor(values, dtype=torch.float64) for values in (steps, gammas))
    end, exponent = (torch.tensor(value, dtype=torch.float64) for value in (step, gamma))
    # Scaled by the step, all entries are of the order of the ones in the constraint.
    a = step * _inner(t[:, None], g[:, None], t, g)
    b = step * _inner(t, g, end, exponent)
    size = step * _inner(end, exponent, end, exponent)
    system = nn.functional.pad(a, (0, 1, 0, 1), value=1.0)
    system[-1, -1] = 0.0
    right = nn.functional.pad(b, (0, 1), value=1.0)[:, None]
    x = torch.linalg.lstsq(system, right, driver="gelsd").solution[:-1, 0]
    square = float((x @ a @ x - 2 * x @ b + size) / size)
    return Solution(x, math.sqrt(max(0.0, square)))


def _inner(t: Tensor, g: Tensor, u: Tensor, h: Tensor) -> Tensor:
    r"""$\langle p_{t,g}, p_{u,h} \rangle$ for times $t$ and $u$ with exponents $g$ and $h$.

    $\frac{(g+1)(h+1)}{g+h+1} m^{g+h+1} / (t^{g+1} u^{h+1})$, where $m$ is the lesser of the times,
    computed as powers of ratios, which do not overflow.
    """
    m = torch.minimum(t, u)
    return (g + 1) * (h + 1) / (g + h + 1) * (m / t) ** (g + 1) * (m / u) ** (h + 1) / m


@overload
def reconstruct(
    snapshots: Sequence[Snapshot],
    sigma_rel: float,
    *,
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]: ...
@overload
def reconstruct(
    snapshots: Sequence[Snapshot],
    sigma_rel: Sequence[float],
    *,
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, Tensor]]: ...
def reconstruct(
    snapshots: Sequence[Snapshot],
    sigma_rel: float | Sequence[float],
    *,
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor] | list[dict[str, Tensor]]:
    """The average of another length, from snapshots of a run.

    The files are read leaf by leaf and summed in float64: beside the result, memory holds one
    float64 leaf per length. Integer leaves, such as counts among buffers, and elements that are
    not finite, such as those of a mask, come from the last snapshot.

    Args:
        snapshots: from `snapshots(folder)`.
        sigma_rel: the wanted relative length, or several, for which the files are read once.
        step: the number of updates at which the average is wanted; default, the last snapshot's.
        dtype: the dtype of the floating-point leaves of the result.

    Returns a dict of the weights by name; a list of such dicts for several lengths.

    Raises:
        ValueError: no snapshots, none up to `step`, or `step` after the last one; two of one step
            and length; a file that is corrupt, or has other leaves; a length out of range; a
            `dtype` that is not floating-point, or overflows at a weight.
        TypeError: an argument of another type.
        OSError: a file cannot be read.

    Warns if a length is outside the saved span, if a step lacks a length that other steps
    have, if a file is older than a file of an earlier step (so perhaps from another run), and if
    the profile's error exceeds 5% or the rounding of the files 1%. The first and the last of
    these warnings give the expected error.
    """
    lengths, several = _listed(sigma_rel)
    if dtype is None:
        raise ValueError("dtype: expected a floating-point dtype, found None")
    _tree.check_dtype(dtype)
    results = summed(*plan(snapshots, lengths, step), dtype)
    return results if several else results[0]


def plan(
    snapshots: Sequence[Snapshot], sigma_rels: Sequence[float], step: int | None
) -> tuple[list[Snapshot], list[Solution]]:
    """The snapshots to use, and how to sum them for each length; raises and warns."""
    if isinstance(snapshots, Iterable):
        snapshots = [*snapshots]
    if not (isinstance(snapshots, list) and all(isinstance(s, Snapshot) for s in snapshots)):
        raise TypeError("snapshots: expected a list from posthoc.snapshots(folder), found others")
    if not snapshots:
        raise ValueError("snapshots: expected some of emajit.posthoc.save, found none")
    first, last = min(snapshots).step, max(snapshots).step
    end = last if step is None else count(step)
    if not first <= end <= last:
        expected = f"one from {first} to {last}, the first and the last step of the snapshots"
        raise ValueError(f"step: expected {expected}, found {end}")
    chosen = sorted(snapshot for snapshot in snapshots if snapshot.step <= end)
    for one, other in pairwise(chosen):
        if one[:2] == other[:2]:
            raise ValueError(f"{other.path}: expected one snapshot of each, found {one.path} too")
    _warn_of_gaps(chosen)
    _warn_of_two_runs(chosen)
    before, after = chosen[-1].step, min(s.step for s in snapshots if s.step >= end)
    gap = "" if before == end else f"; step {end} was not saved, but {before} and {after} were"
    unit = _unit(chosen[-1])
    steps, gammas, _ = zip(*chosen, strict=True)
    solutions = []
    for sigma_rel in sigma_rels:
        solution = solve_coefficients(steps, gammas, end, sigma_rel_to_gamma(sigma_rel))
        _warn_of_errors(sigma_rel, chosen, solution, unit, gap)
        solutions.append(solution)
    return chosen, solutions


def _warn_of_gaps(chosen: Sequence[Snapshot]) -> None:
    gammas = {snapshot.gamma for snapshot in chosen}
    count = Counter(snapshot.step for snapshot in chosen)
    gaps = [str(step) for step in count if count[step] < len(gammas)]
    if gaps:
        steps = _paths.some(gaps)
        message = f"snapshots: expected {len(gammas)} lengths at each step, some lack at {steps}"
        _warn.warn(message)


def _warn_of_two_runs(chosen: Sequence[Snapshot]) -> None:
    """Warn if a file is older than a file of an earlier step: one run writes them in order."""
    newest = -math.inf, Path()
    for _, group in groupby(chosen, key=lambda snapshot: snapshot.step):
        dated = [(snapshot.path.stat().st_mtime, snapshot.path) for snapshot in group]
        oldest = min(dated)
        if oldest[0] < newest[0]:
            message = f"snapshots: {oldest[1]} is older than {newest[1]}: of another run?"
            _warn.warn(message)
            return
        newest = max(newest, *dated)


def _warn_of_errors(
    sigma_rel: float, chosen: Sequence[Snapshot], solution: Solution, unit: float, gap: str
) -> None:
    gammas = [snapshot.gamma for snapshot in chosen]
    outside = not min(gammas) * 0.9999 <= sigma_rel_to_gamma(sigma_rel) <= max(gammas) * 1.0001
    rounding = float(solution.coefficients.norm()) * unit
    if outside or solution.error > 0.05 or rounding > 0.01:
        span = " to ".join([f"{gamma_to_sigma_rel(g):.3f}" for g in (max(gammas), min(gammas))])
        where = f"outside of {span}, the saved lengths" if outside else f"within {span}"
        message = (
            f"sigma_rel {sigma_rel:g} is {where}: the expected error is {solution.error:.2g} times "
            f"the norm of the profile, and {rounding:.2g} of each weight from the rounding of the "
            f"files{gap}"
        )
        _warn.warn(message)


def _unit(snapshot: Snapshot) -> float:
    """The largest relative rounding error of a number in the file."""
    with opened(snapshot.path) as file:
        dtypes = {file.form(name)[1] for name in file.names()}
    known = [dtype for dtype in dtypes if isinstance(dtype, torch.dtype)]
    units = [torch.finfo(d).eps / 2 for d in known if d.is_floating_point or d.is_complex]
    return max(units, default=0.0)


def summed(
    chosen: Sequence[Snapshot],
    solutions: Sequence[Solution],
    dtype: torch.dtype,
    tell: Callable[[int], object] = lambda _: None,
) -> list[dict[str, Tensor]]:
    """The weights by name, for each solution; `tell` gets the number of names of each leaf."""
    results: list[dict[str, Tensor]] = [{} for _ in solutions]
    with ExitStack() as stack:
        held = [stack.enter_context(opened(snapshot.path)) for snapshot in chosen]
        last = held[-1]
        for file in held[:-1]:
            _check_alike(file, last)
        groups: dict[str, list[str]] = {}
        for name in last.names():
            groups.setdefault(last.record.tied.get(name, name), []).append(name)
        for name, names in groups.items():
            for result, leaf in zip(results, _sums(name, held, solutions, dtype), strict=True):
                result.update(dict.fromkeys(names, leaf))
            tell(len(names))
    return results


def _sums(
    name: str, held: Sequence[Saved], solutions: Sequence[Solution], dtype: torch.dtype
) -> list[Tensor]:
    newest = _read(held[-1], name)
    if not (newest.is_floating_point() or newest.is_complex()):
        return [newest.clone() for _ in solutions]
    wide = _tree.copy_dtype(newest, torch.float64)
    sums = [torch.zeros(newest.shape, dtype=wide) for _ in solutions]
    for i, file in enumerate(held):
        leaf = _read(file, name)
        for total, solution in zip(sums, solutions, strict=True):
            total.add_(leaf, alpha=float(solution.coefficients[i]))
    narrow = _tree.copy_dtype(newest, dtype)
    return [files.cast(repr(name), _with_mask(total, newest), narrow) for total in sums]


def _read(file: Saved, name: str) -> Tensor:
    leaf = file.read(name)
    has_arithmetic = leaf.dtype.itemsize > 1 or not leaf.is_floating_point()
    return leaf if has_arithmetic else leaf.to(torch.float32)


def _with_mask(total: Tensor, newest: Tensor) -> Tensor:
    """The sum, with non-finite elements, such as a mask's, from the last snapshot."""
    finite = newest.isfinite()
    return total if bool(finite.all()) else torch.where(finite, total, newest.to(total.dtype))


def _check_alike(file: Saved, other: Saved) -> None:
    """Raise ValueError where two snapshots are of different models."""
    differ = sorted({*file.names()} ^ {*other.names()})
    if differ:
        found = f"another at {_paths.some(differ)}"
        raise ValueError(f"{file.path}: expected the leaves of {other.path}, found {found}")
    if file.record.tied != other.record.tied:
        ties = file.record.tied
        raise ValueError(f"{file.path}: expected the ties of {other.path}, found {ties}")
    for name in file.names():
        if file.form(name) != other.form(name):
            expected, found = ("{} in {}".format(*f.form(name)) for f in (other, file))
            raise ValueError(
                f"{file.path}: {name!r}: expected {expected} as in {other.path}, found {found}"
            )
