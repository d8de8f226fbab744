"""torch_ema's `ExponentialMovingAverage`: `shadow_params` by position, `num_updates`, `decay`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emajit.checkpoint.averaged import Averaged, Layout, Names, Reading, Writer, in_order, required


def _read(tree: Mapping[str, Any]) -> list[Reading]:
    if not {"shadow_params", "num_updates"} <= tree.keys():
        return []
    return [Reading("torch_ema", tree["shadow_params"], tree["num_updates"], tree.get("decay"))]


def _state(averaged: Averaged, names: Names) -> dict[str, Any]:
    return {
        "decay": required("decay", "torch-ema", averaged),
        "num_updates": averaged.step,
        "shadow_params": in_order("torch-ema", averaged, names),
        "collected_params": None,
    }


LAYOUT = Layout(_read, Writer("torch-ema", _state, by_position=True))
