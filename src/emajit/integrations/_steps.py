"""Whether an optimizer of accelerate has made its step."""

from __future__ import annotations

from typing import Any


def scale(optimizer: Any) -> float | None:
    """The gradient scale, for a fused optimizer, which skips a step by itself; else None.

    accelerate detects a skipped step by a missing call of `step`, which a fused optimizer gets
    always.
    """
    scaler, inner = (getattr(optimizer, name, None) for name in ("scaler", "optimizer"))
    if scaler is None or not getattr(inner, "_step_supports_amp_scaling", False):
        return None
    return float(scaler.get_scale())


def was_skipped(optimizer: Any, before: float | None) -> bool:
    """Whether a step was skipped, which reduces the gradient scale from `before`."""
    skipped = bool(getattr(optimizer, "step_was_skipped", False))
    return skipped or (before is not None and optimizer.scaler.get_scale() < before)
