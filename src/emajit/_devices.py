"""Devices without float64 compute in float32 instead."""

from __future__ import annotations

import torch

WITHOUT_FLOAT64 = {"mps"}


def is_narrow(device: torch.device) -> bool:
    """Whether a device has no float64."""
    return device.type in WITHOUT_FLOAT64


def widest(device: torch.device) -> torch.dtype:
    """The widest real dtype of a device."""
    return torch.float32 if is_narrow(device) else torch.float64
