"""diffusers' `EMAModel`: `shadow_params` by position, `optimization_step`, `decay`.

"diffusers-ema" writes the options of the source, such as the `power` of the warm-up, else their
defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emajit.checkpoint.averaged import Averaged, Layout, Names, Reading, Writer, in_order, required

OPTIONS = {
    "min_decay": 0.0,
    "update_after_step": 0,
    "use_ema_warmup": False,
    "inv_gamma": 1.0,
    "power": 2 / 3,
}


def options_in(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a state of `EMAModel`; empty for another mapping."""
    held = tree if "optimization_step" in tree else {}
    return {key: held[key] for key in OPTIONS if isinstance(held.get(key), int | float)}


def _read(tree: Mapping[str, Any]) -> list[Reading]:
    if not {"shadow_params", "optimization_step"} <= tree.keys():
        return []
    step, decay = tree["optimization_step"], tree.get("decay")
    shadow, options = tree["shadow_params"], options_in(tree)
    return [Reading("diffusers EMAModel", shadow, step, decay, options=options)]


def state(averaged: Averaged, names: Names) -> dict[str, Any]:
    return {
        "decay": required("decay", "diffusers-ema", averaged),
        "optimization_step": required("step", "diffusers-ema", averaged),
        **OPTIONS,
        **averaged.options,
        "shadow_params": in_order("diffusers-ema", averaged, names),
    }


LAYOUT = Layout(_read, Writer("diffusers-ema", state, by_position=True, options=OPTIONS))
