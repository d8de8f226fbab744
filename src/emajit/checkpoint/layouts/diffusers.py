"""diffusers' `EMAModel`: `shadow_params` by position, `optimization_step`, `decay`.

"diffusers-ema" writes its options, such as the `power` of the warm-up, with their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emajit.checkpoint.averaged import Averaged, Layout, Names, Reading, Writer, in_order, required


def _read(tree: Mapping[str, Any]) -> list[Reading]:
    if not {"shadow_params", "optimization_step"} <= tree.keys():
        return []
    step, decay = tree["optimization_step"], tree.get("decay")
    return [Reading("diffusers EMAModel", tree["shadow_params"], step, decay)]


def _state(averaged: Averaged, names: Names) -> dict[str, Any]:
    return {
        "decay": required("decay", "diffusers-ema", averaged),
        "min_decay": 0.0,
        "optimization_step": required("step", "diffusers-ema", averaged),
        "update_after_step": 0,
        "use_ema_warmup": False,
        "inv_gamma": 1.0,
        "power": 2 / 3,
        "shadow_params": in_order("diffusers-ema", averaged, names),
    }


LAYOUT = Layout(_read, Writer("diffusers-ema", _state, by_position=True))
