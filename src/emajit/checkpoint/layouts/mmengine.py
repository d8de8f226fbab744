"""mmengine, which swaps on saving: averages in `state_dict`, trained weights in `ema_state_dict`.

The trained weights are below `module.`, beside the number of updates in `steps`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emajit.checkpoint.averaged import Layout, Reading, step_of, tensors_below, tensors_of


def _read(tree: Mapping[str, Any]) -> list[Reading]:
    if not tree.get("ema_state_dict") or not _is_of_mmengine(tree):
        return []
    step = step_of(tree["ema_state_dict"].get("steps"))
    raw = tensors_below("module.", tensors_of(tree["ema_state_dict"]))
    return [Reading("mmengine", tensors_of(tree["state_dict"]), step, raw=raw, path="state_dict")]


def _is_of_mmengine(tree: Mapping[str, Any]) -> bool:
    """Whether mmengine wrote the file: others keep the averages in `ema_state_dict`."""
    meta = tree.get("meta")
    told = isinstance(meta, Mapping) and "mmengine_version" in meta
    return told or "message_hub" in tree or "steps" in tree["ema_state_dict"]


LAYOUT = Layout(_read)
