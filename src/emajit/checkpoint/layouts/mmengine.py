"""mmengine, which swaps on saving: averages in `state_dict`, trained weights in `ema_state_dict`.

The trained weights are below `module.`, beside the number of updates in `steps`.

"mmengine" writes a copy of a checkpoint of mmengine in which `EMAHook` finds these averages, in the
place of others or of none. The momentum is an option of the hook, which no file holds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emajit import _names
from emajit.checkpoint.averaged import (
    Layout,
    Place,
    Reading,
    Writer,
    step_of,
    tensors_below,
    tensors_of,
)
from emajit.checkpoint.patching import Changes


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
    return told or "message_hub" in tree or "steps" in tree.get("ema_state_dict", {})


def _place(tree: Mapping[str, Any]) -> Place:
    if "state_dict" not in tree or not _is_of_mmengine(tree):
        raise ValueError(f"expected a checkpoint of mmengine, found {[*tree][:5]}")
    state, ema = tree["state_dict"], tree.get("ema_state_dict")
    if ema:
        count = ema["steps"]

        def put(averages: dict[str, Tensor], step: int | None) -> Changes:
            steps = [] if step is None else [(count, torch.tensor(step))]
            return Changes({}, [(state[name], v) for name, v in averages.items()] + steps)

        return Place(_names.below("module.", ema), state, put)

    def add(averages: dict[str, Tensor], step: int | None) -> Changes:
        averaged = copy.copy(state)  # also its versions of modules
        averaged.update(averages)
        trained = {f"module.{name}": value for name, value in state.items()}
        ema = {"steps": torch.tensor(step), **trained}
        return Changes({"state_dict": averaged, "ema_state_dict": ema})

    return Place(state, None, add)


LAYOUT = Layout(_read, Writer("mmengine", None, place=_place))
