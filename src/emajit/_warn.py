"""Warnings that point at the caller's line."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

_INSIDE = tuple(str(Path(file).parent) for file in (__file__, torch.__file__))


def warn(message: str, kind: type[Warning] = UserWarning) -> None:
    """Warn with the line of the first caller outside of emajit and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, kind, stacklevel=level)


NARROW = {torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2}
# Weights of deviation 0.07 that move by 0.2 in 2000 steps: their averages in bfloat16 are off by
# 21 % of the way at a decay of 0.99, by 39 % at 0.996.
MOST_DECAY = 0.9
_told: set[torch.dtype] = set()


def warn_of_stall(dtype: torch.dtype, alpha: object) -> None:
    """Warn, once for each dtype, if many increments of an average are under half an ulp.

    The decay of a schedule is judged at each step, so that it is told once it has grown.
    """
    if dtype not in NARROW or dtype in _told or not isinstance(alpha, float):
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
