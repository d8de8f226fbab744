"""Warnings that point at the caller's line."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_INSIDE = tuple(str(Path(file).parent) for file in (__file__, torch.__file__))


def warn(message: str, kind: type[Warning] = UserWarning) -> None:
    """Warn with the line of the first caller outside of emajit and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, kind, stacklevel=level)


NARROW = {torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2}
# Weights of standard deviation 0.07 that move by 0.2 in 2000 steps: their bfloat16 averages lag by
# 21 % of that move at a decay of 0.99, by 39 % at 0.996.
MOST_DECAY = 0.9
_told: set[torch.dtype] = set()


def warn_of_stall(dtype: torch.dtype, alpha: object, *, again: bool = False) -> None:
    """Warn if many increments of an average are under half an ulp.

    Updates warn once for each dtype, with a schedule once its decay has grown above `MOST_DECAY`.
    `again` warns each time: where an average is built.
    """
    if dtype not in NARROW or not isinstance(alpha, float) or (dtype in _told and not again):
        return
    if not MOST_DECAY < 1.0 - alpha < 1.0:
        return
    _told.add(dtype)
    message = (
        f"an average in {dtype} stalls: at a decay above {MOST_DECAY} increments under half an ulp "
        "round away; dtype=torch.float32 averages in float32"
    )
    if dtype.itemsize > 1:
        message += ", and rounding='stochastic' keeps the mean right"
    warn(message)


_told_of: weakref.WeakSet[object] = weakref.WeakSet()


def warn_of_nonfinite(owner: object, averages: Mapping[str, Tensor]) -> None:
    """Warn, once for each owner, if an average holds a value that is not finite.

    Call this where averages are saved: the sums take a hundredth of the time of saving.
    """
    if owner in _told_of:
        return
    broken = next((name for name, average in averages.items() if not _is_finite(average)), None)
    if broken is not None:
        _told_of.add(owner)
        warn(
            f"{broken}: the average holds values that are not finite, and so will all later ones; "
            "with nonfinite='skip' weights that are not finite are not averaged"
        )


def _is_finite(average: Tensor) -> bool:
    if average.is_meta or not (average.is_floating_point() or average.is_complex()):
        return True
    wide = average.to(torch.float32) if average.dtype.itemsize == 1 else average
    total = wide.sum(dtype=torch.float32 if wide.dtype.itemsize == 2 else None)
    return bool(total.isfinite()) or bool(wide.isfinite().all())  # a sum may overflow
