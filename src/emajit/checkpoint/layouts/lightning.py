"""Lightning's weight averaging: averages in `state_dict`, trained in `current_model_state`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emajit.checkpoint.averaged import Layout, Reading, step_of, tensors_of


def read(tree: Mapping[str, Any]) -> list[Reading]:
    if "current_model_state" not in tree:
        return []
    step = step_of(tree.get("averaging_state", {}).get("n_averaged"))
    averages, raw = (tensors_of(tree[key]) for key in ("state_dict", "current_model_state"))
    return [Reading("Lightning weight averaging", averages, step, raw=raw, path="state_dict")]


LAYOUT = Layout(read)
