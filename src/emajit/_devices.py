"""Devices without float64 compute in float32 instead."""

from __future__ import annotations

from typing import Any

import torch

WITHOUT_FLOAT64 = {"mps"}


def is_narrow(device: torch.device) -> bool:
    """Whether a device has no float64."""
    return widest(device) == torch.float32


def widest(device: torch.device) -> torch.dtype:
    """The widest real dtype of a device."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def argument(schedule: object, step: Any) -> Any:
    """The step for a schedule: of a tensor int64, or float64 for a function of the user's.

    A LitEma counts in int32, in which a product may overflow; quotients of integers are float32.
    """
    if not (isinstance(step, torch.Tensor) and callable(schedule)):
        return step
    return step.long() if hasattr(schedule, "alpha") else step.to(widest(step.device))
