"""mmengine, which swaps on saving: averages in `state_dict`, trained weights in `ema_state_dict`.

The trained weights are below `module.`, beside the number of updates in `steps`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emajit.checkpoint.averaged import (
    Averaged,
    Layout,
    Names,
    step_of,
    tensors_below,
    tensors_of,
)


def _read(tree: Mapping[str, Any], _: Names) -> Averaged | None:
    if "ema_state_dict" not in tree:
        return None
    step = step_of(tree["ema_state_dict"].get("steps"))
    raw = tensors_below("module.", tensors_of(tree["ema_state_dict"]))
    return Averaged(tensors_of(tree["state_dict"]), "mmengine", step, raw=raw)


LAYOUT = Layout(_read)
