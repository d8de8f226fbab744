"""Lightning's weight averaging: averages in `state_dict`, trained in `current_model_state`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emajit.checkpoint.averaged import Averaged, Layout, Names, step_of, tensors_of


def _read(tree: Mapping[str, Any], _: Names) -> Averaged | None:
    if "current_model_state" not in tree:
        return None
    step = step_of(tree.get("averaging_state", {}).get("n_averaged"))
    raw = tensors_of(tree["current_model_state"])
    return Averaged(tensors_of(tree["state_dict"]), "Lightning weight averaging", step, raw=raw)


LAYOUT = Layout(_read)
