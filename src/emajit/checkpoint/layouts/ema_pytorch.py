"""ema-pytorch's `EMA` and `KarrasEMA`: `initted`, `step`, and the averages below `ema_model.`.

The trained weights may be below `online_model.`. `PostHocEMA` has several averages below
`ema_models.`. "ema-pytorch" writes the state of an `EMA`, which starts from the model again as long
as `step` is not beyond its `update_after_step`. `step` counts the calls, also those that average
nothing: by default nine of ten (`update_every`, which no file tells).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from emajit.checkpoint.averaged import (
    Averaged,
    Layout,
    Names,
    Writer,
    required,
    step_of,
    tensors_below,
    tensors_of,
)


def _read(tree: Mapping[str, Any], _: Names) -> Averaged | None:
    state = tensors_of(tree)
    several = sorted({key.split(".")[1] for key in state if key.startswith("ema_models.")})
    if len(several) > 1:
        raise ValueError(
            f"ema-pytorch: expected one average, found {len(several)} below 'ema_models.'; pass "
            "those below one of them"
        )
    if several:
        state = tensors_below(f"ema_models.{several[0]}.", state)
    if not {"initted", "step"} <= state.keys():
        return None
    # A float16 step is rounded, and infinite from 65520 on.
    step = None if state["step"].is_floating_point() else step_of(state["step"])
    online = any(key.startswith("online_model.") for key in state)
    raw = tensors_below("online_model.", state) if online else {}
    return Averaged(tensors_below("ema_model.", state), "ema-pytorch", step, raw=raw)


def _state(averaged: Averaged, _: Names) -> dict[str, Any]:
    step = torch.tensor(required("step", "ema-pytorch", averaged))
    online = {f"online_model.{name}": value for name, value in averaged.raw.items()}
    average = {f"ema_model.{name}": value for name, value in averaged.weights.items()}
    return {"initted": torch.tensor(True), "step": step, **online, **average}


LAYOUT = Layout(_read, Writer("ema-pytorch", _state))
